"""The guarantees of the data order hold at 10^11 molecules and 4,096 workers, where no test can list a whole epoch.

Instead, these tests show that the mapping from position to molecule can be inverted, so that no two positions share a
molecule and no molecule is left out. They list whole windows, which cover whole chunks, and with the same code all rows
of small collections.
"""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moleblend_ray.data.batches.order import (
    _CHUNKS,
    _WINDOW,
    MAX_MOLECULES,
    DataOrder,
    permute,
    unpermute,
)
from moleblend_ray.data.config import OrderConfig
from moleblend_ray.relations.hashing import keyed_hash

Molecules = NDArray[np.int64]

# Not a multiple of chunks or windows: the last ones are shorter.
PLANET = 10**11 + 7
WORKERS = 4096
EPOCHS = 3


def planet(num_molecules: int = PLANET, **changes: int) -> DataOrder:
    defaults = {"seed": 11, "global_batch_size": 16 * WORKERS, "num_streams": WORKERS}
    return DataOrder(num_molecules, OrderConfig(**(defaults | changes)))


def position_of(data: DataOrder, epoch: Molecules, molecule: Molecules) -> Molecules:
    """The position of each molecule in the given epoch: the inverse of the order's two steps."""
    config, total = data.config, data.num_molecules
    chunks = -(-total // config.chunk_rows)
    missing = chunks * config.chunk_rows - total  # rows that the last chunk lacks
    size, key = np.full(len(molecule), chunks), keyed_hash(config.seed, _CHUNKS, epoch)
    chunk, row = np.divmod(molecule, config.chunk_rows)
    slot = unpermute(chunk, size, key)
    behind = slot > unpermute(size - 1, size, key)
    offset = slot * config.chunk_rows + row - np.where(behind, missing, 0)
    window = offset // config.shuffle_window
    start = window * config.shuffle_window
    size = np.minimum(config.shuffle_window, total - start)
    inside = unpermute(offset - start, size, keyed_hash(config.seed, _WINDOW, epoch, window))
    return epoch * total + start + inside


def sampled(total: int, count: int, seed: int) -> Molecules:
    """Random numbers below ``total``, including the smallest and the largest."""
    ends = np.r_[np.arange(3000), total - 3000 + np.arange(3000)]
    return np.unique(np.r_[ends, np.random.default_rng(seed).integers(0, total, count)])


@given(
    size=st.one_of(
        st.integers(1, MAX_MOLECULES),
        st.integers(1, 39).flatmap(lambda bits: st.integers(2**bits - 1, 2**bits + 1)),
    ),
    key=st.integers(0, 2**64 - 1),
)
@settings(max_examples=100)
def test_a_permutation_of_any_size_stays_inside_and_can_be_undone(size: int, key: int) -> None:
    random = np.random.default_rng(key)
    index = np.unique(np.r_[0, size - 1, random.integers(0, size, 500)])
    sizes, keys = np.full(len(index), size), np.full(len(index), key, np.uint64)
    for there, back in ((permute, unpermute), (unpermute, permute)):
        image = there(index, sizes, keys)
        assert image.min() >= 0
        assert image.max() < size
        assert len(np.unique(image)) == len(index)
        assert np.array_equal(back(image, sizes, keys), index)


@pytest.mark.parametrize("total", [10**11, PLANET, MAX_MOLECULES])
@pytest.mark.parametrize("chunk_rows", [2048, 1000])
def test_no_two_positions_of_an_epoch_share_a_molecule(total: int, chunk_rows: int) -> None:
    data = planet(total, chunk_rows=chunk_rows)
    for epoch in range(EPOCHS):
        positions = epoch * total + sampled(total, 20_000, seed=epoch)
        molecules = data.molecules_at(positions)
        assert molecules.min() >= 0
        assert molecules.max() < total
        assert len(np.unique(molecules)) == len(positions)
        assert np.array_equal(
            position_of(data, np.full(len(positions), epoch), molecules), positions
        )


@pytest.mark.parametrize("total", [10**11, PLANET, MAX_MOLECULES])
@pytest.mark.parametrize("chunk_rows", [2048, 1000])
def test_each_molecule_has_a_position_in_each_epoch(total: int, chunk_rows: int) -> None:
    data = planet(total, chunk_rows=chunk_rows)
    molecules = sampled(total, 20_000, seed=7)
    for epoch in range(EPOCHS):
        positions = position_of(data, np.full(len(molecules), epoch), molecules)
        assert (positions // total == epoch).all()
        assert np.array_equal(data.molecules_at(positions), molecules)


def test_windows_of_a_planet_hold_each_row_of_their_chunks_once() -> None:
    data = planet()
    rows, size = data.config.chunk_rows, data.config.shuffle_window
    last_chunk = PLANET // rows
    short = position_of(data, np.array([1]), np.array([PLANET - 1]))[0] - PLANET
    last_window = PLANET // size
    for window in (0, 1, short // size, short // size + 1, 1_000_000, last_window - 1, last_window):
        offsets = np.arange(window * size, min((window + 1) * size, PLANET))
        molecules = np.sort(data.molecules_at(PLANET + offsets))
        assert (np.diff(molecules) > 0).all()
        chunks, firsts, counts = np.unique(molecules // rows, return_index=True, return_counts=True)
        # The rows of a chunk are consecutive, and only the two chunks at the ends of the window are cut.
        assert np.array_equal(molecules[firsts + counts - 1] - molecules[firsts], counts - 1)
        full = np.where(chunks == last_chunk, PLANET - last_chunk * rows, rows)
        assert (counts != full).sum() <= 2
        assert len(chunks) <= -(-len(offsets) // rows) + 2


def steps_per_epoch(data: DataOrder) -> int:
    """Steps after which every molecule was seen at least once; the last one may reach into the next epoch."""
    return -(-data.num_molecules // data.config.global_batch_size)


@pytest.mark.parametrize("world_size", [1, 60, 1024, 2048, WORKERS])
@pytest.mark.parametrize("border", [False, True])
def test_workers_share_a_step_evenly_without_overlap(world_size: int, border: bool) -> None:
    streams = WORKERS if WORKERS % world_size == 0 else 5040
    data = planet(global_batch_size=4 * streams, num_streams=streams)
    step = 2 * PLANET // data.config.global_batch_size if border else 123_456
    size = data.config.global_batch_size
    assert (step * size // PLANET != (step + 1) * size // PLANET) == border
    batches = [data.stream_batches(step, 1, stream)[0] for stream in range(streams)]
    ranks = [np.concatenate(batches[rank::world_size]) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {data.config.global_batch_size // world_size}
    together = np.concatenate(ranks)
    assert len(np.unique(together)) == data.config.global_batch_size
    assert np.array_equal(np.sort(together), np.sort(data.global_batch(step)))


@pytest.mark.parametrize(
    ("molecules", "batch", "streams", "window", "chunk"),
    [
        (1, 8, 8, 4, 2),  # a batch of eight epochs
        (7, 24, 12, 5, 3),  # several borders within a step
        (997, 60, 15, 64, 10),  # a prime: every step, window and chunk is cut somewhere
        (1000, 60, 12, 128, 1000),  # one chunk
        (1001, 60, 60, 1, 8),  # no window
        (1023, 128, 128, 4096, 32),  # one window, larger than the collection
        (4099, 512, 64, 100, 64),  # windows smaller than two chunks
    ],
)
def test_every_molecule_comes_once_an_epoch_over_all_streams(
    molecules: int, batch: int, streams: int, window: int, chunk: int
) -> None:
    data = planet(
        molecules, global_batch_size=batch, num_streams=streams, shuffle_window=window, chunk_rows=chunk,
    )  # fmt: skip
    steps = EPOCHS * steps_per_epoch(data)
    # (stream, step, row) -> the global sequence of positions.
    by_stream = np.stack([data.stream_batches(0, steps, stream) for stream in range(streams)])
    sequence = by_stream.transpose(1, 0, 2).reshape(-1)
    whole = len(sequence) // molecules
    epochs = sequence[: whole * molecules].reshape(whole, molecules)
    assert whole >= EPOCHS
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(molecules), (whole, 1)))
    rest = sequence[whole * molecules :]
    assert len(np.unique(rest)) == len(rest)


def test_epochs_of_a_planet_have_unrelated_orders() -> None:
    data = planet()
    offsets = np.random.default_rng(1).integers(0, PLANET, 10_000)
    orders = np.stack([data.molecules_at(epoch * PLANET + offsets) for epoch in range(5)])
    correlation = np.corrcoef(orders) - np.eye(5)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(offsets))
    # A window has 32 of 48 million chunks; the chance that two epochs begin with a common chunk is 1 in 50,000.
    begins = [
        set(data.molecules_at(epoch * PLANET + np.arange(65536)) // 2048) for epoch in range(5)
    ]
    assert all(not begins[a] & begins[b] for a in range(5) for b in range(a))
    within = np.stack([row % 2048 for row in orders])
    assert (within[0] == within[1:]).mean() < 5e-3


def assert_uniform(counts: NDArray[np.int64]) -> None:
    """Pearson's chi-squared within five of its standard deviations."""
    free, expected = len(counts) - 1, counts.mean()
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_squared - free) < 5 * np.sqrt(2 * free)


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_a_run_of_windows_takes_chunks_from_everywhere(epoch: int) -> None:
    data = planet()
    # The chunks of 1,000 consecutive windows: one row of each slot.
    first = 32_000 * 300
    offsets = (first + np.arange(32_000)) * 2048
    chunks = data._chunk_sequence(np.full(len(offsets), epoch), offsets) // 2048
    assert len(np.unique(chunks)) == len(chunks)
    assert_uniform(np.histogram(chunks, bins=64, range=(0, PLANET / 2048))[0])


def test_a_step_mixes_all_chunks_of_its_window() -> None:
    data = planet(global_batch_size=8192)
    window = data.molecules_at(np.arange(65536))
    numbers = {chunk: index for index, chunk in enumerate(np.unique(window // 2048))}
    for step in range(8):
        chunks = np.array([numbers[chunk] for chunk in data.global_batch(step) // 2048])
        counts = np.bincount(chunks, minlength=len(numbers))
        # Drawn without replacement, so the counts, 256 on average, vary less than chi-squared.
        assert np.abs(counts - 256).max() < 5 * np.sqrt(256)


def test_no_stream_is_given_a_part_of_the_collection() -> None:
    data = planet()
    steps = np.random.default_rng(2).integers(0, EPOCHS * steps_per_epoch(data), 400)
    streams = (0, 1, 2047, 2048, 4095)
    seen = np.stack(
        [np.concatenate([data.stream_batches(s, 1, v)[0] for s in steps]) for v in streams]
    )
    for molecules in seen:
        # Rows of a step share 32 chunks, so steps and not rows are the independent draws.
        means = molecules.reshape(len(steps), -1).mean(axis=1) / PLANET
        assert abs(means.mean() - 0.5) < 5 * means.std() / np.sqrt(len(means))
        assert_uniform(np.histogram(molecules[::16], bins=16, range=(0, PLANET))[0])


def peak_bytes(data: DataOrder, step: int) -> int:
    data.global_batch(step)  # compiled and cached before the measurement
    tracemalloc.start()
    try:
        data.global_batch(step)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_of_a_batch_does_not_grow_with_the_collection() -> None:
    # The last step of the first epoch in both cases, so that both contain an epoch border.
    small, large = (planet(total, global_batch_size=2**15) for total in (10**5 + 7, PLANET))
    peaks = [peak_bytes(data, steps_per_epoch(data) - 1) for data in (small, large)]
    assert peaks[0] > 8 * 2**15, "the measurement sees NumPy's arrays"
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 256 * 2**15
