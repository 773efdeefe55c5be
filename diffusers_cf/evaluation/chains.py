"""Choose the post-processing of a method on validation patients: how much smoothing helps depends on the lesions."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from diffusers_cf.evaluation.pixel_counts import PixelCounts
from diffusers_cf.evaluation.postprocessing import PostProcessing, foreground_mask
from diffusers_cf.evaluation.protocol import Patient, maps_of_patients, rows_by_patient


RAW = PostProcessing(1, 0.0, clear_rim=False)  # changes nothing in the foreground
# Post-processing to choose from: the paper's, and gentler filters without and with one across slices.
CHAINS_TO_TRY = (
    PostProcessing(),
    *(PostProcessing(size, sigma, clear_rim=False) for size in (1, 3, 5) for sigma in (0.0, 0.5, 1.0, 1.5)),
)


def maps_of_rows(
    method, slices, rows: Sequence[int] | None = None, batch_size: int | None = 32, device: str | torch.device = "cpu",
    progress=None,
) -> Iterator[tuple[Patient, np.ndarray]]:  # fmt: skip
    """Yield each patient with its maps `(S, H, W)`, before post-processing.

    Args:
        method (`AnomalyMethod`): makes the maps.
        slices (`SliceDataset`): a split.
        rows (`Sequence[int]`, *optional*): rows of the split; all by default.
        batch_size (`int`, *optional*): slices in a call, unless the method needs whole patients.
        device (`str` or `torch.device`): where the method computes.
        progress (`tqdm`, *optional*): counts slices.

    Raises:
        InputError: a map holds NaN or infinite values.
    """
    rows = np.arange(len(slices)) if rows is None else np.asarray(rows)
    patients = (Patient(slices, name, found) for name, found in rows_by_patient(slices, rows).items())
    options = {"batch_size": batch_size, "device": device, "progress": progress}
    for patient, maps, _ in maps_of_patients(method.anomaly_map, patients, method.whole_patient, options):
        yield patient, maps


def maps_of_split(method, slices, chain: PostProcessing, **options) -> tuple[np.ndarray, np.ndarray]:
    """Return the post-processed maps of all slices of a split and their foreground, float16 and bool `(N, H, W)`.

    Args:
        method (`AnomalyMethod`): makes the maps.
        slices (`SliceDataset`): the split.
        chain (`PostProcessing`): of the maps.
        **options: of [`maps_of_rows`].
    """
    size = (slices.preprocessing["size"],) * 2
    maps, inside = np.zeros((len(slices), *size), np.float16), np.zeros((len(slices), *size), bool)
    for patient, heat in maps_of_rows(method, slices, **options):
        maps[patient.rows] = chain.apply(heat, patient.images, patient.slices)
        inside[patient.rows] = foreground_mask(patient.images)
    return maps, inside


def choose_chain(
    method, slices, bright_channel: int | None = None, **options
) -> tuple[PostProcessing, dict[PostProcessing, PixelCounts]]:
    """Return the post-processing with the highest AUPRC in the foreground of all patients, and the counts of each.

    Args:
        method (`AnomalyMethod`): makes the maps.
        slices (`SliceDataset`): the validation split, with masks.
        bright_channel (`int`, *optional*): of every chain but `RAW`.
        **options: of [`maps_of_rows`].
    """
    chains = [*(replace(chain, bright_channel=bright_channel) for chain in CHAINS_TO_TRY), RAW]
    counts = {chain: PixelCounts() for chain in chains}
    for patient, maps in maps_of_rows(method, slices, **options):
        inside = foreground_mask(patient.images)
        for chain, count in counts.items():
            heat = chain.apply(maps, patient.images, patient.slices)
            count.update(heat[inside], patient.masks[inside])
    return max(counts, key=lambda chain: counts[chain].average_precision()), counts
