"""Keyed hashing is a stable, well spread pure function of its words."""

from __future__ import annotations

import numpy as np

from moleblend_ray.relations.hashing import keyed_hash, mix


def test_finaliser_is_splitmix64() -> None:
    # First outputs of the published SplitMix64 with seed 0 (Steele et al. 2014; Vigna's splitmix64.c).
    counter = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [hex(word) for word in mix(counter).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_order_of_words_matters_and_words_broadcast() -> None:
    table = keyed_hash(7, np.arange(50)[:, None], np.arange(50)[None])
    assert table.shape == (50, 50)
    assert len(np.unique(table)) == 2500
    assert table[3, 9] == keyed_hash(7, 3, 9)[0]


def test_every_bit_is_set_half_of_the_time() -> None:
    words = keyed_hash(0, np.arange(20_000))
    shares = [(words >> np.uint64(bit) & np.uint64(1)).mean() for bit in range(64)]
    assert np.abs(np.array(shares) - 0.5).max() < 0.02
