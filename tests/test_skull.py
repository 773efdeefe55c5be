"""`segment --skull_strip`: the brain is found in a scan of a head, and only it is mapped."""

import importlib.metadata

import nibabel as nib
import numpy as np
import pytest
from data_files import write_brats
from scipy import ndimage
from segmentation_files import make_pipe, voxels

from diffusers_cf.data.phantom import make_patient, write_patient
from diffusers_cf.errors import InputError
from diffusers_cf.segmentation import volumes as volumes_module
from diffusers_cf.segmentation.patient import segment_patient


@pytest.mark.slow
def test_a_shell_around_a_phantom_is_taken_off(tmp_path):
    """A bright shell 4 to 6 voxels outside the brain, in both scans, as a skull would be."""
    patient = make_patient(7, 0)
    folder, brain = write_patient(patient, tmp_path / "scan"), (patient.volumes > 0).any(axis=0)
    distance = ndimage.distance_transform_edt(~brain)
    shell = (distance > 3) & (distance < 7)
    for modality in ("flair", "t1"):
        path = next(folder.glob(f"*_{modality}.nii.gz"))
        image = nib.load(path)
        data = np.where(shell, np.percentile(image.get_fdata()[brain], 90), image.get_fdata())
        nib.save(nib.Nifti1Image(data.astype(np.float32), image.affine), path)
    report = segment_patient(make_pipe(), folder, tmp_path, patient="P", skull_strip=True, progress=False)
    heat, shown = voxels(tmp_path / "P" / "heatmap.nii.gz"), voxels(tmp_path / "P" / "counterfactual_t1.nii.gz")
    assert report["skull_strip"] == f"deepbet {importlib.metadata.version('deepbet')}"
    assert not heat[shell].any() and not shown[shell].any() and (shown[brain] > 0).mean() > 0.98
    assert not any("skull" in warning for warning in report["warnings"])


def test_a_patient_is_finished_with_or_without_the_skull(monkeypatch, tmp_path):
    folder = write_brats(tmp_path / "data", "P_01")
    monkeypatch.setattr(volumes_module, "write_preview", lambda path, *_: path.touch())
    monkeypatch.setattr(volumes_module, "brain_mask", lambda scan: np.indices(scan.data.shape)[2] > 5)
    pipe = make_pipe()
    segment_patient(pipe, folder, tmp_path, skull_strip=True, progress=False)
    heat = voxels(tmp_path / "P_01" / "heatmap.nii.gz")
    assert not heat[..., :6].any() and heat[..., 6:].any()
    segment_patient(pipe, folder, tmp_path, skull_strip=True, progress=False)
    with pytest.raises(InputError, match="finished with other skull-stripping"):
        segment_patient(pipe, folder, tmp_path, progress=False)


def test_without_the_package_nothing_is_written(monkeypatch, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(InputError, match="^--skull_strip needs the package deepbet"):
        segment_patient(make_pipe(), write_brats(tmp_path / "data", "P_01"), tmp_path / "out", skull_strip=True)
    assert not (tmp_path / "out").exists()
