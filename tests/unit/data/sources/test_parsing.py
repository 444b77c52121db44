"""Cells and records that cannot be parsed are rejected alone."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from source_files import METHANE, records_of, smiles_of

from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.chemistry.molecule import Molecule, molecule_from_smiles
from moleblend_ray.chemistry.records import MolBlock
from moleblend_ray.chemistry.rejection import Rejection


def test_cells_that_are_no_finite_number_are_told(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("smiles,y\n" + "C,1\n" * 1000 + "C,>10\nC,inf\nC,1_0\n")
    records = records_of(path)
    assert [record.unreadable for record in records[-3:]] == [("y",)] * 3
    assert np.isnan([record.labels[0] for record in records[-3:]]).all()


@pytest.mark.parametrize("cell", ["", " ", "NA", "N/A", "#N/A", "<NA>", "nan", "NULL", "None", "?"])
def test_what_tables_write_for_a_missing_number_is_none(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"smiles,y\nC,1\nCC,{cell}\n")
    missing = records_of(path)[1]
    assert missing.unreadable == ()
    assert np.isnan(missing.labels[0])


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


def test_properties_without_a_blank_line_or_with_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.sdf"
    path.write_text(METHANE.format(title="a") + ">  <x>  (1)\n1\n2\n\n> 25 <y>\n3\n$$$$\n")
    (record,) = records_of(path, label_columns=("x", "y"))
    assert np.isnan(record.labels[0])
    assert record.labels[1] == 3.0
    assert record.unreadable == ("x",)


def test_a_property_with_two_values_has_none(tmp_path: Path) -> None:
    path = tmp_path / "m.sdf"
    twice = "> <x>\n1\n\n> <y>\n7\n\n> <z>\n\n> <x>\n2\n\n> <y>\n7\n\n> <z>\n3\n\n"
    path.write_text(METHANE.format(title="a") + twice + "$$$$\n")
    (record,) = records_of(path, label_columns=("x", "y", "z"))
    np.testing.assert_equal(record.labels, [np.nan, 7.0, np.nan])
    assert record.unreadable == ("x", "z")


@pytest.mark.parametrize("value", ["2\n\n", "\n", "2\n3\n\n", ""])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_molecules_without_a_line_between_them_are_told_and_not_taken_for_the_first(
    tmp_path: Path, value: str, line_end: str
) -> None:
    path = tmp_path / "m.sdf"
    first, second = (METHANE.format(title=title) for title in "ab")
    first += f"> <x>\n{value}" if value else ""
    text = first + second + "> <x>\n1\n\n$$$$\n" + second + "> <x>\n1\n\n$$$$\n"
    path.write_text(text, newline=line_end)
    joined, plain = records_of(path, label_columns=("x",))
    assert isinstance(joined.content, Rejection)
    assert joined.content.code == "invalid_record"
    assert joined.content.detail.startswith("2 molblocks in one record: the line $$$$")
    assert joined.mol_id == "a"
    assert np.isnan(joined.labels).all()
    assert plain.mol_id == "b"
    np.testing.assert_equal(plain.labels, [1.0])


@pytest.mark.parametrize("title", ["", "scaffold"])
def test_a_molblock_that_is_the_value_of_a_property_is_no_molecule_of_the_file(
    tmp_path: Path, title: str
) -> None:
    path = tmp_path / "m.sdf"
    scaffold = METHANE.format(title=title)
    path.write_text(METHANE.format(title="a") + f"> <scaffold>\n{scaffold}\n> <x>\n1\n\n$$$$\n")
    (record,) = records_of(path, label_columns=("x",))
    assert isinstance(record.content, MolBlock)
    np.testing.assert_equal(record.labels, [1.0])


def test_names_of_properties_may_contain_angle_brackets(tmp_path: Path) -> None:
    path = tmp_path / "m.sdf"
    values = ">  <logD (pH>7)>  (1)\n1\n\n>  <logD (pH>2)>\n>2\n\n> 25 <a<b> DT5\n3\n\n$$$$\n"
    path.write_text(METHANE.format(title="a") + values)
    names = ("logD (pH>7)", "logD (pH>2)", "a<b")
    (record,) = records_of(path, label_columns=names)
    np.testing.assert_equal(record.labels, [1.0, np.nan, 3.0])
    assert record.unreadable == ("logD (pH>2)",)


def test_a_byte_order_mark_is_no_part_of_the_first_title(tmp_path: Path) -> None:
    path = tmp_path / "m.sdf"
    text = "".join(METHANE.format(title=title) + "$$$$\n" for title in ("a", "b"))
    path.write_text(text, encoding="utf-8-sig")
    assert [record.mol_id for record in records_of(path)] == ["a", "b"]


@pytest.mark.parametrize("name", ["t.smi", "t.ism", "t.cxsmiles", "t.cxsmiles.gz"])
def test_an_extension_of_a_smiles_is_no_name(tmp_path: Path, name: str) -> None:
    lines = {
        "C[C@H](N)O |&1:1|": ("C[C@H](N)O |&1:1|", None),
        "C[C@H](N)O |&1:1,r| a b": ("C[C@H](N)O |&1:1,r|", "a b"),
        "C[C@H](N)O |&1:1|\ta b": ("C[C@H](N)O |&1:1|", "a b"),
        "C[C@H](N)O\t|&1:1|\ta": ("C[C@H](N)O |&1:1|", "a"),
        "CCO a|b|": ("CCO", "a|b|"),
        "CCO |a": ("CCO", "|a"),
    }
    text = "\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    records = records_of(tmp_path / name)
    expected = list(lines.values())
    assert list(zip(smiles_of(records), [r.mol_id for r in records], strict=True)) == expected
    molecule = molecule_from_smiles(expected[1][0], FeaturizeConfig())
    assert isinstance(molecule, Molecule)
    assert molecule.smiles == "C[C@H](N)O"


def test_a_library_of_extended_smiles_with_columns_is_a_table(tmp_path: Path) -> None:
    rows = ["smiles\tid\tType\tMW", "C[C@H](N)O |&1:1|\tZ1\tM\t61.1", "CCO\tZ2\tS\t46.1"]
    (tmp_path / "REAL.cxsmiles").write_text("\n".join(rows))
    records = records_of(tmp_path / "REAL.cxsmiles", id_column="id")
    assert smiles_of(records) == ["C[C@H](N)O |&1:1|", "CCO"]
    assert [record.mol_id for record in records] == ["Z1", "Z2"]


def test_several_lines_in_one_of_a_table_of_smiles_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "t.smi").write_bytes(b"C a\r\nN c\rNC d\rNCC e\r\nCC b\n")
    first, bad, last = records_of(tmp_path / "t.smi")
    assert smiles_of([first, last]) == ["C", "CC"]
    assert isinstance(bad.content, Rejection)
    assert "carriage return" in bad.content.detail
