"""DICOM: read a series as a scan, and write mask and heatmap as DICOM SEG and Parametric Map."""

import hashlib
import io
import logging
from pathlib import Path

import nibabel
import numpy as np

from diffusers_cf import __version__
from diffusers_cf.data.geometry import from_ras
from diffusers_cf.data.nifti import Scan, check_finite
from diffusers_cf.errors import InputError, reading
from diffusers_cf.loading import sha256_of


logger = logging.getLogger(__name__)

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
    if start[_PREAMBLE:] == b"DICM" or not start.startswith(_FIRST_GROUPS):
        return start[_PREAMBLE:] == b"DICM"
    try:
        import pydicom

        found = pydicom.dcmread(path, force=True, specific_tags=["SOPClassUID"], stop_before_pixels=True)
        return found.get("SOPClassUID") in pydicom.uid.UID_dictionary
    except ImportError:  # reported when the series is read
        return True
    except Exception:  # pydicom raises arbitrary exceptions for other files
        return False


def read_series(folder: Path) -> Scan:
    """Read the one series in a folder, single-frame or enhanced; names and order of files and frames do not matter.

    Objects without an image (DICOMDIR, presentation states) and copies of an image are left out, with a warning.

    Returns:
        `Scan`: float32 voxels after the rescaling that each file states, and an affine to RAS millimetres, as for NIfTI.

    Raises:
        InputError: pydicom or highdicom is missing, a file is damaged, in colour or compressed without a decoder, there
            are several series, slices are missing, double or unevenly spaced, or voxels are NaN or infinite after
            rescaling.
    """
    _, volume = _read(folder)
    check_finite(folder, volume.array)
    affine = volume.get_affine("RAS")
    image = nibabel.Nifti1Image(volume.array, affine)
    image.header.set_xyzt_units("mm")
    return Scan(np.asarray(volume.array), affine, image.header, folder)


def _read(folder: Path):
    """Return the images of the one series in a folder, as pydicom data sets, and its voxels as a highdicom volume."""
    try:
        import highdicom
        import pydicom
        import pydicom.pixels
    except ImportError:
        raise InputError(
            "DICOM needs pydicom and highdicom: pip install pydicom highdicom pylibjpeg pylibjpeg-openjpeg"
        ) from None
    images, left_out = {}, []
    for path in filter(_is_dicom, sorted(folder.iterdir())):
        with reading(path, "DICOM file"):
            image = pydicom.dcmread(path, force=True)
            if "TransferSyntaxUID" not in image.file_meta:  # a file without preamble: take the one pydicom detected
                uid, implicit = pydicom.uid, image.original_encoding[0]
                image.file_meta.TransferSyntaxUID = (
                    uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
                )
            if "PixelData" not in image or image.SOPInstanceUID in images:
                left_out.append(path.name)
                continue
            if image.SamplesPerPixel != 1:
                raise InputError(f"{path}: a colour image; grey-scale images are required")
            syntax = image.file_meta.TransferSyntaxUID
            if syntax.is_compressed and not pydicom.pixels.get_decoder(syntax).is_available:
                raise InputError(f"{path}: no decoder for {syntax.name}: pip install pylibjpeg pylibjpeg-libjpeg")
            images[image.SOPInstanceUID] = image
    if left_out:
        logger.warning("%s: left out, no image or a copy of one: %s", folder, ", ".join(left_out))
    images = list(images.values())
    count = len({str(image.get("SeriesInstanceUID")) for image in images})
    if count != 1:
        raise InputError(f"{folder}: holds {count} DICOM series with images; use one folder for each series")
    frames = [int(image.get("NumberOfFrames", 1)) for image in images]
    if max(frames) > 1 and len(images) > 1:
        raise InputError(f"{folder}: holds {len(images)} multi-frame DICOM files; use one folder for each")
    with reading(folder, "DICOM series"):
        if max(frames) > 1:
            volume = highdicom.Image.from_dataset(images[0], copy=False).get_volume(dtype=np.float32)
        else:
            _check_positions(folder, images)
            volume = highdicom.get_volume_from_series(images, dtype=np.float32, orientation_tol=1e-4)
        return images, volume


