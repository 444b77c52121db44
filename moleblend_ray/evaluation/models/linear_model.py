"""Penalised linear models: ridge regression for numbers, logistic regression for classes, by scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.data.sources.classes import Exclusive, in_groups
from moleblend_ray.evaluation.molecules.censoring import LabelBounds
from moleblend_ray.evaluation.tasks import TaskKind

_GRIDS: Final[Mapping[TaskKind, Sequence[Mapping[str, float]]]] = {
    TaskKind.CLASSIFICATION: [{"C": value} for value in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)],
    TaskKind.REGRESSION: [{"alpha": value} for value in (1.0, 10.0, 100.0, 1000.0, 10000.0)],
}


_TOLERANCE: Final = 1e-6
"""By what share a turn of a fit to bounds lowers what it minimises, at least, or the fit ends."""
_MOST_TURNS: Final = 100
_SMALLEST_STEP: Final = 1e-3


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
    exclusive: Exclusive = (),
) -> LinearModel:
    """Fit each column of ``labels`` (N, T), NaN where missing, to ``inputs`` (N, D).

    Columns without labels, or with equal ones, get zeros. ``balanced`` weights all classes alike. Of numbers that are known by
    ``bounds`` only, the squared distance to what these allow counts. Of each group of ``exclusive`` columns one label is 1, and
    the softmax of their logits is fitted.
    """
    found = LinearModel(np.zeros((labels.shape[1], inputs.shape[1])), np.zeros(labels.shape[1]))
    for places in exclusive:
        _fit_classes(
            found, places, _scikit_model(kind, penalty, balanced), inputs, labels[:, places]
        )
    grouped = in_groups(exclusive)
    for column, values in enumerate(labels.T):
        if column in grouped:
            continue
        known = ~np.isnan(values)
        targets = values[known]
        if len(targets) and targets.min() < targets.max():
            model = _scikit_model(kind, penalty, balanced)
            weights = _fitted(model, inputs[known], targets)
            if bounds is not None:
                weights = _fitted_to_bounds(model, inputs, values, bounds[:, column], weights)
            found.weight[column], found.bias[column] = weights[:-1], weights[-1]
    return found


def _fit_classes(
    found: LinearModel,
    places: Sequence[int],
    model: Any,
    inputs: NDArray[Any],
    labels: NDArray[np.float64],
) -> None:
    """Fit the columns ``places`` of ``found`` to the classes of which (N, K) ``labels`` say one is 1, where they do."""
    known = (labels == 1).sum(axis=1) == 1
    classes = labels[known].argmax(axis=1)
    if len(np.unique(classes)) <= 1:
        return
    model.fit(inputs[known], classes)
    own = np.array(places)[model.classes_]
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:
        # Of two classes scikit-learn has one function, of the second.
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    found.weight[own], found.bias[own] = weight, bias


def _fitted(model: Any, inputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    """(D + 1,) the weights of ``model``, and its bias, after a fit."""
    model.fit(inputs, targets)
    return np.append(model.coef_, model.intercept_).astype(np.float64)


def _fitted_to_bounds(
    model: Any,
    inputs: NDArray[Any],
    values: NDArray[np.float64],
    bounds: LabelBounds,
    weights: NDArray[np.float64],
) -> NDArray[np.float64]:
    """(D + 1,) weights of a ridge regression on the known ``values`` (N,) and the ``bounds`` (N,), from ``weights`` that fit the
    values alone.

    The penalised sum of squared distances is convex and made of quadratic pieces: on each, some bounds are not respected, and
    count as labels. A turn goes towards the minimum of the piece at hand, all the way or as far as the sum gets smaller (the
    finite Newton method, Keerthi and DeCoste, J. Mach. Learn. Res. 6, 341 (2005)).
    """
    used = bounds.known | ~np.isnan(values)
    inputs, values, bounds = inputs[used], values[used], bounds[used]

    def with_targets(
        weights: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        found: NDArray[np.float64] = inputs @ weights[:-1] + weights[-1]
        return found, np.where(bounds.known, bounds.within(found), values)

    def penalised(weights: NDArray[np.float64]) -> float:
        found, targets = with_targets(weights)
        return float(((found - targets) ** 2).sum() + model.alpha * (weights[:-1] ** 2).sum())

    lowest = penalised(weights)
    for _ in range(_MOST_TURNS):
        found, targets = with_targets(weights)
        counted = ~bounds.known | (found != targets)
        step, share = _fitted(model, inputs[counted], targets[counted]) - weights, 1.0
        while penalised(weights + share * step) > lowest and share > _SMALLEST_STEP:
            share /= 2
        reached = penalised(weights + share * step)
        if reached >= lowest * (1 - _TOLERANCE):
            return weights
        weights, lowest = weights + share * step, reached
    return weights


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
