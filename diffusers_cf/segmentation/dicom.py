"""DICOM in and out: a series as a scan like any other, and mask and heatmap as DICOM SEG and Parametric Map."""

import hashlib
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path

import nibabel
import numpy as np

from diffusers_cf import __version__
from diffusers_cf.data.nifti import Scan, canonical_modality, check_finite
from diffusers_cf.errors import InputError
from diffusers_cf.loading import sha256_of


SOFTWARE = {
    "manufacturer": "diffusers_cf",
    "manufacturer_model_name": "CounterfactualDDIMPipeline",
    "software_versions": __version__,
    "device_serial_number": "0",
}
_PREAMBLE = 128  # bytes before a DICOM file says that it is one
# Group 2 or 8, little-endian: how a file begins that lacks the preamble, as some archives write it.
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00")


def _readable(function: Callable) -> Callable:
    """Says in one line which file or folder can't be read."""

    @wraps(function)
    def call(path: Path, *args, **options):
        try:
            return function(path, *args, **options)
        except OSError as error:
            raise InputError(f"{error.filename or path}: can't be read ({error.strerror or error})") from None

    return call


@_readable
def find_series(folder: Path, modality: str) -> Path | None:
    """The sub-folder of a patient that is called like a modality and holds DICOM files; None if there is none.

    Raises:
        InputError: several fit, or the folder can't be read.
    """
    wanted = canonical_modality(modality)
    found = [path for path in sorted(folder.iterdir()) if canonical_modality(path.name) == wanted and is_series(path)]
    if len(found) > 1:
        raise InputError(f"{folder}: several series are {modality}: {', '.join(path.name for path in found)}")
    return found[0] if found else None


@_readable
def is_series(folder: Path) -> bool:
    """Whether the folder holds a DICOM file; raises InputError if it can't be read."""
    return folder.is_dir() and any(_is_dicom(path) for path in sorted(folder.iterdir()))


