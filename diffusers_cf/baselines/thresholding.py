"""Thresholding, row 1 of Table 1: bright tissue is lesion, nothing is learned."""

from collections.abc import Sequence

import numpy as np
import torch

from diffusers_cf.baselines.method import AnomalyMethod
from diffusers_cf.data.intensity import unit_intensity
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.postprocessing import foreground_mask


class IntensityThresholding(AnomalyMethod):
    """The intensity of one modality as it is (method id `threshold-<modality>`).

    Args:
        modalities: Names of the channels, in their order.
        modality: The one to take, in any case.

    Attributes:
        whole_patient: Whether `anomaly_map` needs all slices of a patient in one call.
        network_evaluations_per_slice: 0.

    Raises:
        InputError: The images have no such modality.
    """

    network_evaluations_per_slice = 0

    def __init__(self, modalities: Sequence[str], modality: str = "flair"):
        super().__init__()
        names = [name.lower() for name in modalities]
        if modality.lower() not in names:
            raise InputError(
                f"thresholding needs the modality {modality}, but the images hold {', '.join(modalities)}"
            )
        self.channel = names.index(modality.lower())

    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the modality's intensity, (N, C, H, W) -> (N, H, W)."""
        return images[:, self.channel].clone()


class MedianThresholding(IntensityThresholding):
    """FLAIR on the intensity scale `median`, whatever scale the images have (method id `threshold-median`).

    The 99th percentile of a scan rises with its lesion, and its median does not: one threshold then fits all patients.
    Give all of a patient's slices in one call (`whole_patient`).

    Args:
        modalities: Names of the channels, in their order; one of them must be flair.

    Raises:
        InputError: There is no FLAIR among them.
    """

    whole_patient = True

    def __init__(self, modalities: Sequence[str]):
        super().__init__(modalities, "flair")

    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the scaled FLAIR of one patient's slices, (N, C, H, W) -> (N, H, W), background 0."""
        flair = images[:, self.channel].detach().cpu().numpy()
        inside, maps = flair > 0, np.zeros(flair.shape, dtype=np.float32)
        if inside.any():
            maps[inside] = self.scores(flair[inside])
        return torch.from_numpy(maps).to(images.device)

    def scores(self, foreground: np.ndarray) -> np.ndarray:
        """Scores, at least 0, of all intensities (P,) of a patient's foreground."""
        return foreground / unit_intensity(foreground, "median")


class RobustZThresholding(MedianThresholding):
    """FLAIR as a robust z-score in the patient's foreground (method id `threshold-robust-z`).

    z = (v - median) / (1.4826 x median absolute deviation), plus 6 and at least 0, so that no score lies below the
    background's.
    """

    def scores(self, foreground: np.ndarray) -> np.ndarray:
        """As in `MedianThresholding`."""
        distance = foreground - np.median(foreground)
        return np.clip(distance / (1.4826 * np.median(np.abs(distance)) + 1e-6) + 6, 0, None)


class EqualizedThresholding(MedianThresholding):
    """FLAIR after histogram equalisation of the foreground (method id `threshold`; Meissen et al. 2021).

    The score of a foreground pixel is the share of the patient's foreground that is at most as bright, by a histogram
    of 256 bins with linear interpolation inside them, in floating point throughout; background is 0. As published, the
    histogram is that of the scan: give all of a patient's slices in one call (`whole_patient`), since a single slice
    equalised on its own would always hold the same share of bright pixels, with or without a lesion.

    Args:
        modalities: Names of the channels, in their order; one of them must be flair.

    Raises:
        InputError: There is no FLAIR among them.
    """

    n_bins = 256

    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the equalised FLAIR of one patient's slices, (N, C, H, W) -> (N, H, W) in [0, 1]."""
        flair = images[:, self.channel].detach().cpu().numpy()
        foreground = foreground_mask(images.detach().cpu())
        equalized = np.zeros(flair.shape, dtype=np.float32)
        if foreground.any():
            counts, edges = np.histogram(flair[foreground], bins=self.n_bins)
            share = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
            equalized[foreground] = np.interp(flair[foreground], edges, share)
        return torch.from_numpy(equalized).to(images.device)
