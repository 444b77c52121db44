"""Sources: every record is read once, with its id and labels; errors name what cannot be read."""

from __future__ import annotations

import gzip
import io
import json
import logging
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moleblend_ray.chemistry.records import GeometryRow, MolBlock, SmilesText
from moleblend_ray.chemistry.rejection import Rejection
from moleblend_ray.data import sources
from moleblend_ray.data.sources import (
    ColumnConfig,
    RawRecord,
    RowChunk,
    SourceSet,
    find_sources,
    inspect_sources,
    parse_chunk,
    read_chunks,
    reading,
    text,
)
from moleblend_ray.errors import ConfigError, DataError, StorageError

METHANE = """{title}
     RDKit          3D

  1  0  0  0  0  0  0  0  0  0999 V2000
    0.0000    0.0000    0.0000 C   0  0  0  0  0  0  0  0  0  0  0  0
M  END
"""


def sd_record(title: str, **properties: object) -> str:
    tags = "".join(f">  <{name}>\n{value}\n\n" for name, value in properties.items())
    return METHANE.format(title=title) + tags + "$$$$\n"


def inspected(uri: Path | str, **columns: object) -> SourceSet:
    return inspect_sources(find_sources(str(uri)), ColumnConfig(**columns))  # type: ignore[arg-type]


def records_of(uri: Path | str, rows_per_chunk: int = 1000, **columns: object) -> list[RawRecord]:
    """All records of a source, through chunks."""
    found = []
    for index, layout in enumerate(inspected(uri, **columns).layouts):
        for chunk in read_chunks(layout, index, rows_per_chunk):
            parsed = list(parse_chunk(chunk, layout))
            assert len(parsed) == chunk.num_rows
            assert parsed[0].row == chunk.first_row
            found += parsed
    return found


def smiles_of(records: list[RawRecord]) -> list[str | None]:
    return [record.content.smiles for record in records if isinstance(record.content, SmilesText)]


# --- tables ---------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["t.tsv", "t.tsv.gz", "T.TSV"])
def test_tab_separated_and_compressed_tables(tmp_path: Path, name: str) -> None:
    content = b"\xef\xbb\xbfsmiles\ty\r\nC\t1\r\nCC\t2\r\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    records = records_of(tmp_path / name)
    assert smiles_of(records) == ["C", "CC"]
    assert [record.labels.tolist() for record in records] == [[1.0], [2.0]]


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz", "table.smi", "table.txt"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_a_table_with_semicolons_is_read_as_one(tmp_path: Path, name: str, quote: str) -> None:
    rows = [("Smiles", "ChEMBL ID", "pIC50"), ("CCO", "a, one", "5.5"), ("CCN", "b", "6")]
    text = "".join(";".join(f"{quote}{cell}{quote}" for cell in row) + "\r\n" for row in rows)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    records = records_of(path, smiles_column="Smiles", id_column="ChEMBL ID")
    assert smiles_of(records) == ["CCO", "CCN"]
    assert [record.mol_id for record in records] == ["a, one", "b"]
    assert [record.labels.tolist() for record in records] == [[5.5], [6.0]]


@pytest.mark.parametrize(
    ("header", "column", "row", "expected"),
    [
        ('smiles;y;"IC50, nM"', "smiles", "CCO;1;2", "CCO"),
        ("SMILES (canonical; RDKit)", "SMILES (canonical; RDKit)", "CCO", "CCO"),
        ('"a;b",smiles', "smiles", "1,CCO", "CCO"),
        ("smiles;y, z\tnote", "smiles", "CCO;1", "CCO"),
        ("\ufeffsmiles;IC50 (nM, 24 h)", "smiles", "CCO;1", "CCO"),
        ('\ufeff"smiles";"IC50 (nM, 24 h)"', "smiles", '"CCO";"1"', "CCO"),
    ],
)
def test_the_column_that_is_looked_for_says_which_delimiter_is_meant(
    tmp_path: Path, header: str, column: str, row: str, expected: str
) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f"{header}\n{row}\n")
    assert smiles_of(records_of(path, smiles_column=column)) == [expected]


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz", "table.tsv", "table.txt"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_header_says_which_delimiter_is_meant_whatever_the_ending(
    tmp_path: Path, name: str, delimiter: str, mark: str
) -> None:
    rows = (("smiles", "id", "pIC50"), ('"C\nC"', "a", "5.5"), ("CCN", "b", "6"))
    text = mark + "".join(delimiter.join(row) + "\r\n" for row in rows)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    records = records_of(path, rows_per_chunk=1, id_column="id")
    assert [record.mol_id for record in records] == ["a", "b"]
    assert [record.labels.tolist() for record in records] == [[5.5], [6.0]]


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz", "table.tsv", "table.txt"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("line", ["sep={}\r\n", "\ufeffsep={}\r\n", '"sep={}"\n', "sep={}\n\n"])
def test_the_line_with_which_excel_is_told_the_delimiter_is_no_header(
    tmp_path: Path, name: str, delimiter: str, line: str
) -> None:
    rows = (("smiles", "id", "pIC50"), ("CCO", "a", "5.5"), ("CCN", "b", "6"))
    text = line.format(delimiter) + "".join(delimiter.join(row) + "\r\n" for row in rows)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    records = records_of(path, rows_per_chunk=1, id_column="id")
    assert [(record.row, record.mol_id) for record in records] == [(0, "a"), (1, "b")]
    assert [record.labels.tolist() for record in records] == [[5.5], [6.0]]


