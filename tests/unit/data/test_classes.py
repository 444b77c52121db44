"""Classes written as words in label columns become labels of 0 and 1, the same ones from every format."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import prepare_in_process

from moleblend_ray.config.prepare import PrepareConfig
from moleblend_ray.data.dataset.manifest import Manifest, load_manifest
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.sources import ColumnConfig, find_sources, inspect_sources
from moleblend_ray.data.sources.cells import class_key, class_labels, read_classes
from moleblend_ray.data.sources.reading import read_chunks
from moleblend_ray.errors import ConfigError

# SMILES, cell, and its place among the classes; None where there is none.
ROWS = [
    ("CCO", "high", 2),
    ("CCN", "Low", 0),
    ("CCC", " medium ", 1),
    ("CCF", "", None),
    ("CCCl", "n/a", None),
    ("CCBr", "unclear", None),
    ("CCS", "HIGH", 2),
    ("CCP", "nan", None),
]
CLASSES = ("low", "medium", "high")
UNREADABLE = 1


def write_csv(folder: Path) -> Path:
    lines = [f"{smiles},{cell}" for smiles, cell, _ in ROWS]
    (folder / "assay.csv").write_text("\n".join(["smiles,stability", *lines]) + "\n")
    return folder / "assay.csv"


def write_parquet(folder: Path) -> Path:
    smiles, cells, _ = zip(*ROWS, strict=True)
    cells = pa.array([cell or None for cell in cells]).dictionary_encode()
    pq.write_table(pa.table({"smiles": smiles, "stability": cells}), folder / "assay.parquet")
    return folder / "assay.parquet"


def write_sdf(folder: Path) -> Path:
    from rdkit import Chem

    with Chem.SDWriter(str(folder / "assay.sdf")) as writer:
        for smiles, cell, _ in ROWS:
            molecule = Chem.MolFromSmiles(smiles)
            if cell:
                molecule.SetProp("stability", cell)
            writer.write(molecule)
    return folder / "assay.sdf"


def prepared(
    source: Path, out: Path, classes: tuple[str, ...], **settings: Any
) -> tuple[Manifest, dict[str, dict[str, float | None]]]:
    """Manifest, and the labels of each SMILES."""
    options = ConvertOptions(
        columns=ColumnConfig(label_columns=("stability",), classes=classes),
        valid_fraction=0.0,
        rows_per_chunk=3,
        **settings,
    )
    prepare_in_process(str(source), str(out), options)
    manifest = load_manifest(str(out))
    tables = [pq.read_table(out / shard.path) for shard in manifest.shards_of("train")]
    return manifest, {
        row["smiles"]: {
            name.removeprefix("label:"): value
            for name, value in row.items()
            if name.startswith("label:")
        }
        for row in pa.concat_tables(tables).to_pylist()
    }


@pytest.mark.parametrize("write", [write_csv, write_parquet, write_sdf])
@pytest.mark.parametrize("settings", [{}, {"shuffle": True}, {"deduplicate": "inchikey"}])
def test_every_format_gives_the_same_labels_of_several_classes(
    tmp_path: Path, write: Any, settings: dict[str, Any]
) -> None:
    manifest, found = prepared(write(tmp_path), tmp_path / "out", CLASSES, **settings)
    assert found == {
        smiles: {
            f"stability={word}": None if place is None else float(place == index)
            for index, word in enumerate(CLASSES)
        }
        for smiles, _, place in ROWS
    }
    assert [info.count for info in manifest.labels] == [4, 4, 4]
    # A cell is one, however many labels follow from it.
    assert [info.num_unreadable for info in manifest.labels] == [UNREADABLE, 0, 0]


@pytest.mark.parametrize("write", [write_csv, write_parquet, write_sdf])
def test_of_two_classes_the_second_is_1_and_the_column_keeps_its_name(
    tmp_path: Path, write: Any
) -> None:
    manifest, found = prepared(write(tmp_path), tmp_path / "out", ("low", "high"))
    label = {0: 0.0, 2: 1.0}
    assert found == {
        smiles: {"stability": None if place is None else label.get(place)}
        for smiles, _, place in ROWS
    }
    (info,) = manifest.labels
    assert (info.name, info.count, info.num_unreadable) == ("stability", 3, UNREADABLE + 1)


def test_a_word_that_would_be_missing_can_be_a_class() -> None:
    (one,) = class_labels(["severity"], ("none", "any"))
    for text, expected in (("None", 0.0), ("any", 1.0), ("", math.nan), ("na", math.nan)):
        labels, wrong = read_classes([one], {"severity": text})
        assert labels.tolist() == pytest.approx([expected], nan_ok=True)
        assert wrong == ()


def test_classes_that_are_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    assert [class_key(text) for text in ("1", "1.0", "true", "I")] == [1.0, 1.0, 1.0, "i"]
    values = pa.array([1.0, 2.0, None, 4.0])
    table = pa.table({"smiles": ["C", "CC", "CCC", "CO"], "stability": values})
    pq.write_table(table, tmp_path / "a.parquet")
    manifest, found = prepared(tmp_path / "a.parquet", tmp_path / "out", ("2", "1"))
    assert [labels["stability"] for labels in found.values()] == [1.0, 0.0, None, None]
    assert manifest.labels[0].num_unreadable == 1
    with pytest.raises(ConfigError, match="classes: expected different ones"):
        class_labels(["stability"], ("1", "1.0"))


def test_several_columns_have_labels_in_their_order() -> None:
    names = [one.name for one in class_labels(("a", "b"), ("x", "y", "z"))]
    assert names == ["a=x", "a=y", "a=z", "b=x", "b=y", "b=z"]
    assert [one.name for one in class_labels(("a", "b"), ("x", "y"))] == ["a", "b"]
    labels = class_labels(("a", "b"), ("x", "y", "z"))
    found, wrong = read_classes(labels, {"a": "w", "b": "z"})
    assert found.tolist() == pytest.approx([math.nan] * 3 + [0, 0, 1], nan_ok=True)
    assert wrong == ("a=x",)


def test_two_columns_with_one_label_are_refused() -> None:
    with pytest.raises(ConfigError, match="classes: two columns would have the label 'a=b=c'"):
        class_labels(("a", "a=b"), ("c", "b=c", "d"))


def test_a_chunk_that_is_read_with_other_classes_is_another_one(tmp_path: Path) -> None:
    files = find_sources(str(write_csv(tmp_path)))
    digests = set()
    for classes in ((), ("low", "high"), ("high", "low"), CLASSES):
        columns = ColumnConfig(label_columns=("stability",), classes=classes)
        (layout,) = inspect_sources(files, columns).layouts
        digests |= {chunk.digest(layout) for chunk in read_chunks(layout, 0, 100)}
    assert len(digests) == 4


def test_a_column_of_none_of_the_classes_is_told_with_its_words(tmp_path: Path) -> None:
    files = find_sources(str(write_csv(tmp_path)))

    def without(*classes: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        sources = inspect_sources(
            files, ColumnConfig(label_columns=("stability",), classes=classes)
        )
        return sources.labels_without_values, sources.words

    words = ("high", "Low", "medium", "n/a", "unclear", "HIGH", "nan")
    assert without() == (("stability",), words)
    assert without("active", "inactive") == (("stability",), words)
    assert without("a", "b", "c")[0] == ("stability=a", "stability=b", "stability=c")
    assert without("low", "never") == ((), ())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": ("a", "b")}, "classes: expected with label_columns"),
        ({"classes": ("a",), "label_columns": ("y",)}, "classes: expected all of them, at least 2"),
        ({"classes": ("a", " "), "label_columns": ("y",)}, "classes: expected a word for each"),
        (
            {"classes": ("a", "b"), "label_columns": ("y",), "censored_labels": True},
            "classes: expected without censored_labels",
        ),
    ],
)
def test_classes_that_make_no_labels_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrepareConfig(source="a.csv", out="b", **settings)
