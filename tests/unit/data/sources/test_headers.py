"""The header of a table tells its delimiter and the names of its columns."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from source_files import LIMIT, assert_too_large, inspected, records_of, smiles_of

from moleblend_ray.errors import ConfigError, DataError


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