def test_such_a_line_is_left_out_at_the_beginning_only_and_may_name_no_other_delimiter(
    tmp_path: Path,
) -> None:
    path = tmp_path / "table.csv"
    path.write_text("smiles\nC\nsep=x\nsep=;\nCC\n")
    assert smiles_of(records_of(path, rows_per_chunk=2)) == ["C", "sep=x", "sep=;", "CC"]
    path.write_text("sep=|\nsmiles|y\nCCO|1\n")
    with pytest.raises(DataError, match=r"says that '\|' separates.*commas, semicolons or tabs"):
        inspected(path)


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04\x14\0\x06\0" + bytes(range(256)) * 40,
        "smiles,y\nCCO,1\n".encode("utf-16"),
        "smiles\ty\nCCO\t1\n".encode("utf-16-le"),
    ],
)
@pytest.mark.parametrize("name", ["table.csv", "table.tsv"])
def test_a_workbook_or_utf16_is_told_without_its_bytes(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"no text in UTF-8.*Save it as CSV in UTF-8\.$") as raised:
        inspected(path)
    assert str(raised.value).isprintable()


def test_names_in_another_encoding_are_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes("smiles,IC50 µM\nCCO,1\n".encode("cp1252"))
    with pytest.raises(ConfigError, match=r"has no 'IC50 µM'.*not in UTF-8, save the file as such"):
        inspected(path, label_columns=("IC50 µM",))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_numbers_with_commas_are_told_and_not_guessed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, delimiter: str
) -> None:
    path = tmp_path / "table.csv"
    path.write_text('smiles;y;z\nC;"1,500";2\nCC;;3\n'.replace(";", delimiter))
    with caplog.at_level(logging.WARNING):
        assert [label.name for label in inspected(path).labels] == ["z"]
    assert "columns y hold numbers with commas" in caplog.text


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
    assert inspected(tmp_path, label_columns=columns).labels_without_numbers == columns
    (tmp_path / "2.csv").write_text("smiles,b\nC,true\n")
    assert inspected(tmp_path, label_columns=columns).labels_without_numbers == ("a", "c")
    (tmp_path / "3.sdf").write_text(sd_record("m", c=1))
    assert inspected(tmp_path, label_columns=columns).labels_without_numbers == ("a",)
    (tmp_path / "4.csv").write_text("smiles,a\n" + "C,>10\n" * 1000 + "C,3\n")
    assert inspected(tmp_path, label_columns=columns).labels_without_numbers == ()


def test_a_delimiter_line_of_an_sd_file_may_go_on(tmp_path: Path) -> None:
    path = tmp_path / "x.sdf"
    path.write_text("".join(sd_record(f"m{i}").replace("$$$$", "$$$$ 1") for i in range(3)))
    assert len(records_of(path)) == 3


def test_explicit_label_columns_keep_their_order_and_take_true_and_false(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("smiles,a,b,c\nC,1,True,x\nC,2,False,3\n")
    assert [label.name for label in inspected(path).labels] == ["a"]
    records = records_of(path, label_columns=("c", "b"))
    np.testing.assert_array_equal([r.labels for r in records], [[np.nan, 1], [3, 0]])
    assert [record.unreadable for record in records] == [("c",), ()]


def test_cells_that_are_no_finite_number_are_told(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("smiles,y\n" + "C,1\n" * 1000 + "C,>10\nC,inf\nC,1_0\nC,N/A\n")
    records = records_of(path)
    assert [record.unreadable for record in records[-4:]] == [("y",), ("y",), ("y",), ()]
    assert np.isnan([record.labels[0] for record in records[-4:]]).all()


@pytest.mark.parametrize("row", ["C", "C,1,2", '"C,1,x'[1:]])
def test_rows_with_a_wrong_number_of_fields_are_rejected(tmp_path: Path, row: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"smiles,y\nCC,1\n{row}\nCCC,2\n")
    first, bad, last = records_of(path)
    assert isinstance(bad.content, Rejection)
    assert bad.content.code == "invalid_record"
    assert "where the header has 2" in bad.content.detail
    assert smiles_of([first, last]) == ["CC", "CCC"]
    assert bad.excerpt.startswith("C")


def test_the_wrong_column_is_answered_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("SMILES,logP,id\nC,1,a\n")
    with pytest.raises(
        ConfigError,
        match=r"smiles_column: .*t\.csv has no 'smiles'; it has 'SMILES', 'logP'.*mean 'SMILES'",
    ):
        inspected(path)
    with pytest.raises(ConfigError, match=r"id_column: .*has no 'idx'.*mean 'id'"):
        inspected(path, smiles_column="SMILES", id_column="idx")
    with pytest.raises(ConfigError, match=r"label_columns: .*has no 'logp'.*mean 'logP'"):
        inspected(path, smiles_column="SMILES", label_columns=("logp",))


def test_a_column_named_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("smiles,y,y\nC,1,2\n")
    with pytest.raises(DataError, match=r"\['y'\] more than once"):
        inspected(path)


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 3, 10])
@pytest.mark.parametrize(
    ("bad", "kept"),
    [
        (['"CCC,x,3'], ["C", "CC", "CCCC"]),  # never closed
        (['CCC,"5-foo,3', "CN,a,4", 'CO,"bar,5'], ["C", "CC", "CN", "CCCC"]),  # another row's cell
        (['CCC,"x"\ry,3'], ["C", "CC", "CCCC"]),
        (["CCC,x,3\rCN,x,3\rCO,x,3"], ["C", "CC", "CCCC"]),  # lines of another system
    ],
)
def test_a_row_with_a_stray_quote_or_carriage_return_costs_no_other(
    tmp_path: Path, bad: list[str], kept: list[str], rows_per_chunk: int
) -> None:
    path = tmp_path / "t.csv"
    lines = ["smiles,name,y", 'C,"a, b",1', 'CC,"two\nlines",2', *bad, "CCCC,x,4"]
    path.write_bytes("\n".join(lines).encode() + b"\n")
    records = records_of(path, rows_per_chunk)
    assert smiles_of(records) == kept
    rejected = [record for record in records if isinstance(record.content, Rejection)]
    assert len(rejected) == len(records) - len(kept) > 0
    for record in rejected:
        assert isinstance(record.content, Rejection)
        assert record.content.code == "invalid_record"
        assert "a quote is not closed, or a carriage return" in record.content.detail


