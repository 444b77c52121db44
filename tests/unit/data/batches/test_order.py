"""The data order is a bijection of each epoch, independent of streams and workers, at any size."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moleblend_ray.data.batches.order import MAX_MOLECULES, DataOrder, permute, unpermute
from moleblend_ray.data.config import OrderConfig
from moleblend_ray.errors import ConfigError, DataError


def order(num_molecules: int, **settings: int) -> DataOrder:
    defaults = {"seed": 3, "global_batch_size": 16, "num_streams": 4}
    return DataOrder(num_molecules, OrderConfig(**(defaults | settings)))


@given(st.integers(1, 5000), st.integers(0, 2**63 - 1))
@settings(max_examples=50)
def test_keyed_permutation_is_a_bijection_with_its_inverse(size: int, key: int) -> None:
    index = np.arange(size)
    sizes, keys = np.full(size, size), np.full(size, key, np.uint64)
    image = permute(index, sizes, keys)
    assert np.array_equal(np.sort(image), index)
    assert np.array_equal(unpermute(image, sizes, keys), index)


@given(
    num_molecules=st.integers(1, 700),
    window=st.integers(1, 900),
    chunk=st.integers(1, 300),
    seed=st.integers(-(2**62), 2**62),
)
@settings(max_examples=60)
def test_each_molecule_comes_exactly_once_an_epoch(
    num_molecules: int, window: int, chunk: int, seed: int
) -> None:
    data = order(num_molecules, shuffle_window=window, chunk_rows=chunk, seed=seed)
    seen = data.molecules_at(np.arange(3 * num_molecules)).reshape(3, -1)
    assert np.array_equal(np.sort(seen, axis=1), np.tile(np.arange(num_molecules), (3, 1)))


def test_batches_across_an_epoch_border_continue_with_the_next_epoch() -> None:
    data = order(100, chunk_rows=8, shuffle_window=32)
    batches = np.concatenate([data.global_batch(step) for step in range(25)])
    epochs = batches.reshape(4, 100)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(100), (4, 1)))


def test_epochs_and_seeds_give_different_orders() -> None:
    data = order(1000, chunk_rows=16, shuffle_window=128)
    first, second = data.molecules_at(np.arange(2000)).reshape(2, 1000)
    other_seed = order(1000, chunk_rows=16, shuffle_window=128, seed=4).molecules_at(
        np.arange(1000)
    )
    assert (first == second).mean() < 0.05
    assert (first == other_seed).mean() < 0.05


@pytest.mark.parametrize("num_streams", [1, 2, 4, 8])
def test_streams_put_together_are_the_same_global_batch_for_any_number_of_streams(
    num_streams: int,
) -> None:
    reference = order(777, num_streams=1)
    data = order(777, num_streams=num_streams)
    for step in (0, 1, 47, 48, 49, 1000):
        streams = [data.stream_batches(step, 1, stream)[0] for stream in range(num_streams)]
        assert np.array_equal(np.concatenate(streams), reference.global_batch(step))


def test_consecutive_steps_of_a_stream_equal_its_single_steps() -> None:
    data = order(500)
    steps = data.stream_batches(29, 5, 2)
    assert np.array_equal(
        steps, np.concatenate([data.stream_batches(29 + k, 1, 2) for k in range(5)])
    )


def test_the_order_never_changes_between_versions() -> None:
    data = order(10_000, chunk_rows=100, shuffle_window=1000)
    assert data.global_batch(12_345).tolist() == PINNED_BATCH
    # The default window is a power of four, the whole domain of a Feistel network.
    assert order(300_000).global_batch(12_345).tolist() == PINNED_BATCH_OF_DEFAULTS


# fmt: off
PINNED_BATCH = [
    6793, 6710, 6283, 8946, 6035, 4822, 6289, 6206,
    6690, 5997, 8983, 2333, 5984, 5905, 2364, 6091,
]
PINNED_BATCH_OF_DEFAULTS = [
    256526, 63299, 47903, 283139, 181136, 157531, 120190, 155742,
    149560, 275609, 38155, 256817, 276021, 89820, 120118, 283030,
]
# fmt: on


def test_rows_of_a_window_are_spread_uniformly() -> None:
    data = order(1 << 14, chunk_rows=64, shuffle_window=1 << 14)
    offsets = data.molecules_at(np.arange(40 << 14)).reshape(40, -1)
    # The molecule at a fixed position over many epochs, and how many neighbours stay neighbours.
    counts = np.histogram(offsets[:, :2048], bins=64, range=(0, 1 << 14))[0]
    expected = counts.sum() / 64
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 63 + 5 * np.sqrt(2 * 63)
    steps = np.abs(np.diff(offsets, axis=1))
    assert (steps == 1).mean() < 2e-3
    assert abs(np.corrcoef(offsets[0], offsets[1])[0, 1]) < 0.04


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_permutations_reach_every_arrangement_evenly(size: int) -> None:
    keys = np.arange(4000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    images = np.stack(
        [permute(np.full(4000, i), np.full(4000, size), keys) for i in range(size)], axis=1
    )
    _, counts = np.unique(images, axis=0, return_counts=True)
    assert len(counts) >= (2, 6, 24, 120)[size - 2]
    assert counts.max() < 3 * counts.mean()


def test_a_hundred_billion_molecules_cost_no_more_than_a_few() -> None:
    data = order(10**11, global_batch_size=4096, shuffle_window=1 << 20)
    started = time.perf_counter()
    batches = [data.global_batch(step) for step in (0, 10**6, 24_414_062, 10**9)]
    assert time.perf_counter() - started < 1.0
    for batch in batches:
        assert batch.min() >= 0
        assert batch.max() < 10**11
        assert len(np.unique(batch)) >= 4095


def test_a_window_reads_few_chunks() -> None:
    data = order(10**9, global_batch_size=256, shuffle_window=4096, chunk_rows=1024)
    window = np.concatenate([data.global_batch(step) for step in range(16)])
    assert len(np.unique(window // 1024)) <= 6


def test_settings_that_make_no_order_are_refused_naming_the_field() -> None:
    with pytest.raises(ConfigError, match=r"num_streams: expected a divisor .* \(10\), found 4"):
        OrderConfig(global_batch_size=10, num_streams=4)
    with pytest.raises(ConfigError, match="chunk_rows: expected at least 1, found 0"):
        OrderConfig(chunk_rows=0)
    for seed in (-(2**63) - 1, 2**63, 2**64):
        with pytest.raises(ConfigError, match=f"seed: expected .* found {seed}"):
            OrderConfig(seed=seed)
    for seed in (-(2**63), 2**63 - 1):
        order(10, seed=seed).global_batch(0)
    for num_molecules in (0, MAX_MOLECULES + 1):
        with pytest.raises(DataError, match=f"found {num_molecules}"):
            DataOrder(num_molecules, OrderConfig())
    for stream in (-1, 4):
        with pytest.raises(ConfigError, match=f"stream {stream} does not exist"):
            order(10).stream_batches(0, 1, stream)