def _check_positions(folder: Path, images: list) -> None:
    """Raise `InputError` if single-frame images have the same position, or leave a gap."""
    if not all("ImagePositionPatient" in image and "ImageOrientationPatient" in image for image in images):
        raise InputError(f"{folder}: an image has no position or orientation, so the series is no volume")
    axes = np.array(images[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    places = np.sort([np.array(image.ImagePositionPatient, dtype=float) @ np.cross(*axes) for image in images])
    steps = np.diff(places)
    if len(steps) and steps.min() < 1e-3:
        kinds = sorted({"/".join(image.get("ImageType", [])) for image in images})
        raise InputError(f"{folder}: several images have the same position (kinds: {', '.join(kinds)}); keep one kind")
    if len(steps) and steps.max() > 1.5 * np.median(steps):
        place = places[steps.argmax()]
        raise InputError(f"{folder}: slices are missing: a gap of {steps.max():g} mm after the one at {place:g} mm")


def series_sha256(folder: Path) -> str:
    """Return the SHA-256 of a series, which does not depend on the names of its files."""
    sums = sorted(sha256_of(path) for path in folder.iterdir() if _is_dicom(path))
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def write_dicom(folder: Path, mask: np.ndarray, heat: np.ndarray, like: Scan, patient: str, unit: str) -> None:
    """Write mask.dcm, a binary DICOM SEG, and heatmap.dcm, a float32 Parametric Map, that refer to a series' images.

    Args:
        folder (`Path`): folder that gets the two files.
        mask (`np.ndarray`): bool `(X, Y, Z)`, RAS.
        heat (`np.ndarray`): float32 `(X, Y, Z)`, RAS, from 0 up.
        like (`Scan`): the scan from [`read_series`] on whose grid both lie.
        patient (`str`): name of the patient, for the descriptions of the new series.
        unit (`str`): what a heat of 1 means.

    Raises:
        InputError: the series can't be read or lacks required attributes. Then neither file is written.
    """
    images, grid = _read(like.path)
    import highdicom
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    def common(number: int, name: str, values: np.ndarray) -> dict:
        values = from_ras(values, like.affine)
        volume = highdicom.Volume(
            values, like.affine, "PATIENT", grid.frame_of_reference_uid, from_reference_convention="RAS"
        )
        return {
            "source_images": images, "pixel_array": volume.match_geometry(grid), "series_number": number,
            "series_description": f"{name} of {patient}, not for clinical use", "series_instance_uid": generate_uid(),
            "sop_instance_uid": generate_uid(), "instance_number": 1, "manufacturer": "diffusers_cf",
            "manufacturer_model_name": "CounterfactualDDIMPipeline", "software_versions": __version__,
            "device_serial_number": "0",
        }  # fmt: skip

    seg, contents = highdicom.seg, {"mask.dcm": io.BytesIO(), "heatmap.dcm": io.BytesIO()}
    low, high = float(heat.min()), max(float(heat.max()), 1e-6)
    # highdicom requires more attributes than reading does, and raises arbitrary exceptions
    with reading(like.path, "series with all attributes that mask.dcm and heatmap.dcm need"):
        algorithm = highdicom.AlgorithmIdentificationSequence(
            name="diffusers_cf", family=codes.DCM.ArtificialIntelligence, version=__version__
        )
        lesion = seg.SegmentDescription(
            segment_number=1, segment_label="lesion",
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Lesion,
            algorithm_type=seg.SegmentAlgorithmTypeValues.AUTOMATIC, algorithm_identification=algorithm,
        )  # fmt: skip
        seg.Segmentation(
            segmentation_type=seg.SegmentationTypeValues.BINARY, segment_descriptions=[lesion],
            **common(9001, "mask", mask.astype(np.uint8)),
        ).save_as(contents["mask.dcm"])  # fmt: skip
        mapping = highdicom.pm.RealWorldValueMapping(
            lut_label="heat", lut_explanation=f"change, {unit}", unit=codes.UCUM.NoUnits, value_range=[low, high],
            slope=1, intercept=0,
        )  # fmt: skip
        window = highdicom.VOILUTTransformation(window_center=(low + high) / 2, window_width=high - low)
        highdicom.pm.ParametricMap(
            contains_recognizable_visual_features=False, real_world_value_mappings=[mapping],
            voi_lut_transformations=[window], **common(9002, "heatmap", heat.astype(np.float32)),
        ).save_as(contents["heatmap.dcm"])  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content.getvalue())
