"""A method's map and the intensity of FLAIR together: tissue that is both unexpected and bright."""

from collections.abc import Iterator, Sequence

import torch

from diffusers_cf.baselines.method import AnomalyMethod, Grid
from diffusers_cf.baselines.thresholding import ZERO, RobustZThresholding
from diffusers_cf.images import resize_images


BATCH_SIZE = 32  # slices of a patient in one call of the method


class IntensityCombination(AnomalyMethod):
    """The square root of a method's map times the positive part of FLAIR's robust z-score within the patient.

    Nothing is learned. Where the method sees no change, or FLAIR is darker than the patient's median, it is 0. The root
    makes patients comparable in whom the method's maps differ in size.

    Args:
        method ([`AnomalyMethod`]): makes the map; its settings and candidates are those of the combination.
        modalities (`Sequence[str]`): names of the channels, in their order; one is FLAIR.

    Raises:
        InputError: no channel is FLAIR.
    """

    whole_patient = True

    def __init__(self, method: AnomalyMethod, modalities: Sequence[str]):
        self.method, self.intensity = method, RobustZThresholding(modalities)

    @property
    def settings(self) -> dict:
        """Settings of the method that makes the map."""
        return self.method.settings

    @settings.setter
    def settings(self, settings: dict) -> None:
        self.method.settings = settings

    @property
    def candidates(self) -> Sequence[dict]:
        """Candidates of the method that makes the map; it chooses by its own maps."""
        return self.method.candidates

    @candidates.setter
    def candidates(self, candidates: Sequence[dict]) -> None:
        self.method.candidates = candidates

    @property
    def network_evaluations_per_slice(self) -> float:
        return self.method.network_evaluations_per_slice

    def candidates_on(self, grid: Grid) -> Sequence[dict]:
        return self.method.candidates_on(grid)

    def learn(self, slices) -> dict:
        return self.method.learn(slices)

    def maps_of_candidates(self, images: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        return self.method.maps_of_candidates(images)

    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        heat = torch.cat([torch.as_tensor(self.method.anomaly_map(part)).cpu() for part in images.split(BATCH_SIZE)])
        z = self.intensity.anomaly_map(images.cpu()) - ZERO
        return resize_images(heat[:, None], tuple(images.shape[-2:]))[:, 0].clamp(min=0).sqrt() * z.clamp(min=0)
