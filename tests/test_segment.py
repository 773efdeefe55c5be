import nibabel as nib
import numpy as np
import pytest
from data_files import SPACING_MM, write_brats
from PIL import Image
from segmentation_files import CUBE, SETTINGS, BrightnessPipeline, make_pipe, voxels, write_cube

from diffusers_cf.data.geometry import to_ras, undisplay
from diffusers_cf.data.intensity import unit_in_words
from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.postprocessing import postprocess_maps, remove_small_components
from diffusers_cf.plots import plot_slices
from diffusers_cf.segmentation import volumes as segment
from diffusers_cf.segmentation.patient import segment_patient
from diffusers_cf.segmentation.volumes import SliceMaps, lesion_mask, most_suspicious


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than all the rest; the test of the preview draws."""
    monkeypatch.setattr("diffusers_cf.segmentation.patient.write_preview", lambda path, *_: path.touch())


@pytest.fixture(scope="module")
def bright():
    return make_pipe(BrightnessPipeline, settings=SETTINGS | {"threshold": 0.5})


@pytest.fixture
def patient(tmp_path):
    return write_brats(tmp_path / "data", "P_01", "LPS")


@pytest.mark.parametrize(("flair_axes", "t1_axes"), [("RAS", "RAS"), ("LPS", "LPS"), ("LAS", "LAS"), ("PSR", "RAS")])
def test_the_lesion_is_found_where_it_is_in_any_orientation(bright, tmp_path, flair_axes, t1_axes):
    folder = write_cube(tmp_path / "P", flair_axes, t1_axes)
    report = segment_patient(bright, folder, tmp_path / "out", progress=False)
    flair, t1 = nib.load(folder / "P_flair.nii.gz"), nib.load(folder / "P_T1n.nii.gz")
    grids = {"heatmap": flair, "mask": flair, "counterfactual_flair": flair, "counterfactual_t1": t1}
    for name, scan in grids.items():
        written = nib.load(tmp_path / "out" / "P" / f"{name}.nii.gz")
        assert written.shape == scan.shape and written.header.get_zooms() == scan.header.get_zooms()
        np.testing.assert_array_equal(written.affine, scan.affine)
        assert nib.aff2axcodes(written.affine) == nib.aff2axcodes(scan.affine)
        assert [written.header[code] for code in ("sform_code", "qform_code")] == [
            scan.header[code] for code in ("sform_code", "qform_code")
        ]
        assert written.get_data_dtype() == (np.uint8 if name == "mask" else np.float32)
    mask = voxels(tmp_path / "out" / "P" / "mask.nii.gz")
    np.testing.assert_array_equal(mask, np.asarray(flair.dataobj) > 500)
    in_ras = to_ras(mask, flair.affine)
    assert in_ras[CUBE].all() and in_ras.sum() == in_ras[CUBE].size
    assert report["lesion_volume_ml"] == pytest.approx(in_ras[CUBE].size * np.prod(SPACING_MM) / 1000)
    heat = to_ras(voxels(tmp_path / "out" / "P" / "heatmap.nii.gz"), flair.affine)
    assert heat[5, 25, 8] == pytest.approx(1, abs=1e-5) and heat[15, 12, 5] == pytest.approx(0.1, abs=1e-5)
    assert not heat[:2].any() and not heat[..., 0].any()


def test_counterfactuals_are_in_the_units_of_their_scan_and_never_negative(tmp_path, monkeypatch):
    folder = write_cube(tmp_path / "P", "LAS", "LAS")
    pipe = make_pipe(BrightnessPipeline, normalize="p50")
    segment_patient(pipe, folder, tmp_path / "out", progress=False)
    affine = nib.load(folder / "P_flair.nii.gz").affine
    for modality, gain in (("flair", 1), ("t1", 3)):
        written = to_ras(voxels(tmp_path / "out" / "P" / f"counterfactual_{modality}.nii.gz"), affine)
        assert written[5, 25, 8] == pytest.approx(500 * gain, rel=1e-5)
        assert written[15, 12, 5] == pytest.approx(50 * gain, rel=1e-5)
        assert not written[:2].any() and not written[..., 0].any()
    monkeypatch.setattr(BrightnessPipeline, "factor", -1.0)
    segment_patient(pipe, folder, tmp_path / "out", overwrite=True, progress=False)
    assert not voxels(tmp_path / "out" / "P" / "counterfactual_flair.nii.gz").any()
    monkeypatch.setattr(BrightnessPipeline, "factor", 3.0)
    segment_patient(pipe, folder, tmp_path / "out", overwrite=True, progress=False)
    written, scan = (voxels(path) for path in (tmp_path / "out/P/counterfactual_t1.nii.gz", folder / "P_T1n.nii.gz"))
    assert not written[scan == 0].any() and (written[scan > 0] > 2 * scan[scan > 0]).all()


def test_postprocessing_where_the_model_asks_for_it(bright, tmp_path):
    folder = write_cube(tmp_path / "P", "LPS", "LPS")
    pipe = make_pipe(BrightnessPipeline, settings=SETTINGS | {"threshold": 0.5, "postprocess": True})
    pipe.preprocessing |= {"evaluation_size": 32}
    report = segment_patient(pipe, folder, tmp_path / "out", progress=False)
    assert report["postprocessed"] is True and report["preprocessing"]["size"] == 32
    affine = nib.load(folder / "P_flair.nii.gz").affine
    mask = to_ras(voxels(tmp_path / "out" / "P" / "mask.nii.gz"), affine)
    assert 0 < mask.sum() < mask[CUBE].size and mask[5, 25, 8]  # the median filter takes the cube's corners
    heat = to_ras(voxels(tmp_path / "out" / "P" / "heatmap.nii.gz"), affine)
    assert (heat[CUBE] > 0.5).all()  # the heatmap itself is the model's own


@pytest.mark.parametrize("voxels_a_pixel", [1, 2])
def test_the_mask_is_that_of_the_chain_of_evaluation(voxels_a_pixel):
    rng = np.random.default_rng(0)
    images = rng.uniform(0.2, 1, (6, 1, 40, 40)).astype(np.float32)
    images[:, :, :4] = 0
    heat = np.zeros((6, 40, 40), dtype=np.float32)
    heat[1:4, 10:20, 10:20] = heat[4:, 30:34, 30:34] = heat[:, 2:8, 20:30] = 1
    scan = undisplay(images[:, 0].repeat(voxels_a_pixel, 1).repeat(voxels_a_pixel, 2))
    spacing_mm = np.array([6.0 / voxels_a_pixel, 6.0 / voxels_a_pixel, 3.0])
    volumes = segment.PatientVolumes("P", scan[None], None, spacing_mm, {})
    maps = SliceMaps(PatientSlices("P", images, np.zeros(6), np.arange(6)), heat, 0 * images)
    facts = {"preprocessing": {"size": 40, "field_mm": 240.0}, "threshold": 0.5, "postprocessed": True}
    mask = lesion_mask(volumes, maps, segment.heat_volume(volumes, maps, heat, 240.0), facts)
    expected = remove_small_components(postprocess_maps(heat, images) >= 0.5)
    # the filter leaves 2 slices of 2 x 2 of the small block, which is too small a component
    assert expected[2, 15, 15] and not expected[4:, 30:34, 30:34].any()
    expected = expected.repeat(voxels_a_pixel, 1).repeat(voxels_a_pixel, 2)
    # on a finer grid the outline is smooth, so corners may differ
    assert (segment.display(mask) != expected).sum() <= (0 if voxels_a_pixel == 1 else 0.03 * expected.sum())
    assert not segment.display(mask)[4:, 30 * voxels_a_pixel :].any()


def test_preview(patient, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("diffusers_cf.segmentation.patient.write_preview", segment.write_preview)
    monkeypatch.setattr(
        segment,
        "plot_slices",
        lambda *args, **options: drawn.update(options, images=args[1:4]) or plot_slices(*args, **options),
    )
    segment_patient(make_pipe(), patient, tmp_path / "out", progress=False)
    with Image.open(tmp_path / "out" / "P_01" / "preview.png") as picture:
        assert picture.format == "PNG" and picture.height > 6 * 100
    images, counterfactuals, heatmaps = drawn["images"]
    outside = (images == 0).all(axis=1)
    assert not heatmaps[outside].any() and not counterfactuals.swapaxes(0, 1)[:, outside].any()
    affine = nib.load(patient / "P_01_seg.nii.gz").affine
    seg = to_ras(voxels(patient / "P_01_seg.nii.gz"), affine)
    mask = to_ras(voxels(tmp_path / "out" / "P_01" / "mask.nii.gz"), affine)
    assert drawn["sides"] is True
    rows = [int(name.split()[-1]) for name in drawn["row_names"]]
    areas = mask.sum(axis=(0, 1))
    assert areas[rows[0]] >= 0.9 * areas.max() and "Dice" in drawn["title"]
    voxel_pixels = SPACING_MM[0] * SPACING_MM[1] / (240 / 128) ** 2
    for name, volume in (("masks", mask), ("references", seg)):
        expected = volume[..., rows].sum(axis=(0, 1)) * voxel_pixels
        np.testing.assert_allclose(drawn[name].sum(axis=(1, 2)), expected, rtol=0.1, atol=10)


def test_pictures_name_the_patients_sides_and_the_unit(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    images = np.zeros((2, 1, 8, 8))
    unit = unit_in_words("median")
    plot_slices(tmp_path / "picture.png", images, images, images[:, 0], masks=images[:, 0], sides=True, unit=unit)
    *pictures, bar = figures[0].axes
    assert len(pictures) == 8
    for axes in pictures:  # column 0 of the image, the patient's left, is at the left
        assert axes.get_xlim()[0] < axes.get_xlim()[1]
        places = {text.get_text(): text.get_position()[0] for text in axes.texts}
        assert places.keys() == {"L", "R"} and places["L"] < 0.1 and places["R"] > 0.9
    assert bar.get_ylabel() == "heatmap: change, 1 = 2.5 x the foreground's median"


def test_preview_shows_the_worst_slices_that_lie_apart():
    heatmaps, masks = np.zeros((60, 4, 4)), np.zeros((60, 4, 4))
    heatmaps[20:26] = 1  # heat alone counts less than any mask
    masks[40, :2], masks[41, :3], masks[50, 0, 0] = 1, 1, 1
    assert most_suspicious(heatmaps, masks, count=3) == [41, 50, 25]  # 40 lies too near to 41
    assert most_suspicious(heatmaps[:2], masks[:2], count=3) == [1, 0]


def test_a_model_that_yields_nan(bright, patient, tmp_path, monkeypatch):
    monkeypatch.setattr(BrightnessPipeline, "factor", np.nan)
    with pytest.raises(InputError, match="MODEL: the model yields NaN or infinite values on P_01"):
        segment_patient(bright, patient, tmp_path / "out", model="MODEL", progress=False)
