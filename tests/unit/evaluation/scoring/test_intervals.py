"""Intervals hold the share of labels that they say, for molecules like those of validation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.stats import binom

from moleblend_ray.evaluation.scoring.intervals import Calibration, intervals_entry, mean_of
from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions


def part(labels: np.ndarray, predictions: np.ndarray) -> PartPredictions:
    """Of (M, T) arrays, or (M,) for one property."""
    labels, predictions = (values.reshape(len(labels), -1) for values in (labels, predictions))
    names = tuple(f"C{row}" for row in range(len(labels)))
    return PartPredictions(mol_ids=names, smiles=names, labels=labels, predictions=predictions)


def calibration(errors: np.ndarray) -> Calibration:
    found = Calibration.of([part(np.zeros(len(errors)), errors)])
    assert found is not None
    return found


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("num_molecules", [19, 100])
def test_a_new_label_is_inside_as_often_as_asked(coverage: float, num_molecules: int) -> None:
    # Heavy tails and a shift: nothing is assumed of the errors but that old and new ones are alike.
    generator, times = np.random.default_rng(7), 4000
    inside = 0
    for _ in range(times):
        errors = generator.standard_t(2, num_molecules + 1) + 0.3
        width = calibration(errors[:-1]).half_widths(coverage)[0]
        inside += bool(abs(errors[-1]) <= width)
    # At least what was asked, at most 1 / (n + 1) more, but for chance.
    lowest, highest = coverage, coverage + 1 / (num_molecules + 1)
    assert binom.cdf(inside, times, lowest) > 1e-3
    assert binom.sf(inside, times, highest) > 1e-3


def test_the_half_width_is_an_error_that_was_seen() -> None:
    errors = np.array([3.0, -1.0, 2.0, -5.0, 4.0, 6.0, -7.0, 8.0, 9.0])
    assert calibration(errors).half_widths(0.9).tolist() == [9.0]
    assert calibration(errors).half_widths(0.5).tolist() == [5.0]
    assert np.isnan(calibration(errors).half_widths(0.91)).all()
    assert np.isnan(calibration(errors[:8]).half_widths(0.9)).all()
    # 100 * 0.55 is a little more than 55 for a computer.
    assert calibration(np.arange(1.0, 100.0)).half_widths(0.55).tolist() == [55.0]


def test_each_property_has_its_own_width_from_its_own_labels() -> None:
    labels = np.zeros((20, 3))
    predictions = np.tile(np.arange(1.0, 21.0)[:, None], (1, 3)) * [1.0, 10.0, 1.0]
    labels[10:, 1] = np.nan
    labels[:, 2] = np.nan
    found = Calibration.of([part(labels, predictions)])
    assert found is not None
    widths = found.half_widths(0.5)
    assert widths[:2].tolist() == [11.0, 60.0]
    assert np.isnan(widths[2])


def test_errors_are_those_of_the_mean_of_all_models() -> None:
    labels = np.zeros(12)
    first, second = part(labels, np.full(12, 4.0)), part(labels, np.full(12, -2.0))
    found = Calibration.of([first, second])
    assert found is not None
    assert found.half_widths(0.9).tolist() == [1.0]
    assert mean_of([first, second]).predictions.tolist() == [[1.0]] * 12


def test_models_of_different_folds_are_judged_by_the_molecules_of_each() -> None:
    def fold(name: str, *predictions: float) -> PartPredictions:
        found = part(np.zeros(len(predictions)), np.array(predictions))
        names = tuple(name + text for text in found.smiles)
        return dataclasses.replace(found, mol_ids=names, smiles=names)

    # Two seeds of one fold, whose mean is wrong by 2 and 6, and one of another.
    parts = [fold("C", 1.0, 5.0), fold("N", 3.0, 4.0, 9.0), fold("C", 3.0, 7.0)]
    found = Calibration.of(parts)
    assert found is not None
    assert [errors.tolist() for errors in found.errors] == [[2.0, 3.0, 4.0, 6.0, 9.0]]
    assert Calibration.of([*parts, None]) is None


def test_models_of_other_molecules_or_none_have_no_common_errors() -> None:
    labels = np.arange(12.0)
    labels[3] = np.nan
    one = part(labels, np.zeros(12))
    assert Calibration.of([one, part(labels.copy(), np.ones(12))]) is not None
    others = (
        None,
        part(labels + 1.0, np.zeros(12)),
        part(labels[:11], np.zeros(11)),
        dataclasses.replace(one, smiles=one.smiles[::-1]),
        dataclasses.replace(one, mol_ids=one.mol_ids[::-1]),
    )
    for other in others:
        assert Calibration.of([one, other]) is None
    assert Calibration.of([None]) is None


def test_results_tell_how_many_test_labels_are_inside() -> None:
    valid = part(np.zeros((20, 2)), np.tile(np.arange(1.0, 21.0)[:, None], (1, 2)))
    labels = np.full((5, 2), 50.0)
    labels[0, 1] = np.nan
    errors = np.array([[0, 1], [18, 18], [19, 19], [20, 20], [-19, -19.5]], dtype=np.float64)
    predictions = 50.0 + errors
    found = intervals_entry(("a", "b"), [valid], part(labels, predictions))
    assert found == {
        "coverage": 0.9,
        "columns": {
            "a": {"half_width": 19.0, "valid_labels": 20, "test_labels": 5, "test_inside": 4},
            "b": {"half_width": 19.0, "valid_labels": 20, "test_labels": 4, "test_inside": 2},
        },
    }
    few = part(np.zeros(3), np.ones(3))
    entry = intervals_entry(("a",), [few], few)
    assert entry is not None
    assert entry["columns"]["a"]["half_width"] is None
    assert entry["columns"]["a"]["test_inside"] == 0


def test_a_fold_that_is_harder_than_the_others_is_not_inside() -> None:
    """Judged by the errors of its own molecules as well, nine of ten labels would be inside of any folds."""
    errors = np.concatenate([np.linspace(1.0, 2.0, 40), np.linspace(10.0, 20.0, 20)])
    every = part(np.zeros(60), errors)
    folds = [slice(0, 20), slice(20, 40), slice(40, 60)]
    valid = [every.take(np.arange(60)[rows]) for rows in folds]
    for of, inside in (((), 55), (folds, 40)):
        entry = intervals_entry(("a",), valid, every, of)
        assert entry is not None
        column = entry["columns"]["a"]
        assert column["half_width"] == pytest.approx(np.sort(errors)[54])
        assert (column["test_inside"], column["test_labels"]) == (inside, 60)


def test_a_fold_without_enough_labels_in_the_others_is_not_counted() -> None:
    labels = np.zeros(16)
    labels[:4] = np.nan
    every = part(labels, np.ones(16))
    folds = [slice(0, 8), slice(8, 16)]
    valid = [every.take(np.arange(16)[rows]) for rows in folds]
    entry = intervals_entry(("a",), valid, every, folds)
    assert entry is not None
    # 12 labels in all, of which 8 are in the second fold and 4 in the first: neither tells anything of the other.
    assert entry["columns"]["a"] == {
        "half_width": 1.0,
        "valid_labels": 12,
        "test_labels": 0,
        "test_inside": 0,
    }
