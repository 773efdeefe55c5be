"""DICOM series as scans, and what `segment` writes for them. All series are oblique and unsorted."""

import nibabel
import numpy as np
import pytest

from diffusers_cf.data.nifti import to_canonical
from diffusers_cf.errors import InputError
from diffusers_cf.segmentation.cohorts import find_patients, patient_files
from diffusers_cf.segmentation.dicom import is_series, read_series, series_sha256, write_dicom
from diffusers_cf.segmentation.patient import segment_patient


highdicom, pydicom = pytest.importorskip("highdicom"), pytest.importorskip("pydicom")
from dicom_files import oblique_affine, without_preamble, write_enhanced, write_series  # noqa: E402
from segmentation_files import SETTINGS, BrightnessPipeline, cli, error_lines, make_pipe  # noqa: E402


SHAPE = (10, 12, 7)


@pytest.fixture
def voxels():
    return np.random.default_rng(1).integers(0, 500, SHAPE) * 2


@pytest.fixture
def series(tmp_path, voxels):
    return write_series(tmp_path / "P_01" / "FLAIR", voxels, oblique_affine())


def test_every_voxel_is_where_the_files_say(series, voxels):
    scan = read_series(series)
    to_ras = np.diag([-1, -1, 1, 1]) @ oblique_affine()
    index = np.stack(np.meshgrid(*map(range, SHAPE), indexing="ij")).reshape(3, -1)
    millimetres = to_ras @ np.vstack([index, np.ones(index.shape[1])])
    found = np.linalg.inv(scan.affine) @ millimetres
    np.testing.assert_allclose(found, np.round(found), atol=1e-4)
    assert np.array_equal(scan.data[tuple(np.round(found[:3]).astype(int))], voxels.reshape(-1))
    assert scan.data.dtype == np.float32 and sorted(scan.spacing_mm) == pytest.approx([1.5, 2.0, 3.0])


def test_masks_and_heatmaps_come_back_voxel_by_voxel_and_refer_to_their_images(series, tmp_path):
    scan = to_canonical(read_series(series))
    mask, heat = scan.data > 700, (scan.data / 1000).astype(np.float32)
    write_dicom(tmp_path, mask, heat, scan, "P_01", "1 = 2 medians")
    segmentation = highdicom.seg.segread(tmp_path / "mask.dcm").get_volume(combine_segments=True)
    parametric = highdicom.imread(tmp_path / "heatmap.dcm").get_volume()
    grid = highdicom.Volume(np.zeros(scan.data.shape), scan.affine, "PATIENT", from_reference_convention="RAS")
    for volume, expected in ((segmentation, mask), (parametric, heat)):
        found = volume.match_geometry(grid, tol=1e-4).array
        assert np.array_equal(found.reshape(expected.shape), expected)
    images = [pydicom.dcmread(path, stop_before_pixels=True) for path in series.iterdir()]
    positions = {image.SOPInstanceUID: [float(value) for value in image.ImagePositionPatient] for image in images}
    for name in ("mask.dcm", "heatmap.dcm"):
        made = pydicom.dcmread(tmp_path / name)
        assert made.StudyInstanceUID == images[0].StudyInstanceUID and made.PatientID == "P_01"
        assert len(made.PerFrameFunctionalGroupsSequence) == len(images)
        for frame in made.PerFrameFunctionalGroupsSequence:
            source = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
            position = [float(value) for value in frame.PlanePositionSequence[0].ImagePositionPatient]
            assert positions[source] == pytest.approx(position, abs=1e-4)
    write_dicom(tmp_path, 0 * mask, 0 * heat, scan, "P_01", "1 = 2 medians")
    assert not highdicom.seg.segread(tmp_path / "mask.dcm").get_volume().array.any()


