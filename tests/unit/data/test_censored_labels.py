"""Bounds among labels (``>10``) are kept beside them, from every format, and never count as labels."""

from __future__ import annotations

import dataclasses
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
from moleblend_ray.data.preparation.receipts import Statistics
from moleblend_ray.data.sources import ColumnConfig, find_sources, inspect_sources
from moleblend_ray.data.sources.cells import censored_number, relation_of
from moleblend_ray.data.sources.columns import ColumnError
from moleblend_ray.data.sources.reading import read_chunks
from moleblend_ray.errors import ConfigError

# SMILES, cell, relation, then the label, its least and its greatest value.
ROWS: list[tuple[str, str, str, float | None, float | None, float | None]] = [
    ("CCO", "5.5", "=", 5.5, None, None),
    ("CCN", ">10", "", None, 10.0, None),
    ("CCC", "4", "<", None, None, 4.0),
    ("CCF", "<= 0.25", "<=", None, None, 0.25),
    ("CCCl", "7", "'>'", None, 7.0, None),
    ("CCBr", "~6", "", 6.0, None, None),
    ("CCS", "", ">", None, None, None),
    ("CCCC", ">3", "<", None, None, None),
    ("CCCN", "active", "", None, None, None),
    ("CCCO", "8", "about", None, None, None),
    ("CCCF", "2", "~", 2.0, None, None),
]
UNREADABLE = 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (">10", (10.0, ">")),
        (" > 1e-3 ", (1e-3, ">")),
        (">=10", (10.0, ">")),
        ("<<0.5", (0.5, "<")),
        ("\u2264 -2", (-2.0, "<")),
        ("\u22655", (5.0, ">")),
        ("=7", (7.0, "=")),
        ("~7", (7.0, "=")),
        ("7", (7.0, "=")),
        (">", None),
        ("> nan", None),
        (">1,5", None),
        ("10>", None),
        ("<>5", None),
        (">inf", None),
        ("5-10", None),
    ],
)
def test_a_cell_is_a_number_with_its_relation_or_unreadable(
    text: str, expected: tuple[float, str] | None
) -> None:
    assert censored_number(text) == expected


@pytest.mark.parametrize("text", ["", "NA", "null", "nan"])
@pytest.mark.parametrize("relation", ["=", "<", None])
def test_a_missing_cell_is_missing_whatever_its_relation(text: str, relation: str | None) -> None:
    found = censored_number(text, relation)
    assert found is not None
    assert math.isnan(found[0])


def test_relations_are_read_as_tables_write_them() -> None:
    shown = ["=", "'='", ' ">" ', "<", ">=", "~", "", "<<", "\u2265", "approx", "=>"]
    assert [relation_of(text) for text in shown] == ["=", "=", ">", "<", ">", "=", "=", "<", ">", None, None]  # fmt: skip


def test_a_missing_relation_is_none_in_all_spellings_of_missing_numbers() -> None:
    assert [relation_of(text) for text in ("", " ", "NA", "nan", "None", "null")] == ["="] * 6


def write_csv(folder: Path) -> Path:
    lines = [f"{smiles},{cell},{relation}" for smiles, cell, relation, *_ in ROWS]
    (folder / "assay.csv").write_text("\n".join(["smiles,ic50,relation", *lines]) + "\n")
    return folder / "assay.csv"


def write_parquet(folder: Path) -> Path:
    smiles, cells, relations, *_ = zip(*ROWS, strict=True)
    table = {"smiles": smiles, "ic50": pa.array(cells).dictionary_encode(), "relation": relations}
    pq.write_table(pa.table(table), folder / "assay.parquet")
    return folder / "assay.parquet"


def write_sdf(folder: Path) -> Path:
    from rdkit import Chem

    with Chem.SDWriter(str(folder / "assay.sdf")) as writer:
        for smiles, cell, relation, *_ in ROWS:
            molecule = Chem.MolFromSmiles(smiles)
            for name, value in (("ic50", cell), ("relation", relation)):
                if value:
                    molecule.SetProp(name, value)
            writer.write(molecule)
    return folder / "assay.sdf"


def prepared(source: Path, out: Path, **settings: Any) -> tuple[Manifest, list[dict[str, Any]]]:
    columns: dict[str, Any] = {"censored_labels": True, "relation_column": "relation"}
    columns |= {name: settings.pop(name) for name in columns if name in settings}
    options = ConvertOptions(
        columns=ColumnConfig(label_columns=("ic50",), **columns),
        valid_fraction=0.0,
        rows_per_chunk=4,
        **settings,
    )
    prepare_in_process(str(source), str(out), options)
    manifest = load_manifest(str(out))
    tables = [pq.read_table(out / shard.path) for shard in manifest.shards_of("train")]
    return manifest, pa.concat_tables(tables).to_pylist()


@pytest.mark.parametrize("write", [write_csv, write_parquet, write_sdf])
@pytest.mark.parametrize("settings", [{}, {"shuffle": True}, {"deduplicate": "inchikey"}])
def test_every_format_gives_the_same_labels_and_bounds(
    tmp_path: Path, write: Any, settings: dict[str, Any]
) -> None:
    manifest, rows = prepared(write(tmp_path), tmp_path / "out", **settings)
    found = {
        row["smiles"]: (row["label:ic50"], row["at_least:ic50"], row["at_most:ic50"])
        for row in rows
    }
    assert found == {smiles: (label, low, high) for smiles, _, _, label, low, high in ROWS}
    (info,) = manifest.labels
    assert (info.count, info.num_bounds, info.num_unreadable) == (3, 4, UNREADABLE)


