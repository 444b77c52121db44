"""The most probable class of a column, and the counts of which class was taken for which."""

from __future__ import annotations

import numpy as np
import pytest

from moleblend_ray.data.sources.classes import Alternatives
from moleblend_ray.evaluation.scoring.alternatives import alternatives_entry, most_probable
from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions

ONE = Alternatives("y", ("y=low", "y=mid", "y=high"), ("low", "mid", "high"))
TWO = Alternatives("other", ("other",), ("no", "yes"))
COLUMNS = ("y=high", "other", "y=low", "y=mid")
"""In another order, and with a label beside them that is more probable."""


def test_a_class_is_the_most_probable_of_its_column_wherever_its_labels_are() -> None:
    found = most_probable(
        ONE, COLUMNS, np.array([[0.1, 0.9, 0.2, 0.0], [0.4, 0.9, 0.1, 0.3], [0.2, 0.9, 0.2, 0.2]])
    )
    assert [ONE.words[index] for index in found] == ["low", "high", "low"]


def test_the_second_of_two_classes_is_that_of_probabilities_above_a_half() -> None:
    probabilities = np.tile(np.array([[0.4], [0.5], [0.6]]), 4)
    assert most_probable(TWO, COLUMNS, probabilities).tolist() == [0, 0, 1]
    labels = np.full((3, 4), np.nan)
    labels[1:, 1] = [1.0, 1.0]
    names = ("a", "b", "c")
    part = PartPredictions(mol_ids=names, smiles=names, labels=labels, predictions=probabilities)
    entry = {"classes": ["no", "yes"], "test_confusion": [[0, 0], [1, 1]]}
    assert alternatives_entry([TWO], COLUMNS, part) == {"other": entry}


def test_molecules_are_counted_by_class_and_most_probable_class() -> None:
    rng = np.random.default_rng(0)
    true, found = rng.integers(0, 3, 200), rng.integers(0, 3, 200)
    labels, predictions = np.zeros((200, 4)), rng.random((200, 4)) / 2
    places = np.array([2, 3, 0])
    labels[np.arange(200), places[true]] = 1.0
    predictions[np.arange(200), places[found]] = 0.9
    labels[:5, [0, 2, 3]] = np.nan  # not known
    labels[5:8, [0, 2, 3]] = [1.0, 1.0, 0.0]  # repeats that contradict each other
    labels[8:10, [0, 2, 3]] = 0.0
    names = tuple(map(str, range(200)))
    part = PartPredictions(mol_ids=names, smiles=names, labels=labels, predictions=predictions)
    entry = alternatives_entry([ONE], COLUMNS, part)
    expected = [
        [int(((true[10:] == row) & (found[10:] == column)).sum()) for column in range(3)]
        for row in range(3)
    ]
    assert entry == {"y": {"classes": ["low", "mid", "high"], "test_confusion": expected}}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, ()),
        ({"label_columns": ["y"]}, ()),
        (
            {"label_columns": ["y"], "classes": ["no", "yes"]},
            (Alternatives("y", ("y",), ("no", "yes")),),
        ),
        ({"label_columns": ["y"], "classes": ["low", "mid", "high"]}, (ONE,)),
        (
            {"label_columns": ["a=b", "c"], "classes": ["1", "2=x", "3"]},
            (
                Alternatives("a=b", ("a=b=1", "a=b=2=x", "a=b=3"), ("1", "2=x", "3")),
                Alternatives("c", ("c=1", "c=2=x", "c=3"), ("1", "2=x", "3")),
            ),
        ),
    ],
)
def test_a_prepared_data_set_tells_its_alternatives(
    columns: dict[str, list[str]], expected: tuple[Alternatives, ...]
) -> None:
    assert Alternatives.of_options({"columns": columns} if columns else {}) == expected
