"""Scores of predictions against labels, some of which are missing (NaN)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.errors import DataError, TrainingError
from moleblend_ray.evaluation.tasks import Metric


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A score over all columns of a task."""

    metric: Metric
    """The metric."""
    value: float
    """Mean over the scored columns, in the labels' unit for errors."""
    columns: Mapping[str, float]
    """Score of each scored column."""
    columns_left_out: tuple[str, ...]
    """Columns that could not be scored: no label, or (ROC-AUC) labels of one class only."""


def score(
    metric: Metric,
    predictions: NDArray[np.floating],
    labels: NDArray[np.floating],
    columns: Sequence[str],
) -> Score:
    """Score (M, T) predictions against (M, T) labels; NaN labels are ignored, unscorable columns are named.

    For ROC-AUC, predictions may be any monotone score, such as a logit.
    """
    if not np.isfinite(predictions).all():
        raise DataError(
            f"{int((~np.isfinite(predictions)).sum())} of {predictions.size} predictions are not finite; "
            "the model diverged: lower the learning rate"
        )
    scored: dict[str, float] = {}
    for index, column in enumerate(columns):
        known = ~np.isnan(labels[:, index])
        value = _column_score(metric, predictions[known, index], labels[known, index])
        if value is not None:
            scored[column] = value
    if not scored:
        raise DataError(
            f"{metric.value} cannot be computed on these {len(labels)} molecules: none of the "
            f"{len(columns)} label columns has {_needs(metric)}; use more data or another split"
        )
    return Score(
        metric=metric,
        value=float(np.mean(list(scored.values()))),
        columns=scored,
        columns_left_out=tuple(column for column in columns if column not in scored),
    )


def _column_score(
    metric: Metric, predictions: NDArray[np.floating], labels: NDArray[np.floating]
) -> float | None:
    if len(labels) == 0:
        return None
    if metric is Metric.ROC_AUC:
        if labels.min() == labels.max():
            return None
        return roc_auc(labels, predictions)
    errors = predictions.astype(np.float64) - labels
    if metric is Metric.RMSE:
        return float(np.sqrt(np.mean(errors**2)))
    return float(np.mean(np.abs(errors)))


def roc_auc(labels: NDArray[np.floating], predictions: NDArray[np.floating]) -> float:
    """Probability that a random positive ranks above a random negative, ties counting half.

    Labels (K,) are 0 and 1, both present. (scikit-learn has this as well, but every worker of a sweep would spend
    seconds on its import.)
    """
    _, inverse, counts = np.unique(predictions, return_inverse=True, return_counts=True)
    midranks = np.cumsum(counts) - (counts - 1) / 2
    positive = labels == 1
    num_positive = int(positive.sum())
    rank_sum = float(midranks[inverse][positive].sum())
    pairs = num_positive * (len(labels) - num_positive)
    return (rank_sum - num_positive * (num_positive + 1) / 2) / pairs


def _needs(metric: Metric) -> str:
    return "labels of both classes" if metric is Metric.ROC_AUC else "a label"


def is_better(metric: Metric, candidate: float, best: float) -> bool:
    """Whether ``candidate`` is a strictly better score than ``best``."""
    return candidate > best if metric.higher_is_better else candidate < best


def worst_score(metric: Metric) -> float:
    """A score that any finite one beats."""
    return -np.inf if metric.higher_is_better else np.inf


class Judged(Protocol):
    """Something that a score on the validation molecules is known of."""

    @property
    def valid_score(self) -> float | None:
        """None if it has none."""


C = TypeVar("C", bound=Judged)


def best_candidate(metric: Metric, candidates: Sequence[C]) -> C:
    """The candidate with the best validation score, the first of equals; TrainingError if none has a score."""
    best: tuple[C, float] | None = None
    for candidate in candidates:
        value = candidate.valid_score
        if value is not None and (best is None or is_better(metric, value, best[1])):
            best = candidate, value
    if best is None:
        raise TrainingError(f"none of {len(candidates)} candidates has a validation score")
    return best[0]
