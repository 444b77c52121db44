"""The beginning of a file tells its columns, ids and labels, whatever its format."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import METHANE, geometry_table, inspected, records_of, sd_record, smiles_of

from moleblend_ray.chemistry.records import MolBlock
from moleblend_ray.errors import ConfigError, DataError


def test_a_table_gives_smiles_ids_and_numeric_labels(tmp_path: Path) -> None:
    path = tmp_path / "assay.csv"
    path.write_text(
        "name,smiles,y,class,comment,empty\n"
        "a,CCO ,1.5,1,hello,\n"
        '"b, ""second""",C,,0,"two\nlines",\n'
        "\n"
        "a,N,nan,1,x,\n"
    )
    source = inspected(path, id_column="name")
    assert [label.name for label in source.labels] == ["y", "class", "empty"]
    records = records_of(path, id_column="name")
    assert smiles_of(records) == ["CCO", "C", "N"]
    assert [record.mol_id for record in records] == ["a", 'b, "second"', "a"]
    assert [record.row for record in records] == [0, 1, 2]
    np.testing.assert_array_equal(
        [record.labels for record in records],
        [[1.5, 1, np.nan], [np.nan, 0, np.nan], [np.nan, 1, np.nan]],
    )


def test_a_delimiter_at_the_end_of_rows_hides_no_label(tmp_path: Path) -> None:
    path = tmp_path / "assay.csv"
    path.write_text("smiles,y,active\nCCO,1.5,yes,\nC,,2,,\nN,3,1\n")
    assert [label.name for label in inspected(path).labels] == ["y"]
    assert [record.labels.tolist() for record in records_of(path)] == [
        [1.5],
        [pytest.approx(np.nan, nan_ok=True)],
        [3.0],
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_numbers_with_commas_are_told_and_not_guessed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, delimiter: str
) -> None:
    path = tmp_path / "table.csv"
    path.write_text('smiles;y;z\nC;"1,500";2\nCC;;3\n'.replace(";", delimiter))
    with caplog.at_level(logging.WARNING):
        assert [label.name for label in inspected(path).labels] == ["z"]
    assert "columns y hold numbers with commas" in caplog.text


@pytest.mark.parametrize(("encoding", "tells"), [("latin-1", True), ("utf-8", False)])
def test_ids_in_another_encoding_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, encoding: str, tells: bool
) -> None:
    path = tmp_path / "table.csv"
    path.write_text("smiles,name,note\nC,caf\xe9,\xe9\nCC,b,\xe9\n", encoding)
    with caplog.at_level(logging.WARNING):
        inspected(path, id_column="name")
        assert ("column name is not in UTF-8, and ids lose characters" in caplog.text) == tells
        caplog.clear()
        inspected(path)
    assert not caplog.records


