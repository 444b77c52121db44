"""Penalised linear models: ridge regression for numbers, logistic regression for classes, by scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.evaluation.tasks import TaskKind

_GRIDS: Final[Mapping[TaskKind, Sequence[Mapping[str, float]]]] = {
    TaskKind.CLASSIFICATION: [{"C": value} for value in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)],
    TaskKind.REGRESSION: [{"alpha": value} for value in (1.0, 10.0, 100.0, 1000.0, 10000.0)],
}


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
) -> LinearModel:
    """Fit each column of ``labels`` (N, T), NaN where missing, to ``inputs`` (N, D).

    Columns without labels, or with equal ones, get zeros. ``balanced`` weights both classes alike.
    """
    found = LinearModel(np.zeros((labels.shape[1], inputs.shape[1])), np.zeros(labels.shape[1]))
    for column, values in enumerate(labels.T):
        known = ~np.isnan(values)
        targets = values[known]
        if len(targets) and targets.min() < targets.max():
            fitted = _scikit_model(kind, penalty, balanced).fit(inputs[known], targets)
            found.weight[column] = np.ravel(fitted.coef_)
            found.bias[column] = np.ravel(fitted.intercept_)[0]
    return found


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
