"""DICOM: read a series as a scan, and write mask and heatmap as DICOM SEG and Parametric Map."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np

from diffusers_cf import __version__
from diffusers_cf.data.nifti import Scan, check_finite
from diffusers_cf.errors import InputError, reading
from diffusers_cf.loading import sha256_of


# Attributes of the objects that are written.
_SOFTWARE = {
    "manufacturer": "diffusers_cf", "manufacturer_model_name": "CounterfactualDDIMPipeline",
    "software_versions": __version__, "device_serial_number": "0", "instance_number": 1,
}  # fmt: skip
_PREAMBLE = 128  # bytes before the letters DICM
# Some archives write files without a preamble. They start with group 2 or 8, little-endian.
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00")


def is_series(folder: Path) -> bool:
    """Return whether a folder holds a DICOM file.

    Raises:
        InputError: a file in it can't be read.
    """
    return folder.is_dir() and any(map(_is_dicom, sorted(folder.iterdir())))


def _is_dicom(path: Path) -> bool:
    if not path.is_file():
        return False
    with reading(path, "file"), path.open("rb") as file:
        start = file.read(_PREAMBLE + 4)
    return start[_PREAMBLE:] == b"DICM" or (start.startswith(_FIRST_GROUPS) and _states_its_class(path))


def _states_its_class(path: Path) -> bool:
    """Return whether a file without preamble, parsed as DICOM, has a registered SOP class."""
    try:
        import pydicom

        found = pydicom.dcmread(path, force=True, specific_tags=["SOPClassUID"], stop_before_pixels=True)
        return found.get("SOPClassUID") in pydicom.uid.UID_dictionary
    except ImportError:  # reported when the series is read
        return True
    except Exception:  # pydicom raises arbitrary exceptions for other files
        return False


def read_series(folder: Path) -> Scan:
    """Read the one series of single-frame images in a folder; file names and their order do not matter.

    Returns:
        `Scan`: float32 voxels after the rescaling that each file states, and an affine to RAS millimetres, as for NIfTI.

    Raises:
        InputError: pydicom or highdicom is missing, a file is damaged, there are several series, slices are missing or
            unevenly spaced, or voxels are NaN or infinite after rescaling.
    """
    highdicom, images = _import_highdicom(), _read_files(folder)
    with reading(folder, "DICOM series"):
        volume = highdicom.get_volume_from_series(images, dtype=np.float32)
    check_finite(folder, volume.array)
    affine = volume.get_affine("RAS")
    image = nibabel.Nifti1Image(volume.array, affine)
    image.header.set_xyzt_units("mm")
    return Scan(np.asarray(volume.array), affine, image.header, folder)


def _import_highdicom():
    try:
        import highdicom
    except ImportError:
        raise InputError("DICOM needs pydicom and highdicom: pip install 'diffusers_cf[dicom]'") from None
    return highdicom


def _read_files(folder: Path) -> list:
    """Read the DICOM files of a folder, which must belong to one series."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    images = []
    for path in filter(_is_dicom, sorted(folder.iterdir())):
        with reading(path, "DICOM file"):
            image = pydicom.dcmread(path, force=True)
            if "TransferSyntaxUID" not in image.file_meta:  # a file without preamble: take the one pydicom detected
                implicit = image.original_encoding[0]
                image.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
            images.append(image)
    count = len({str(image.get("SeriesInstanceUID")) for image in images})
    if count != 1:
        raise InputError(f"{folder}: holds {count} DICOM series; use one folder for each series")
    return images


