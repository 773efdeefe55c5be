"""How well the position of a slice alone tells its label, to compare with each map's slice AUROC."""

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer


SPLINE_KNOTS = 8


def relative_positions(patients: Sequence[str], slices: Sequence[int]) -> np.ndarray:
    """Return the position of each slice within its patient: 0 the lowest slice given, 1 the highest, 0.5 a single one.

    Args:
        patients (`Sequence[str]`): `(N,)`, patient of each slice.
        slices (`Sequence[int]`): `(N,)`, axial index of each slice.

    Returns:
        `np.ndarray`: float64 `(N,)` in [0, 1].
    """
    patients, slices = np.asarray(patients), np.asarray(slices, dtype=np.float64)
    positions = np.full(len(slices), 0.5)
    for patient in np.unique(patients):
        own = patients == patient
        low, high = slices[own].min(), slices[own].max()
        if high > low:
            positions[own] = (slices[own] - low) / (high - low)
    return positions


def position_scores(
    train_labels: Sequence[int], train_positions: Sequence[float], test_positions: Sequence[float]
) -> np.ndarray:
    """Return the probability that a slice is unhealthy given its position: logistic regression on cubic splines.

    Lesions are rare at both ends of the head, so a score that only recognises the ends already detects some of them.

    Args:
        train_labels (`Sequence[int]`): `(N,)`, 0 healthy, anything else unhealthy; both must occur.
        train_positions (`Sequence[float]`): `(N,)`, from [`relative_positions`].
        test_positions (`Sequence[float]`): `(M,)`.

    Returns:
        `np.ndarray`: float64 `(M,)` in (0, 1).
    """
    # knots over all of [0, 1]: those of the data would coincide if every patient had one slice
    splines = SplineTransformer(knots=np.linspace(0, 1, SPLINE_KNOTS)[:, None], extrapolation="constant")
    model = make_pipeline(splines, LogisticRegression(C=10.0, max_iter=1000))
    model.fit(np.asarray(train_positions)[:, None], np.asarray(train_labels) != 0)
    return model.predict_proba(np.asarray(test_positions)[:, None])[:, 1]
