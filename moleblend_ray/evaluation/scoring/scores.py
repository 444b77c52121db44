"""Scores of predictions against labels, some of which are missing (NaN)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.data.sources.classes import Exclusive, in_groups
from moleblend_ray.errors import DataError, TrainingError
from moleblend_ray.evaluation.molecules.censoring import LabelBounds
from moleblend_ray.evaluation.tasks import Metric, TaskKind, metrics_of, no_column_has

logger = logging.getLogger(__name__)

DECISION: Final = 0.5
"""Above this probability a molecule is taken for class 1."""

F = TypeVar("F", bound=Callable[..., object])

_NAMED: Final = 5
"""Columns that a message names; the others it counts."""


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
    """Columns that could not be scored: no label, or (but for errors) labels that are all equal."""


def score(
    metric: Metric,
    predictions: NDArray[np.floating],
    labels: NDArray[np.floating],
    columns: Sequence[str],
    bounds: LabelBounds | None = None,
    exclusive: Exclusive = (),
) -> Score:
    """Score (M, T) predictions against (M, T) labels; NaN labels are ignored, unscorable columns are named.

    Of labels that are known by ``bounds`` only, the distance of a prediction to what these allow counts as its error; they
    have no part in correlations. For classes, predictions are probabilities of class 1; metrics of the order alone take any
    monotone score. Of each group of ``exclusive`` columns one label is 1, and the most probable one is decided for. Raises
    TrainingError if a prediction is not finite, DataError if no column can be scored.
    """
    if not np.isfinite(predictions).all():
        raise TrainingError(
            f"{int((~np.isfinite(predictions)).sum())} of {predictions.size} predictions are not finite; "
            "the model diverged: lower the learning rate"
        )
    expected = labels
    if bounds is not None and metric.is_error:
        expected = np.where(bounds.known, bounds.within(predictions.astype(np.float64)), labels)
    if metric.decides:
        predictions = decided(predictions, exclusive)
    formulas = formulas_of(metric, len(columns), exclusive, _FORMULAS, recall)
    scored: dict[str, float] = {}
    for index, column in enumerate(columns):
        if not _is_scorable(metric, labels[~np.isnan(labels[:, index]), index]):
            continue
        known = ~np.isnan(expected[:, index])
        scored[column] = formulas[index](
            expected[known, index].astype(np.float64), predictions[known, index].astype(np.float64)
        )
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


def require_scorable(
    metric: Metric, labels: NDArray[np.floating], columns: Sequence[str], part: str
) -> None:
    """Raise DataError if (M, T) ``labels`` of a ``part`` of the molecules allow no score; log columns that will have none."""
    cannot = [
        column
        for column, values in zip(columns, labels.T, strict=True)
        if not _is_scorable(metric, values[~np.isnan(values)])
    ]
    if len(cannot) == len(columns):
        # Errors can be computed where correlations cannot; all metrics of classes need both.
        remedy = (
            ", another split or task.metric=mae" if _has_error_for(metric) else " or another split"
        )
        raise DataError(
            f"{metric.value} cannot be computed on the {len(labels)} molecules of the {part} part: {no_column_has(columns)} {_needs(metric)} "
            f"there; use more molecules{remedy}"
        )
    if cannot:
        shown = ", ".join(cannot[:_NAMED]) + (" ..." if len(cannot) > _NAMED else "")
        logger.info(
            "%d of %d columns have no %s in the %s part: %s",
            len(cannot),
            len(columns),
            metric.value,
            part,
            shown,
        )


def other_scores(
    metric: Metric,
    predictions: NDArray[np.floating],
    labels: NDArray[np.floating],
    columns: Sequence[str],
    bounds: LabelBounds | None = None,
    exclusive: Exclusive = (),
) -> dict[str, float]:
    """Values of the other metrics for the same type of labels, of those that these labels allow; as :func:`score`."""
    found = {}
    for other in metrics_of(metric.kind):
        if other is not metric:
            # Labels that are all equal have errors, but no correlation.
            with contextlib.suppress(DataError):
                found[other.value] = score(
                    other, predictions, labels, columns, bounds, exclusive
                ).value
    return found


def decided(predictions: NDArray[np.floating], exclusive: Exclusive) -> NDArray[np.float64]:
    """(M, T) 1 where the probabilities ``predictions`` (M, T) say that the label is 1, otherwise 0: above a half, or in a group of
    ``exclusive`` columns the greatest, of equal ones the first."""
    found = (predictions > DECISION).astype(np.float64)
    for places in exclusive:
        found[:, places] = np.eye(len(places))[predictions[:, places].argmax(axis=1)]
    return found


def formulas_of(
    metric: Metric, num_columns: int, exclusive: Exclusive, formulas: Mapping[Metric, F], recall: F
) -> list[F]:
    """The formula for each column, that of the metric in ``formulas``. The balanced accuracy of several classes is the mean of the
    ``recall`` of each."""
    grouped = in_groups(exclusive)
    is_mean = metric is Metric.BALANCED_ACCURACY
    return [
        recall if is_mean and column in grouped else formulas[metric]
        for column in range(num_columns)
    ]


def _is_scorable(metric: Metric, known: NDArray[np.floating]) -> bool:
    return len(known) > 0 and (metric.is_error or known.min() < known.max())


# scikit-learn and SciPy have all of these, but every worker of a sweep would spend seconds on their import.


def roc_auc(labels: NDArray[np.float64], predictions: NDArray[np.float64]) -> float:
    """Probability that a random positive ranks above a random negative, ties counting half.

    Labels (K,) are 0 and 1, both present.
    """
    positive = labels == 1
    num_positive = int(positive.sum())
    rank_sum = float(_midranks(predictions)[positive].sum())
    pairs = num_positive * (len(labels) - num_positive)
    return (rank_sum - num_positive * (num_positive + 1) / 2) / pairs


def average_precision(labels: NDArray[np.float64], predictions: NDArray[np.float64]) -> float:
    """Mean over the positives of the precision among all molecules that rank at least as high, without interpolation
    (Davis & Goadrich, ICML 2006, on why not). Labels (K,) are 0 and 1, both present."""
    values, inverse = np.unique(-predictions, return_inverse=True)
    positives = np.bincount(inverse, weights=labels, minlength=len(values))
    molecules = np.bincount(inverse, minlength=len(values))
    precision = np.cumsum(positives) / np.cumsum(molecules)
    return float(precision @ positives / positives.sum())


def recall(labels: NDArray[np.float64], decisions: NDArray[np.float64]) -> float:
    """Share of the positives that are decided for; labels (K,) and decisions (K,) are 0 and 1, one label at least is 1."""
    return float(decisions[labels == 1].mean())


def balanced_accuracy(labels: NDArray[np.float64], decisions: NDArray[np.float64]) -> float:
    """Mean over both classes of the share that is decided for. Labels (K,), both of them present, and decisions (K,) are 0 and
    1."""
    return (recall(labels, decisions) + recall(1.0 - labels, 1.0 - decisions)) / 2


def mcc(labels: NDArray[np.float64], decisions: NDArray[np.float64]) -> float:
    """Matthews' correlation coefficient of labels (K,), both of them present, and decisions (K,), which are 0 and 1; 0 if all
    decisions are equal."""
    if decisions.min() == decisions.max():
        return 0.0
    return float(np.corrcoef(labels, decisions)[0, 1])


def r2(labels: NDArray[np.float64], predictions: NDArray[np.float64]) -> float:
    """1 - residual / total sum of squares of (K,) labels that are not all equal."""
    residual = np.sum((predictions - labels) ** 2)
    return float(1.0 - residual / np.sum((labels - labels.mean()) ** 2))


def spearman(labels: NDArray[np.float64], predictions: NDArray[np.float64]) -> float:
    """Pearson's correlation of the ranks, equal values sharing their mean rank; 0 if all predictions are equal.

    Labels (K,) are not all equal.
    """
    ranks, predicted = _midranks(labels), _midranks(predictions)
    ranks, predicted = ranks - ranks.mean(), predicted - predicted.mean()
    norm = np.sqrt((ranks @ ranks) * (predicted @ predicted))
    return float(ranks @ predicted / norm) if norm > 0 else 0.0


def _rmse(labels: NDArray[np.float64], predictions: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean((predictions - labels) ** 2)))


def _mae(labels: NDArray[np.float64], predictions: NDArray[np.float64]) -> float:
    return float(np.mean(np.abs(predictions - labels)))


def _midranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K,) ranks from 1, equal values sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


_FORMULAS: Final[Mapping[Metric, Callable[[NDArray[np.float64], NDArray[np.float64]], float]]] = {
    Metric.ROC_AUC: roc_auc,
    Metric.PR_AUC: average_precision,
    Metric.BALANCED_ACCURACY: balanced_accuracy,
    Metric.MCC: mcc,
    Metric.RMSE: _rmse,
    Metric.MAE: _mae,
    Metric.R2: r2,
    Metric.SPEARMAN: spearman,
}


def _has_error_for(metric: Metric) -> bool:
    """Whether the task has another metric that needs less: an error in the task's units."""
    return metric.kind is TaskKind.REGRESSION and not metric.is_error


def _needs(metric: Metric) -> str:
    if metric.is_error:
        return "a label"
    return (
        "labels of both classes" if metric.kind is TaskKind.CLASSIFICATION else "labels that differ"
    )


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