def test_a_series_is_found_by_the_name_of_its_folder(series, tmp_path):
    assert patient_files(tmp_path / "P_01", ["flair"]) == {"flair": series}
    (tmp_path / "P_01" / "t1").mkdir()
    assert not is_series(tmp_path / "P_01" / "t1")
    with pytest.raises(InputError, match="P_01: modality missing: t1"):
        patient_files(tmp_path / "P_01", ["flair", "t1"])
    series.rename(tmp_path / "P_01" / "t2f")
    write_series(tmp_path / "P_01" / "flair", np.ones(SHAPE), oblique_affine())
    with pytest.raises(InputError, match="several scans are flair: flair, t2f"):
        patient_files(tmp_path / "P_01", ["flair"])


def test_a_series_is_the_same_whatever_its_files_are_called(series):
    before = series_sha256(series)
    for number, path in enumerate(sorted(series.iterdir())):
        path.rename(series / f"x{number}.dcm")
    assert series_sha256(series) == before
    next(series.iterdir()).unlink()
    assert series_sha256(series) != before


@pytest.mark.parametrize("with_meta", [True, False])
def test_files_without_preamble_are_read_if_they_are_dicom(series, with_meta):
    expected, sha256 = read_series(series), series_sha256(series)
    for path in series.iterdir():
        without_preamble(path, with_meta)
    (series / "notes").write_bytes(b"\x08\x00" + b"not DICOM " * 30)
    (series / "short").write_bytes(b"\x02\x00")
    found = read_series(series)
    assert is_series(series) and series_sha256(series) != sha256
    np.testing.assert_array_equal(found.data, expected.data)
    np.testing.assert_array_equal(found.affine, expected.affine)


def change_files(series, change):
    for number, path in enumerate(sorted(series.iterdir())):
        image = pydicom.dcmread(path)
        change(image, number)
        image.save_as(path)


def rounded_otherwise(image, number):
    image.ImageOrientationPatient = [value + 1e-6 * (number % 2) for value in image.ImageOrientationPatient]


def test_strays_copies_and_rounded_orientations_are_no_obstacle(series, caplog):
    expected = read_series(series)
    change_files(series, rounded_otherwise)
    first = next(series.iterdir())
    (series / "a copy").write_bytes(first.read_bytes())
    state = pydicom.dcmread(first)
    state.SOPClassUID = state.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.11.1"
    state.SeriesInstanceUID = pydicom.uid.generate_uid()
    del state.PixelData
    state.save_as(series / "presentation state")
    found = read_series(series)
    np.testing.assert_array_equal(found.data, expected.data)
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-3)
    assert "presentation state" in caplog.text


@pytest.mark.parametrize("order", [range(7), [3, 1, 0, 2, 6, 5, 4]])
def test_an_enhanced_object_is_the_same_scan(order, series, voxels, tmp_path):
    enhanced = write_enhanced(tmp_path / "enhanced", voxels, oblique_affine(), list(order))
    found, expected = (to_canonical(read_series(folder)) for folder in (enhanced, series))
    np.testing.assert_array_equal(found.data, expected.data)
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)
    write_dicom(tmp_path, found.data > 700, found.data, found, "P_01", "1 = 2 medians")
    assert highdicom.seg.segread(tmp_path / "mask.dcm").get_volume().array.sum() == (voxels > 700).sum()


def in_colour(image, number):
    image.SamplesPerPixel, image.PhotometricInterpretation, image.PlanarConfiguration = 3, "RGB", 0


def lossless(image, number):
    image.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xc3" + bytes(40)])
    image["PixelData"].is_undefined_length, image["PixelData"].VR = True, "OB"
    image.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1


