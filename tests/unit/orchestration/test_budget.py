"""Blocks on their way keep within the object store's budget."""

from __future__ import annotations

import pytest

from moleblend_ray.errors import ConfigError
from moleblend_ray.orchestration.budget import most_blocks


def test_what_trainers_take_in_advance_counts_as_well() -> None:
    assert most_blocks(budget=100, block_bytes=5.0, num_streams=4) == 20 - 2 * 4


def test_a_budget_of_three_blocks_a_stream_is_enough_and_less_is_refused() -> None:
    assert most_blocks(budget=60, block_bytes=5.0, num_streams=4) == 4
    with pytest.raises(ConfigError, match="4 streams need 3 each"):
        most_blocks(budget=59, block_bytes=5.0, num_streams=4)
