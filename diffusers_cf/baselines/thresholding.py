"""Intensity thresholding (Meissen et al. 2021): bright tissue is lesion. Nothing is trained."""

from collections.abc import Sequence

import numpy as np
import torch

from diffusers_cf.baselines.method import AnomalyMethod
from diffusers_cf.data.intensity import unit_intensity
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.postprocessing import foreground_mask, robust_z


class IntensityThresholding(AnomalyMethod):
    """The unchanged intensity of one modality (method id `threshold-<modality>`).

    Args:
        modalities (`Sequence[str]`): names of the channels, in their order.
        modality (`str`): the modality to use, in upper or lower case.

    Raises:
        InputError: the images have no such modality.
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
        return images[:, self.channel].clone()


class PatientThresholding(IntensityThresholding):
    """FLAIR relative to all foreground intensities of a patient: pass all slices of the patient in one call."""

    whole_patient = True
    all_channels = False  # whether the foreground is that of all channels instead of FLAIR's

    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        """Return the scores of one patient's slices, `(N, C, H, W)` to `(N, H, W)`, at least 0, background 0."""
        slices = images.detach().cpu().numpy()
        flair = slices[:, self.channel]
        inside, maps = foreground_mask(slices if self.all_channels else flair[:, None]), np.zeros_like(flair)
        if inside.any():
            maps[inside] = self.scores(flair[inside])
        return torch.from_numpy(maps).to(images.device)

    def scores(self, foreground: np.ndarray) -> np.ndarray:
        """Return the scores, at least 0, of the foreground intensities `(P,)` of a patient."""
        raise NotImplementedError


class MedianThresholding(PatientThresholding):
    """FLAIR on the intensity scale `median`, whatever scale the images have (method id `threshold-median`).

    A lesion raises the 99th percentile of a scan but not its median, so that one threshold fits all patients.
    """

    def scores(self, foreground: np.ndarray) -> np.ndarray:
        return foreground / unit_intensity(foreground, "median")


ZERO = 6  # score of the median


class RobustZThresholding(PatientThresholding):
    """FLAIR as a robust z-score within the patient's foreground (method id `threshold-robust-z`).

    z = (v - median) / (1.4826 * median absolute deviation). The score is max(z + ZERO, 0), so that no tissue scores below
    the background.
    """

    def scores(self, foreground: np.ndarray) -> np.ndarray:
        return np.clip(robust_z(foreground, foreground) + ZERO, 0, None)


class EqualizedThresholding(PatientThresholding):
    """FLAIR after histogram equalisation of the foreground (method id `threshold`).

    The score of a pixel is the share of the patient's foreground that is at most as bright: a histogram of 256 bins,
    interpolated linearly inside each bin. As published, the histogram is that of the whole scan: equalised alone, every
    slice would have the same share of bright pixels, with or without a lesion.
    """

    all_channels = True

    def scores(self, foreground: np.ndarray) -> np.ndarray:
        counts, edges = np.histogram(foreground, bins=256)
        return np.interp(foreground, edges, np.concatenate([[0.0], np.cumsum(counts) / counts.sum()]))
