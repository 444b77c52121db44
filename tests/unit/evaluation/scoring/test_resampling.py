"""Intervals of scores: draws are scored as lists with repetitions are, and intervals hold what they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moleblend_ray.data.sources.classes import Exclusive
from moleblend_ray.errors import DataError
from moleblend_ray.evaluation.molecules.censoring import LabelBounds
from moleblend_ray.evaluation.scoring import resampling as module
from moleblend_ray.evaluation.scoring.resampling import DRAWS, Resampling, gains
from moleblend_ray.evaluation.scoring.scores import score
from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions
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


def plain_score(metric: Metric, part: PartPredictions, exclusive: Exclusive = ()) -> float:
    """The score of a list of molecules; NaN if it has none."""
    names = [str(column) for column in range(part.labels.shape[1])]
    try:
        return score(metric, part.predictions, part.labels, names, part.bounds, exclusive).value
    except DataError:
        return NAN


def test_a_scaffold_that_is_most_of_a_fold_is_in_all_draws() -> None:
    phenyl = [f"{'C' * length}c1ccccc1" for length in range(1, 61)]
    others = [
        f"{'C' * length}{ring}" for ring in ("C1CC1", "C1CCC1", "C1CCCC1") for length in range(1, 5)
    ]
    chains = ["C" * length for length in range(1, 11)]
    found = Resampling.of([*phenyl, *others, *chains], most_of_one=20)
    assert found.of_units == "scaffolds"
    assert len(np.unique(found.units)) == 60 + 3 + 10
    assert len(np.unique(found.units[60:72])) == 3
    whole = Resampling.of([*phenyl, *others, *chains], most_of_one=60)
    np.testing.assert_equal(whole.units, Resampling.of([*phenyl, *others, *chains]).units)
    assert len(np.unique(whole.units)) == 1 + 3 + 10


@pytest.mark.parametrize("metric", list(Metric))
def test_the_molecules_of_a_fold_are_scored_on_the_draws_of_all(metric: Metric) -> None:
    part = molecules(metric, 5, 40)
    draws = one_by_one(40)
    half = part_of(part.labels[15:35], part.predictions[15:35])
    found = draws.scores(metric, [half], ["a"], slice(15, 35))
    times = np.concatenate([chunk.T for chunk in draws._drawn()]).astype(np.int64)
    for draw in range(25):
        assert found[draw] == pytest.approx(
            plain_score(metric, repeated(half, times[draw, 15:35])), nan_ok=True
        )


def one_by_one(count: int) -> Resampling:
    return Resampling(units=np.arange(count), of_units="molecules")


def resampled_scores(metric: Metric, *parts: PartPredictions) -> Array:
    names = [str(column) for column in range(parts[0].labels.shape[1])]
    return one_by_one(len(parts[0].smiles)).scores(metric, parts, names)


def interval(scores: Array, count: int = 100) -> tuple[float, float] | None:
    """That of scores of draws from so many molecules, which are right on average."""
    return one_by_one(count).interval(scores, float(np.nanmean(scores)))


def scores_of(metric: Metric, part: PartPredictions, times: NDArray[np.int64]) -> Array:
    """Those of draws with these numbers of times (D, M)."""
    weights = np.ascontiguousarray(times.T, dtype=np.float64)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Resampling, "_drawn", lambda self: iter([weights]))
        return resampled_scores(metric, part)


@pytest.mark.parametrize("metric", list(Metric))
@given(seed=st.integers(0, 10**6), count=st.integers(1, 12), num_columns=st.integers(1, 3))
def test_a_draw_is_scored_as_a_list_with_repetitions(
    metric: Metric, seed: int, count: int, num_columns: int
) -> None:
    part = molecules(metric, seed, count, num_columns)
    times = np.random.default_rng(seed + 1).multinomial(count, [1 / count] * count, size=8)
    times[0] = 1
    found = scores_of(metric, part, times)
    expected = [plain_score(metric, repeated(part, row)) for row in times]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("metric", [Metric.ROC_AUC, Metric.BALANCED_ACCURACY, Metric.MCC])
def test_classes_of_one_column_count_together_in_draws_as_in_scores(metric: Metric) -> None:
    rng = np.random.default_rng(0)
    labels = np.zeros((30, 4))
    labels[:, [2, 0, 3]] = np.eye(3)[rng.integers(0, 3, 30)]
    labels[:, 1] = rng.integers(0, 2, 30)
    part = part_of(labels, rng.random((30, 4)))
    draws, names, groups = one_by_one(30), list("abcd"), ([2, 0, 3],)
    found = draws.scores(metric, [part], names, exclusive=groups)
    times = np.concatenate([chunk.T for chunk in draws._drawn()]).astype(np.int64)
    for draw in range(25):
        expected = plain_score(metric, repeated(part, times[draw]), groups)
        assert found[draw] == pytest.approx(expected)
    apart = draws.scores(metric, [part], names)
    assert np.allclose(found, apart) == (metric is Metric.ROC_AUC)


def test_bounds_count_in_errors_as_in_scores() -> None:
    labels = np.array([[1.0], [NAN], [NAN], [4.0]])
    at_least = np.array([[NAN], [5.0], [1.0], [NAN]])
    part = part_of(
        labels,
        np.array([[2.0], [2.0], [2.0], [2.0]]),
        LabelBounds(at_least=at_least, at_most=np.full((4, 1), NAN)),
    )
    times = np.array([[1, 1, 1, 1], [0, 3, 0, 1], [2, 0, 1, 1]])
    for metric in (Metric.RMSE, Metric.MAE):
        found = scores_of(metric, part, times)
        expected = [plain_score(metric, repeated(part, row)) for row in times]
        np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("metric", [Metric.RMSE, Metric.ROC_AUC])
def test_seeds_are_averaged_on_the_same_draws(metric: Metric) -> None:
    first = molecules(metric, 0, 40)
    second = part_of(first.labels, first.predictions[::-1].copy())
    one, two, both = (
        resampled_scores(metric, *parts) for parts in ([first], [second], [first, second])
    )
    assert len(one) == DRAWS
    np.testing.assert_allclose(both, (one + two) / 2)
    np.testing.assert_array_equal(one, resampled_scores(metric, first))


def test_draws_do_not_depend_on_how_many_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    part = molecules(Metric.MAE, 3, 50)
    whole = resampled_scores(Metric.MAE, part)
    monkeypatch.setattr(module, "_CHUNK", 50 * 7)
    np.testing.assert_allclose(resampled_scores(Metric.MAE, part), whole, rtol=1e-12)


def test_every_molecule_is_drawn_once_on_average() -> None:
    times = np.concatenate(list(one_by_one(30)._drawn()), axis=1)
    assert times.shape == (30, DRAWS)
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
        limits = interval(resampled_scores(metric, part))
        assert limits is not None
        inside += limits[0] <= truth <= limits[1]
    # Of 300 intervals that hold it with probability 0.95, 274 to 296 do (99.9 %); those of the percentile bootstrap do a little less.
    assert 270 <= inside <= 296


def test_the_difference_of_models_that_err_alike_is_surer_than_their_scores() -> None:
    rng = np.random.default_rng(0)
    labels = rng.normal(size=(100, 1))
    errors = rng.normal(size=(100, 1))
    model, other = (part_of(labels, labels + errors * scale) for scale in (1.0, 1.1))
    draws = [resampled_scores(Metric.RMSE, part) for part in (model, other)]
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
    part = part_of(labels, np.arange(50.0)[:, None] % 7)
    scores = resampled_scores(Metric.ROC_AUC, part)
    assert 0.3 < np.isnan(scores).mean() < 0.45
    assert interval(scores) is None
    labels[:4] = 1.0
    assert interval(resampled_scores(Metric.ROC_AUC, part)) is None
    labels[:5] = 1.0
    assert interval(resampled_scores(Metric.ROC_AUC, part)) is not None


def test_a_score_that_draws_make_too_high_has_no_interval_and_its_differences_may_have_one() -> (
    None
):
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 20)) < np.linspace(0.05, 0.5, 20)).astype(float)
    errors = rng.normal(size=labels.shape)
    others = 0.7 * errors + 0.7 * rng.normal(size=labels.shape)
    names = [str(column) for column in range(20)]
    drawn = one_by_one(60)
    parts = [part_of(labels, labels + error) for error in (errors, others)]
    for metric, is_given in ((Metric.PR_AUC, False), (Metric.ROC_AUC, True)):
        draws = [drawn.scores(metric, [part], names) for part in parts]
        scores = [plain_score(metric, part) for part in parts]
        assert [drawn.interval(*pair) is not None for pair in zip(draws, scores, strict=True)] == [
            is_given
        ] * 2
        assert drawn.interval(gains(metric, *draws), gains(metric, *scores)) is not None


def test_few_molecules_have_no_interval() -> None:
    part = molecules(Metric.RMSE, 0, 10)
    scores = resampled_scores(Metric.RMSE, part)
    assert interval(scores, 10) is not None
    assert interval(scores, 9) is None
    # All draws of a single molecule are equal, and would look like certainty.
    alone = Resampling.of(["c1ccccc1"])
    part = part_of(np.zeros((1, 1)), np.ones((1, 1)))
    assert alone.interval(alone.scores(Metric.RMSE, [part], ["y"]), 1.0) is None


def test_a_perfect_score_has_no_interval() -> None:
    labels = np.repeat([0.0, 1.0], 20)[:, None]
    scores = resampled_scores(Metric.ROC_AUC, part_of(labels, labels))
    assert (scores == 1.0).all()
    assert interval(scores) is None
    assert interval(gains(Metric.ROC_AUC, scores, scores)) is None


def test_molecules_of_a_scaffold_are_drawn_together_and_those_without_rings_alone() -> None:
    rings = [f"{'C' * length}c1ccccc1" for length in range(6)]
    others = [f"{'C' * length}C1CCCC{'C' * size}1" for size in range(8) for length in range(2)]
    chains = ["CCO", "CCN", "not a molecule"]
    drawn = Resampling.of([*rings, *others, *chains])
    assert drawn.to_json() == {"draws": 1000, "level": 0.95, "of": "scaffolds", "units": 12}
    times = np.concatenate(list(drawn._drawn()), axis=1)
    assert (times[:6] == times[0]).all()
    assert (times[6] == times[7]).all()
    assert not (times[6] == times[8]).all()
    assert not (times[-1] == times[-2]).all()
    assert times[[0, *range(6, 22, 2), 22, 23, 24]].sum(axis=0).tolist() == [12.0] * 1000


@pytest.mark.parametrize("num_rings", [0, 12])
def test_rows_of_one_molecule_are_drawn_together(num_rings: int) -> None:
    """With rings or without, and whether scaffolds are drawn or molecules."""
    rings = [f"C1CCCC{'C' * size}1" for size in range(num_rings)]
    chains = ["CCO", "CCN", "CCO", "CCC", "CCO"]
    drawn = Resampling.of([*rings, *chains])
    assert drawn.to_json()["units"] == num_rings + 3
    times = np.concatenate(list(drawn._drawn()), axis=1)[num_rings:]
    assert (times[0] == times[2]).all()
    assert (times[0] == times[4]).all()
    assert not (times[0] == times[1]).all()


def test_groups_of_the_split_are_drawn_where_there_are_ten() -> None:
    smiles = [f"C1CCCC{'C' * size}1" for size in range(24)]
    drawn = Resampling.of(smiles, groups=np.arange(24) // 2)
    assert drawn.to_json() == {"draws": 1000, "level": 0.95, "of": "groups", "units": 12}
    pairs = drawn.units.reshape(12, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all()
    few = Resampling.of(smiles, groups=np.arange(24) // 3)
    assert few.to_json() == Resampling.of(smiles).to_json()
    assert few.to_json()["of"] == "scaffolds"


def test_a_group_that_is_most_of_a_fold_is_in_all_draws() -> None:
    smiles = [f"C1CCCC{'C' * size}1" for size in range(24)]
    groups = np.append(np.zeros(10, int), np.arange(14) // 2 + 1)
    drawn = Resampling.of(smiles, 9, groups)
    assert (drawn.of_units, len(set(drawn.units))) == ("groups", 10 + 7)
    assert Resampling.of(smiles, 10, groups).of_units == "scaffolds"


def test_a_test_part_of_few_series_is_drawn_by_molecules() -> None:
    drawn = Resampling.of([f"{'C' * length}c1ccccc1" for length in range(30)])
    assert drawn.to_json()["of"] == "molecules"
    assert drawn.to_json()["units"] == 30


def test_series_that_share_their_errors_make_intervals_wider() -> None:
    rng = np.random.default_rng(0)
    smiles = [f"{'C' * length}C1CCCC{'C' * size}1" for size in range(20) for length in range(10)]
    labels = rng.normal(size=(200, 1))
    errors = np.repeat(rng.normal(size=20), 10)[:, None]
    part = part_of(labels, labels + errors)
    drawn = Resampling.of(smiles)
    by_scaffold = drawn.interval(
        drawn.scores(Metric.RMSE, [part], ["y"]), plain_score(Metric.RMSE, part)
    )
    by_molecule = interval(resampled_scores(Metric.RMSE, part))
    assert by_scaffold is not None
    assert by_molecule is not None
    assert by_scaffold[1] - by_scaffold[0] > 2 * (by_molecule[1] - by_molecule[0])
