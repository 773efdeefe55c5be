"""A DICOM series of MR images, oblique and unsorted, for the tests."""

import numpy as np
import pydicom
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid


def oblique_affine(angle=0.3):
    """Index (column, row, slice) to LPS millimetres: rotated about the patient's long axis and tilted."""
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    affine = np.eye(4)
    affine[:3, :3] = turn * np.array([1.5, 2.0, 3.0])
    affine[:3, 3] = (-20.0, 11.0, 5.0)
    return affine


def write_series(folder, voxels, affine, slope=2.0):
    """Write voxels (columns, rows, slices) as a series of files with random names that store voxels / slope."""
    folder.mkdir(parents=True)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    random = np.random.default_rng(0)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :3] / spacing
    for number in random.permutation(voxels.shape[2]):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image = pydicom.dataset.FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        image.SOPClassUID, image.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, series, frame
        image.PatientName, image.PatientID, image.PatientBirthDate, image.PatientSex = "A^B", "P_01", "", ""
        image.StudyDate = image.StudyTime = image.AccessionNumber = image.ReferringPhysicianName = image.StudyID = ""
        image.Modality, image.SeriesNumber, image.InstanceNumber = "MR", 1, int(number) + 1
        image.Manufacturer = image.PositionReferenceIndicator = ""
        image.ImagePositionPatient = (affine @ [0, 0, number, 1])[:3].tolist()
        image.ImageOrientationPatient = [*directions[:, 0].tolist(), *directions[:, 1].tolist()]
        image.PixelSpacing, image.SliceThickness = [float(spacing[1]), float(spacing[0])], float(spacing[2])
        image.ImageType = ["ORIGINAL", "PRIMARY"]
        image.Rows, image.Columns, image.SamplesPerPixel = voxels.shape[1], voxels.shape[0], 1
        image.PhotometricInterpretation, image.PixelRepresentation = "MONOCHROME2", 0
        image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
        image.RescaleSlope, image.RescaleIntercept, image.RescaleType = slope, 0.0, "US"
        image.PixelData = (voxels[:, :, number].T / slope).astype(np.uint16).tobytes()
        image.save_as(folder / f"{random.integers(10**9)}", enforce_file_format=True)
    return folder


def write_enhanced(folder, voxels, affine, order):
    """Write voxels (columns, rows, slices) as one enhanced MR object, its frames in this order of slices."""
    write_series(folder, voxels[:, :, :1], affine, slope=1.0)
    (path,) = folder.iterdir()
    image = pydicom.dcmread(path)
    orientation, spacing = image.ImageOrientationPatient, image.PixelSpacing
    moved = ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"]
    for name in moved:
        delattr(image, name)
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = pydicom.uid.EnhancedMRImageStorage
    image.ImageType = ["ORIGINAL", "PRIMARY", "OTHER", "NONE"]
    image.ContentDate, image.ContentTime, image.AcquisitionDateTime = "20200101", "120000", "20200101120000"
    image.NumberOfFrames, image.PresentationLUTShape = len(order), "IDENTITY"
    image.PixelData = np.stack([voxels[:, :, number].T for number in order]).astype(np.uint16).tobytes()

    def item(**values):
        made = pydicom.Dataset()
        for name, value in values.items():
            setattr(made, name, value)
        return made

    organization = generate_uid()
    image.DimensionOrganizationSequence = [item(DimensionOrganizationUID=organization)]
    image.DimensionIndexSequence = [
        item(DimensionOrganizationUID=organization, DimensionIndexPointer=tag, FunctionalGroupPointer=0x00209111)
        for tag in (0x00209056, 0x00209057)
    ]
    thickness = float(np.linalg.norm(affine[:3, 2]))
    measures = item(PixelSpacing=spacing, SliceThickness=thickness, SpacingBetweenSlices=thickness)
    shared = item(PixelMeasuresSequence=[measures])
    shared.PlaneOrientationSequence = [item(ImageOrientationPatient=orientation)]
    shared.PixelValueTransformationSequence = [item(RescaleIntercept=0.0, RescaleSlope=1.0, RescaleType="US")]
    image.SharedFunctionalGroupsSequence, frames = [shared], []
    for number in order:
        content = item(StackID="1", InStackPositionNumber=number + 1, DimensionIndexValues=[1, number + 1])
        position = item(ImagePositionPatient=(affine @ [0, 0, number, 1])[:3].tolist())
        frames.append(item(FrameContentSequence=[content], PlanePositionSequence=[position]))
    image.PerFrameFunctionalGroupsSequence = frames
    image.save_as(path, enforce_file_format=True)
    return folder


def without_preamble(path, with_meta=False):
    """Rewrite a file without preamble, as some archives do, and perhaps without the header that names its encoding."""
    image = pydicom.dcmread(path)
    image.preamble = None
    if not with_meta:
        image.file_meta = pydicom.dataset.FileMetaDataset()
    options = {} if with_meta else {"implicit_vr": True, "little_endian": True}
    image.save_as(path, enforce_file_format=False, **options)
    assert path.read_bytes()[128:132] != b"DICM"
