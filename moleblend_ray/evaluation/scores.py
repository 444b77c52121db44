"""Scores of predictions against labels, some of which are missing (NaN)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.errors import DataError
from moleblend_ray.evaluation.tasks import Metric


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A metric over all columns of a task."""

    metric: Metric
    """What was computed."""
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

    For ROC-AUC any monotone score (a logit) does as a prediction.
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

    Labels (K,) are 0 and 1, both present. (scikit-learn has this too, but takes seconds to import, which
    every worker of a sweep would spend.)
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