def test_numbers_of_a_parquet_table_are_bounds_if_their_relation_says_so(tmp_path: Path) -> None:
    values = pa.array([5.5, 10.0, None, float("nan")])
    table = {"smiles": ["CCO", "CCN", "CCC", "CCF"], "ic50": values, "relation": ["=", ">", "<", ">"]}  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "assay.parquet")
    manifest, rows = prepared(tmp_path / "assay.parquet", tmp_path / "out")
    assert [row["label:ic50"] for row in rows] == [5.5, None, None, None]
    assert [row["at_least:ic50"] for row in rows] == [None, 10.0, None, None]
    assert manifest.labels[0].num_unreadable == 0


def test_without_the_setting_a_bound_is_missing_and_nothing_changes_in_the_files(
    tmp_path: Path,
) -> None:
    manifest, rows = prepared(
        write_csv(tmp_path), tmp_path / "out", censored_labels=False, relation_column=None
    )
    assert manifest.format_version == 4
    assert "num_bounds" not in manifest.to_json()["labels"][0]
    assert not [name for name in rows[0] if name.startswith(("at_least:", "at_most:"))]
    assert rows[1]["label:ic50"] is None
    with_bounds, _ = prepared(write_csv(tmp_path), tmp_path / "bounds")
    assert with_bounds.format_version == 5


def test_columns_of_bounds_are_labels_by_default_only_where_bounds_are_kept(tmp_path: Path) -> None:
    (tmp_path / "assay.csv").write_text("smiles,ic50,note\nCCO,>10,a\nCCN,5,b\n")
    files = find_sources(str(tmp_path / "assay.csv"))
    names = [
        [label.name for label in inspect_sources(files, ColumnConfig(censored_labels=kept)).labels]
        for kept in (False, True)
    ]
    assert names == [[], ["ic50"]]


def test_a_chunk_that_is_read_with_bounds_is_another_one(tmp_path: Path) -> None:
    files = find_sources(str(write_csv(tmp_path)))
    digests = set()
    for columns in (
        ColumnConfig(label_columns=("ic50",)),
        ColumnConfig(label_columns=("ic50",), censored_labels=True),
        ColumnConfig(label_columns=("ic50",), censored_labels=True, relation_column="relation"),
    ):
        (layout,) = inspect_sources(files, columns).layouts
        digests |= {chunk.digest(layout) for chunk in read_chunks(layout, 0, 100)}
    assert len(digests) == 3


def test_a_relation_column_that_no_file_has_is_refused_with_its_nearest(tmp_path: Path) -> None:
    columns = ColumnConfig(censored_labels=True, relation_column="relations")
    with pytest.raises(ColumnError, match=r"relation_column: .*Did you mean 'relation'"):
        inspect_sources(find_sources(str(write_csv(tmp_path))), columns)


@pytest.mark.parametrize("write", [write_csv, write_parquet, write_sdf])
def test_the_relation_column_is_no_label_whatever_it_holds(tmp_path: Path, write: Any) -> None:
    files = find_sources(str(write(tmp_path)))
    columns = ColumnConfig(censored_labels=True, relation_column="ic50")
    assert inspect_sources(files, columns).labels == ()
    with pytest.raises(ColumnError, match="relation_column: 'ic50' is a label column, too"):
        inspect_sources(files, dataclasses.replace(columns, label_columns=("ic50",)))


def test_numbers_as_relations_are_no_labels(tmp_path: Path) -> None:
    table = pa.table({"smiles": ["CCO"], "ic50": [1.5], "relation": [1.0]})
    pq.write_table(table, tmp_path / "assay.parquet")
    columns = ColumnConfig(censored_labels=True, relation_column="relation")
    labels = inspect_sources(find_sources(str(tmp_path / "assay.parquet")), columns).labels
    assert [label.name for label in labels] == ["ic50"]


def test_files_without_the_relation_column_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = ColumnConfig(censored_labels=True, relation_column="relation")
    write_csv(tmp_path)
    inspect_sources(find_sources(str(tmp_path)), columns)
    assert not caplog.records
    (tmp_path / "other.csv").write_text("smiles,ic50,Relation\nCCO,10,>\n")
    inspect_sources(find_sources(str(tmp_path)), columns)
    (message,) = caplog.messages
    assert message.startswith("relation_column: no 'relation' in ")
    assert "other.csv: numbers there count as measured" in message


def test_bounds_with_decimal_commas_are_told_before_anything_is_prepared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "assay.csv").write_text("smiles;ic50\nCCO;> 1,5\nCCN;5\n")
    columns = ColumnConfig(censored_labels=True, label_columns=("ic50",))
    inspect_sources(find_sources(str(tmp_path / "assay.csv")), columns)
    assert "columns ic50 hold numbers with commas" in caplog.text


def test_a_relation_column_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="relation_column: expected with censored_labels=true"):
        PrepareConfig(source="a.csv", out="b", relation_column="relation")


def test_a_label_column_is_named_once() -> None:
    with pytest.raises(ConfigError, match=r"label_columns: expected each column once.*'y', 'y'"):
        PrepareConfig(source="a.csv", out="b", label_columns=("y", "y"))


def test_statistics_of_before_have_no_bounds() -> None:
    assert Statistics(molecules=1, label_counts={"y": 1}).bound_counts == {}
