"""What had to change, as a map: the last line of Algorithm 1 and its variants."""

from collections.abc import Sequence

import torch


# Of a decoded counterfactual; `forward` decodes nothing (forward.py).
DECODED_MAPS = ("counterfactual", "reconstruction", "signed")
MAPS = (*DECODED_MAPS, "forward")


def heatmap(
    map: str, reference: torch.Tensor, counterfactual: torch.Tensor, signs: Sequence[float] | None = None
) -> torch.Tensor:
    """Heatmaps `(N, H, W)` of a decoded counterfactual.

    Args:
        map (`str`): one of `DECODED_MAPS`. `counterfactual` and `reconstruction` differ in their reference alone.
        reference (`torch.Tensor`): `(N, C, H, W)`, the image, or its reconstruction by the null condition.
        counterfactual (`torch.Tensor`): `(N, C, H, W)`.
        signs (`Sequence[float]`, *optional*): for `signed`, 1 or -1 for each channel.

    Raises:
        ValueError: for another map, or for `signed` without a sign for each channel.
    """
    if map not in DECODED_MAPS:
        raise ValueError(f"map is {map!r}: of a decoded counterfactual it must be one of {', '.join(DECODED_MAPS)}")
    if map != "signed":
        return anomaly_heatmap(reference, counterfactual)
    check_signs(signs, reference.shape[1])
    return signed_heatmap(reference, counterfactual, signs)


def anomaly_heatmap(reference: torch.Tensor, counterfactual: torch.Tensor) -> torch.Tensor:
    """Last line of Algorithm 1: mean over channels of |reference - counterfactual|, `(N, C, H, W)` to `(N, H, W)`."""
    return (reference - counterfactual).abs().mean(dim=1)


def check_signs(signs: object, channels: int) -> None:
    """Raises ValueError unless `signs` has a number for each channel, as the map `signed` needs them."""
    numbers = isinstance(signs, Sequence) and all(isinstance(sign, (int, float)) for sign in signs)
    if not numbers or len(signs) != channels:
        raise ValueError("map is 'signed': preprocessing holds no `signs`, one for each channel (sweep --store)")


def signed_heatmap(reference: torch.Tensor, counterfactual: torch.Tensor, signs: Sequence[float]) -> torch.Tensor:
    """Mean over channels of `sign (reference - counterfactual)`, 0 where negative; beyond the paper.

    `signs` say for each channel whether disease is brighter (1) or darker (-1): noise of either sign cancels out.
    """
    weights = torch.tensor(signs, dtype=reference.dtype, device=reference.device).reshape(1, -1, 1, 1)
    return (weights * (reference - counterfactual)).mean(dim=1).clamp(min=0)
