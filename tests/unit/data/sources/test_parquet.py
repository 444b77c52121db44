"""Parquet tables with and without geometry; every row is read once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from source_files import geometry_table, inspected, records_of, smiles_of, with_unit

from moleblend_ray.chemistry.records import GeometryRow
from moleblend_ray.chemistry.rejection import Rejection
from moleblend_ray.data.dataset.manifest import LabelColumn
from moleblend_ray.data.sources import (
    ColumnConfig,
    find_sources,
    inspect_sources,
    parquet_parts,
    read_chunks,
)
from moleblend_ray.errors import DataError


def test_a_geometry_table_gives_rows_ids_and_labels_with_units(tmp_path: Path) -> None:
    table = geometry_table(
        homo=[-0.25, None, float("inf")], done=[True, False, True], count=pa.array([1, 2, None])
    )
    pq.write_table(with_unit(table, "homo", "hartree"), tmp_path / "g.parquet")
    source = inspected(tmp_path / "g.parquet")
    assert source.labels == (LabelColumn("homo", "hartree"), LabelColumn("count"))
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
    assert chosen.labels == (LabelColumn("done"), LabelColumn("homo", "hartree"))


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


def test_whole_numbers_with_gaps_are_the_same_names_as_without(tmp_path: Path) -> None:
    """pandas makes floats of them."""
    ids, large = pa.array([7.0, None, 1e15, 0.5]), pa.array([2.0**53, 1e300, -3.0, 1.0])
    smiles = ["C", "CC", "CCC", "CCCC"]
    for column, expected in ((ids, ["7", None, "1000000000000000", "0.5"]), (large, None)):
        pq.write_table(pa.table({"smiles": smiles, "mol_id": column}), tmp_path / "t.parquet")
        found = [record.mol_id for record in records_of(tmp_path / "t.parquet")]
        assert found == (expected or [str(2.0**53), "1e+300", "-3", "1"])


def test_ids_that_are_nan_are_missing(tmp_path: Path) -> None:
    """As null; ``nan`` would be the name of many molecules."""
    ids = pa.array(np.array([7.0, np.nan, np.nan]))
    pq.write_table(pa.table({"smiles": ["C", "CC", "CCC"], "mol_id": ids}), tmp_path / "t.parquet")
    found = [record.mol_id for record in records_of(tmp_path / "t.parquet")]
    assert found == ["7", None, None]


def test_bytes_that_are_not_utf8_are_replaced(tmp_path: Path) -> None:
    names = pa.array([b"caf\xe9", b"b"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"smiles": ["C", "CC"], "mol_id": names}), tmp_path / "t.parquet")
    assert [record.mol_id for record in records_of(tmp_path / "t.parquet")] == ["caf\ufffd", "b"]


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
    parts = parquet_parts(find_sources(str(tmp_path))[0], rows_per_chunk)
    assert [part.chunk_index for part in parts] == list(range(len(parts)))
    assert max(part.num_rows for part in parts) <= rows_per_chunk


@pytest.mark.parametrize("rows_per_chunk", [1000, 8192, 9000])
def test_chunks_of_a_large_row_group_are_the_same_by_whichever_task(
    tmp_path: Path, rows_per_chunk: int
) -> None:
    table = pa.table(
        {
            "smiles": ["C" * (row % 50 + 1) for row in range(20_000)],
            "kind": pa.array([f"{row // 300}" for row in range(20_000)]).dictionary_encode(),
            "label": [None if row % 7 == 0 else row / 4 for row in range(20_000)],
        }
    )
    pq.write_table(table, tmp_path / "s.parquet", row_group_size=20_000)
    config = ColumnConfig(label_columns=("label", "kind"))
    (layout,) = inspect_sources(find_sources(str(tmp_path)), config).layouts
    chunks = list(read_chunks(layout, 0, rows_per_chunk))
    rows = [pa.ipc.open_stream(chunk.payload).read_all() for chunk in chunks]
    assert pa.concat_tables(rows).to_pydict() == table.to_pydict()
    for part in parquet_parts(layout.file, rows_per_chunk):
        assert list(read_chunks(layout, 0, rows_per_chunk, [part])) == [chunks[part.chunk_index]]


def test_a_large_row_group_is_not_decoded_as_a_whole(tmp_path: Path) -> None:
    rows = pa.concat_tables([geometry_table(200)] * 1000)
    pq.write_table(rows, tmp_path / "g.parquet", row_group_size=len(rows))
    (layout,) = inspect_sources(find_sources(str(tmp_path)), ColumnConfig()).layouts
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    most = max(pool.bytes_allocated() - before for _ in read_chunks(layout, 0, 1000))
    assert most < rows.nbytes / 4


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
