from __future__ import annotations

import dataclasses

import molecule_zoo as zoo
import numpy as np
import pytest
import torch
from synthetic import random_block, shard_table, with_random_descriptors

from moleblend_ray.data.batches.batch import build_micro_batches, unpack_micro_batch
from moleblend_ray.errors import DataError
from moleblend_ray.model.batch import MoleculeBatch, size_groups
from moleblend_ray.vocabulary import UNREACHABLE


def test_padding_puts_each_molecule_where_it_belongs() -> None:
    molecules = [zoo.single_atom(), zoo.chain(3), zoo.ring(5).without_positions([2])]
    batch = zoo.batch(molecules, ids=[10, 2**40, 12], step=4)
    assert batch.step == 4
    assert batch.molecule_ids.tolist() == [10, 2**40, 12]
    assert batch.atom_mask.sum(1).tolist() == [1, 3, 5]
    for row, molecule in enumerate(molecules):
        n = molecule.num_atoms
        assert torch.equal(batch.atom_features[row, :n], torch.from_numpy(molecule.atom_features))
        assert batch.position_mask[row, :n].tolist() == molecule.position_mask.tolist()
        assert not batch.positions[row, n:].any()
    assert batch.spd[1, :3, :3].tolist() == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]
    assert not batch.spd[1, 3:].any()
    assert not batch.path_codes[1, :, 3:].any()
    assert batch.degrees[2].tolist() == [2] * 5


@pytest.mark.parametrize("described", [False, True])
def test_rows_of_a_shard_are_a_batch_in_their_order(described: bool) -> None:
    rng = np.random.default_rng(0)
    block = random_block(rng, 12)
    if described:
        block, _ = with_random_descriptors(rng, block)
    table = shard_table(block, rng.integers(0, 3, len(block))).slice(2, 9)
    batch = MoleculeBatch.from_table(table)
    assert batch.num_atoms.tolist() == block.num_atoms[2:11].tolist()
    assert batch.num_atoms.tolist() != sorted(batch.num_atoms.tolist())
    for row, alone in enumerate(MoleculeBatch.from_table(table.slice(i, 1)) for i in range(9)):
        n = int(alone.num_atoms)
        for name in ("atom_features", "degrees", "positions", "position_mask"):
            assert torch.equal(getattr(batch, name)[row, :n], getattr(alone, name)[0])
        for name in ("spd", "path_codes"):
            assert torch.equal(getattr(batch, name)[row, :n, :n], getattr(alone, name)[0])
    assert len(batch.descriptors) == 9 * described
    with pytest.raises(DataError, match="found none"):
        MoleculeBatch.from_table(table.slice(0, 0))
    with pytest.raises(DataError, match="lacks the column 'num_atoms'"):
        MoleculeBatch.from_table(table.select(["smiles"]))


def test_unknown_positions_become_zero_even_if_stored_as_nan() -> None:
    batch = zoo.batch([zoo.ring(4).without_positions([1])])
    assert batch.positions.isfinite().all()
    assert not batch.positions[0, 1].any()
    assert batch.pair_position_mask[0].sum() == 9


def test_fragments_are_unreachable_from_each_other() -> None:
    batch = zoo.batch([zoo.salt()])
    assert (batch.spd[0, 7, :7] == UNREACHABLE).all()
    assert not batch.path_codes[0, 7].any()


def test_packing_and_padding_undo_each_other() -> None:
    batch = zoo.batch([zoo.single_atom(), zoo.chain(3), zoo.ring(5)])
    atoms = torch.randn(9, 2, 3)
    assert torch.equal(batch.pack_atoms(batch.pad_atoms(atoms)), atoms)
    assert torch.equal(batch.pad_atoms(atoms)[batch.atom_mask], atoms)
    tokens = torch.randn(12, 4)
    padded = batch.pad_tokens(tokens)
    assert torch.equal(batch.pack_tokens(padded), tokens)
    assert torch.equal(padded[:, 0], tokens[batch.graph_token])
    assert torch.equal(padded[:, 1:][batch.atom_mask], tokens[batch.atom_token])
    assert batch.token_molecule.tolist() == [0] * 2 + [1] * 4 + [2] * 6


def test_without_an_atom_all_else_is_as_in_the_whole_molecule() -> None:
    molecules = [zoo.chain(2), zoo.ring(6).without_positions([2]), zoo.salt(), zoo.chain(9)]
    batch = zoo.batch(molecules, ids=[3, 5, 7, 9], step=4)
    places = [(row, atom) for row in (0, 1, 2) for atom in range(molecules[row].num_atoms)]
    order = np.random.default_rng(0).permutation(len(places))
    molecule, atom = torch.tensor(places)[order].unbind(1)
    found = batch.without_atom(molecule, atom)
    assert found.step == batch.step
    assert found.molecule_ids.tolist() == batch.molecule_ids[molecule].tolist()
    most = max(molecules[row].num_atoms for row, _ in places) - 1
    assert found.max_atoms == most
    for row, (whole, gone) in enumerate(zip(molecule.tolist(), atom.tolist(), strict=True)):
        left = [index for index in range(molecules[whole].num_atoms) if index != gone]
        n = len(left)
        assert found.num_atoms[row] == n
        assert found.atom_mask[row].tolist() == [True] * n + [False] * (most - n)
        for name in ("atom_features", "degrees", "positions", "position_mask"):
            values = getattr(found, name)[row]
            assert torch.equal(values[:n], getattr(batch, name)[whole][left])
            assert not values[n:].any()
        for name in ("spd", "path_codes"):
            values = getattr(found, name)[row]
            assert torch.equal(values[:n, :n], getattr(batch, name)[whole][left][:, left])
            assert not values[n:].any()
            assert not values[:, n:].any()
    tokens = torch.randn(int(found.num_atoms.sum()) + len(places), 4)
    padded = found.pad_tokens(tokens)
    assert torch.equal(found.pack_tokens(padded), tokens)
    assert torch.equal(padded[:, 0], tokens[found.graph_token])
    assert torch.equal(padded[:, 1:][found.atom_mask], tokens[found.atom_token])
    assert torch.equal(
        found.pad_atoms(tokens[found.atom_token])[found.atom_mask], tokens[found.atom_token]
    )
    assert found.size_groups == size_groups(found.num_atoms.numpy())


def test_a_received_buffer_gives_the_same_batch_and_stays_untouched() -> None:
    (micro,) = build_micro_batches(zoo.block([zoo.chain(3), zoo.ring(6)]), 2, 0, 8)
    sent = bytes(micro.payload)
    received = MoleculeBatch.from_micro_batch(unpack_micro_batch(sent))
    expected = MoleculeBatch.from_micro_batch(micro)
    for field in dataclasses.fields(expected):
        value = getattr(expected, field.name)
        same = getattr(received, field.name)
        assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same
    received.positions.fill_(1.0)
    assert sent == bytes(micro.payload)


@pytest.mark.parametrize(
    ("atoms", "expected"),
    [
        ([1, 15, 15], [(0, 3, 16)]),
        ([3, 15, 16, 31, 32, 200], [(0, 2, 16), (2, 2, 32), (4, 1, 64), (5, 1, 256)]),
        ([2, 40] * 8, [(0, 16, 64)]),
    ],
)
def test_molecules_of_similar_size_form_groups(
    atoms: list[int], expected: list[tuple[int, int, int]]
) -> None:
    assert size_groups(np.array(atoms, np.int32)) == tuple(expected)