@given(st.text(st.sampled_from('a,"\n\r'), max_size=40), st.integers(1, 4))
def test_rows_are_divided_alike_in_a_file_and_in_its_chunks_and_keep_every_line(
    content: str, rows_per_chunk: int
) -> None:
    raw = content.encode()
    rows = list(text.csv_records([raw], ",", 1 << 20))
    for first in range(0, len(rows), rows_per_chunk):
        chunk = rows[first : first + rows_per_chunk]
        assert list(text.csv_records([b"".join(chunk)], ",", 1 << 20)) == chunk
    lines = [line for line in raw.split(b"\n") if line.strip(b"\r")]
    found = [line for row in rows for line in row.split(b"\n") if line.strip(b"\r")]
    assert found == lines


def test_columns_without_a_name_are_no_labels(tmp_path: Path) -> None:
    (tmp_path / "index.csv").write_text(",smiles,y\n0,C,1\n1,CC,2\n")
    (tmp_path / "end.csv").write_text("smiles,y,\nC,1,\nCC,2,\n")
    table = pa.table({"smiles": ["C", "CC"], "y": [1.0, 2.0], "__index_level_0__": [4, 7]})
    pq.write_table(table, tmp_path / "index.parquet")
    for name in ("index.csv", "end.csv", "index.parquet"):
        assert [label.name for label in inspected(tmp_path / name).labels] == ["y"]
        assert [record.labels.tolist() for record in records_of(tmp_path / name)] == [[1], [2]]


cells = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=8)


@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=12), st.integers(1, 5))
def test_any_table_the_csv_module_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], rows_per_chunk: int
) -> None:
    import csv

    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows([("smiles", "name"), *rows])
    path = tmp_path_factory.mktemp("any") / "t.csv"
    path.write_bytes(buffer.getvalue().encode())
    records = records_of(path, rows_per_chunk, id_column="name", label_columns=())
    assert smiles_of(records) == [smiles.strip() for smiles, _ in rows]
    assert [record.mol_id or "" for record in records] == [name.strip() for _, name in rows]


# --- SD files ---------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["$$$$\n", "$$$$", ""])
def test_line_ends_and_a_missing_last_delimiter_do_not_matter(
    tmp_path: Path, ending: str, last: str
) -> None:
    text = (sd_record("a", y=1) + sd_record("b", y=2)).removesuffix("$$$$\n") + last
    path = tmp_path / "m.sdf.gz"
    path.write_bytes(gzip.compress(text.replace("\n", ending).encode()))
    records = records_of(path)
    assert [record.mol_id for record in records] == ["a", "b"]
    assert [record.labels.tolist() for record in records] == [[1.0], [2.0]]
    assert records[1].content == MolBlock(METHANE.format(title="b"))


def test_properties_without_a_blank_line_or_with_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.sdf"
    path.write_text(METHANE.format(title="a") + ">  <x>  (1)\n1\n2\n\n> 25 <y>\n3\n$$$$\n")
    (record,) = records_of(path, label_columns=("x", "y"))
    assert np.isnan(record.labels[0])
    assert record.labels[1] == 3.0
    assert record.unreadable == ("x",)


def test_a_record_without_end_is_passed_on_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.sdf"
    path.write_text("junk\n$$$$\n" + sd_record("fine"))
    junk, fine = records_of(path)
    assert junk.content == MolBlock("junk\n")
    assert fine.mol_id == "fine"


# --- records that are too large ---------------------------------------------------------------------

LIMIT = 1 << 20
"""Of these tests."""


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_RECORD_BYTES", LIMIT)


def assert_too_large(record: RawRecord, size: str) -> None:
    assert isinstance(record.content, Rejection)
    assert record.content.code == "invalid_record"
    expected = f"the record has {size} MiB, more than the 1 MiB that a record may have"
    assert record.content.detail == expected
    assert np.isnan(record.labels).all()


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 10])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["m.sdf", "m.sdf.gz"])
def test_an_sd_record_that_is_too_large_costs_no_other(
    tmp_path: Path, name: str, ending: str, rows_per_chunk: int
) -> None:
    image = "A" * LIMIT + "\n" + "$$$$ is not at the beginning of a line here: $$$$\n".rjust(LIMIT)
    records = [
        sd_record("a", mu=1),
        sd_record("b", mu="no number", image=image),
        sd_record("c", mu=3),
        sd_record("d", image=image, mu=4),
        sd_record("e", mu=5),
    ]
    raw = "".join(records).replace("\n", ending).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    found = records_of(tmp_path / name, rows_per_chunk)
    assert [record.row for record in found] == [0, 1, 2, 3, 4]
    assert [record.mol_id for record in found] == ["a", "b", "c", "d", "e"]
    for index in (0, 2, 4):
        title = found[index].mol_id
        assert found[index].content == MolBlock(METHANE.format(title=title))
    # The label is found although the records that are too large seem to have something else in it, or nothing.
    assert [found[index].labels.tolist() for index in (0, 2, 4)] == [[1], [3], [5]]
    for index in (1, 3):
        assert_too_large(found[index], "2.1")
        assert found[index].excerpt == records[index][:200]


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("num_bytes", [LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 5])
@pytest.mark.parametrize("end", ["$$$$\n", "$$$$", "\n", ""])
def test_the_limit_is_that_of_the_record_whatever_the_blocks_and_the_end_of_the_file(
    tmp_path: Path, num_bytes: int, end: str
) -> None:
    record = METHANE.format(title="m") + ">  <note>\n"
    record += "x" * (num_bytes - len(record) - len(end)) + end
    for before in ("", sd_record("a"), sd_record("a", note="y" * 1000)):
        (tmp_path / "m.sdf").write_text(before + record)
        last = records_of(tmp_path / "m.sdf")[-1]
        if num_bytes <= LIMIT:
            assert last.content == MolBlock(METHANE.format(title="m"))
        else:
            assert_too_large(last, "1.1")


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("before", ["", sd_record("a")])
@pytest.mark.parametrize("content", ["not an SD file\n" * 300_000, "\0" * 4_500_000])
def test_what_is_too_large_and_goes_on_to_the_end_of_an_sd_file_is_one_record(
    tmp_path: Path, before: str, content: str
) -> None:
    (tmp_path / "m.sdf").write_text(before + content)
    *others, last = records_of(tmp_path / "m.sdf")
    assert [record.mol_id for record in others] == (["a"] if before else [])
    assert_too_large(last, "4.3")
    assert last.excerpt == content[:200]


