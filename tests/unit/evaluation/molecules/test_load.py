"""Labels are taken from a prepared dataset as they are there, and refused where they make no task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.preparation.assembly import write_manifest
from moleblend_ray.data.preparation.claim import claim_output
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.shard_writer import convert_chunk
from moleblend_ray.data.sources import ColumnConfig, find_sources, inspect_sources, read_chunks
from moleblend_ray.data.sources.classes import Alternatives
from moleblend_ray.errors import DataError
from moleblend_ray.evaluation.molecules.dataset import load_labelled
from moleblend_ray.evaluation.tasks import Task, TaskKind, resolve_task

Prepare = Callable[..., str]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    """Prepares the text of a CSV in this process; gives the dataset's folder."""

    def run(
        text: str,
        label_columns: tuple[str, ...] | None = None,
        featurize: FeaturizeConfig = FeaturizeConfig(),  # noqa: B008 (frozen)
        censored: bool = False,
        classes: tuple[str, ...] = (),
    ) -> str:
        source, out = tmp_path / "molecules.csv", str(tmp_path / "data")
        source.write_text(text)
        options = ConvertOptions(
            columns=ColumnConfig(
                label_columns=label_columns, censored_labels=censored, classes=classes
            ),
            featurize=featurize,
            rows_per_chunk=3,
            row_group_rows=2,
        )
        sources = inspect_sources(find_sources(str(source)), options.columns)
        claim_output(out, sources, options)
        receipts = [
            convert_chunk(chunk, layout, sources.labels, options, out)
            for index, layout in enumerate(sources.layouts)
            for chunk in read_chunks(layout, index, 3)
        ]
        write_manifest(out, sources, options, receipts)
        return out

    return run


def number(*columns: str) -> Task:
    return resolve_task("number", columns=columns, kind=TaskKind.REGRESSION)


def test_missing_cells_are_nan_and_molecules_without_any_label_are_left_out_and_counted(
    prepare: Prepare,
) -> None:
    uri = prepare("smiles,a,b\nCCO,1,\nCCN,,\nCCC,,3\nnonsense,5,5\nCO,4,6\n")
    molecules = load_labelled(uri, number("b", "a"))
    assert molecules.columns == ("b", "a")
    by_smiles = dict(zip(molecules.smiles, molecules.labels.tolist(), strict=True))
    assert set(by_smiles) == {"CCO", "CCC", "CO"}
    np.testing.assert_equal(by_smiles["CCO"], [np.nan, 1.0])
    np.testing.assert_equal(by_smiles["CO"], [6.0, 4.0])
    assert (molecules.num_unlabelled, molecules.num_quarantined) == (1, 1)
    assert molecules.block.num_atoms.tolist() == [len(text) for text in molecules.smiles]


def test_molecules_know_the_form_that_they_were_prepared_in(prepare: Prepare) -> None:
    text = "smiles,a\nCCO.Cl,1\nCCN,2\n"
    uri = prepare(text, featurize=FeaturizeConfig(salts="largest_fragment"))
    assert load_labelled(uri, number("a")).form == MoleculeForm(salts="largest_fragment")


def test_a_task_without_named_columns_takes_every_label_column(prepare: Prepare) -> None:
    uri = prepare("smiles,a,b\nCCO,1,0\nCCN,0,1\n")
    assert set(load_labelled(uri, resolve_task("sider")).columns) == {"a", "b"}


def test_a_missing_label_column_is_named_beside_those_there_are(prepare: Prepare) -> None:
    uri = prepare("smiles,a,b\nCCO,1,0\n")
    with pytest.raises(DataError, match=r"\['exp'\].*it has: a, b.*task\.columns"):
        load_labelled(uri, resolve_task("lipophilicity"))


def test_class_labels_other_than_0_and_1_are_shown(prepare: Prepare) -> None:
    uri = prepare("smiles,p_np\nCCO,1\nCCN,2.5\n")
    with pytest.raises(DataError, match=r"'p_np'.*2\.5.*0, 1 or empty"):
        load_labelled(uri, resolve_task("bbbp"))


def test_a_column_that_is_empty_throughout_is_an_error(prepare: Prepare) -> None:
    uri = prepare("smiles,a,b\nCCO,,1\nCCN,,2\n")
    with pytest.raises(DataError):
        load_labelled(uri, number("a"))


def test_cells_that_hold_no_number_are_counted_and_told_where_there_is_nothing_else(
    prepare: Prepare,
) -> None:
    text = "smiles,a,b,c\nCCO,active,1,\nCCN,inactive,>10,x\nCCC,active,3,\n"
    uri = prepare(text, ("a", "b", "c"))
    molecules = load_labelled(uri, number("b"))
    assert (len(molecules), molecules.num_unlabelled, molecules.num_unreadable) == (2, 1, 1)
    with pytest.raises(DataError, match=r"\['a'\]; 3 of their cells hold something else than a"):
        load_labelled(uri, number("a"))


