"""A bound tells training that predictions beyond it are wrong, and nothing else; scores know measured labels alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize

from moleblend_ray.chemistry.scaffolds import Split
from moleblend_ray.evaluation.models.baselines import (
    BOUNDS_SETTING,
    BaselineData,
    BaselineKind,
    candidate_groups,
    predict_group,
)
from moleblend_ray.evaluation.models.finetune import StartingPoint, finetune_once, predict_mean
from moleblend_ray.evaluation.models.linear_model import fit_linear
from moleblend_ray.evaluation.models.losses import Targets, masked_loss
from moleblend_ray.evaluation.molecules.censoring import LabelBounds, bounds_entry
from moleblend_ray.evaluation.molecules.dataset import LabelledMolecules
from moleblend_ray.evaluation.results.results import labels_entry
from moleblend_ray.evaluation.scoring.intervals import Calibration, mean_of
from moleblend_ray.evaluation.scoring.scores import score
from moleblend_ray.evaluation.scoring.stored_predictions import read_predictions, write_predictions
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import Metric, TaskKind, resolve_task

from ..conftest import MakeLabelled, all_smiles

NAN = float("nan")
SIZE_TASK = resolve_task("size", columns=("y0",), kind=TaskKind.REGRESSION)
CPU = torch.device("cpu")


def atoms_of(smiles: Sequence[str]) -> np.ndarray:
    """(M,) numbers of heavy atoms."""
    return np.array([float(sum(c.isalpha() for c in text)) for text in smiles])


def bounds_of(at_least: object, at_most: object) -> LabelBounds:
    return LabelBounds(
        at_least=np.asarray(at_least, dtype=np.float64),
        at_most=np.asarray(at_most, dtype=np.float64),
    )


def test_bounds_fill_the_places_of_labels_alone() -> None:
    bounds = bounds_of([[1.0, NAN, NAN, 1.0]], [[NAN, -2.0, NAN, 4.0]])
    assert bounds.filled(np.array([[NAN, NAN, 7.0, NAN]])).tolist() == [[1.0, -2.0, 7.0, 2.5]]


@given(arrays(np.float64, (6, 2), elements=st.floats(-50, 50)))
def test_the_nearest_allowed_value_is_the_prediction_or_the_bound(predictions: np.ndarray) -> None:
    bounds = bounds_of([[1.0, NAN]] * 3 + [[NAN, NAN]] * 3, [[NAN, -2.0]] * 3 + [[NAN, 3.0]] * 3)
    within, known = bounds.within(predictions), bounds.known
    assert np.isnan(within[~known]).all()
    expected = np.stack(
        [np.maximum(predictions[:, 0], 1.0), np.minimum(predictions[:, 1], bounds.values[:, 1])],
        axis=1,
    )
    assert (within[known] == expected[known]).all()
    assert (bounds.respected(predictions) == (known & (expected == predictions))).all()


@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
def test_the_loss_of_a_bound_is_that_of_the_distance_beyond_it(loss: str) -> None:
    labels = np.array([[0.5, NAN, NAN, NAN]])
    bounds = bounds_of([[NAN, 1.0, NAN, NAN]], [[NAN, NAN, -1.0, NAN]])
    targets = Targets.of(labels, bounds)
    assert targets.num_known(np.array([0])) == 3
    for outputs, distances in (
        ([0.0, 0.25, 1.0, 9.0], [-0.5, -0.75, 2.0]),
        ([0.5, 3.0, -2.0, 9.0], [0.0, 0.0, 0.0]),
        ([1.0, 1.0, -0.5, 9.0], [0.5, 0.0, 0.5]),
    ):
        found = torch.tensor([outputs], requires_grad=True)
        shown = targets.for_outputs(found, np.array([0]))
        value = masked_loss(TaskKind.REGRESSION, found, shown, regression_loss=loss)
        apart = torch.tensor([distances], requires_grad=True)
        zeros = torch.zeros_like(apart)
        expected = masked_loss(TaskKind.REGRESSION, apart, zeros, regression_loss=loss)
        (gradient,) = torch.autograd.grad(value, found)
        (beyond,) = torch.autograd.grad(expected, apart)
        assert value.item() == expected.item()
        assert gradient[0, :3].tolist() == beyond[0].tolist()
        assert gradient[0, 3].item() == 0.0


def test_bounds_do_not_hide_an_output_that_is_not_a_number() -> None:
    labels = np.full((1, 2), NAN)
    targets = Targets.of(labels, bounds_of([[1.0, NAN]], [[NAN, 2.0]]))
    for column in range(2):
        outputs = torch.zeros(1, 2)
        outputs[0, column] = NAN
        shown = targets.for_outputs(outputs, np.array([0]))
        assert masked_loss(TaskKind.REGRESSION, outputs, shown).isnan()


def test_targets_without_bounds_are_the_labels() -> None:
    labels = np.array([[0.5, NAN], [NAN, 2.0]])
    targets = Targets.of(labels, None)
    shown = targets.for_outputs(torch.full((2, 2), 7.0), np.array([1, 0]))
    np.testing.assert_equal(shown.numpy(), labels[::-1].astype(np.float32))
    assert targets.num_known(np.array([0, 1])) == 2


# With a highest measured value of -2, one label in nine is measured.
@pytest.mark.parametrize("highest", [2.0, -2.0])
@pytest.mark.parametrize("alpha", [1.0, 100.0])
@pytest.mark.parametrize("limit", [NAN, 0.5])
def test_a_linear_model_with_bounds_is_the_minimum_of_its_penalised_distances(
    alpha: float, highest: float, limit: float
) -> None:
    generator = np.random.default_rng(3)
    inputs = generator.normal(size=(120, 4))
    truth = inputs @ np.array([2.0, -1.0, 0.5, 0.0]) + 0.3 * generator.normal(size=120) + 1.0
    above, below = truth > highest, truth < highest - 3.0
    labels = np.where(above | below, NAN, truth)[:, None]
    bounds = bounds_of(
        np.where(above, highest, NAN)[:, None], np.where(below, highest - 3.0, NAN)[:, None]
    )
    # With a limit, labels above lie between two bounds, too narrow for most.
    bounds.at_most[above] = highest + limit
    labels[:5], bounds.at_least[:5], bounds.at_most[:5] = NAN, NAN, NAN  # nothing is known of these

    def objective(weights: np.ndarray) -> float:
        found = inputs @ weights[:4] + weights[4]
        known = ~np.isnan(labels[:, 0])
        apart = np.where(known, found - labels[:, 0], found - bounds.within(found[:, None])[:, 0])
        return float(np.nansum(apart**2) + alpha * (weights[:4] ** 2).sum())

    model = fit_linear(TaskKind.REGRESSION, inputs, labels, {"alpha": alpha}, bounds=bounds)
    found = np.append(model.weight[0], model.bias[0])
    best = minimize(objective, np.zeros(5), method="BFGS").x
    np.testing.assert_allclose(found, best, atol=1e-3)
    without = fit_linear(TaskKind.REGRESSION, inputs, labels, {"alpha": alpha})
    assert objective(found) < objective(np.append(without.weight[0], without.bias[0]))


@pytest.fixture
def censored(make_labelled: MakeLabelled) -> LabelledMolecules:
    """Labels are numbers of heavy atoms; of those with 8 and more only that is known, of every other small one nothing."""
    smiles = all_smiles()
    size = atoms_of(smiles)
    large = size >= 8
    molecules = make_labelled(smiles, np.where(large, NAN, size))
    return dataclasses.replace(
        molecules,
        bounds=bounds_of(np.where(large, 8.0, NAN)[:, None], np.full((len(smiles), 1), NAN)),
    )


def test_training_learns_from_bounds_where_nothing_else_is_known(
    make_labelled: MakeLabelled, tiny_start: StartingPoint
) -> None:
    smiles = all_smiles()
    size = atoms_of(smiles)
    large = size >= 8
    # For training numbers of the small molecules and bounds of the large ones; for validation the numbers of all.
    labels = np.concatenate([np.where(large, NAN, size), size])
    bounds = np.concatenate([np.where(large, 8.0, NAN), np.full(len(size), NAN)])[:, None]
    known = make_labelled([*smiles, *smiles], labels)
    bounded = dataclasses.replace(known, bounds=bounds_of(bounds, np.full_like(bounds, NAN)))
    rows = np.arange(len(smiles))
    below = {}
    for name, molecules in (("with bounds", bounded), ("without", known)):
        result = finetune_once(
            molecules,
            rows,
            rows + len(rows),
            task=SIZE_TASK,
            start=tiny_start,
            settings=FinetuneSettings(learning_rate=5e-3, batch_size=16, epochs=20, patience=99),
            seed=0,
            device=CPU,
        )
        predictions = predict_mean(result.model, result.trained, molecules, rows[large], 32, CPU)
        below[name] = np.maximum(8.0 - predictions, 0.0).mean()
    # The largest number that was measured is 7.
    assert below["without"] > 1.0
    assert below["with bounds"] < 0.5 * below["without"]


def test_a_step_of_bounds_alone_is_a_step(
    censored: LabelledMolecules, tiny_start: StartingPoint
) -> None:
    assert censored.bounds is not None
    bounded = censored.bounds.known[:, 0]
    rows = np.arange(len(censored))
    # The measured labels come last, so that whole batches hold bounds alone.
    small, large = rows[~bounded], rows[bounded]
    result = finetune_once(
        censored,
        np.concatenate([large, small]),
        small,
        task=SIZE_TASK,
        start=tiny_start,
        settings=FinetuneSettings(learning_rate=1e-3, batch_size=1, epochs=1),
        seed=0,
        device=CPU,
    )
    assert np.isfinite(result.history[0].train_loss)
    assert result.history[0].train_loss > 0


def test_scales_and_intervals_are_of_measured_labels(
    censored: LabelledMolecules, tmp_path: Path
) -> None:
    rows = np.arange(len(censored))
    split = Split(train=rows[::2], valid=rows[1::4], test=rows[3::4])
    # Of the large molecules every other one is predicted 3 below its bound.
    beyond = 8.0 + np.where(rows % 8 < 4, 1.0, -3.0)[:, None]
    predictions = np.where(np.isnan(censored.labels), beyond, censored.labels + 0.5)
    write_predictions(str(tmp_path), censored, split, predictions)
    valid, test = (read_predictions(str(tmp_path), part, ("y0",)) for part in ("valid", "test"))
    assert valid is not None
    assert test is not None
    assert censored.bounds is not None
    np.testing.assert_equal(test.labels, censored.labels[split.test])
    assert test.bounds is not None
    np.testing.assert_equal(test.bounds.at_least, censored.bounds.at_least[split.test])
    np.testing.assert_equal(test.bounds.at_most, censored.bounds.at_most[split.test])
    calibration = Calibration.of([valid])
    assert calibration is not None
    assert calibration.half_widths(0.5).tolist() == [0.5]
    num_bounds = int(censored.bounds.known[split.test].sum())
    wrong = int((beyond[split.test] < 8.0)[censored.bounds.known[split.test]].sum())
    found = bounds_entry(("y0",), test.bounds, mean_of([test, test]).predictions)["y0"]
    assert (found["test_bounds"], found["test_respected"]) == (num_bounds, num_bounds - wrong)
    assert 0 < wrong < num_bounds
    assert found["test_distance"] == pytest.approx(3.0 * (wrong / num_bounds) ** 0.5)
    counted = labels_entry(TaskKind.REGRESSION, censored, split._asdict())["y0"]["test"]
    assert counted == {"labels": len(split.test) - num_bounds, "bounds": num_bounds}


@pytest.mark.parametrize("metric", [metric for metric in Metric if not metric.decides])
def test_errors_count_the_distance_to_a_bound_and_correlations_do_not(metric: Metric) -> None:
    labels = np.array([[1.0, 0.0], [2.0, 1.0], [NAN, NAN], [NAN, NAN]])
    bounds = bounds_of(
        [[NAN, NAN], [NAN, NAN], [5.0, NAN], [NAN, NAN]], [[NAN] * 2] * 3 + [[0.0, NAN]]
    )
    predictions = np.array([[1.5, 0.0], [2.0, 1.0], [2.0, 9.0], [-3.0, 9.0]])
    without = score(metric, predictions, labels, ("a", "b"))
    found = score(metric, predictions, labels, ("a", "b"), bounds)
    assert found.columns["b"] == without.columns["b"]
    expected = {Metric.RMSE: ((0.5**2 + 3**2) / 4) ** 0.5, Metric.MAE: 3.5 / 4}
    assert found.columns["a"] == pytest.approx(expected.get(metric, without.columns["a"]))


def test_a_column_of_bounds_alone_has_no_score() -> None:
    labels, bounds = np.array([[1.0, NAN]]), bounds_of([[NAN, 3.0]], [[NAN, NAN]])
    found = score(Metric.RMSE, np.array([[2.0, 2.0]]), labels, ("a", "b"), bounds)
    assert (dict(found.columns), found.columns_left_out) == ({"a": 1.0}, ("b",))


def baseline_data(molecules: LabelledMolecules, kind: BaselineKind) -> BaselineData:
    size = atoms_of(molecules.smiles)
    bits = (size[:, None] > np.arange(3, 15)).astype(np.uint8)
    rows = np.arange(len(molecules))
    return BaselineData(
        task=SIZE_TASK,
        mol_ids=molecules.mol_ids,
        smiles=molecules.smiles,
        features=bits if kind is not BaselineKind.DESCRIPTORS else size[:, None],
        labels=molecules.labels,
        bounds=molecules.bounds,
        columns=("y0",),
        train=rows,
        valid=rows,
        test=rows,
    )


@pytest.mark.parametrize("kind", [BaselineKind.FOREST, BaselineKind.BOOSTING])
def test_trees_try_bounds_as_labels_and_without(
    censored: LabelledMolecules, kind: BaselineKind
) -> None:
    data = baseline_data(censored, kind)
    plain, groups = (
        candidate_groups(
            kind, TaskKind.REGRESSION, data.labels, num_trees=20, num_rounds=16, censored=both
        )
        for both in (False, True)
    )
    assert len(groups) == 2 * len(plain)
    bounded = np.flatnonzero(np.isnan(data.labels[:, 0]))
    largest = {}
    for group in (groups[0], groups[len(plain)]):
        predictions = predict_group(data, kind, group, bounded, 0, 1)[-1]
        largest[group[0][BOUNDS_SETTING]] = float(predictions.max())
    without = dataclasses.replace(data, bounds=None)
    expected = predict_group(without, kind, plain[0], bounded, 0, 1)[-1]
    assert largest["left_out"] == float(expected.max()) <= 7.0
    assert 7.5 < largest["as_labels"] <= 8.0 + 1e-9


def test_the_linear_baseline_goes_beyond_bounds(censored: LabelledMolecules) -> None:
    data = baseline_data(censored, BaselineKind.DESCRIPTORS)
    rows = np.arange(len(censored))
    (group,) = candidate_groups(
        BaselineKind.DESCRIPTORS,
        TaskKind.REGRESSION,
        data.labels,
        num_trees=1,
        num_rounds=1,
        censored=True,
    )
    (predictions,) = predict_group(data, BaselineKind.DESCRIPTORS, group[:1], rows, 0, 1)
    assert censored.bounds is not None
    assert censored.bounds.respected(predictions + 0.2)[np.isnan(data.labels)].all()
    # A larger molecule is predicted larger, although both are known to have 8 atoms or more alone.
    assert predictions.max() > 10.0


def test_without_test_molecules_bounds_are_gone_with_them(censored: LabelledMolecules) -> None:
    data = dataclasses.replace(
        baseline_data(censored, BaselineKind.FOREST),
        train=np.arange(40),
        valid=np.arange(40, 50),
        test=np.arange(50, len(censored)),
    )
    seen = data.without_test()
    assert seen.bounds is not None
    assert len(seen.bounds.at_least) == len(seen.labels) == 50


def test_molecules_that_are_taken_keep_their_bounds(censored: LabelledMolecules) -> None:
    rows = np.array([95, 0, 3])
    taken = censored.take(rows)
    assert censored.bounds is not None
    assert taken.bounds is not None
    np.testing.assert_equal(taken.bounds.at_least, censored.bounds.at_least[rows])
