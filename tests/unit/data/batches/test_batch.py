"""Micro-batches: sorted by size, packed into one buffer, read without copying, checked when they arrive."""

from __future__ import annotations

import dataclasses
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from relations_support import bond_degrees
from synthetic import random_block

from moleblend_ray.data.batches.batch import (
    HEADER_FIELDS,
    MicroBatch,
    build_micro_batches,
    build_steps,
    mean_molecule_bytes,
    num_micro_batches,
    unpack_micro_batch,
)
from moleblend_ray.data.config import StreamConfig
from moleblend_ray.data.dataset.block import MoleculeBlock, undescribed
from moleblend_ray.errors import ConfigError, DataError
from moleblend_ray.relations.topology import topology
from moleblend_ray.vocabulary import NUM_DESCRIPTORS

ARRAYS = [item.name for item in fields(MicroBatch) if item.name not in ("step", "stream", "index")]


@pytest.fixture
def block() -> MoleculeBlock:
    return random_block(np.random.default_rng(2), 30)


def with_descriptors(block: MoleculeBlock) -> MoleculeBlock:
    """The molecules with random descriptors, some of them not known."""
    rng = np.random.default_rng(4)
    drawn = rng.normal(size=(len(block), NUM_DESCRIPTORS)).astype(np.float32)
    drawn[rng.random(drawn.shape) < 0.1] = np.nan
    return dataclasses.replace(block, descriptors=drawn)


@pytest.mark.parametrize(("size", "parts"), [(30, 1), (64, 1), (15, 2), (8, 4), (1, 30), (29, 2)])
def test_micro_batches_ascend_in_size_and_hold_each_molecule_once(
    block: MoleculeBlock, size: int, parts: int
) -> None:
    micro_batches = build_micro_batches(block, 5, 2, size)
    assert len(micro_batches) == parts == num_micro_batches(30, size)
    assert [micro.index for micro in micro_batches] == list(range(parts))
    assert {(micro.step, micro.stream) for micro in micro_batches} == {(5, 2)}
    sizes = np.concatenate([micro.num_atoms for micro in micro_batches])
    assert (np.diff(sizes) >= 0).all()
    ids = np.concatenate([micro.molecule_ids for micro in micro_batches])
    assert np.array_equal(np.sort(ids), np.arange(30))
    counts = [len(micro) for micro in micro_batches]
    assert max(counts) - min(counts) <= 1
    assert max(counts) <= size


def test_micro_batches_carry_the_molecules_and_their_relations(block: MoleculeBlock) -> None:
    micro_batches = build_micro_batches(block, 0, 0, 7)
    assert sum(map(len, micro_batches)) == 30
    for micro in micro_batches:
        own = block.take(micro.molecule_ids)
        relations = topology(own.num_atoms, own.num_bonds, own.bonds, own.bond_features)
        assert np.array_equal(micro.num_atoms, own.num_atoms)
        assert np.array_equal(micro.atom_features, own.atom_features)
        assert np.array_equal(micro.positions, own.positions)
        assert np.array_equal(micro.position_mask, own.position_mask)
        assert np.array_equal(micro.spd, relations.spd)
        assert np.array_equal(micro.path_words, relations.path_words)
        assert np.array_equal(micro.path_codes, relations.path_codes)
        assert np.array_equal(micro.degrees, bond_degrees(own.num_atoms, own.num_bonds, own.bonds))


def test_many_steps_at_once_equal_each_step_by_itself(block: MoleculeBlock) -> None:
    together = build_steps(block, range(10, 13), 1, 4)
    alone = [
        micro
        for k in range(3)
        for micro in build_micro_batches(block.take(np.arange(10 * k, 10 * k + 10)), 10 + k, 1, 4)
    ]
    assert [bytes(micro.payload) for micro in together] == [bytes(m.payload) for m in alone]
    with pytest.raises(DataError, match="cannot be cut into 4 steps"):
        build_steps(block, range(4), 0, 4)


def test_a_molecule_with_damaged_bonds_is_named_before_it_is_packed(block: MoleculeBlock) -> None:
    rows = np.flatnonzero(block.num_bonds > 0)
    bonds = block.bonds.copy()
    bonds[np.cumsum(block.num_bonds)[rows[3]] - 1, 0] = block.num_atoms[rows[3]]
    with pytest.raises(DataError, match=f"molecule {rows[3]} of the block has"):
        build_steps(dataclasses.replace(block, bonds=bonds), range(3), 0, 4)
    with pytest.raises(DataError, match="bond arrays do not fit"):
        build_steps(dataclasses.replace(block, bonds=bonds[:-1]), range(3), 0, 4)


def test_degrees_count_the_neighbours_of_each_atom() -> None:
    block = random_block(np.random.default_rng(0), 1)
    molecules = dataclasses.replace(
        block,
        molecule_ids=np.arange(3),
        num_atoms=np.array([1, 2, 3], np.int32),
        num_bonds=np.array([0, 1, 2], np.int32),
        atom_features=np.zeros((6, 9), np.uint8),
        bonds=np.array([[1, 0], [0, 1], [1, 2]], np.uint16),
        bond_features=np.zeros((3, 3), np.uint8),
        positions=np.zeros((6, 3), np.float32),
        position_mask=np.zeros(6, bool),
    )
    (micro,) = build_micro_batches(molecules, 0, 0, 3)
    assert micro.degrees.tolist() == [0, 1, 1, 1, 2, 1]


