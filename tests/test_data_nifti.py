"""Reading NIfTI files: bad files give one clear line, unusual but sound ones are read correctly."""

import gzip
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from data_files import brain, ras_affine, save

from diffusers_cf.data.geometry import from_ras
from diffusers_cf.data.nifti import canonical_modality, check_same_grid, nifti_suffix, read_nifti, to_canonical
from diffusers_cf.errors import InputError
from diffusers_cf.segmentation.volumes import write_volume


DATA = np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4)


def nifti_bytes(data=DATA, **fields) -> bytes:
    """The bytes of a NIfTI-1 file; `fields` overwrite fields of its header, unchecked."""
    image = nib.Nifti1Image(data, ras_affine())
    raw = bytearray(image.to_bytes())
    header = nib.Nifti1Header(raw[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    raw[:348] = header.structarr.tobytes()
    return bytes(raw)


def flipped(packed: bytes, position: int) -> bytes:
    changed = bytearray(packed)
    changed[position] ^= 0x10
    return bytes(changed)


PLAIN = nifti_bytes()
PACKED = gzip.compress(nifti_bytes(np.random.default_rng(0).integers(0, 900, (30, 30, 30)).astype(np.int16)))
HUGE = nifti_bytes(dim=[3, 32000, 32000, 32000, 1, 1, 1, 1])
BAD_FILES = {
    "truncated": (PACKED[: int(0.7 * len(PACKED))], "truncated"),
    "last byte missing": (PACKED[:-1], "truncated"),
    "only the CRC wrong": (flipped(PACKED, -8), "CRC check failed"),
    "garbage behind the stream": (PACKED + b"garbage", "Not a gzipped file"),
    "plain and truncated": (PLAIN[:-30], "Expected 240 bytes, got 210"),
    "empty": (b"", "0 bytes"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(600), "not a single-file NIfTI"),
    "NaN": (nifti_bytes(np.where(DATA == 7, np.nan, DATA)), "1 of 120 voxels are NaN or infinite"),
    "infinite": (nifti_bytes(np.where(DATA < 2, -np.inf, DATA)), "2 of 120 voxels are NaN or infinite"),
    "claims 65 TB": (HUGE, "asks for 65536000000352 bytes"),
    "claims 65 TB, packed": (gzip.compress(HUGE), "asks for 65536000000352 bytes"),
    "negative dimension": (nifti_bytes(dim=[3, 6, -5, 4, 1, 1, 1, 1]), "shape (6, -5, 4)"),
    "no dimensions": (nifti_bytes(dim=[0, 6, 5, 4, 1, 1, 1, 1]), "0 dimensions"),
    "unknown data type": (nifti_bytes(datatype=77), "77 not recognized"),
    "complex": (nifti_bytes(DATA.astype(np.complex64)), "magnitude image"),
    "colour": (nifti_bytes(np.zeros((6, 5, 4), dtype=[(c, "u1") for c in "RGB"])), "colour"),
    "4-D": (nifti_bytes(np.zeros((6, 5, 4, 2), dtype=np.int16)), "3-D image expected, but its shape is (6, 5, 4, 2)"),
    "singular affine": (nifti_bytes(srow_x=[0, 0, 0, 0]), "singular"),
    "flat affine": (nifti_bytes(srow_x=[8, 6, 0, 0], srow_y=[0, 0, 0, 0]), "singular"),
    "NaN affine": (nifti_bytes(srow_x=[np.nan, 0, 0, 0]), "no usable geometry"),
    "no affine": (nifti_bytes(sform_code=0, qform_code=0), "neither sform nor qform"),
    "header and image apart": (nifti_bytes(magic=b"ni1"), "not a single-file NIfTI"),
    "data inside the header": (nifti_bytes(vox_offset=100), "vox offset 100 too low"),
    "NaN data offset": (nifti_bytes(vox_offset=np.nan), "NaN"),
    "intercept NaN": (nifti_bytes(scl_slope=2, scl_inter=np.nan), "invalid intercept"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_gives_one_line_with_its_name(case, tmp_path):
    content, reason = BAD_FILES[case]
    path = tmp_path / ("scan.nii.gz" if content[:2] == b"\x1f\x8b" else "scan.nii")
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_nifti(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and reason in message and "\n" not in message


def test_no_flipped_byte_goes_unnoticed(tmp_path):
    for position in range(20, len(PACKED), len(PACKED) // 25):
        (tmp_path / "scan.nii.gz").write_bytes(flipped(PACKED, position))
        with pytest.raises(InputError, match="scan.nii.gz"):
            read_nifti(tmp_path / "scan.nii.gz")


def test_gzip_bomb_stops_at_the_limit(tmp_path):
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(PLAIN + bytes(3_000_000)))
    with pytest.raises(InputError, match="more than 2000000 bytes after decompression"):
        read_nifti(tmp_path / "bomb.nii.gz", max_bytes=2_000_000)
    assert read_nifti(tmp_path / "bomb.nii.gz").data.shape == (6, 5, 4)
    with pytest.raises(InputError, match="120 voxels .* the limit is 100"):
        read_nifti(tmp_path / "bomb.nii.gz", max_voxels=100)


BIG_ENDIAN = nib.Nifti1Header(endianness=">")
BIG_ENDIAN.set_data_dtype(np.int16)
SOUND_FILES = {
    "plain": (PLAIN, DATA),
    "wrong header size": (nifti_bytes(sizeof_hdr=7), DATA),
    "packed": (gzip.compress(PLAIN), DATA),
    "slope": (nifti_bytes(scl_slope=0.5, scl_inter=-100), DATA * 0.5 - 100),
    "slope 0": (nifti_bytes(scl_slope=0, scl_inter=7), DATA),
    "slope NaN": (nifti_bytes(scl_slope=np.nan, scl_inter=np.nan), DATA),
    "slope infinite": (nifti_bytes(scl_slope=np.inf), DATA),
    "float64": (nifti_bytes(DATA.astype(np.float64)), DATA),
    "uint8": (nifti_bytes((DATA % 256).astype(np.uint8)), DATA),
    "singleton axis": (nifti_bytes(DATA[..., None]), DATA),
    "2-D": (nifti_bytes(DATA[..., 0]), DATA[..., :1]),
    "big-endian": (nib.Nifti1Image(DATA, ras_affine(), BIG_ENDIAN).to_bytes(), DATA),
    "NIfTI-2": (nib.Nifti2Image(DATA, ras_affine()).to_bytes(), DATA),
}


@pytest.mark.parametrize("case", SOUND_FILES)
def test_sound_file_is_read(case, tmp_path):
    content, expected = SOUND_FILES[case]
    path = tmp_path / "scan.nii"
    path.write_bytes(content)
    scan = read_nifti(path)
    kept = {"slope": np.float32, "float64": np.float32, "uint8": np.uint8}
    assert scan.data.dtype == kept.get(case, np.int16) and scan.data.dtype.isnative
    np.testing.assert_array_equal(scan.data, expected)
    np.testing.assert_allclose(scan.affine, ras_affine())
    np.testing.assert_allclose(scan.spacing_mm, [8, 6, 9])


@pytest.mark.parametrize(("unit", "millimetres"), [("micron", 1e-3), ("meter", 1e3), ("unknown", 1.0), ("mm", 1.0)])
def test_other_units_of_length_become_millimetres(unit, millimetres, tmp_path):
    stored = ras_affine()
    stored[:3] /= millimetres
    image = nib.Nifti1Image(DATA, stored)
    image.set_qform(stored, 1)
    image.header.set_xyzt_units(unit, "sec")
    nib.save(image, tmp_path / "scan.nii")
    scan = read_nifti(tmp_path / "scan.nii")
    np.testing.assert_allclose(scan.affine, ras_affine(), rtol=1e-6)
    np.testing.assert_allclose(scan.spacing_mm, [8, 6, 9], rtol=1e-6)
    write_volume(tmp_path / "map.nii.gz", to_canonical(scan).data, scan, np.float32)
    written = nib.load(tmp_path / "map.nii.gz")
    for affine in (written.affine, written.get_sform(), written.get_qform()):
        np.testing.assert_allclose(affine, ras_affine(), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(written.header.get_zooms(), [8, 6, 9], rtol=1e-6)
    assert written.header.get_xyzt_units() == ("mm", "sec")


def test_integers_take_no_more_memory_than_in_the_file(tmp_path):
    voxels = np.zeros((256, 256, 400), np.uint8)
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(nib.Nifti1Image(voxels, np.eye(4)).to_bytes(), 1))
    tracemalloc.start()
    read_nifti(tmp_path / "scan.nii.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * voxels.nbytes


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "PSR", "IRA", "SLA"])
def test_canonical_and_back(axes, tmp_path):
    volume = brain()[0][0]
    scan = read_nifti(save(tmp_path / "scan.nii.gz", volume, axes))
    assert nib.aff2axcodes(scan.affine) == tuple(axes)
    canonical = to_canonical(scan)
    np.testing.assert_array_equal(canonical.data, volume)
    np.testing.assert_allclose(canonical.affine, ras_affine(), atol=1e-4)
    np.testing.assert_array_equal(from_ras(canonical.data, scan.affine), scan.data)
    save(tmp_path / "four.nii", np.stack([volume, volume + 1], axis=-1), axes)
    four = to_canonical(read_nifti(tmp_path / "four.nii", dimensions=4))
    np.testing.assert_array_equal(four.data[..., 1], volume + 1)
    assert check_same_grid([canonical, four, to_canonical(read_nifti(save(tmp_path / "ras.nii", volume)))]) is None
    assert read_nifti(tmp_path / "ras.nii", dimensions=4).data.shape == (26, 32, 12, 1)


def test_names_of_files_and_modalities():
    names = "FLAIR t2f T1 t1n t1w t1Gd T1C t1ce T2w t2 ADC".split()
    expected = "flair flair t1 t1 t1 t1ce t1ce t1ce t2 t2 adc".split()
    assert [canonical_modality(name) for name in names] == expected
    suffixes = {"BraTS2021_00006_t1ce.nii.gz": "t1ce", "BraTS-GLI-00001-000-T2F.nii.gz": "t2f", "flair.nii": "flair"}
    suffixes |= {"a.b_Seg.NII.GZ": "seg", "sub-01_ce-X_T1w.nii.gz": "t1ce", "sub-01_T1w.nii.gz": "t1w"}
    suffixes |= {"._x_t1.nii.gz": "", "x_t1.nii.gz.part": "", "x_t1.png": ""}
    assert {name: nifti_suffix(name) for name in suffixes} == suffixes


def scans_with(tmp_path, shape=(6, 5, 4), shift=0.0, scale=1.0, tilt=0.0):
    affine = ras_affine()
    affine[0, 3] += shift
    affine[0, 0] *= scale
    affine[1, 0] += tilt * affine[0, 0]
    paths = save(tmp_path / "a.nii", DATA), save(tmp_path / "b.nii", np.ones(shape, np.int16), affine=affine)
    return [to_canonical(read_nifti(path)) for path in paths]


@pytest.mark.parametrize("change", [{}, {"shift": 5e-4}, {"scale": 1 + 1e-5}, {"tilt": 5e-5}])
def test_same_grid_within_tolerance(change, tmp_path):
    assert check_same_grid(scans_with(tmp_path, **change)) is None


@pytest.mark.parametrize("change", [{"shape": (6, 5, 3)}, {"shift": 5e-3}, {"scale": 1.001}, {"tilt": 5e-4}])
def test_other_grid_lists_each_file(change, tmp_path):
    with pytest.raises(InputError, match=r"differ: a\.nii is 6x5x4, spacing .*; b\.nii is 6x5x"):
        check_same_grid(scans_with(tmp_path, **change))
