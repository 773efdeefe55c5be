"""A method's map and the intensity of FLAIR together, on scales that image labels give them."""

from collections.abc import Sequence

import numpy as np
import torch

from diffusers_cf.baselines.method import AnomalyMethod
from diffusers_cf.baselines.thresholding import RobustZThresholding
from diffusers_cf.evaluation.postprocessing import foreground_mask
from diffusers_cf.evaluation.protocol import maps_at_size, rows_by_patient


BATCH_SIZE = 32  # slices of a patient in one call of the method
MAX_SLICES = 256  # to learn the scales from, of whole patients


class IntensityCombination(AnomalyMethod):
    """The sum of two z-scores: of a method's map and of FLAIR as [`RobustZThresholding`] has it.

    A z-score is (value - mean) / standard deviation of the foreground of training slices labelled healthy. These four
    numbers are all that is learned; both parts have the same weight.

    Args:
        method ([`AnomalyMethod`]): makes the map.
        modalities (`Sequence[str]`): names of the channels, in their order; one is FLAIR.
    """

    whole_patient = True

    def __init__(self, method: AnomalyMethod, modalities: Sequence[str]):
        self.parts = (method, RobustZThresholding(modalities))
        self.means, self.deviations = np.zeros(2), np.ones(2)
        super().__init__()

    @property
    def settings(self) -> dict:
        """The settings of the method that makes the map."""
        return self.parts[0].settings

    @settings.setter
    def settings(self, settings: dict) -> None:
        self.parts[0].settings = settings

    @property
    def candidates(self) -> Sequence[dict]:
        """The candidates of the method that makes the map, which is chosen by itself."""
        return self.parts[0].candidates

    @candidates.setter
    def candidates(self, candidates: Sequence[dict]) -> None:
        self.parts[0].candidates = candidates

    def candidates_on(self, grid) -> Sequence[dict]:
        return self.parts[0].candidates_on(grid)

    def maps_of_candidates(self, images: torch.Tensor):
        return self.parts[0].maps_of_candidates(images)

    @property
    def network_evaluations_per_slice(self) -> float:
        return self.parts[0].network_evaluations_per_slice

    def learn(self, slices, chosen: bool) -> dict:
        """Learn the scales from slices that are labelled healthy, once the settings are chosen; return them."""
        learned = self.parts[0].learn(slices, chosen)
        if not chosen:
            return learned
        healthy = np.flatnonzero(np.asarray(slices.labels) == 0)
        patients, values = list(rows_by_patient(slices, healthy).values()), ([], [])
        for rows in patients[:: -(-len(healthy) // MAX_SLICES)]:
            every = np.flatnonzero(slices.patients == slices.patients[rows[0]])  # robust z needs the whole patient
            images = slices.collate(slices.__getitems__(every.tolist()))["images"]
            inside = foreground_mask(images) & np.isin(every, rows)[:, None, None]
            for part, found in zip(self._maps(images), values, strict=True):
                found.append(part[inside])
        self.means, self.deviations = (np.array([f(np.concatenate(v)) for v in values]) for f in (np.mean, np.std))
        return learned | {"means": self.means.tolist(), "deviations": self.deviations.tolist()}

    def _maps(self, images: torch.Tensor) -> list[np.ndarray]:
        method, intensity = self.parts
        heat = torch.cat([torch.as_tensor(method.anomaly_map(part)).cpu() for part in images.split(BATCH_SIZE)])
        return [maps_at_size(heat, images.shape[-2:]), intensity.anomaly_map(images.cpu()).numpy()]

    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        scores = zip(self._maps(images), self.means, self.deviations, strict=True)
        return torch.from_numpy(sum((part - mean) / np.maximum(sd, 1e-12) for part, mean, sd in scores))
