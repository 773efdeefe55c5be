"""Source `brats`: one folder per patient, one NIfTI file per modality.

    FOLDER/PATIENT/PATIENT_{t1,t1ce,t2,flair,seg}.nii.gz        BraTS up to 2021
    FOLDER/PATIENT/PATIENT-{t1n,t1c,t2w,t2f,seg}.nii.gz         BraTS from 2023

Only the end of a file's name counts, in any case; any orientation; any label id above 0 is lesion.
"""

from pathlib import Path

from diffusers_cf.data.nifti import (
    MODALITIES,
    canonical_modality,
    find_file,
    find_modality_files,
    nifti_suffix,
    read_nifti,
    to_canonical,
)
from diffusers_cf.data.scans import PatientScans, VolumeSource, check_patient_id
from diffusers_cf.errors import InputError


class BratsSource(VolumeSource):
    """Patients in BraTS layout.

    Args:
        path: The folder that holds a folder per patient.
        modalities: Which modalities become the channels, in this order; flair, t1, t1ce, t2 by default.
        **options: As in `VolumeSource`.
    """

    name = "brats"

    def __init__(self, path: str | Path, modalities=MODALITIES, **options):
        super().__init__(path, **options)
        self.modalities = tuple(canonical_modality(modality) for modality in modalities)
        # Without a labels file a missing segmentation is a problem of its patient, not of the data set.
        self.has_masks = self.labels is None or all(
            find_file(self.path / patient, "seg") is not None for patient in self.patients()
        )

    def patients(self) -> list[str]:
        """Sorted names of the sub-folders."""
        folders = sorted(f.name for f in self.path.iterdir() if f.is_dir() and not f.name.startswith("."))
        if not folders:
            scans = any(nifti_suffix(f.name) for f in self.path.iterdir())
            hint = "it holds scans itself: give the folder above it" if scans else "no folder per patient in it"
            raise InputError(f"{self.path}: {hint}")
        return [check_patient_id(name) for name in folders]

    def load(self, patient: str) -> PatientScans:
        """Reads every modality and the segmentation, noting what fails."""
        folder, found = self.path / patient, PatientScans()
        for modality in self.modalities:
            try:
                path = find_modality_files(folder, (modality,))[modality]
                found.scans[modality] = to_canonical(read_nifti(path))
            except InputError as error:
                found.errors.append(str(error))
        try:
            found.seg_path = find_file(folder, "seg")
            found.seg = None if found.seg_path is None else to_canonical(read_nifti(found.seg_path))
        except InputError as error:
            found.errors.append(str(error))
        return found