def at_one_place(image, number):
    image.ImagePositionPatient = [0, 0, 3 * (number // 2)]
    image.ImageType = ["ORIGINAL", "PRIMARY", "MP"[number % 2]]


@pytest.mark.parametrize(
    "change, reason",
    [
        (in_colour, "a colour image"),
        (lossless, "no decoder for JPEG Lossless.*pip install pylibjpeg"),
        (at_one_place, "several images have the same position .*ORIGINAL/PRIMARY/M, ORIGINAL/PRIMARY/P"),
        (lambda image, number: image.pop("ImagePositionPatient"), "an image has no position"),
    ],
)
def test_series_that_are_no_volume(change, reason, series, monkeypatch):
    monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.is_available", False)
    change_files(series, change)
    with pytest.raises(InputError, match=f"FLAIR.*: {reason}"):
        read_series(series)


def test_voxels_that_are_not_finite_after_rescaling_are_refused(tmp_path, voxels):
    series = write_series(tmp_path / "flair", voxels * 1e38, oblique_affine(), slope=1e38)
    with pytest.raises(InputError, match=r"flair: \d+ of 840 voxels are NaN or infinite"):
        read_series(series)


def test_what_is_no_series_is_refused_in_one_line(series, voxels, tmp_path):
    files = sorted(series.iterdir())
    files[3].write_bytes(files[3].read_bytes()[:400])
    with pytest.raises(InputError) as caught:
        read_series(series)
    assert "\n" not in str(caught.value) and str(series) in str(caught.value)
    files[3].unlink()
    places = {pydicom.dcmread(path).InstanceNumber: path for path in series.iterdir()}
    places.get(4, places[5]).unlink()
    with pytest.raises(InputError, match="FLAIR: slices are missing: a gap of "):
        read_series(series)
    write_series(tmp_path / "two", voxels, oblique_affine())
    files[0].rename(tmp_path / "two" / "other")
    with pytest.raises(InputError, match="two: holds 2 DICOM series"):
        read_series(tmp_path / "two")


@pytest.fixture
def patient(tmp_path):
    block = np.zeros((24, 28, 10), int)
    block[2:22, 3:25, 1:9] = 100
    block[12:17, 5:10, 4:7] = 1000
    for name, factor in (("FLAIR", 1), ("t1n", 2)):
        write_series(tmp_path / "cohort" / "P_01" / name, factor * block, oblique_affine(angle=0.1))
    return tmp_path / "cohort" / "P_01"


@pytest.fixture(scope="module")
def pipe():
    return make_pipe(BrightnessPipeline, settings=SETTINGS | {"threshold": 0.5})


def test_a_patient_of_series_is_segmented_to_nifti_and_dicom(pipe, patient, tmp_path):
    assert find_patients(tmp_path / "cohort", ["flair", "t1"]) == ([("P_01", patient)], {})
    out = tmp_path / "out" / "P_01"
    report = segment_patient(pipe, patient, tmp_path / "out", fill=True, progress=False)
    assert set(report["inputs"]) == {"flair", "t1"}
    mask, scan = nibabel.load(out / "mask.nii.gz"), read_series(patient / "FLAIR")
    np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-4)
    assert np.array_equal(mask.get_fdata() > 0, scan.data > 500)
    filled, inside = nibabel.load(out / "filled_flair.nii.gz").get_fdata(), scan.data > 500
    counterfactual = nibabel.load(out / "counterfactual_flair.nii.gz").get_fdata()
    assert np.array_equal(filled, np.where(inside, counterfactual, scan.data)) and (filled != scan.data).any()
    written = highdicom.seg.segread(out / "mask.dcm").get_volume(combine_segments=True)
    assert written.array.sum() == mask.get_fdata().sum()
    heat = highdicom.imread(out / "heatmap.dcm").get_volume()
    assert heat.array.sum() == pytest.approx(nibabel.load(out / "heatmap.nii.gz").get_fdata().sum())
    assert segment_patient(pipe, patient, tmp_path / "out", progress=False) == report


def test_a_series_that_lacks_attributes_of_a_segmentation(pipe, patient, tmp_path, monkeypatch, capsys):
    change_files(patient / "FLAIR", lambda image, number: image.pop("StudyInstanceUID"))
    monkeypatch.setattr("diffusers_cf.inference.open_pipeline", lambda *_: pipe)
    for state in ("s ->", "finished before, skipped"):
        assert cli("segment", patient, "--model", "any", "--output", tmp_path / "out") == 2
        printed = capsys.readouterr()
        (line,) = error_lines(printed)
        assert all(part in line for part in ("FLAIR: ", "mask.dcm", "StudyInstanceUID")) and state in printed.out
    written = {path.name for path in (tmp_path / "out" / "P_01").iterdir()}
    assert {"heatmap.nii.gz", "mask.nii.gz", "report.json"} < written and not {"mask.dcm", "heatmap.dcm"} & written
