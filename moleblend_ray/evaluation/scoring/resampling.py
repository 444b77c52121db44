"""How much of a score is chance of which molecules were tested: a bootstrap over the test molecules.

A test part is a sample. Drawn again, it would give other scores, and a model that is a little better on it need not be better.
So its molecules are drawn with replacement many times, every model is scored on each draw, and the middle 95 % of these scores
are the interval (percentile bootstrap: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13). All models
are scored on the same draws: the interval of a difference between two is much narrower than those of their scores, as both find
the same molecules hard (Nicholls, J. Comput. Aided Mol. Des. 30, 103 (2016)).

Molecules of one scaffold are alike, so whole scaffolds are drawn (cluster bootstrap: Davison and Hinkley, "Bootstrap Methods and
their Application", 1997, section 3.8). Drawn one by one, as if they were independent, they give intervals that are too narrow
where a test part has series of molecules (``benchmarks/score_intervals.py``). With a split by groups of the user's, these are drawn.

A draw is given as the number of times that each molecule is in it, and scores are computed with these weights, which is
the score of :mod:`~moleblend_ray.evaluation.scoring.scores` on a list with repetitions.

Shape legend: D draws, M molecules, K molecules with a label of a column, G different values among K, T columns.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.chemistry.scaffolds import murcko_scaffold
from moleblend_ray.data.sources.classes import Exclusive
from moleblend_ray.errors import DataError
from moleblend_ray.evaluation.scoring.scores import decided, formulas_of
from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions
from moleblend_ray.evaluation.tasks import Metric

DRAWS: Final = 1000
"""Number of draws."""

LEVEL: Final = 0.95
"""Share of the draws inside an interval."""

_SEED: Final = 0
"""All models are scored on the same draws, and so are those of a repeated command."""

_FEWEST_UNITS: Final = 10
"""With fewer scaffolds, molecules are drawn one by one: the test part is of these few series, not a sample of series. With fewer
molecules there are no intervals: of 5 molecules with normal errors, 75 % of those of an RMSE hold the true one, of 10 83 %, of 20
91 %."""

_MIN_SCORED: Final = 0.99
"""Share of draws that must have a score: those with one class alone have none. Of fewer than five molecules of a class there are
more; intervals of a ROC-AUC from three such molecules hold the true one in 73 % of the cases, from five in 87 %."""

_MOST_BIAS: Final = 0.5
"""Largest distance of the mean of the draws from the score, in standard deviations of the draws. The PR-AUC of few positives is too
high on average, and that of draws again; the mean of many columns varies less and is as wrong. Of 12 columns of 100 molecules, 62 %
of the intervals held the true one. Efron and Tibshirani (chapter 10) ignore biases of up to a quarter; at half, 83 % hold it."""

_CHUNK: Final = 1 << 21
"""Weights in memory at once."""

Array = NDArray[np.float64]

N = TypeVar("N", float, Array)


class Scored(NamedTuple):
    """A model on the molecules of a test part."""

    score: float
    """Its score on the molecules as they are."""
    draws: Array
    """(D,) its score on each draw."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Resampling:
    """Draws of the molecules of a test part."""

    units: NDArray[np.int64]
    """(M,) what each molecule is drawn with: the number of its group, of its scaffold, or of itself."""
    of_units: Literal["groups", "scaffolds", "molecules"]
    """What is drawn as a whole."""

    @classmethod
    def of(
        cls,
        smiles: Sequence[str],
        most_of_one: int | None = None,
        groups: NDArray[np.int64] | None = None,
    ) -> Resampling:
        """Draws of molecules by their SMILES (M,), or by the ``groups`` (M,) of a split by group, where there are ten. One without
        rings, or of which RDKit finds no scaffold, is drawn alone, with all its rows.

        So are those of a scaffold or group with more than ``most_of_one`` molecules (None: of none). As a whole it would be in some
        draws and not in others, but any test part of this kind has its share of it, as it has of phenyl compounds.
        """
        if groups is not None:
            by_group = _drawn_together(
                smiles, [f"group {number}" for number in groups], most_of_one
            )
            if int(by_group.max()) + 1 >= _FEWEST_UNITS:
                return cls(units=by_group, of_units="groups")
        scaffolds = [_scaffold(text) or text for text in smiles]
        by_scaffold = _drawn_together(smiles, scaffolds, most_of_one)
        if int(by_scaffold.max()) + 1 >= _FEWEST_UNITS:
            return cls(units=by_scaffold, of_units="scaffolds")
        return cls(units=_numbered(smiles), of_units="molecules")

    def scores(
        self,
        metric: Metric,
        parts: Sequence[PartPredictions],
        columns: Sequence[str],
        rows: slice | None = None,
        *,
        exclusive: Exclusive = (),
    ) -> Array:
        """(D,) score of each draw of the molecules, which are the same in all ``parts``, mean over these (the seeds of a model).

        ``rows``: only these of the molecules are in ``parts``, such as those of a fold. A score is the mean over the columns that
        have one in this draw, with groups of ``exclusive`` ones as for :func:`score`; NaN if none has.
        """
        chunks = []
        for drawn in self._drawn():
            weights = drawn if rows is None else drawn[rows]
            scores = [
                _weighted_score(metric, part, len(columns), exclusive, weights) for part in parts
            ]
            chunks.append(np.mean(scores, axis=0))
        return np.concatenate(chunks)

    def interval(self, scores: Array, of_all: float) -> tuple[float, float] | None:
        """Limits of the middle :data:`LEVEL` of the scores (D,) of the draws, or of their differences; ``of_all`` is that of the test
        molecules as they are.

        None if it would look surer than it is: of fewer than ten molecules, if too many draws have no score, if all draws have one
        score (a perfect ROC-AUC, which other molecules need not give), and if the scores of draws are too high or low on average.
        """
        known = scores[~np.isnan(scores)]
        if self._count < _FEWEST_UNITS or len(known) < _MIN_SCORED * len(scores):
            return None
        low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        if low == high or abs(known.mean() - of_all) > _MOST_BIAS * known.std():
            return None
        return float(low), float(high)

    def comparison(self, metric: Metric, model: Scored, baseline: Scored) -> dict[str, Any]:
        """The part of ``results.json`` about how sure the score of a baseline is, and that the model is better."""
        differences = gains(metric, model.draws, baseline.draws)
        return {
            "test_interval": self.interval(baseline.draws, baseline.score),
            "model_is_better_by": self.interval(
                differences, gains(metric, model.score, baseline.score)
            ),
        }

    def to_json(self) -> dict[str, Any]:
        """The part of ``results.json`` about how intervals of scores are made."""
        return {"draws": DRAWS, "level": LEVEL, "of": self.of_units, "units": self._count}

    @property
    def _count(self) -> int:
        """Number of groups, scaffolds or molecules that are drawn from."""
        return int(self.units.max()) + 1

    def _drawn(self) -> Iterator[Array]:
        """(M, D') how often each molecule is in a draw, for some of the draws at a time; the same in each call."""
        count = self._count
        generator = np.random.default_rng((_SEED, count))
        size = max(1, _CHUNK // len(self.units))
        for start in range(0, DRAWS, size):
            width = min(size, DRAWS - start)
            rows = generator.integers(count, size=(width, count))
            flat = (rows + count * np.arange(width)[:, None]).ravel()
            times = np.bincount(flat, minlength=width * count).reshape(width, count)
            yield np.ascontiguousarray(times.T, dtype=np.float64)[self.units]


def _drawn_together(
    smiles: Sequence[str], names: Sequence[str], most_of_one: int | None
) -> NDArray[np.int64]:
    """(M,) a number for each name (M,), and for each molecule of a name that more than ``most_of_one`` have."""
    if most_of_one is None:
        return _numbered(names)
    sizes = Counter(names)
    pairs = zip(smiles, names, strict=True)
    return _numbered([text if sizes[name] > most_of_one else name for text, name in pairs])


def _numbered(names: Sequence[str]) -> NDArray[np.int64]:
    """(M,) a number for each different name, from 0."""
    numbers: NDArray[np.int64] = np.unique(names, return_inverse=True)[1].astype(np.int64)
    return numbers


def _scaffold(smiles: str) -> str:
    try:
        return murcko_scaffold(smiles)
    except DataError:
        return ""


def gains(metric: Metric, model: N, other: N) -> N:
    """By how much ``model`` is better than ``other``, in each draw (D,) or in all; negative where it is worse."""
    return model - other if metric.higher_is_better else other - model


def _weighted_score(
    metric: Metric,
    part: PartPredictions,
    num_columns: int,
    exclusive: Exclusive,
    weights: Array,
) -> Array:
    """(D',) mean over columns of the score of each draw."""
    labels, predictions = part.labels, part.predictions
    if part.bounds is not None and metric.is_error:
        labels = np.where(part.bounds.known, part.bounds.within(predictions), labels)
    if metric.decides:
        predictions = decided(predictions, exclusive)
    formulas = formulas_of(metric, num_columns, exclusive, _FORMULAS, _recall)
    found = np.full((num_columns, weights.shape[1]), np.nan)
    for column in range(num_columns):
        known = np.flatnonzero(~np.isnan(labels[:, column]))
        if len(known) and not np.isnan(part.labels[:, column]).all():
            found[column] = formulas[column](
                labels[known, column], predictions[known, column], weights[known]
            )
    with warnings.catch_warnings():
        # A draw in which no column has a score.
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        mean: Array = np.nanmean(found, axis=0)
    return mean


# -- scores with weights: labels (K,), predictions (K,), weights (K, D) -> (D,); NaN where a draw has no score -----------------


def _rmse(labels: Array, predictions: Array, weights: Array) -> Array:
    return np.sqrt(_ratio((predictions - labels) ** 2 @ weights, weights.sum(axis=0)))


def _mae(labels: Array, predictions: Array, weights: Array) -> Array:
    return _ratio(np.abs(predictions - labels) @ weights, weights.sum(axis=0))


def _r2(labels: Array, predictions: Array, weights: Array) -> Array:
    residual = (predictions - labels) ** 2 @ weights
    # Beside a mean far from 0 the difference of squares would be rounding.
    centred = labels - labels.mean()
    total = centred**2 @ weights - _ratio((centred @ weights) ** 2, weights.sum(axis=0))
    varied = np.where(total > 1e-12 * (centred**2 @ weights), total, 0.0)
    return 1.0 - _ratio(residual, varied)


def _roc_auc(labels: Array, predictions: Array, weights: Array) -> Array:
    order, groups = _sorted_groups(predictions)
    positive, negative = _classes(labels[order], weights[order], groups)
    lower = np.cumsum(negative, axis=0) - 0.5 * negative
    pairs = positive.sum(axis=0) * negative.sum(axis=0)
    return _ratio(np.einsum("gd,gd->d", positive, lower), pairs)


def _average_precision(labels: Array, predictions: Array, weights: Array) -> Array:
    order, groups = _sorted_groups(-predictions)
    positive, negative = _classes(labels[order], weights[order], groups)
    found, wrong = np.cumsum(positive, axis=0), np.cumsum(negative, axis=0)
    # Before the first molecule of a draw nothing is found, and nothing counted.
    precision = found / np.maximum(found + wrong, 1.0)
    total = positive.sum(axis=0)
    score = _ratio(np.einsum("gd,gd->d", positive, precision), total)
    return np.where(negative.sum(axis=0) > 0, score, np.nan)


def _recall(labels: Array, decisions: Array, weights: Array) -> Array:
    found = _ratio((labels * decisions) @ weights, labels @ weights)
    return np.where((1.0 - labels) @ weights > 0, found, np.nan)


def _balanced_accuracy(labels: Array, decisions: Array, weights: Array) -> Array:
    of_ones = _recall(labels, decisions, weights)
    return (of_ones + _recall(1.0 - labels, 1.0 - decisions, weights)) / 2


def _mcc(labels: Array, decisions: Array, weights: Array) -> Array:
    total, true, chosen = weights.sum(axis=0), labels @ weights, decisions @ weights
    product = total * ((labels * decisions) @ weights) - true * chosen
    norm = np.sqrt(true * (total - true) * chosen * (total - chosen))
    score = np.divide(product, norm, out=np.zeros_like(norm), where=norm > 0)
    # As in scores: equal decisions have no correlation, equal labels no score.
    return np.where(true * (total - true) > 0, score, np.nan)


def _spearman(labels: Array, predictions: Array, weights: Array) -> Array:
    ranks, predicted = (_midranks(values, weights) for values in (labels, predictions))
    mean = (weights.sum(axis=0) + 1.0) / 2
    ranks, predicted = ranks - mean, predicted - mean
    products = [
        np.einsum("kd,kd,kd->d", weights, *pair)
        for pair in ((ranks, predicted), (ranks, ranks), (predicted, predicted))
    ]
    norm = np.sqrt(products[1] * products[2])
    score = np.divide(products[0], norm, out=np.zeros_like(norm), where=norm > 0)
    # As in scores: predictions that are all equal have no correlation, labels that are have no score.
    return np.where(products[1] > 0, score, np.nan)


_FORMULAS: Final[Mapping[Metric, Callable[[Array, Array, Array], Array]]] = {
    Metric.ROC_AUC: _roc_auc,
    Metric.PR_AUC: _average_precision,
    Metric.BALANCED_ACCURACY: _balanced_accuracy,
    Metric.MCC: _mcc,
    Metric.RMSE: _rmse,
    Metric.MAE: _mae,
    Metric.R2: _r2,
    Metric.SPEARMAN: _spearman,
}


def _ratio(numerator: Array, denominator: Array) -> Array:
    """The quotient; NaN where the denominator is 0."""
    nothing = np.full(np.shape(denominator), np.nan)
    found: Array = np.divide(numerator, denominator, out=nothing, where=denominator > 0)
    return found


def _sorted_groups(values: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(K,) ascending order of ``values``, and (G,) where in it each different value begins."""
    order = np.argsort(values, kind="stable")
    ascending = values[order]
    begins = np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1]))
    return order, begins


def _summed(values: Array, groups: NDArray[np.int64]) -> Array:
    """(G, D) sums of (K, D) over the groups of :func:`_sorted_groups`."""
    if len(groups) == len(values):
        return values
    found: Array = np.add.reduceat(values, groups, axis=0)
    return found


def _classes(labels: Array, weights: Array, groups: NDArray[np.int64]) -> tuple[Array, Array]:
    """(G, D) weights of the positives and of the negatives in each group."""
    positive = weights * (labels == 1)[:, None]
    return _summed(positive, groups), _summed(weights - positive, groups)


def _midranks(values: Array, weights: Array) -> Array:
    """(K, D) rank of each value from 1 in each draw, equal values sharing their mean rank."""
    order, groups = _sorted_groups(values)
    drawn = _summed(weights[order], groups)
    of_groups = np.cumsum(drawn, axis=0) - (drawn - 1.0) / 2
    sizes = np.diff(np.append(groups, len(values)))
    ranks = np.empty_like(weights)
    ranks[order] = np.repeat(of_groups, sizes, axis=0)
    return ranks