def test_columns_that_are_not_asked_for_may_hold_numbers_with_commas(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "table.csv"
    path.write_text('smiles,alerts,z\nC,"3,14",2\n')
    with caplog.at_level(logging.WARNING):
        assert [label.name for label in inspected(path, label_columns=("z",)).labels] == ["z"]
    assert caplog.text == ""


def test_labels_without_a_number_are_told_of_files_that_the_sample_holds_whole(
    tmp_path: Path,
) -> None:
    columns = ("a", "b", "c")
    (tmp_path / "1.csv").write_text("smiles,a,b,c\nC,>10,yes,\nC,,,n/a\n")
    assert inspected(tmp_path, label_columns=columns).labels_without_values == columns
    (tmp_path / "2.csv").write_text("smiles,b\nC,true\n")
    assert inspected(tmp_path, label_columns=columns).labels_without_values == ("a", "c")
    (tmp_path / "3.sdf").write_text(sd_record("m", c=1))
    assert inspected(tmp_path, label_columns=columns).labels_without_values == ("a",)
    (tmp_path / "4.csv").write_text("smiles,a\n" + "C,>10\n" * 1000 + "C,3\n")
    assert inspected(tmp_path, label_columns=columns).labels_without_values == ()


def test_explicit_label_columns_keep_their_order_and_take_true_and_false(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("smiles,a,b,c\nC,1,True,x\nC,2,False,3\n")
    assert [label.name for label in inspected(path).labels] == ["a"]
    records = records_of(path, label_columns=("c", "b"))
    np.testing.assert_array_equal([r.labels for r in records], [[np.nan, 1], [3, 0]])
    assert [record.unreadable for record in records] == [("c",), ()]


def test_columns_without_a_name_are_no_labels(tmp_path: Path) -> None:
    (tmp_path / "index.csv").write_text(",smiles,y\n0,C,1\n1,CC,2\n")
    (tmp_path / "end.csv").write_text("smiles,y,\nC,1,\nCC,2,\n")
    table = pa.table({"smiles": ["C", "CC"], "y": [1.0, 2.0], "__index_level_0__": [4, 7]})
    pq.write_table(table, tmp_path / "index.parquet")
    for name in ("index.csv", "end.csv", "index.parquet"):
        assert [label.name for label in inspected(tmp_path / name).labels] == ["y"]
        assert [record.labels.tolist() for record in records_of(tmp_path / name)] == [[1], [2]]


def test_an_sd_file_gives_molblocks_titles_and_numeric_properties(tmp_path: Path) -> None:
    path = tmp_path / "m.sdf"
    text = sd_record("one", mu=1.5, note="text", smiles="C") + sd_record("", mu="-2e-3", extra=7)
    path.write_text(text)
    source = inspected(path)
    assert [label.name for label in source.labels] == ["mu", "extra"]
    first, second = records_of(path)
    assert (first.mol_id, second.mol_id) == ("one", None)
    np.testing.assert_array_equal([first.labels, second.labels], [[1.5, np.nan], [-2e-3, 7]])
    assert first.content == MolBlock(METHANE.format(title="one"))
    assert [record.mol_id for record in records_of(path, id_column="note")] == ["text", None]


def test_parquet_columns_that_cannot_be_labels_or_are_there_twice_are_refused(
    tmp_path: Path,
) -> None:
    pq.write_table(pa.table({"smiles": ["C"], "y": [[1.0]]}), tmp_path / "list.parquet")
    with pytest.raises(
        ConfigError, match=r"label_columns: 'y' of .*list\.parquet is list<.*numbers"
    ):
        inspected(tmp_path / "list.parquet", label_columns=("y",))
    twice = pa.table([["C"], [1.0], [2.0]], names=["smiles", "y", "y"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match=r"\['y'\] more than once"):
        inspected(tmp_path / "twice.parquet")


def test_a_table_with_only_smiles_works_and_without_names_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    pq.write_table(pa.table({"structure": ["C", None, "CC"], "y": [1, 2, 3]}), path)
    records = records_of(path, smiles_column="structure")
    assert smiles_of(records) == ["C", "", "CC"]
    assert [record.mol_id for record in records] == [None] * 3
    with pytest.raises(
        ConfigError, match=r"smiles_column: .*has no 'smiles'; it has 'structure', 'y'"
    ):
        inspected(path)


def test_geometry_alone_needs_no_smiles_column(tmp_path: Path) -> None:
    pq.write_table(geometry_table().drop_columns(["smiles"]), tmp_path / "g.parquet")
    assert len(records_of(tmp_path / "g.parquet")) == 3
    with pytest.raises(ConfigError, match=r"has no 'smi'"):
        inspected(tmp_path / "g.parquet", smiles_column="smi")


@pytest.mark.parametrize(
    ("name", "content", "smiles", "names"),
    [
        (
            "m.smi",
            "CCO ethanol\nC\n\nN an amine\n",
            ["CCO", "C", "N"],
            ["ethanol", None, "an amine"],
        ),
        ("m.smiles", "CCO\tethyl alcohol\r\nC\tm\r\n", ["CCO", "C"], ["ethyl alcohol", "m"]),
        ("m.smi", "smiles zinc_id\nC 1\nCC 2\n", ["C", "CC"], ["1", "2"]),
        ("m.smi", "SMILES\tname\nC\t1\n", ["C"], ["1"]),
        ("m.txt", "C\nCC\n", ["C", "CC"], [None, None]),
        ("m.txt.gz", "canonical_smiles\nC\n", ["C"], [None]),
    ],
)
def test_a_table_of_smiles_needs_no_header(
    tmp_path: Path, name: str, content: str, smiles: list[str], names: list[str | None]
) -> None:
    raw = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    records = records_of(tmp_path / name, rows_per_chunk=1)
    assert smiles_of(records) == smiles
    assert [record.mol_id for record in records] == names
    assert [record.row for record in records] == list(range(len(smiles)))