sd_pieces = st.sampled_from(["$$$$", "$", "\n", "\r\n", "x", "a longer piece", "\n$$$$\n"])


@given(st.lists(sd_pieces, max_size=40), st.integers(1, 30), st.integers(1, 20))
def test_sd_records_are_the_same_with_and_without_a_limit(
    pieces: list[str], block_bytes: int, max_bytes: int
) -> None:
    raw = "".join(pieces).encode() + b"end"
    blocks = [raw[start : start + block_bytes] for start in range(0, len(raw), block_bytes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_KEPT_BYTES", 5)
        found = list(text.sd_records(blocks, max_bytes))
    whole = list(text.sd_records([raw], len(raw)))
    assert list(map(text.size_of, found)) == list(map(len, whole))
    for record, expected in zip(found, whole, strict=True):
        is_too_large = len(expected) > max_bytes
        assert isinstance(record, text.Beginning) == is_too_large
        assert record == (expected[:5] if is_too_large else expected)


@pytest.mark.parametrize("line_bytes", [80, 64 << 20])
def test_of_a_record_that_is_too_large_no_more_than_the_limit_is_held(line_bytes: int) -> None:
    line = b"x" * (line_bytes - 1) + b"\n"
    content = line * ((64 << 20) // line_bytes) + b"$$$$\n"

    def blocks() -> Iterator[bytes]:
        for start in range(0, len(content), 1 << 18):
            yield content[start : start + (1 << 18)]

    for read in (text.sd_records, text.lines_of):
        tracemalloc.start()
        sizes = [text.size_of(record) for record in read(blocks(), LIMIT)]
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert sum(sizes) == len(content)
        assert peak_bytes < 4 * LIMIT + 200 * len(sizes)


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 10])
@pytest.mark.parametrize(
    ("name", "header"), [("t.csv", "smiles,y\n"), ("t.tsv", "smiles\ty\n"), ("t.smi", "")]
)
def test_a_line_that_is_too_large_costs_no_other(
    tmp_path: Path, name: str, header: str, rows_per_chunk: int
) -> None:
    mark = "\t" if name == "t.tsv" else "," if header else " "
    lines = [f"{smiles}{mark}{y}\n" for y, smiles in enumerate(["C", "N" * LIMIT, "CC", "CCC"])]
    blank = " " * (LIMIT + 1)
    (tmp_path / name).write_text(header + "".join(lines) + blank)
    records = records_of(tmp_path / name, rows_per_chunk)
    assert [record.row for record in records] == [0, 1, 2, 3, 4]
    assert smiles_of(records) == ["C", "CC", "CCC"]
    assert_too_large(records[1], "1.1")
    assert (records[1].mol_id, records[1].excerpt) == (None, "N" * 200)
    assert_too_large(records[4], "1.1")


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 10])
@pytest.mark.parametrize(
    ("before", "large", "kept"),
    [
        (['CN,"a', 'b",2'], "CO,{large},3", ["C", "CN", "CC", "CCC"]),
        ([], 'CO,"{large},3', ["C", "CC", "CCC"]),  # never closed
        (['CN,"a'], '{large}",3', ["C", "CC", "CCC"]),  # opened before
        (['CN,"a', "b"], "{large}", ["C", "CC", "CCC"]),
    ],
)
def test_a_line_that_is_too_large_is_a_row_of_its_own_whatever_its_quotes(
    tmp_path: Path, before: list[str], large: str, kept: list[str], rows_per_chunk: int
) -> None:
    lines = ["smiles,name,y", "C,x,1", *before, large.format(large="z" * LIMIT)]
    lines += ['CC,"two\nlines",4', "CCC,x,5"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    records = records_of(tmp_path / "t.csv", rows_per_chunk)
    assert smiles_of(records) == kept
    assert_too_large(records[-3], "1.1")
    assert sum(isinstance(record.content, Rejection) for record in records) == len(records) - len(
        kept
    )


ROW_OF_MANY_LINES = '{smiles},"' + '","'.join(["a\nb" + "z" * (LIMIT // 4)] * 7) + '"\n'
"""A row of 1.8 MiB in lines of a quarter of that."""


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 10])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_row_whose_cells_together_are_too_large_costs_no_other(
    tmp_path: Path, num_rows: int, rows_per_chunk: int
) -> None:
    header = "smiles," + ",".join(f"c{number}" for number in range(7)) + "\n"
    small = ROW_OF_MANY_LINES.replace("z", "")
    large = "".join(ROW_OF_MANY_LINES.format(smiles="CO") for _ in range(num_rows))
    (tmp_path / "t.csv").write_text(
        header + small.format(smiles="C") + large + small.format(smiles="CC")
    )
    records = records_of(tmp_path / "t.csv", rows_per_chunk, label_columns=())
    assert [record.row for record in records] == list(range(num_rows + 2))
    assert smiles_of(records) == ["C", "CC"]
    for record in records[1:-1]:
        assert_too_large(record, "1.8")
        assert record.excerpt == large[:200]


@pytest.mark.parametrize("num_cells", [3, 12, 200])
def test_of_a_row_of_many_lines_no_more_than_the_limit_is_held(num_cells: int) -> None:
    cell = b"x" * (LIMIT // 2) + b'\n"'
    row = b'CO,"' + b',"'.join([cell] * num_cells) + b"\n"

    def blocks() -> Iterator[bytes]:
        yield b'C,1\nCO,"'
        for number in range(num_cells):
            yield (b',"' if number else b"") + cell
        yield b"\nCC,2\n"

    tracemalloc.start()
    first, large, last = text.csv_records(blocks(), ",", LIMIT)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (first, last) == (b"C,1\n", b"CC,2\n")
    assert isinstance(large, text.Beginning)
    assert (large, large.num_bytes) == (row[:800], len(row))
    assert peak_bytes < 16 * LIMIT


@pytest.mark.parametrize("letter", ["x", "\N{CJK UNIFIED IDEOGRAPH-6C34}"])
def test_a_quote_that_is_not_closed_before_many_rows_costs_one_row(letter: str) -> None:
    line = f"CC,{letter * 20},2\n".encode()
    lines = [b'CO,"two\nlines",1\n', b'CO,"x,1\n', *[line] * (4 * LIMIT // len(line))]
    assert list(text.csv_records([b"".join(lines)], ",", LIMIT)) == lines


@pytest.mark.parametrize("rest", ["z,1\n", ""])
def test_a_row_too_large_that_turns_out_to_be_none_ends_before_its_last_part(rest: str) -> None:
    half = "x" * (LIMIT // 2) + "\n"
    large = 'CO,"' + '","'.join([half] * 5)
    tail = ['z"z,2\n', *["C,3\n"] * 3]
    found = list(text.csv_records([(large + rest + "".join(tail)).encode()], ",", LIMIT))
    assert isinstance(found[0], text.Beginning)
    assert 2 * LIMIT < found[0].num_bytes <= len(large)
    assert found[-3:] == [b"C,3\n"] * 3
    assert sum(map(text.size_of, found)) == len(large + rest + "".join(tail))


@pytest.mark.usefixtures("small_limit")
def test_a_first_line_that_is_too_large_is_no_header(tmp_path: Path) -> None:
    large = "smiles" * LIMIT
    (tmp_path / "t.smi").write_text(f"{large}\nC a\n")
    first, second = records_of(tmp_path / "t.smi")
    assert_too_large(first, "6.1")
    assert (second.row, second.mol_id) == (1, "a")
    (tmp_path / "t.csv").write_text(f"{large},y\nC,1\n")
    with pytest.raises(DataError, match=r"t\.csv: its first line, in .*6\.1 MiB.*Is it a table"):
        inspected(tmp_path / "t.csv")


@pytest.mark.usefixtures("small_limit")
def test_the_place_and_the_size_of_a_record_that_is_too_large_are_in_the_digest(
    tmp_path: Path,
) -> None:
    path = tmp_path / "m.sdf"
    digests = []
    for size in (0, 1, 1, 2):
        path.write_text(sd_record("a") + sd_record("b", image="x" * (LIMIT + size)))
        (layout,) = inspected(path).layouts
        (chunk,) = read_chunks(layout, 0, 10)
        assert len(chunk.payload) < 10_000
        digests.append(chunk.digest(layout))
    assert digests[1] == digests[2]
    assert len(set(digests)) == 3


@pytest.mark.usefixtures("small_limit")
def test_chunks_end_where_they_would_if_records_that_are_too_large_were_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_CHUNK_BYTES", 3 * LIMIT)
    path = tmp_path / "m.sdf"
    path.write_text("".join(sd_record(f"m{i}", image="x" * LIMIT) for i in range(7)))
    (layout,) = inspected(path).layouts
    assert [chunk.num_rows for chunk in read_chunks(layout, 0, 10)] == [3, 3, 1]


# --- Parquet ----------------------------------------------------------------------------------------


def geometry_table(num_rows: int = 3, **columns: object) -> pa.Table:
    """Rows of two atoms each, in the documented layout."""
    return pa.table(
        {
            "mol_id": [f"m{row}" for row in range(num_rows)],
            "smiles": ["C=O"] * num_rows,
            "n_atoms": pa.array([2] * num_rows, pa.int16()),
            "atomic_numbers": pa.array([[6, 8]] * num_rows, pa.list_(pa.uint8())),
            "formal_charges": pa.array([[0, 0]] * num_rows, pa.list_(pa.int8())),
            "positions": pa.array([[0.0, 0, 0, 1.2, 0, 0]] * num_rows, pa.list_(pa.float32())),
            "bond_begin": pa.array([[0]] * num_rows, pa.list_(pa.int32())),
            "bond_end": pa.array([[1]] * num_rows, pa.list_(pa.int32())),
            "bond_order": pa.array([[2]] * num_rows, pa.list_(pa.int32())),
            **columns,
        }
    )


def with_unit(table: pa.Table, name: str, unit: str) -> pa.Table:
    index = table.schema.get_field_index(name)
    field = table.schema.field(name).with_metadata({"unit": unit})
    return table.cast(table.schema.set(index, field))


def test_a_geometry_table_gives_rows_ids_and_labels_with_units(tmp_path: Path) -> None:
    table = geometry_table(
        homo=[-0.25, None, float("inf")], done=[True, False, True], count=pa.array([1, 2, None])
    )
    pq.write_table(with_unit(table, "homo", "hartree"), tmp_path / "g.parquet")
    source = inspected(tmp_path / "g.parquet")
    assert [tuple(label) for label in source.labels] == [("homo", "hartree"), ("count", None)]
    records = records_of(tmp_path / "g.parquet")
    assert [record.mol_id for record in records] == ["m0", "m1", "m2"]
    np.testing.assert_array_equal(
        [record.labels for record in records], [[-0.25, 1], [np.nan, 2], [np.nan, np.nan]]
    )
    assert [record.unreadable for record in records] == [(), (), ("homo",)]
    row = records[0].content
    assert isinstance(row, GeometryRow)
    assert np.asarray(row.positions).tolist() == pytest.approx([0, 0, 0, 1.2, 0, 0])
    assert (list(row.atomic_numbers), list(row.bond_order), row.smiles) == ([6, 8], [2], "C=O")
    chosen = inspected(tmp_path / "g.parquet", label_columns=("done", "homo"))
    assert [tuple(label) for label in chosen.labels] == [("done", None), ("homo", "hartree")]


TEXT_TYPES = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())


@pytest.mark.parametrize("kind", [*TEXT_TYPES, pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_text_of_any_type_is_read_as_in_other_tables(tmp_path: Path, kind: pa.DataType) -> None:
    columns = {"smiles": ["C", "CC", None], "mol_id": ["a", " b ", "c"], "y": ["1.5", "n.d.", None]}
    table = pa.table({name: pa.array(values).cast(kind) for name, values in columns.items()})
    pq.write_table(table, tmp_path / "t.parquet")
    records = records_of(tmp_path / "t.parquet", label_columns=("y",))
    assert smiles_of(records) == ["C", "CC", ""]
    assert [record.mol_id for record in records] == ["a", "b", "c"]
    np.testing.assert_array_equal([record.labels[0] for record in records], [1.5, np.nan, np.nan])
    assert [record.unreadable for record in records] == [(), ("y",), ()]


def test_bytes_that_are_not_utf8_are_replaced(tmp_path: Path) -> None:
    names = pa.array([b"caf\xe9", b"b"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"smiles": ["C", "CC"], "mol_id": names}), tmp_path / "t.parquet")
    assert [record.mol_id for record in records_of(tmp_path / "t.parquet")] == ["caf\ufffd", "b"]


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


def test_other_list_types_and_sliced_chunks_give_the_same_rows(tmp_path: Path) -> None:
    positions = [[float(row), 0, 0, 1.2, 0, row] for row in range(10)]
    plain = geometry_table(10, positions=pa.array(positions, pa.list_(pa.float32())))
    large = geometry_table(10, positions=pa.array(positions, pa.large_list(pa.float64())))
    fixed = geometry_table(10, positions=pa.array(positions, pa.list_(pa.float64(), 6)))
    pq.write_table(plain, tmp_path / "plain.parquet", row_group_size=4)
    found = []
    for name, table, rows in (("plain", plain, 3), ("large", large, 7), ("fixed", fixed, 10)):
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=4)
        records = records_of(tmp_path / f"{name}.parquet", rows)
        found.append([np.asarray(record.content.positions).tolist() for record in records])  # type: ignore[union-attr]
    assert found[0] == found[1] == found[2]
    assert found[0] == np.array(positions, np.float32).tolist()


def test_nulls_in_geometry_reject_the_row_or_leave_it_without_coordinates(tmp_path: Path) -> None:
    lists = [[0.0, 0, 0, 1.2, 0, 0], None, [0.0, 0, 0, None, 0, 0]]
    begins = pa.array([None, [0], [0]], pa.list_(pa.int32()))
    table = geometry_table(positions=pa.array(lists, pa.list_(pa.float32())), bond_begin=begins)
    pq.write_table(table, tmp_path / "g.parquet")
    first, second, third = (record.content for record in records_of(tmp_path / "g.parquet"))
    assert isinstance(first, Rejection)
    assert "bond_begin is null" in first.detail
    assert isinstance(second, GeometryRow)
    assert second.positions is None
    assert isinstance(third, Rejection)
    assert "a null in positions" in third.detail


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


def test_incomplete_geometry_is_told_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pq.write_table(geometry_table().drop_columns(["bond_order"]), tmp_path / "g.parquet")
    assert smiles_of(records_of(tmp_path / "g.parquet")) == ["C=O"] * 3
    assert "positions but not bond_order" in caplog.text


def test_nested_positions_are_refused(tmp_path: Path) -> None:
    nested = pa.array([[[0.0, 0, 0], [1.2, 0, 0]]] * 3)
    pq.write_table(geometry_table(positions=nested), tmp_path / "g.parquet")
    with pytest.raises(DataError, match=r"column 'positions' is list.*expected a flat list"):
        inspected(tmp_path / "g.parquet")


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 4, 7, 10, 100])
def test_parquet_chunks_cover_every_row_once_whatever_the_row_groups(
    tmp_path: Path, rows_per_chunk: int
) -> None:
    table = pa.table({"smiles": ["C" * (row + 1) for row in range(23)]})
    with pq.ParquetWriter(tmp_path / "s.parquet", table.schema) as writer:
        for start, length in ((0, 2), (2, 3), (5, 10), (15, 1), (16, 7)):
            writer.write_table(table.slice(start, length))
    records = records_of(tmp_path / "s.parquet", rows_per_chunk)
    assert [len(smiles or "") for smiles in smiles_of(records)] == list(range(1, 24))
    parts = sources.parquet_parts(find_sources(str(tmp_path))[0], rows_per_chunk)
    assert [part.chunk_index for part in parts] == list(range(len(parts)))
    assert max(part.num_rows for part in parts) <= rows_per_chunk


# --- files ------------------------------------------------------------------------------------------


def test_directories_and_globs_are_read_in_order_with_all_labels(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.csv").write_text("smiles,y\nC,1\n")
    (tmp_path / "deep" / "c.sdf").write_text(sd_record("x", mu=3))
    (tmp_path / "a.tsv").write_text("smiles\tz\nN\t2\n")
    (tmp_path / "README.md").write_text("no molecules")
    source = inspected(tmp_path)
    assert [Path(layout.file.uri).name for layout in source.layouts] == ["a.tsv", "b.csv", "c.sdf"]
    assert [label.name for label in source.labels] == ["z", "y", "mu"]
    labels = np.array([record.labels for record in records_of(tmp_path)])
    nan = np.nan
    np.testing.assert_array_equal(labels, [[2, nan, nan], [nan, 1, nan], [nan, nan, 3]])
    assert len(find_sources(str(tmp_path / "*.csv"))) == 1


def test_several_sources_are_read_in_the_order_given_and_no_file_twice(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv", "deep/c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("smiles\nC\n")
    found = find_sources(str(tmp_path / "deep"), str(tmp_path / "*.csv"))
    assert [Path(file.uri).name for file in found] == ["c.csv", "a.csv", "b.csv"]
    with pytest.raises(ConfigError, match=r"a\.csv is in two of .*Leave one of them out"):
        find_sources(str(tmp_path / "a.csv"), str(tmp_path))


def test_one_label_in_two_units_is_refused(tmp_path: Path) -> None:
    for name, unit in (("a", "eV"), ("b", "hartree")):
        pq.write_table(
            with_unit(geometry_table(gap=[1.0] * 3), "gap", unit), tmp_path / f"{name}.parquet"
        )
    with pytest.raises(
        ConfigError, match=r"'gap' is in eV in .*a\.parquet and in hartree in .*b\.parquet"
    ):
        inspected(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.sdf", b""),
        ("m.sdf", b"\n\n"),
        ("m.csv", b""),
        ("m.csv", b"smiles,y\n"),
        ("m.csv.gz", gzip.compress(b"", mtime=0)),
        ("m.parquet", b""),
    ],
)
def test_an_empty_file_is_told(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: empty, no records"):
        inspected(tmp_path / name)


def test_an_empty_file_among_others_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.csv").write_bytes(b"")
    (tmp_path / "b.csv").write_bytes(b"smiles\nC\n")
    assert smiles_of(records_of(tmp_path)) == ["C"]
    assert "a.csv is empty" in caplog.text


def test_no_molecule_files_and_unknown_kinds_are_told(tmp_path: Path) -> None:
    (tmp_path / "molecules.xyz").write_text("1\n")
    for uri in (tmp_path, tmp_path / "molecules.xyz"):
        with pytest.raises(DataError, match=r"found molecules\.xyz; expected \.sdf, \.csv"):
            find_sources(str(uri))
    with pytest.raises(StorageError, match=r"missing\.csv: it does not exist"):
        find_sources(str(tmp_path / "missing.csv"))
    (tmp_path / "Assay.XLSX").write_text("PK")
    with pytest.raises(DataError, match=r"found Assay\.XLSX; .* Save the sheet of a workbook as"):
        find_sources(str(tmp_path / "Assay.XLSX"))


def test_a_prepared_data_set_is_no_source(tmp_path: Path) -> None:
    ours = {"format_version": 1, "fingerprint": "x", "shards": []}
    (tmp_path / "manifest.json").write_text(json.dumps(ours))
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match="holds a prepared data set already"):
        find_sources(str(tmp_path))


@pytest.mark.parametrize("content", ['{"format_version": 3, "files": []}', "[]", "not JSON"])
def test_a_manifest_of_another_program_is_left_out(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    (tmp_path / "x.csv").write_text("smiles\nC\n")
    assert [Path(file.uri).name for file in find_sources(str(tmp_path))] == ["x.csv"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_lines_may_end_in_carriage_returns_alone(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    suffix = "" if pack is bytes else ".gz"
    table = b"smiles,y\rCCO,1\rCCN,2\r"
    (tmp_path / f"a.csv{suffix}").write_bytes(pack(table))
    record = sd_record("x", mu=3).encode().replace(b"\n", b"\r")
    (tmp_path / f"b.sdf{suffix}").write_bytes(pack(record * 2))
    assert [record.mol_id for record in records_of(tmp_path)] == [None, None, "x", "x"]
    labels = np.array([record.labels for record in records_of(tmp_path)])
    nan = np.nan
    np.testing.assert_array_equal(labels, [[1, nan], [2, nan], [nan, 3], [nan, 3]])


@pytest.mark.parametrize("suffix", ["sdf", "csv"])
def test_a_truncated_gzip_gives_its_complete_chunks_then_names_the_record(
    tmp_path: Path, suffix: str
) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.bytes(30).hex() for _ in range(2000)]
    if suffix == "sdf":
        text = "".join(sd_record(f"m{i}", noise=word) for i, word in enumerate(noise))
    else:
        text = "smiles,noise\n" + "".join(f"C,{word}\n" for word in noise)
    content = gzip.compress(text.encode(), mtime=0)
    path = tmp_path / f"t.{suffix}.gz"
    path.write_bytes(content)
    (layout,) = inspected(path).layouts
    whole = list(read_chunks(layout, 0, 100))
    path.write_bytes(content[: len(content) // 2])
    (layout,) = inspected(path).layouts
    found: list[RowChunk] = []
    with pytest.raises(
        DataError, match=rf"t\.{suffix}\.gz is damaged after record \d+.*truncated"
    ) as error:
        _collect(layout, found)
    assert 0 < len(found) < 20
    assert found == whole[: len(found)]
    record = int(str(error.value).split("after record ")[1].split(" ")[0])
    assert 100 * len(found) <= record < 100 * len(found) + 100


def _collect(layout: sources.SourceLayout, into: list[RowChunk]) -> None:
    for chunk in read_chunks(layout, 0, 100):
        into.append(chunk)  # noqa: PERF402 - what comes before the error counts


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "damaged after record"),
        (lambda content: content[:5], "damaged after record 0"),
        (lambda _: b"smiles\nC\n", "is not a gzip file"),
    ],
)
def test_a_corrupt_gzip_is_told(
    tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    rng = np.random.default_rng(0)
    text = "smiles,x\n" + "".join(f"C,{rng.bytes(30).hex()}\n" for _ in range(20_000))
    path = tmp_path / "t.csv.gz"
    path.write_bytes(damage(gzip.compress(text.encode())))
    with pytest.raises(DataError, match=message):
        records_of(path)


def test_a_damaged_parquet_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    path.write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"s\.parquet is not a Parquet file or is damaged"):
        inspected(path)
    pq.write_table(
        pa.table({"smiles": ["C" * 50] * 1000}), path, compression="zstd", use_dictionary=False
    )
    content = bytearray(path.read_bytes())
    content[20:60] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"s\.parquet is damaged after record 0"):
        records_of(path)


def test_chunks_end_by_rows_or_bytes_and_their_digest_is_of_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.csv"
    path.write_text("smiles\n" + "".join(f"{'C' * row}\n" for row in range(1, 11)))
    (layout,) = inspected(path).layouts
    assert [chunk.num_rows for chunk in read_chunks(layout, 0, 4)] == [4, 4, 2]
    monkeypatch.setattr(reading, "MAX_CHUNK_BYTES", 14)
    chunks = list(read_chunks(layout, 0, 4))
    assert [chunk.num_rows for chunk in chunks] == [4, 3, 2, 1]
    assert [chunk.first_row for chunk in chunks] == [0, 4, 7, 9]
    assert len({chunk.digest(layout) for chunk in chunks}) == 4


def test_a_source_in_s3_is_read_like_a_local_one(s3_uri: str, tmp_path: Path) -> None:
    from moleblend_ray.data import storage

    storage.write_bytes(s3_uri + "/a.csv.gz", gzip.compress(b"smiles,y\nC,1\nCC,2\n"))
    pq.write_table(geometry_table(), tmp_path / "g.parquet")
    storage.upload(tmp_path / "g.parquet", s3_uri + "/b.parquet")
    assert [record.mol_id for record in records_of(s3_uri)] == [None, None, "m0", "m1", "m2"]
    assert find_sources(s3_uri)[0].uri == s3_uri + "/a.csv.gz"


# --- tables of SMILES -------------------------------------------------------------------------------


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


def test_several_lines_in_one_of_a_table_of_smiles_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "t.smi").write_bytes(b"C a\r\nN c\rNC d\rNCC e\r\nCC b\n")
    first, bad, last = records_of(tmp_path / "t.smi")
    assert smiles_of([first, last]) == ["C", "CC"]
    assert isinstance(bad.content, Rejection)
    assert "carriage return" in bad.content.detail


@pytest.mark.parametrize("delimiter", ["\t", ","])
def test_a_text_table_with_a_header_of_columns_is_a_table(tmp_path: Path, delimiter: str) -> None:
    lines = [("chembl_id", "canonical_smiles", "y"), ("CHEMBL1", "C", "2.5")]
    path = tmp_path / "chemreps.txt"
    path.write_text("".join(delimiter.join(line) + "\n" for line in lines))
    (record,) = records_of(path, smiles_column="canonical_smiles", id_column="chembl_id")
    assert (record.mol_id, record.labels.tolist()) == ("CHEMBL1", [2.5])
    assert smiles_of([record]) == ["C"]
    with pytest.raises(ConfigError, match="mean 'canonical_smiles'"):
        inspected(path)


def test_text_files_in_a_directory_are_notes(tmp_path: Path) -> None:
    (tmp_path / "README.txt").write_text("C\n")
    (tmp_path / "m.smi").write_text("CC\n")
    assert smiles_of(records_of(tmp_path)) == ["CC"]


def test_the_sample_of_a_file_with_huge_records_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moleblend_ray.data.sources import layouts

    monkeypatch.setattr(layouts, "_SAMPLE_BYTES", 3000)
    path = tmp_path / "m.sdf"
    records = [
        sd_record(f"m{i}", note="x" * 1000, **({"late": i} if i == 9 else {})) for i in range(10)
    ]
    path.write_text("".join(records))
    assert inspected(path).labels == ()
    # A property that is not in the sample may be asked for, as it may come later in the file.
    assert [label.name for label in inspected(path, label_columns=("late",)).labels] == ["late"]
    assert records_of(path, label_columns=("late",))[9].labels.tolist() == [9.0]
