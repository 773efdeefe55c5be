"""Every rival of Table 1 behind one contract: `anomaly_map(images (N, C, H, W)) -> (N, H, W)`, higher = more lesion."""

from collections.abc import Sequence

from diffusers_cf.baselines.thresholding import EqualizedThresholding, IntensityThresholding
from diffusers_cf.errors import InputError


# Method ids in the order of Table 1.
BASELINES = {
    "threshold": EqualizedThresholding,
    "threshold-<modality>": IntensityThresholding,
}


def make_baseline(method: str, modalities: Sequence[str]):
    """Returns the method of an id, made for images with these modalities.

    Args:
        method: A key of `BASELINES`, `<modality>` replaced by the name of one.
        modalities: Names of the channels, in their order.

    Raises:
        InputError: There is no such method, or the images lack the modality that it needs.
    """
    family, _, modality = method.partition("-")
    if family == "threshold" and modality:
        return IntensityThresholding(modalities, modality)
    if method not in BASELINES:
        raise InputError(f"there is no method {method}; the methods are {', '.join(BASELINES)}")
    return BASELINES[method](modalities)