def _is_dicom(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(_PREAMBLE + 4)
    return start[_PREAMBLE:] == b"DICM" or (start.startswith(_FIRST_GROUPS) and _names_its_class(path))


def _names_its_class(path: Path) -> bool:
    """Whether a file without preamble is DICOM all the same: read as such, it says what kind of object it is."""
    try:
        import pydicom
    except ImportError:  # said when the series is read
        return True
    try:
        found = pydicom.dcmread(path, force=True, specific_tags=["SOPClassUID"], stop_before_pixels=True)
        return found.get("SOPClassUID") in pydicom.uid.UID_dictionary
    except Exception:  # what is no DICOM raises whatever it likes
        return False


@_readable
def read_series(folder: Path) -> Scan:
    """Reads the one series of single-frame images in a folder, whatever its files are called and in whatever order.

    Returns:
        Voxels after the rescaling that each file states; the affine leads to RAS millimetres as that of NIfTI does.

    Raises:
        InputError: pydicom or highdicom is missing, a file is damaged, there are several series, slices are missing or
            uneven, or voxels are NaN or infinite after the rescaling.
    """
    highdicom, datasets = _package(), _read_files(folder)
    try:
        volume = highdicom.get_volume_from_series(datasets, dtype=np.float32)
    except Exception as error:  # decoders raise whatever they like
        raise InputError(f"{folder}: no usable series ({_first_line(error)})") from None
    check_finite(folder, volume.array)
    affine = volume.get_affine("RAS")
    image = nibabel.Nifti1Image(volume.array, affine)
    image.header.set_xyzt_units("mm")
    return Scan(np.asarray(volume.array), affine, image.header, folder)


def _package():
    try:
        import highdicom
    except ImportError:
        raise InputError("DICOM needs pydicom and highdicom: pip install 'diffusers_cf[dicom]'") from None
    return highdicom


def _read_files(folder: Path, **options) -> list:
    """The DICOM files of a folder, all of one series; options as in `pydicom.dcmread`."""
    import pydicom

    datasets = []
    for path in sorted(path for path in folder.iterdir() if _is_dicom(path)):
        try:
            dataset = pydicom.dcmread(path, force=True, **options)
            if "TransferSyntaxUID" not in dataset.file_meta:  # of a file without preamble
                dataset.file_meta.TransferSyntaxUID = _encoding(dataset)
            datasets.append(dataset)
        except Exception as error:  # a damaged file raises whatever it likes
            raise InputError(f"{path}: damaged ({_first_line(error)})") from None
    series = {str(dataset.get("SeriesInstanceUID")) for dataset in datasets}
    if len(series) != 1:
        raise InputError(f"{folder}: holds {len(series)} DICOM series: one folder for each")
    return datasets


def _encoding(dataset):
    """Transfer syntax of an uncompressed file that does not name it, as pydicom has found it out."""
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    return ImplicitVRLittleEndian if dataset.original_encoding[0] else ExplicitVRLittleEndian


@_readable
def series_sha256(folder: Path) -> str:
    """SHA-256 of a series, whatever its files are called."""
    sums = sorted(sha256_of(path) for path in folder.iterdir() if _is_dicom(path))
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def _made_for_a_series(write: Callable) -> Callable:
    """Says in one line why a series can't carry what is made of it: highdicom demands more of it than reading does."""

    @wraps(write)
    def call(path: Path, values: np.ndarray, affine: np.ndarray, source: Path, *words: str) -> None:
        try:
            write(path, values, affine, source, *words)
        except (InputError, OSError, MemoryError):
            raise
        except Exception as error:  # whatever it likes, AttributeError among them
            reason = _first_line(error)
            raise InputError(f"{source}: the series can't carry {path.name} ({reason})") from None

    return call


@_made_for_a_series
def write_segmentation(path: Path, mask: np.ndarray, affine: np.ndarray, source: Path, description: str) -> None:
    """Writes a mask as a binary DICOM SEG that refers to the images of a series.

    Args:
        path: a .dcm file.
        mask: bool (X, Y, Z).
        affine: voxel index of `mask` to RAS millimetres.
        source: folder of the series, which lies on the same grid.
        description: of the series that is made.

    Raises:
        InputError: the series lacks what such an object must say, or can't be read.
    """
    highdicom = _package()
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    images = _read_files(source)
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="diffusers_cf", family=codes.DCM.ArtificialIntelligence, version=__version__
    )
    segment = highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label="lesion",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Lesion,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
    )
    made = highdicom.seg.Segmentation(
        source_images=images,
        pixel_array=_on_grid_of(images, mask.astype(np.uint8), affine),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[segment],
        series_instance_uid=generate_uid(),
        series_number=9001,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        series_description=description,
        **SOFTWARE,
    )
    made.save_as(path)


@_made_for_a_series
def write_parametric_map(
    path: Path, heat: np.ndarray, affine: np.ndarray, source: Path, description: str, unit: str
) -> None:
    """Writes a heatmap as a float32 DICOM Parametric Map; arguments as in [`write_segmentation`], and what 1 means."""
    highdicom = _package()
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    images = _read_files(source)
    limits = [float(heat.min()), max(float(heat.max()), 1e-6)]
    mapping = highdicom.pm.RealWorldValueMapping(
        lut_label="heat",
        lut_explanation=f"change, {unit}",
        unit=codes.UCUM.NoUnits,
        value_range=limits,
        slope=1,
        intercept=0,
    )
    made = highdicom.pm.ParametricMap(
        source_images=images,
        pixel_array=_on_grid_of(images, heat.astype(np.float32), affine),
        series_instance_uid=generate_uid(),
        series_number=9002,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[
            highdicom.VOILUTTransformation(window_center=sum(limits) / 2, window_width=limits[1] - limits[0])
        ],
        series_description=description,
        **SOFTWARE,
    )
    made.save_as(path)


def _on_grid_of(images: Sequence, values: np.ndarray, affine: np.ndarray):
    """Values (X, Y, Z) as a highdicom volume whose axes run as those of a series."""
    highdicom = _package()
    series = highdicom.get_volume_from_series(images)
    volume = highdicom.Volume(
        values, affine, "PATIENT", series.frame_of_reference_uid, from_reference_convention="RAS"
    )
    return volume.match_geometry(series)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
