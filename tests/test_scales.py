"""The same scan on its way through `prepare` and through `segment` is the same image, on either intensity scale."""

import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
from segmentation_files import SETTINGS, make_pipe

from diffusers_cf.cli import main
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.segmentation.cohorts import patient_files
from diffusers_cf.segmentation.patient import segment_patient, segmentation_facts
from diffusers_cf.segmentation.volumes import network_slices, read_volumes


DATA = Path(os.environ.get("DIFFUSERS_CF_DATA", Path(__file__).parents[2] / "shared" / "data"))
REAL = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data: {DATA} (DIFFUSERS_CF_DATA) is missing")


@REAL
@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize("normalize", ["median", "p99"])
def test_prepare_and_segment_see_the_same_slices(normalize, tmp_path):
    pipe = make_pipe(normalize=normalize, evaluation_size=128, settings=SETTINGS | {"strength": 0.0})
    modalities = pipe.preprocessing["modalities"]
    options = ["--input", DATA / "volumes", "--normalize", normalize, "--modalities", *modalities]
    assert main(["prepare", "--source", "brats", "--output", *map(str, [tmp_path / "set", *options])]) == 0
    prepared = {}
    for split in ("train", "validation", "test"):
        dataset = SliceDataset(tmp_path / "set", split, cache_dir=tmp_path / "cache")
        assert dataset.preprocessing["normalize"] == normalize
        for patient in np.unique(dataset.patients):
            rows = np.flatnonzero(dataset.patients == patient).tolist()
            prepared[str(patient)] = dataset.collate(dataset.__getitems__(rows))
    assert sorted(prepared) == ["BraTS2021_00006", "MS19"]
    for patient, batch in prepared.items():
        folder = DATA / "volumes" / patient
        volumes = read_volumes(patient, patient_files(folder, modalities))
        shown = network_slices(volumes, segmentation_facts(pipe))
        np.testing.assert_array_equal(batch["slices"], shown.slices)
        # as float16 keeps them: within 1e-3 up to a value of 4, four times the brightest that the network sees
        np.testing.assert_allclose(batch["images"].numpy().clip(max=4), shown.images.clip(max=4), rtol=0, atol=1e-3)
        segment_patient(pipe, folder, tmp_path / "out", progress=False)
        for modality in modalities:
            scan = nibabel.load(next(folder.glob(f"*_{modality}.nii.gz")))
            written = nibabel.load(tmp_path / "out" / patient / f"counterfactual_{modality}.nii.gz")
            assert written.shape == scan.shape and nibabel.aff2axcodes(written.affine) == nibabel.aff2axcodes(
                scan.affine
            )
            np.testing.assert_array_equal(written.affine, scan.affine)
            np.testing.assert_allclose(written.get_fdata(), scan.get_fdata().clip(min=0), rtol=1e-6)
