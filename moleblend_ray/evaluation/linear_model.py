"""Penalised linear models: ridge regression for numbers, logistic regression for classes, by scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.evaluation.censoring import LabelBounds
from moleblend_ray.evaluation.tasks import TaskKind

_GRIDS: Final[Mapping[TaskKind, Sequence[Mapping[str, float]]]] = {
    TaskKind.CLASSIFICATION: [{"C": value} for value in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)],
    TaskKind.REGRESSION: [{"alpha": value} for value in (1.0, 10.0, 100.0, 1000.0, 10000.0)],
}


_TOLERANCE: Final = 1e-3
"""How far the values that stand for bounds may still move when a fit ends, in standard deviations of the labels."""
_MOST_TURNS: Final = 100


def linear_grid(kind: TaskKind) -> Sequence[Mapping[str, float]]:
    """Penalties to choose from, with the names of scikit-learn."""
    return _GRIDS[kind]


class LinearModel(NamedTuple):
    """One linear function for each of T columns."""

    weight: NDArray[np.float64]
    """(T, D)."""
    bias: NDArray[np.float64]
    """(T,)."""

    def __call__(self, inputs: NDArray[Any]) -> NDArray[np.float64]:
        """(M, T) numbers, or logits, of ``inputs`` (M, D)."""
        outputs: NDArray[np.float64] = inputs @ self.weight.T + self.bias
        return outputs


def fit_linear(
    kind: TaskKind,
    inputs: NDArray[Any],
    labels: NDArray[np.float64],
    penalty: Mapping[str, float | int | str],
    *,
    balanced: bool = False,
    bounds: LabelBounds | None = None,
) -> LinearModel:
    """Fit each column of ``labels`` (N, T), NaN where missing, to ``inputs`` (N, D).

    Columns without labels, or with equal ones, get zeros. ``balanced`` weights both classes alike. Of numbers that are known by
    ``bounds`` only, the squared distance to what these allow counts.
    """
    found = LinearModel(np.zeros((labels.shape[1], inputs.shape[1])), np.zeros(labels.shape[1]))
    for column, values in enumerate(labels.T):
        known = ~np.isnan(values)
        targets = values[known]
        if len(targets) and targets.min() < targets.max():
            model = _scikit_model(kind, penalty, balanced)
            model.fit(inputs[known], targets)
            if bounds is not None:
                _fit_to_bounds(model, inputs, values, bounds[:, column])
            found.weight[column] = np.ravel(model.coef_)
            found.bias[column] = np.ravel(model.intercept_)[0]
    return found


def _fit_to_bounds(
    model: Any, inputs: NDArray[Any], values: NDArray[np.float64], bounds: LabelBounds
) -> None:
    """Fit ``model``, which is fitted to the known ``values`` (N,), to these and the ``bounds`` (N,).

    In turns, each bound stands for the nearest prediction that it allows, and the model is fitted to all. Both steps lower the
    same convex function, the penalised sum of squared distances, so this approaches its minimum.
    """
    used = bounds.known | ~np.isnan(values)
    inputs, values, bounds = inputs[used], values[used], bounds[used]
    if not bounds.known.any():
        return
    tolerance = _TOLERANCE * np.nanstd(values)
    targets = np.where(bounds.known, bounds.within(model.predict(inputs)), values)
    for _ in range(_MOST_TURNS):
        model.fit(inputs, targets)
        moved = np.where(bounds.known, bounds.within(model.predict(inputs)), values)
        change = np.abs(moved - targets).max()
        targets = moved
        if change <= tolerance:
            return


def _scikit_model(kind: TaskKind, penalty: Mapping[str, float | int | str], balanced: bool) -> Any:
    # Imported here, as it takes some time and configurations import this package as well.
    from sklearn.linear_model import LogisticRegression, Ridge

    if kind is TaskKind.REGRESSION:
        return Ridge(**penalty)
    # Newton's method: exact in a few steps, and fast enough with 200 inputs.
    weights = "balanced" if balanced else None
    return LogisticRegression(
        **penalty, solver="newton-cholesky", max_iter=200, class_weight=weights
    )
