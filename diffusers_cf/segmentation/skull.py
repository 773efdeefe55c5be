"""Take skull and other tissue out of a head scan, by deepbet (extra `skull`)."""

import importlib.metadata

import nibabel
import numpy as np

from diffusers_cf.data.nifti import Scan
from diffusers_cf.errors import InputError


def skull_stripper() -> str:
    """Return name and version of the package that finds the brain; raise `InputError` if it is not installed."""
    try:
        return f"deepbet {importlib.metadata.version('deepbet')}"
    except importlib.metadata.PackageNotFoundError:
        raise InputError("--skull_strip needs the package deepbet: pip install deepbet") from None


def brain_mask(scan: Scan) -> np.ndarray:
    """Return where the brain is in a RAS scan of a head, bool `(X, Y, Z)` (Fisch et al. 2024, deepbet)."""
    from deepbet import BrainExtraction

    image = nibabel.Nifti1Image(np.asarray(scan.data, np.float32), scan.affine)
    _, mask, _ = BrainExtraction(no_gpu=True).run(image)
    return np.asarray(mask.dataobj) > 0
