"""Choose the post-processing of a method on validation patients: how much smoothing helps depends on the lesions."""

import numpy as np
import torch

from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.pixel_counts import PixelCounts
from diffusers_cf.evaluation.postprocessing import PostProcessing, foreground_mask
from diffusers_cf.evaluation.protocol import maps_at_size, rows_by_patient


RAW = PostProcessing(1, 0.0, clear_rim=False)  # changes nothing in the foreground
# Post-processing to choose from: the paper's, and gentler filters without and with one across slices.
CHAINS_TO_TRY = (
    PostProcessing(),
    *(PostProcessing(size, sigma, clear_rim=False) for size in (1, 3, 5) for sigma in (0.0, 0.5, 1.0, 1.5)),
)


def maps_of_split(method, slices, chain, batch_size: int = 32, progress=None) -> tuple[np.ndarray, np.ndarray]:
    """Return the post-processed maps of all slices of a split and their foreground, `(N, H, W)`.

    Args:
        method (`AnomalyMethod`): the teacher.
        slices (`SliceDataset`): the split.
        chain (`PostProcessing`): of the maps.
        batch_size (`int`): slices in a call, unless the method needs whole patients.
        progress (`tqdm`, *optional*): counts slices.
    """
    size = (slices.preprocessing["size"],) * 2
    maps, inside = np.zeros((len(slices), *size), np.float16), np.zeros((len(slices), *size), bool)
    for name, rows in rows_by_patient(slices, np.arange(len(slices))).items():
        images = slices.collate(slices.__getitems__(rows.tolist()))["images"]
        parts = [images] if method.whole_patient else images.split(batch_size)
        heat = maps_at_size(torch.cat([torch.as_tensor(method.anomaly_map(part)).cpu() for part in parts]), size)
        if not np.isfinite(heat).all():
            raise InputError(f"patient {name}: the teacher's map holds NaN or infinite values")
        maps[rows], inside[rows] = chain.apply(heat, images, slices.slices[rows]), foreground_mask(images)
        if progress is not None:
            progress.update(len(rows))
    return maps, inside


def choose_chain(
    method, slices, batch_size: int = 32, progress=None
) -> tuple[PostProcessing, dict[PostProcessing, PixelCounts]]:
    """Return the post-processing of `CHAINS_TO_TRY` with the highest AUPRC in the foreground of all patients, and all their counts.

    Args:
        method (`AnomalyMethod`): anything with `anomaly_map` and `whole_patient`.
        slices (`SliceDataset`): the validation split, with masks.
        batch_size (`int`): slices in a call, unless the method needs whole patients.
        progress (`tqdm`, *optional*): counts slices.
    """
    maps, inside = maps_of_split(method, slices, RAW, batch_size, progress)
    counts = {chain: PixelCounts() for chain in CHAINS_TO_TRY}
    for rows in rows_by_patient(slices, np.arange(len(maps))).values():
        batch = slices.collate(slices.__getitems__(rows.tolist()))
        for chain, count in counts.items():
            heat = chain.apply(maps[rows], batch["images"], slices.slices[rows])
            count.update(heat[inside[rows]], np.asarray(batch["masks"])[inside[rows]])
    return max(counts, key=lambda chain: counts[chain].average_precision()), counts