def test_degrees_saturate_at_255() -> None:
    n = 300
    star = dataclasses.replace(
        random_block(np.random.default_rng(0), 1),
        num_atoms=np.array([n], np.int32),
        num_bonds=np.array([n - 1], np.int32),
        atom_features=np.zeros((n, 9), np.uint8),
        bonds=np.stack([np.arange(1, n), np.zeros(n - 1)], axis=1).astype(np.uint16),
        bond_features=np.zeros((n - 1, 3), np.uint8),
        positions=np.zeros((n, 3), np.float32),
        position_mask=np.zeros(n, bool),
    )
    (micro,) = build_micro_batches(star, 0, 0, 1)
    assert micro.degrees.tolist() == [255] + [1] * (n - 1)
    assert set(micro.spd.tolist()) == {0, 1, 2}


def test_unpacking_views_the_buffer_and_gives_back_every_array(block: MoleculeBlock) -> None:
    micro = build_micro_batches(with_descriptors(block), 3, 1, 30)[0]
    payload = bytes(micro.payload)
    found = unpack_micro_batch(payload)
    assert (found.step, found.stream, found.index) == (3, 1, 0)
    for name in ARRAYS:
        assert getattr(found, name).dtype == getattr(micro, name).dtype
        np.testing.assert_array_equal(getattr(found, name), getattr(micro, name), name)
        assert np.shares_memory(getattr(found, name), np.frombuffer(payload, np.uint8))
    off_by_one = memoryview(b"\0" + payload)[1:]
    assert np.array_equal(unpack_micro_batch(off_by_one).spd, micro.spd)


def test_a_15_atom_molecule_takes_the_1482_bytes_of_the_documented_layout() -> None:
    rng = np.random.default_rng(0)
    whole = random_block(rng, 3000, max_atoms=15)
    block = whole.take(np.flatnonzero(whole.num_atoms == 15)[:64])
    assert len(block) == 64
    payload = build_micro_batches(block, 0, 0, 64)[0].payload
    assert len(payload) == 88 + 64 * 1482


@given(st.binary(max_size=400))
@settings(max_examples=60)
def test_random_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(DataError, match="micro-batch"):
        unpack_micro_batch(content)


def test_truncated_or_altered_buffers_are_refused(block: MoleculeBlock) -> None:
    payload = bytes(build_micro_batches(block, 3, 1, 30)[0].payload)
    for length in (0, 8, 79, 80, len(payload) // 2, len(payload) - 8, len(payload) - 1):
        with pytest.raises(DataError, match=r"fewer than its header|was cut off or damaged"):
            unpack_micro_batch(payload[:length])
    words = np.frombuffer(payload, np.int64).copy()
    for place, value, message in [
        (1, 4, "has version 4, this program reads 3"),
        (6, 2**62, "was cut off or damaged"),
        (6, 31, "was cut off or damaged"),
        (7, -1, "damaged header"),
        (9, 4, "damaged header"),
        (10, 4, "damaged header"),
        (11 + 30, 2**33 + 1, "do not add up"),
    ]:
        altered = words.copy()
        altered[place] = value
        with pytest.raises(DataError, match=message):
            unpack_micro_batch(altered.tobytes())


def test_descriptors_travel_with_their_molecules(block: MoleculeBlock) -> None:
    block = with_descriptors(block)
    micro_batches = build_steps(block, range(3, 5), 1, 7)
    assert sum(map(len, micro_batches)) == 30
    for micro in micro_batches:
        expected = block.descriptors[micro.molecule_ids].astype(np.float16)
        received = unpack_micro_batch(bytes(micro.payload))
        assert received.descriptors.dtype == np.float16
        np.testing.assert_array_equal(received.descriptors, expected)
        np.testing.assert_array_equal(received.path_words, micro.path_words)
    bare = build_steps(dataclasses.replace(block, descriptors=undescribed(30)), range(2), 1, 7)
    assert all(micro.descriptors.shape == (0, NUM_DESCRIPTORS) for micro in bare)


@pytest.mark.parametrize("described", [False, True])
def test_the_mean_bytes_of_a_molecule_are_those_of_its_buffer(
    block: MoleculeBlock, described: bool
) -> None:
    block = with_descriptors(block) if described else block
    sizes, counts = np.unique(block.num_atoms, return_counts=True)
    mean = mean_molecule_bytes(
        dict(zip(sizes.tolist(), counts.tolist(), strict=True)), described=described
    )
    (micro,) = build_micro_batches(block, 0, 0, len(block))
    header, padding = 8 * len(HEADER_FIELDS), 8 * 8
    assert 0 <= len(micro.payload) - header - mean * len(block) < padding


def test_blocks_have_as_many_steps_as_the_store_holds_six_times_for_each_stream() -> None:
    stream = StreamConfig()
    assert stream.block_steps(4, step_bytes=380_000, budget=10**9) == 32  # 12 MiB
    assert stream.block_steps(4, step_bytes=380_000, budget=24 * 1_900_000) == 4
    assert stream.block_steps(4, step_bytes=380_000, budget=10**6) == 1
    assert stream.block_steps(4, step_bytes=1_000, budget=10**9) == 64
    assert StreamConfig(steps_per_block=5).block_steps(4, step_bytes=1.0, budget=1) == 5


def test_stream_settings_out_of_range_are_refused_all_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        StreamConfig(micro_batch_size=0, min_actors=3, max_actors=2, actor_cpus=0)
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "micro_batch_size",
        "max_actors",
        "actor_cpus",
    ]
