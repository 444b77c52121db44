"""Rows of one molecule are told, and become one row with the label that all of them say together."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moleblend_ray.data.sources.classes import Alternatives
from moleblend_ray.errors import DataError
from moleblend_ray.evaluation.molecules.censoring import LabelBounds
from moleblend_ray.evaluation.molecules.dataset import LabelledMolecules
from moleblend_ray.evaluation.molecules.replicates import (
    Replicates,
    _means,
    _medians,
    with_replicates,
)
from moleblend_ray.evaluation.tasks import ReplicateRule, TaskKind

from ..conftest import MakeLabelled

NAN = float("nan")
KEEP, MEAN, MEDIAN = ReplicateRule
SMILES = ["CCO", "CCN", "OCC", "CCC", "CCN", "C(O)C"]
"""Ethanol in rows 0, 2 and 5, ethylamine in rows 1 and 4."""


def merged(
    molecules: LabelledMolecules, rule: ReplicateRule, **changes: Any
) -> tuple[LabelledMolecules, Replicates]:
    settings = {"kind": TaskKind.REGRESSION, "within_parts": False, **changes}
    return with_replicates(molecules, rule=rule, **settings)


@pytest.mark.parametrize(("rule", "expected"), [(MEAN, [4.0, 6.0, 7.0]), (MEDIAN, [2.0, 6.0, 7.0])])
def test_a_molecule_is_its_first_row_with_the_label_of_all(
    make_labelled: MakeLabelled, rule: ReplicateRule, expected: list[float]
) -> None:
    molecules = make_labelled(SMILES, np.array([1.0, 5.0, 2.0, 7.0, 7.0, 9.0]))
    found, replicates = merged(molecules, rule)
    assert found.smiles == ("CCO", "CCN", "CCC")
    assert found.mol_ids == ("mol_0", "mol_1", "mol_3")
    assert found.labels[:, 0].tolist() == expected
    assert found.block.molecule_ids.tolist() == [0, 1, 2]
    assert found.block.num_atoms.tolist() == [3, 3, 3]
    assert (replicates.molecules, replicates.rows, replicates.dropped) == (2, 5, 0)


def test_it_is_told_if_all_labels_contradict_each_other(make_labelled: MakeLabelled) -> None:
    molecules = make_labelled(["CCO", "CCN", "OCC", "NCC"], np.array([1.0, 1.0, 0.0, 0.0]))
    with pytest.raises(DataError, match=r"replicates=mean: .* each of the 2 .* 'mol_0' \(CCO\)"):
        merged(molecules, MEAN, kind=TaskKind.CLASSIFICATION)


def test_a_molecule_has_the_most_frequent_of_several_classes(make_labelled: MakeLabelled) -> None:
    smiles = ["CCO", "OCC", "C(O)C", "OCC", "CCN", "NCC", "CCC", "CCC", "CC"]
    classes = np.array([0, 1, 0, 2, 1, 2, -1, 2, -1])
    labels = np.eye(3)[classes]
    labels[classes < 0] = NAN
    several = Alternatives("y", ("y0", "y1", "y2"), ("a", "b", "c"))
    molecules = dataclasses.replace(make_labelled(smiles, labels), alternatives=(several,))
    found, replicates = merged(molecules, MEAN, kind=TaskKind.CLASSIFICATION)
    # Half of ethanol's rows, ethylamine's two contradict each other, propane's second is the only one; ethane has none.
    assert found.smiles == ("CCO", "CCN", "CCC")
    np.testing.assert_equal(found.labels, [[1, 0, 0], [0, NAN, NAN], [0, 0, 1]])
    assert (replicates.undecided, replicates.dropped) == (2, 1)


def test_kept_rows_are_counted_with_the_deviation_within_molecules(
    make_labelled: MakeLabelled,
) -> None:
    labels = np.array([[1.0, NAN], [5.0, 1.0], [2.0, NAN], [7.0, 3.0], [7.0, NAN], [9.0, NAN]])
    molecules = make_labelled(SMILES, labels)
    found, replicates = merged(molecules, KEEP)
    assert found is molecules
    # Deviations from 4 and 6, with two degrees of freedom and one.
    std = np.sqrt((9 + 4 + 25 + 1 + 1) / 3)
    assert replicates.to_json() == {
        "rule": "keep",
        "molecules": 2,
        "rows": 5,
        "undecided": 0,
        "dropped": 0,
        "columns": {"y0": {"molecules": 2, "std": pytest.approx(std)}, "y1": {"molecules": 0}},
    }


def test_a_missing_label_says_nothing_about_that_of_another_row(
    make_labelled: MakeLabelled,
) -> None:
    labels = np.array([[NAN, 4.0], [1.0, 2.0], [3.0, NAN], [7.0, NAN], [NAN, 2.0], [5.0, NAN]])
    found, replicates = merged(make_labelled(SMILES, labels), MEAN)
    np.testing.assert_array_equal(found.labels, [[4.0, 4.0], [1.0, 2.0], [7.0, NAN]])
    assert (replicates.undecided, replicates.dropped) == (0, 0)


@pytest.mark.parametrize("rule", [MEAN, MEDIAN])
def test_the_more_frequent_class_counts_and_none_if_both_are_as_frequent(
    make_labelled: MakeLabelled, rule: ReplicateRule
) -> None:
    labels = np.array([[1.0, 0.0], [0.0, NAN], [0.0, 1.0], [1.0, NAN], [1.0, NAN], [1.0, NAN]])
    molecules = make_labelled(SMILES, labels)
    found, replicates = merged(molecules, rule, kind=TaskKind.CLASSIFICATION)
    # Ethylamine has both classes once, and is left out; of ethanol's second label likewise.
    assert found.smiles == ("CCO", "CCC")
    np.testing.assert_array_equal(found.labels, [[1.0, NAN], [1.0, NAN]])
    assert (replicates.undecided, replicates.dropped) == (2, 1)
    assert replicates.to_json()["columns"] == {
        "y0": {"molecules": 2, "contradictory": 2},
        "y1": {"molecules": 1, "contradictory": 1},
    }
    # Rows that agree contradict nothing, of either class.
    _, agreeing = merged(
        make_labelled(SMILES, np.zeros((6, 1))), rule, kind=TaskKind.CLASSIFICATION
    )
    assert agreeing.to_json()["columns"]["y0"]["contradictory"] == 0


def test_rows_in_different_parts_stay_apart_where_the_data_divide_them(
    make_labelled: MakeLabelled,
) -> None:
    molecules = make_labelled(SMILES, np.array([1.0, 5.0, 2.0, 7.0, 7.0, 9.0]))
    molecules = dataclasses.replace(molecules, parts=np.array([0, 0, 0, 1, 2, 2], dtype=np.uint8))
    found, _ = merged(molecules, MEAN, within_parts=True)
    assert found.smiles == ("CCO", "CCN", "CCC", "CCN", "CCO")
    assert found.labels[:, 0].tolist() == [1.5, 5.0, 7.0, 7.0, 9.0]
    assert found.parts is not None
    assert found.parts.tolist() == [0, 0, 1, 2, 2]
    together, _ = merged(molecules, MEAN)
    assert len(together) == 3


def test_bounds_count_where_nothing_was_measured_and_narrow_each_other(
    make_labelled: MakeLabelled,
) -> None:
    smiles = ["CCO", "CCO", "CCN", "CCN", "CCC", "CCC", "CCF", "CCF", "CCCl", "CCCl"]
    labels = np.array([4.0, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN])
    at_least = np.array([NAN, 5.0, 1.0, 3.0, 1.0, NAN, 6.0, NAN, NAN, NAN])[:, None]
    at_most = np.array([NAN, NAN, NAN, NAN, NAN, 2.0, NAN, 5.0, 8.0, 7.0])[:, None]
    molecules = dataclasses.replace(
        make_labelled(smiles, labels), bounds=LabelBounds(at_least=at_least, at_most=at_most)
    )
    found, replicates = merged(molecules, MEDIAN)
    assert found.smiles == ("CCO", "CCN", "CCC", "CCCl")
    assert found.bounds is not None
    np.testing.assert_array_equal(found.labels[:, 0], [4.0, NAN, NAN, NAN])
    np.testing.assert_array_equal(found.bounds.at_least[:, 0], [NAN, 3.0, 1.0, NAN])
    np.testing.assert_array_equal(found.bounds.at_most[:, 0], [NAN, NAN, 2.0, 7.0])
    # More than 6 and less than 5.
    assert (replicates.undecided, replicates.dropped) == (1, 1)


VALUES = arrays(
    np.float64, st.integers(1, 40), elements=st.sampled_from([-1e90, -2.5, 0.1, 0.3, 7.0, 1e100])
)


@given(VALUES, st.integers(0, 2**32 - 1))
def test_means_and_medians_of_groups_are_those_of_pandas(values: np.ndarray, seed: int) -> None:
    group = np.random.default_rng(seed).integers(0, 12, size=len(values))
    grouped = pd.Series(values).groupby(group)
    for ours, theirs in (
        (_means(values, group, 12), grouped.mean()),
        (_medians(values, group, 12), grouped.median()),
    ):
        np.testing.assert_allclose(ours, theirs.reindex(range(12)), rtol=1e-12, atol=1e-12 * 1e100)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_equal_labels_stay_exactly_what_they_are(make_labelled: MakeLabelled, count: int) -> None:
    molecules = make_labelled(["CCO"] * count, np.full(count, 0.1))
    for rule in (MEAN, MEDIAN):
        assert merged(molecules, rule)[0].labels.tolist() == [[0.1]]