def series_sha256(folder: Path) -> str:
    """Return the SHA-256 of a series, which does not depend on the names of its files."""
    sums = sorted(sha256_of(path) for path in folder.iterdir() if _is_dicom(path))
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def write_segmentation(path: Path, mask: np.ndarray, affine: np.ndarray, source: Path, description: str) -> None:
    """Write a mask as a binary DICOM SEG that refers to the images of a series.

    Args:
        path (`Path`): a .dcm file.
        mask (`np.ndarray`): bool `(X, Y, Z)`, on the grid of the series up to flips and permutations of axes.
        affine (`np.ndarray`): `(4, 4)`, voxel index of `mask` to RAS millimetres.
        source (`Path`): folder of the series.
        description (`str`): description of the new series.

    Raises:
        InputError: the series can't be read, or lacks attributes that a DICOM SEG requires.
    """

    def make(highdicom, images: list):
        from pydicom.sr.codedict import codes
        from pydicom.uid import generate_uid

        algorithm = highdicom.AlgorithmIdentificationSequence(
            name="diffusers_cf", family=codes.DCM.ArtificialIntelligence, version=__version__
        )
        segment = highdicom.seg.SegmentDescription(
            segment_number=1, segment_label="lesion",
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Lesion,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC, algorithm_identification=algorithm,
        )  # fmt: skip
        return highdicom.seg.Segmentation(
            source_images=images,
            pixel_array=_on_grid_of(images, mask.astype(np.uint8), affine),
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY, segment_descriptions=[segment],
            series_number=9001, series_description=description,
            series_instance_uid=generate_uid(), sop_instance_uid=generate_uid(), **_SOFTWARE,
        )  # fmt: skip

    _write(path, source, make)


def write_parametric_map(
    path: Path, heat: np.ndarray, affine: np.ndarray, source: Path, description: str, unit: str
) -> None:
    """Write a heatmap as a float32 DICOM Parametric Map that refers to the images of a series.

    Args:
        path (`Path`): a .dcm file.
        heat (`np.ndarray`): float32 `(X, Y, Z)`, from 0 up, on the grid of the series as in [`write_segmentation`].
        affine (`np.ndarray`): `(4, 4)`, voxel index of `heat` to RAS millimetres.
        source (`Path`): folder of the series.
        description (`str`): description of the new series.
        unit (`str`): what a heat of 1 means.

    Raises:
        InputError: the series can't be read, or lacks attributes that a Parametric Map requires.
    """

    def make(highdicom, images: list):
        from pydicom.sr.codedict import codes
        from pydicom.uid import generate_uid

        low, high = float(heat.min()), max(float(heat.max()), 1e-6)
        mapping = highdicom.pm.RealWorldValueMapping(
            lut_label="heat", lut_explanation=f"change, {unit}", unit=codes.UCUM.NoUnits, value_range=[low, high],
            slope=1, intercept=0,
        )  # fmt: skip
        window = highdicom.VOILUTTransformation(window_center=(low + high) / 2, window_width=high - low)
        return highdicom.pm.ParametricMap(
            source_images=images,
            pixel_array=_on_grid_of(images, heat.astype(np.float32), affine),
            contains_recognizable_visual_features=False,
            real_world_value_mappings=[mapping], voi_lut_transformations=[window],
            series_number=9002, series_description=description,
            series_instance_uid=generate_uid(), sop_instance_uid=generate_uid(), **_SOFTWARE,
        )  # fmt: skip

    _write(path, source, make)


def _write(path: Path, source: Path, make: Callable) -> None:
    """Write the object that `make(highdicom, images)` returns for the images of the series in `source`."""
    highdicom, images, content = _import_highdicom(), _read_files(source), io.BytesIO()
    # highdicom requires more attributes of a series than reading does, and raises arbitrary exceptions
    with reading(source, f"series with all attributes that {path.name} needs"):
        make(highdicom, images).save_as(content)
    path.write_bytes(content.getvalue())


def _on_grid_of(images: list, values: np.ndarray, affine: np.ndarray):
    """Return values `(X, Y, Z)` as a highdicom volume with the axes of a series."""
    import highdicom

    series = highdicom.get_volume_from_series(images)
    volume = highdicom.Volume(
        values, affine, "PATIENT", series.frame_of_reference_uid, from_reference_convention="RAS"
    )
    return volume.match_geometry(series)
