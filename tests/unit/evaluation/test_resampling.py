"""Intervals of scores: draws are scored as lists with repetitions are, and intervals hold what they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moleblend_ray.errors import DataError
from moleblend_ray.evaluation import resampling
from moleblend_ray.evaluation.censoring import LabelBounds
from moleblend_ray.evaluation.resampling import gains, interval, resampled_scores
from moleblend_ray.evaluation.scores import score
from moleblend_ray.evaluation.stored_predictions import PartPredictions
from moleblend_ray.evaluation.tasks import Metric, TaskKind

Array = NDArray[np.float64]
NAN = float("nan")


def part_of(
    labels: Array, predictions: Array, bounds: LabelBounds | None = None
) -> PartPredictions:
    names = tuple(f"m{row}" for row in range(len(labels)))
    return PartPredictions(
        mol_ids=names, smiles=names, labels=labels, predictions=predictions, bounds=bounds
    )


def molecules(metric: Metric, seed: int, count: int, num_columns: int = 1) -> PartPredictions:
    """Some labels are missing, and predictions have ties."""
    rng = np.random.default_rng(seed)
    shape = count, num_columns
    labels = rng.integers(0, 2 if metric.kind is TaskKind.CLASSIFICATION else 6, shape).astype(
        float
    )
    labels[rng.random(shape) < 0.2] = NAN
    return part_of(
        labels + (100.0 if metric is Metric.R2 else 0.0), rng.integers(0, 5, shape) / 2.0
    )


def repeated(part: PartPredictions, times: NDArray[np.int64]) -> PartPredictions:
    rows = np.repeat(np.arange(len(times)), times)
    bounds = part.bounds and part.bounds[rows]
    return part_of(part.labels[rows], part.predictions[rows], bounds)


def plain_score(metric: Metric, part: PartPredictions) -> float:
    """The score of a list of molecules; NaN if it has none."""
    names = [str(column) for column in range(part.labels.shape[1])]
    try:
        return score(metric, part.predictions, part.labels, names, part.bounds).value
    except DataError:
        return NAN


def drawn(monkeypatch: pytest.MonkeyPatch, times: NDArray[np.int64]) -> None:
    """Let the draws be these (D, M)."""
    weights = np.ascontiguousarray(times.T, dtype=np.float64)
    monkeypatch.setattr(resampling, "_drawn", lambda count: iter([weights]))


@pytest.mark.parametrize("metric", list(Metric))
@given(seed=st.integers(0, 10**6), count=st.integers(1, 12), num_columns=st.integers(1, 3))
def test_a_draw_is_scored_as_a_list_with_repetitions(
    metric: Metric, seed: int, count: int, num_columns: int
) -> None:
    part = molecules(metric, seed, count, num_columns)
    times = np.random.default_rng(seed + 1).multinomial(count, [1 / count] * count, size=8)
    times[0] = 1
    with pytest.MonkeyPatch.context() as monkeypatch:
        drawn(monkeypatch, times)
        found = resampled_scores(metric, [part], [str(c) for c in range(num_columns)])
    expected = [plain_score(metric, repeated(part, row)) for row in times]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_bounds_count_in_errors_as_in_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.array([[1.0], [NAN], [NAN], [4.0]])
    at_least = np.array([[NAN], [5.0], [1.0], [NAN]])
    part = part_of(
        labels,
        np.array([[2.0], [2.0], [2.0], [2.0]]),
        LabelBounds(at_least=at_least, at_most=np.full((4, 1), NAN)),
    )
    times = np.array([[1, 1, 1, 1], [0, 3, 0, 1], [2, 0, 1, 1]])
    drawn(monkeypatch, times)
    for metric in (Metric.RMSE, Metric.MAE):
        found = resampled_scores(metric, [part], ("y",))
        expected = [plain_score(metric, repeated(part, row)) for row in times]
        np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("metric", [Metric.RMSE, Metric.ROC_AUC])
def test_seeds_are_averaged_on_the_same_draws(metric: Metric) -> None:
    first = molecules(metric, 0, 40)
    second = part_of(first.labels, first.predictions[::-1].copy())
    one, two, both = (
        resampled_scores(metric, parts, ("y",)) for parts in ([first], [second], [first, second])
    )
    assert len(one) == resampling.DRAWS
    np.testing.assert_allclose(both, (one + two) / 2)
    np.testing.assert_array_equal(one, resampled_scores(metric, [first], ("y",)))


def test_draws_do_not_depend_on_how_many_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    part = molecules(Metric.MAE, 3, 50)
    whole = resampled_scores(Metric.MAE, [part], ("y",))
    monkeypatch.setattr(resampling, "_CHUNK", 50 * 7)
    np.testing.assert_allclose(resampled_scores(Metric.MAE, [part], ("y",)), whole, rtol=1e-12)


def test_every_molecule_is_drawn_once_on_average() -> None:
    times = np.concatenate(list(resampling._drawn(30)), axis=1)
    assert times.shape == (30, resampling.DRAWS)
    assert (times.sum(axis=0) == 30).all()
    # Of 30 molecules, each is missing in (1 - 1/30)^30 = 0.362 of the draws.
    assert (times == 0).mean() == pytest.approx(0.362, abs=0.01)


@pytest.mark.parametrize("metric", [Metric.RMSE, Metric.ROC_AUC])
def test_intervals_hold_the_score_of_all_molecules_as_often_as_they_say(metric: Metric) -> None:
    rng = np.random.default_rng(7)
    is_class = metric is Metric.ROC_AUC
    # Of a normal error of 1, and of two normal distributions one standard deviation apart: Phi(1 / sqrt(2)).
    truth = 0.7602 if is_class else 1.0
    inside = 0
    for _ in range(300):
        labels = (rng.random((120, 1)) < 0.4).astype(float)
        predictions = labels + rng.normal(size=(120, 1))
        part = part_of(labels, predictions)
        limits = interval(resampled_scores(metric, [part], ("y",)))
        assert limits is not None
        inside += limits[0] <= truth <= limits[1]
    # Of 300 intervals that hold it with probability 0.95, 274 to 296 do (99.9 %); those of the percentile bootstrap do a little less.
    assert 270 <= inside <= 296


def test_the_difference_of_models_that_err_alike_is_surer_than_their_scores() -> None:
    rng = np.random.default_rng(0)
    labels = rng.normal(size=(100, 1))
    errors = rng.normal(size=(100, 1))
    model, other = (part_of(labels, labels + errors * scale) for scale in (1.0, 1.1))
    draws = [resampled_scores(Metric.RMSE, [part], ("y",)) for part in (model, other)]
    (low, high), (other_low, other_high) = (interval(scores) or (NAN, NAN) for scores in draws)
    assert max(low, other_low) < min(high, other_high)
    difference = interval(gains(Metric.RMSE, *draws))
    assert difference is not None
    assert 0 < difference[0] < difference[1] < high - low
    back = interval(gains(Metric.RMSE, *reversed(draws)))
    assert back == pytest.approx((-difference[1], -difference[0]))
    np.testing.assert_array_equal(gains(Metric.ROC_AUC, *draws), -gains(Metric.RMSE, *draws))


def test_molecules_of_which_too_many_draws_have_one_class_have_no_interval() -> None:
    labels = np.zeros((50, 1))
    labels[0] = 1.0
    part = part_of(labels, np.linspace(0, 1, 50)[:, None])
    scores = resampled_scores(Metric.ROC_AUC, [part], ("y",))
    assert 0.3 < np.isnan(scores).mean() < 0.45
    assert interval(scores) is None
    labels[:5] = 1.0
    assert interval(resampled_scores(Metric.ROC_AUC, [part], ("y",))) is not None
