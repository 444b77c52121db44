"""The stream without Ray: steps from shards are the same for any world size and at any time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from synthetic import write_dataset

from moleblend_ray.data.batches.builder import MicroBatchBuilder, local_step_batches
from moleblend_ray.data.batches.order import DataOrder
from moleblend_ray.data.config import OrderConfig, StreamConfig
from moleblend_ray.data.dataset import shard_reader, shards
from moleblend_ray.data.dataset.block import MoleculeBlock
from moleblend_ray.data.dataset.manifest import ShardInfo, load_manifest
from moleblend_ray.data.dataset.node_cache import NodeCache
from moleblend_ray.errors import ConfigError, DataError

ORDER = OrderConfig(seed=1, global_batch_size=24, num_streams=4, shuffle_window=100, chunk_rows=32)
STREAM = StreamConfig(micro_batch_size=4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, MoleculeBlock]:
    folder = str(tmp_path_factory.mktemp("data"))
    return folder, write_dataset(folder, 500, max_conformers=3)


def test_steps_hold_the_molecules_of_the_data_order(
    dataset: tuple[str, MoleculeBlock],
) -> None:
    uri, molecules = dataset
    order = DataOrder(500, ORDER)
    # Steps 18 to 24 cross the border of the first epoch.
    batches = list(local_step_batches(uri, ORDER, STREAM, first_step=18, num_steps=7))
    assert [batch.step for batch in batches] == [18, 19, 20, 21, 22, 23, 24]
    for batch in batches:
        ids = np.concatenate([micro.molecule_ids for micro in batch.micro_batches])
        assert np.array_equal(np.sort(ids), np.sort(order.global_batch(batch.step)))
        for micro in batch.micro_batches:
            own = molecules.take(micro.molecule_ids)
            assert np.array_equal(micro.num_atoms, own.num_atoms)
            assert np.array_equal(micro.atom_features, own.atom_features)


@pytest.mark.parametrize("cache_bytes", [1, 1 << 20])
def test_descriptors_come_from_all_row_groups_scaled_and_with_their_molecule(
    tmp_path: Path, cache_bytes: int
) -> None:
    molecules = write_dataset(str(tmp_path), 500, max_conformers=3, described=True)
    scaling = load_manifest(str(tmp_path)).descriptor_scaling
    assert scaling is not None
    expected = scaling.targets(molecules.descriptors)
    known = ~np.isnan(molecules.descriptors)
    np.testing.assert_array_equal(known, ~np.isnan(expected))
    np.testing.assert_allclose(
        expected[known], scaling.apply(molecules.descriptors)[known], atol=1e-5
    )
    stream = dataclasses.replace(STREAM, cache_bytes=cache_bytes)
    builders = [
        MicroBatchBuilder(str(tmp_path), ORDER, stream, shared=shared) for shared in (False, True)
    ]
    try:
        alone, together = (builder.build(18, 7, 1) for builder in builders)
    finally:
        for builder in builders:
            builder.close()
    for micro, other in zip(alone, together, strict=True):
        assert bytes(micro.payload) == bytes(other.payload)
        own = expected[micro.molecule_ids].astype(np.float16)
        np.testing.assert_array_equal(micro.descriptors, own)
    assert len({int(i) // 64 for micro in alone for i in micro.molecule_ids}) > 3


def test_what_one_builder_of_a_machine_has_read_costs_the_others_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(str(tmp_path), 500)
    requests = []
    read_shard_range = shards.read_shard_range

    def counted(uri: str, shard: ShardInfo, offset: int, length: int) -> bytes:
        requests.append(shard.path)
        return read_shard_range(uri, shard, offset, length)

    monkeypatch.setattr(shard_reader, "read_shard_range", counted)
    builders = [MicroBatchBuilder(str(tmp_path), ORDER, STREAM, shared=True) for _ in range(2)]
    try:
        first = builders[0].build(0, 4, 0)
        # Neither the row groups nor the footers of their shards.
        made, requests[:] = len(requests), []
        again = builders[1].build(0, 4, 0)
        assert (made > 2, requests) == (True, [])
        # A table that another process drops just then is read again, with its footer.
        monkeypatch.setattr(NodeCache, "has", lambda *_: True)
        assert builders[1]._shared is not None
        for table in builders[1]._shared.folder.glob("*.arrow"):
            table.unlink()
        builders[1]._reader._groups.clear()
        dropped = builders[1].build(0, 4, 0)
    finally:
        for builder in builders:
            builder.close()
    for micros in (again, dropped):
        assert [bytes(micro.payload) for micro in micros] == [bytes(m.payload) for m in first]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_build_the_bytes_of_a_single_process(
    dataset: tuple[str, MoleculeBlock], world_size: int
) -> None:
    span = {"first_step": 3, "num_steps": 2}
    alone = list(local_step_batches(dataset[0], ORDER, STREAM, **span))
    ranks = [
        list(
            local_step_batches(dataset[0], ORDER, STREAM, rank=rank, world_size=world_size, **span)
        )
        for rank in range(world_size)
    ]
    for rank, own in enumerate(ranks):
        for batch in own:
            assert {m.stream for m in batch.micro_batches} == set(range(rank, 4, world_size))
    for step in range(2):
        expected = {(m.stream, m.index): bytes(m.payload) for m in alone[step].micro_batches}
        found = {
            (m.stream, m.index): bytes(m.payload) for own in ranks for m in own[step].micro_batches
        }
        assert found == expected


def test_a_group_of_steps_equals_its_steps_built_one_by_one(
    dataset: tuple[str, MoleculeBlock],
) -> None:
    rotating = StreamConfig(micro_batch_size=4, random_rotation=True)
    builder = MicroBatchBuilder(dataset[0], ORDER, rotating)
    group = builder.build(20, 3, 2)
    single = [micro for step in (20, 21, 22) for micro in builder.build(step, 1, 2)]
    assert [bytes(m.payload) for m in group] == [bytes(m.payload) for m in single]


def test_a_data_set_that_was_replaced_is_refused_and_not_mixed_with_the_former_one(
    tmp_path: Path,
) -> None:
    uri = str(tmp_path)
    write_dataset(uri, 40, seed=1)
    former = load_manifest(uri).fingerprint
    assert len(MicroBatchBuilder(uri, ORDER, STREAM, fingerprint=former).build(0, 1, 0)) == 2
    write_dataset(uri, 40, seed=2)
    later = load_manifest(uri).fingerprint
    with pytest.raises(DataError, match=f"fingerprint was {former}, now it is {later}"):
        MicroBatchBuilder(uri, ORDER, STREAM, fingerprint=former)


def test_conformers_are_drawn_anew_each_step_and_only_by_key(
    dataset: tuple[str, MoleculeBlock],
) -> None:
    uri, molecules = dataset
    shifts = []
    for batch in local_step_batches(uri, ORDER, STREAM, first_step=0, num_steps=40):
        for micro in batch.micro_batches:
            own = molecules.take(micro.molecule_ids)
            shifts.append(np.round((micro.positions - own.positions)[:, 0]).astype(int))
    assert set(np.unique(np.concatenate(shifts)).tolist()) == {0, 1, 2}
    again = next(local_step_batches(uri, ORDER, STREAM, first_step=7, num_steps=1))
    other = next(local_step_batches(uri, ORDER, STREAM, first_step=7, num_steps=1))
    assert [bytes(m.payload) for m in again.micro_batches] == [
        bytes(m.payload) for m in other.micro_batches
    ]


def test_conformers_of_molecules_and_of_steps_are_drawn_independently(
    dataset: tuple[str, MoleculeBlock],
) -> None:
    uri, molecules = dataset
    builder = MicroBatchBuilder(uri, ORDER, STREAM)
    first_atom = np.cumsum(molecules.num_atoms) - molecules.num_atoms
    ids = np.arange(500)
    shifts = [
        builder._read(ids, np.full(500, step)).positions - molecules.positions for step in range(60)
    ]
    drawn = np.round([shift[first_atom, 0] for shift in shifts]).astype(int)
    of_three = drawn[:, drawn.max(axis=0) == 2]
    assert of_three.shape[1] > 100
    for number in range(3):
        # Shares over the molecules of a step, and over the steps of a molecule.
        assert np.abs((of_three == number).mean(axis=1) - 1 / 3).max() < 0.2
        assert np.abs((of_three == number).mean(axis=0) - 1 / 3).max() < 0.33


def test_each_molecule_is_turned_otherwise_in_each_step_and_never_mirrored(tmp_path: Path) -> None:
    molecules = write_dataset(str(tmp_path), 60)
    order = OrderConfig(global_batch_size=60, num_streams=1)
    stream = StreamConfig(micro_batch_size=1, random_rotation=True)
    rotations = []
    for batch in local_step_batches(str(tmp_path), order, stream, first_step=0, num_steps=3):
        for micro in batch.micro_batches:
            if micro.num_atoms[0] >= 4:
                own = molecules.take(micro.molecule_ids)
                rotations.append(np.linalg.lstsq(own.positions, micro.positions)[0])
    assert len(rotations) > 3 * 40
    np.testing.assert_allclose(np.linalg.det(rotations), 1.0, atol=1e-3)
    assert len(np.unique(np.round(rotations, 3), axis=0)) == len(rotations)


def test_random_rotation_keeps_each_molecules_distances_and_changes_its_frame(
    tmp_path: Path,
) -> None:
    molecules = write_dataset(str(tmp_path), 60)
    order = OrderConfig(global_batch_size=60, num_streams=1)
    stream = StreamConfig(micro_batch_size=1, random_rotation=True)
    (batch,) = local_step_batches(str(tmp_path), order, stream, first_step=0, num_steps=1)
    assert len(batch.micro_batches) == 60
    several_atoms = [micro for micro in batch.micro_batches if micro.num_atoms[0] > 1]
    assert len(several_atoms) > 50
    for micro in several_atoms:
        own = molecules.take(micro.molecule_ids)
        before = np.linalg.norm(own.positions[:, None] - own.positions[None], axis=-1)
        after = np.linalg.norm(micro.positions[:, None] - micro.positions[None], axis=-1)
        assert np.allclose(before, after, atol=1e-5)
        assert not np.allclose(own.positions, micro.positions, atol=1e-2)


def test_a_world_size_that_does_not_divide_the_streams_is_refused(
    dataset: tuple[str, MoleculeBlock],
) -> None:
    with pytest.raises(ConfigError, match="4 streams cannot be divided among 3 workers"):
        next(local_step_batches(dataset[0], ORDER, STREAM, first_step=0, num_steps=1, world_size=3))
