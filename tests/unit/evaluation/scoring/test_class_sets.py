"""Sets of classes hold the share of each class that they say, also of a rare one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from moleblend_ray.evaluation.scoring.class_sets import (
    SET_NAMES,
    ClassCalibration,
    class_sets_entry,
)
from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions


def part(labels: np.ndarray, predictions: np.ndarray) -> PartPredictions:
    """Of (M, T) arrays, or (M,) for one property."""
    labels, predictions = (
        np.asarray(values, float).reshape(len(labels), -1) for values in (labels, predictions)
    )
    names = tuple(f"C{row}" for row in range(len(labels)))
    return PartPredictions(mol_ids=names, smiles=names, labels=labels, predictions=predictions)


def calibration(labels: np.ndarray, predictions: np.ndarray) -> ClassCalibration:
    found = ClassCalibration.of([part(labels, predictions)])
    assert found is not None
    return found


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("value", [0, 1])
def test_a_new_molecule_of_a_class_has_it_in_its_set_as_often_as_asked(
    coverage: float, value: int
) -> None:
    # Class 1 is rare, and the models give it low probabilities: nothing is assumed of them.
    generator, times = np.random.default_rng(5), 3000
    labels = np.array([0] * 60 + [1] * 19)
    inside = 0
    for _ in range(times):
        probabilities = generator.beta(1 + labels, 4)
        new = generator.beta(1 + value, 4, (1, 1))
        found = calibration(labels, probabilities).p_values(new).sets(coverage)[0, 0]
        inside += bool(found & (1 << value))
    count = int((labels == value).sum())
    assert binom.cdf(inside, times, coverage) > 1e-3
    assert binom.sf(inside, times, coverage + 1 / (count + 1)) > 1e-3


def test_p_values_are_shares_of_those_that_are_no_more_typical() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1, 1])
    found = calibration(labels, np.array([0.1, 0.2, 0.6, 0.4, 0.7, 0.7, 0.9]))
    p_values = found.p_values(np.array([[0.0], [0.2], [0.5], [0.7], [1.0]]))
    # Of class 0 as many as have at least this probability of 1, of class 1 as many as have at most this; and the molecule itself.
    assert p_values.of_0[:, 0].tolist() == [4 / 4, 3 / 4, 2 / 4, 1 / 4, 1 / 4]
    assert p_values.of_1[:, 0].tolist() == [1 / 5, 1 / 5, 2 / 5, 4 / 5, 5 / 5]
    sets = p_values.sets(0.7)[:, 0]
    assert [SET_NAMES[code] for code in sets] == ["0", "0", "both", "1", "1"]
    assert [SET_NAMES[code] for code in p_values.sets(0.25)[:, 0]] == ["0", "neither", "neither", "1", "1"]  # fmt: skip


def test_a_class_of_too_few_molecules_is_in_every_set_and_that_is_told() -> None:
    labels = np.array([0.0] * 9 + [1.0] * 8)
    found = calibration(labels, labels)
    assert found.never_excluded(0.9).tolist() == [[False, True]]
    assert found.never_excluded(0.8).tolist() == [[False, False]]
    sets = found.p_values(np.array([[-1.0], [2.0]])).sets(0.9)[:, 0]
    assert [SET_NAMES[code] for code in sets] == ["both", "1"]
    alone = calibration(np.zeros(3), np.zeros(3))
    assert alone.p_values(np.array([[0.5]])).of_1.tolist() == [[1.0]]


def test_each_property_has_its_own_molecules_and_missing_labels_count_for_none() -> None:
    labels = np.array([[0.0, 1.0], [0.0, np.nan], [1.0, 1.0], [np.nan, np.nan]])
    found = calibration(labels, np.tile(np.array([[0.1], [0.2], [0.3], [0.4]]), (1, 2)))
    assert found.counts.tolist() == [[2, 1], [0, 2]]
    first, second = found.probabilities
    assert [values.tolist() for values in first] == [[0.1, 0.2], [0.3]]
    assert [values.tolist() for values in second] == [[], [0.1, 0.3]]


def test_models_of_other_molecules_or_none_tell_nothing_together() -> None:
    labels = np.array([0.0, 1.0])
    one = part(labels, labels)
    assert ClassCalibration.of([one, None]) is None
    assert ClassCalibration.of([]) is None
    assert ClassCalibration.of([one, part(1 - labels, labels)]) is None
    both = ClassCalibration.of([one, part(labels, 1 - labels)])
    assert both is not None
    assert [values.tolist() for values in both.probabilities[0]] == [[0.5], [0.5]]


def test_results_tell_what_sets_hold_of_the_test_part() -> None:
    labels = np.array([0.0] * 19 + [1.0] * 19)
    valid = part(labels, np.concatenate([np.linspace(0, 0.6, 19), np.linspace(0.4, 1.0, 19)]))
    test = part(
        np.array([0.0, 0.0, 1.0, 1.0, 1.0, np.nan]), np.array([0.0, 0.99, 1.0, 0.5, 0.0, 0.5])
    )
    entry = class_sets_entry(("y",), [valid], test)
    assert entry == {
        "coverage": 0.9,
        "columns": {
            "y": {
                "valid_labels": [19, 19],
                "test_sets": {"neither": 0, "0": 2, "1": 2, "both": 1},
                "test_labels": [2, 3],
                "test_inside": [1, 2],
            }
        },
    }
    assert class_sets_entry(("y",), [valid, test], test) is None
