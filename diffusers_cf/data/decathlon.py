"""Source `decathlon`: Task01_BrainTumour of the Medical Segmentation Decathlon, or another task in its layout.

FOLDER/dataset.json, FOLDER/imagesTr/PATIENT.nii.gz (4-D: one volume per modality), FOLDER/labelsTr/PATIENT.nii.gz
"""

import json
from dataclasses import replace
from pathlib import Path

from diffusers_cf.data.nifti import canonical_modality, read_nifti, to_canonical
from diffusers_cf.data.scans import PatientScans, VolumeSource, check_patient_id
from diffusers_cf.errors import InputError


class DecathlonSource(VolumeSource):
    """Patients of the training list in dataset.json.

    Args:
        path: The folder with dataset.json.
        modalities: Which of the file's modalities become the channels, in this order; by default all that
            dataset.json names, in the order flair, t1, t1ce, t2.
        **options: As in `VolumeSource`.

    Raises:
        InputError: dataset.json can't be used, or a modality is not in it.
    """

    name = "decathlon"

    def __init__(self, path: str | Path, modalities=None, **options):
        super().__init__(path, **options)
        self.index = self.path / "dataset.json"
        try:
            described = json.loads(self.index.read_text(encoding="utf-8"))
            channels = sorted(described["modality"].items(), key=lambda item: int(item[0]))
            self.entries = {_patient_id(entry["image"]): entry for entry in described["training"]}
        except OSError as error:
            raise InputError(f"{self.index}: can't be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self.index}: not a dataset.json of the Decathlon ({error!r})") from None
        self.channels = [canonical_modality(name) for _, name in channels]
        wanted = sorted(self.channels) if modalities is None else [canonical_modality(name) for name in modalities]
        absent = [modality for modality in wanted if modality not in self.channels]
        if absent:
            raise InputError(f"{self.index}: no modality {', '.join(absent)} (there are {', '.join(self.channels)})")
        self.modalities = tuple(wanted)
        ids = described.get("labels") or range(5)
        self.known_ids = frozenset(int(i) for i in ids)
        self.has_masks = self.labels is None or all(self._has_mask(entry) for entry in self.entries.values())

    def patients(self) -> list[str]:
        """Sorted ids in dataset.json's training list."""
        if not self.entries:
            raise InputError(f"{self.index}: its training list is empty")
        return [check_patient_id(name) for name in sorted(self.entries)]

    def load(self, patient: str) -> PatientScans:
        """Reads the 4-D image and the segmentation, noting what fails."""
        entry, found = self.entries[patient], PatientScans()
        try:
            image = to_canonical(read_nifti(self._inside(entry["image"]), dimensions=4))
            if image.data.shape[3] != len(self.channels):
                raise InputError(
                    f"{image.path}: {image.data.shape[3]} volumes, but {self.index.name} names "
                    f"{len(self.channels)} modalities ({', '.join(self.channels)})"
                )
            for modality in self.modalities:
                found.scans[modality] = replace(image, data=image.data[..., self.channels.index(modality)])
        except InputError as error:
            found.errors.append(str(error))
        try:
            # With a labels file a segmentation may be absent; without one, its absence is named as a missing file.
            if self._has_mask(entry) or (entry.get("label") and self.labels is None):
                found.seg_path = self._inside(entry["label"])
                found.seg = to_canonical(read_nifti(found.seg_path))
        except InputError as error:
            found.errors.append(str(error))
        return found

    def _has_mask(self, entry: dict) -> bool:
        return bool(entry.get("label")) and self._inside(entry["label"]).is_file()

    def _inside(self, name: str) -> Path:
        """A path of dataset.json, refused if it leads out of the folder."""
        path = self.path / name
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise InputError(f"{self.index}: {name} lies outside {self.path}")
        return path


def _patient_id(image: str) -> str:
    return Path(image).name.removesuffix(".gz").removesuffix(".nii")