def test_classes_of_one_column_are_alternatives_where_all_are_asked_for(prepare: Prepare) -> None:
    text = "smiles,a,b\nCCO,low,mid\nCCN,High,low\nCCC,,mid\nCO,mid,\n"
    uri = prepare(text, ("a", "b"), classes=("low", "mid", "high"))
    columns = ("a=low", "a=mid", "a=high", "b=mid")
    task = resolve_task("mine", columns=columns, kind=TaskKind.CLASSIFICATION)
    found = load_labelled(uri, task)
    assert found.alternatives == (Alternatives("a", columns[:3], ("low", "mid", "high")),)
    by_smiles = dict(zip(found.smiles, found.labels.tolist(), strict=True))
    np.testing.assert_equal(by_smiles["CCN"], [0.0, 0.0, 1.0, 0.0])
    np.testing.assert_equal(by_smiles["CCC"], [np.nan, np.nan, np.nan, 1.0])
    assert found.take(np.array([0])).alternatives == found.alternatives


def test_molecules_of_which_only_a_bound_is_known_count_where_bounds_do(prepare: Prepare) -> None:
    text = "smiles,a,b\nCCO,1,>7\nCCN,<2,\nCCC,,x\nCO,>=4,3\n"
    uri = prepare(text, ("a", "b"), censored=True)
    found = load_labelled(uri, number("a"), with_bounds=True)
    order = np.argsort(found.smiles)
    assert [found.smiles[row] for row in order] == ["CCN", "CCO", "CO"]
    assert found.bounds is not None
    np.testing.assert_equal(found.labels[order, 0], [np.nan, 1.0, np.nan])
    np.testing.assert_equal(found.bounds.at_least[order, 0], [np.nan, np.nan, 4.0])
    np.testing.assert_equal(found.bounds.at_most[order, 0], [2.0, np.nan, np.nan])
    assert (found.num_unlabelled, found.num_unreadable) == (1, 0)
    without = load_labelled(uri, number("a"))
    assert (without.smiles, without.bounds, without.num_unlabelled) == (("CCO",), None, 3)
    assert without.num_unreadable == 2


def test_bounds_are_checked_as_labels_are(prepare: Prepare) -> None:
    uri = prepare("smiles,a\nCCO,1\nCCN,>1e200\n", ("a",), censored=True)
    with pytest.raises(DataError, match=r"'a'.* has the value 1e\+200 for molecule '\S+_1'"):
        load_labelled(uri, number("a"), with_bounds=True)


def test_no_label_with_bounds_is_an_error_that_says_what_was_expected(prepare: Prepare) -> None:
    uri = prepare("smiles,a\nCCO,10+\nCCN,> 10 uM\n", ("a",), censored=True)
    with pytest.raises(DataError, match="2 of their cells hold neither a number nor a bound"):
        load_labelled(uri, number("a"), with_bounds=True)


def test_a_data_set_without_bounds_is_told_where_they_are_wanted(prepare: Prepare) -> None:
    uri = prepare("smiles,a\nCCO,1\nCCN,2\n")
    with pytest.raises(DataError, match=r"task\.censored: .*censored_labels=true"):
        load_labelled(uri, number("a"), with_bounds=True)


def test_a_folder_that_is_no_prepared_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="manifest"):
        load_labelled(str(tmp_path), number("a"))


@pytest.mark.parametrize(
    ("kind", "cells", "message"),
    [
        ("classification", "0,-1,1,-1", r"value -1 for molecule '\S+_1', the first of 2; class"),
        (
            "classification",
            "1,1,0,2",
            r"value 2 for molecule '\S+_3', the first of 1; .*0, 1 or empty",
        ),
        ("regression", "1,,1.7976931348623157e308,2", r"1.79769e\+308 for molecule '\S+_2'.*empty"),
    ],
)
def test_labels_that_cannot_be_used_are_told_with_their_molecule(
    prepare: Prepare, kind: str, cells: str, message: str
) -> None:
    rows = zip(("CCO", "CCN", "CCC", "CO"), cells.split(","), strict=True)
    uri = prepare("smiles,y\n" + "".join(f"{smiles},{cell}\n" for smiles, cell in rows))
    with pytest.raises(DataError, match=message):
        load_labelled(uri, resolve_task("own", columns=("y",), kind=TaskKind(kind)))


def test_labels_whose_squares_would_be_0_are_told_with_their_column(prepare: Prepare) -> None:
    uri = prepare("smiles,a,b,c\nCCO,1e-200,1e-9,0\nCCN,-3e-200,2e-9,0\nCCC,,1e-200,0\n")
    assert load_labelled(uri, number("b", "c")).columns == ("b", "c")
    with pytest.raises(DataError, match=r"column 'a' .* at most 3e-200, too small .*another unit"):
        load_labelled(uri, number("a", "b"))
