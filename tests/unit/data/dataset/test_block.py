"""Blocks of molecules: made from rows of shards, and rows selected from them."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pyarrow as pa
import pytest
from synthetic import random_block, shard_table

from moleblend_ray.data.dataset.block import GraphColumns, MoleculeBlock, block_from_table, gather
from moleblend_ray.errors import DataError


def assert_equal(found: MoleculeBlock, expected: MoleculeBlock) -> None:
    for item in fields(MoleculeBlock):
        a, b = getattr(found, item.name), getattr(expected, item.name)
        assert a.dtype == b.dtype, item.name
        assert np.array_equal(a, b), item.name


@pytest.fixture
def block() -> MoleculeBlock:
    return random_block(np.random.default_rng(1), 12)


def test_rows_of_a_shard_table_come_back_as_they_were_written(block: MoleculeBlock) -> None:
    table = shard_table(block, np.ones(12, int))
    assert_equal(block_from_table(table, block.molecule_ids), block)


def test_slices_and_several_chunks_of_a_table_read_the_same(block: MoleculeBlock) -> None:
    table = shard_table(block, np.ones(12, int))
    chunked = pa.concat_tables([table.slice(0, 5), table.slice(5)]).slice(2, 7)
    rows = np.arange(2, 9)
    assert_equal(block_from_table(chunked, rows), block.take(rows))


def test_taken_molecules_follow_the_given_order_and_may_repeat(block: MoleculeBlock) -> None:
    rows = np.array([7, 0, 7, 3])
    alone = [block.take(np.array([row])) for row in rows]
    taken = block.take(rows)
    for field in fields(MoleculeBlock):
        expected = np.concatenate([getattr(molecule, field.name) for molecule in alone])
        np.testing.assert_array_equal(getattr(taken, field.name), expected)


def test_conformer_draw_is_taken_modulo_the_number_of_conformers(block: MoleculeBlock) -> None:
    conformers = np.array([1, 2, 3] * 4)
    rows, draw = np.arange(12), np.arange(12) + 100
    columns = GraphColumns.from_table(shard_table(block, conformers))
    found = gather([columns], np.zeros_like(rows), rows, block.molecule_ids, draw)
    moved = np.repeat(draw % conformers, block.num_atoms)[:, None].astype(np.float32)
    assert np.array_equal(found.positions, block.positions + moved)
    assert np.array_equal(found.position_mask, block.position_mask)
    first = block_from_table(shard_table(block, conformers), block.molecule_ids)
    assert_equal(first, block)


def test_molecules_without_conformers_have_no_positions(block: MoleculeBlock) -> None:
    conformers = np.array([0, 1, 2] * 4)
    found = block_from_table(shard_table(block, conformers), block.molecule_ids)
    without = np.repeat(conformers == 0, block.num_atoms)
    assert not found.position_mask[without].any()
    assert np.array_equal(found.positions[~without], block.positions[~without])
    none = block_from_table(shard_table(block, np.zeros(12, int)), block.molecule_ids)
    assert not none.position_mask.any()
    assert none.positions.shape == block.positions.shape


def test_damaged_columns_are_refused_naming_the_column(block: MoleculeBlock) -> None:
    table = shard_table(block, np.ones(12, int))
    with pytest.raises(DataError, match="lacks the column 'bonds'"):
        block_from_table(table.drop_columns(["bonds"]), block.molecule_ids)
    lists = table.column("atom_features").to_pylist()
    lists[4] = lists[4][:-1]
    index = table.column_names.index("atom_features")
    cut = table.set_column(index, "atom_features", pa.array(lists, pa.list_(pa.uint8())))
    with pytest.raises(DataError, match=r"'atom_features' of a shard has \d+ values in row 4"):
        block_from_table(cut, block.molecule_ids)
    lists[4] = None
    null = table.set_column(index, "atom_features", pa.array(lists, pa.list_(pa.uint8())))
    with pytest.raises(DataError, match="has 1 nulls"):
        block_from_table(null, block.molecule_ids)
    with pytest.raises(DataError, match="3 molecule ids were given for 12 rows"):
        block_from_table(table, np.arange(3))
