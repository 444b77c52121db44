"""Blocks on their way keep within the object store's budget."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from ray.data import DataContext

from moleblend_ray.errors import ConfigError
from moleblend_ray.orchestration.streaming import budget
from moleblend_ray.orchestration.streaming.budget import limit_blocks, most_blocks


def test_what_trainers_take_in_advance_counts_as_well() -> None:
    assert most_blocks(budget=100, block_bytes=5.0, num_streams=4) == 20 - 2 * 4


def test_a_budget_of_three_blocks_a_stream_is_enough_and_less_is_refused() -> None:
    assert most_blocks(budget=60, block_bytes=5.0, num_streams=4) == 4
    with pytest.raises(ConfigError, match="4 streams need 3 each"):
        most_blocks(budget=59, block_bytes=5.0, num_streams=4)


class Pipeline:
    """The two operators that the policy sees, with counts to set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.now, self.slept = 100.0, 0.0
        monkeypatch.setattr(
            budget, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep)
        )
        context = DataContext()
        limit_blocks(context, most)
        self.active = 1
        self.builder = Mock(num_active_tasks=lambda: self.active)
        self.builder.metrics.num_inputs_received = 0
        self.sink = Mock()
        self.sink.metrics = Mock(block_outputs_taken=0, num_external_outqueue_blocks=0)
        topology: Any = {self.builder: None, self.sink: None}
        manager: Any = None
        self.policy = budget._BlockLimit(context, topology, manager)

    def _sleep(self, seconds: float) -> None:
        self.slept += seconds
        self.now += seconds

    def start(self) -> int:
        """Begin blocks until the policy says no; returns how many."""
        before = self.builder.metrics.num_inputs_received
        while self.policy.can_add_input(self.builder):
            self.builder.metrics.num_inputs_received += 1
        return int(self.builder.metrics.num_inputs_received - before)

    def take(self, blocks: int) -> None:
        self.sink.metrics.block_outputs_taken += blocks
        self.policy.can_add_input(self.builder)  # it looks at least this often


def test_a_taken_block_makes_room_once_its_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(monkeypatch, most=5)
    assert pipeline.start() == 5
    pipeline.take(3)
    assert pipeline.start() == 0
    pipeline.now += 1.0  # Ray's period
    assert pipeline.start() == 0
    pipeline.now += 1.0
    assert pipeline.start() == 3
    assert pipeline.slept == 0


def test_an_idle_pipeline_waits_for_memory_and_not_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray starts a task regardless of a policy's no where nothing runs and a trainer waits."""
    pipeline = Pipeline(monkeypatch, most=5)
    pipeline.start()
    pipeline.take(2)
    pipeline.now += 1.0
    pipeline.active = 0
    assert pipeline.start() == 2
    assert 0 < pipeline.slept < 1.0
    # Nothing was taken since: no wait could help.
    slept = pipeline.slept
    assert pipeline.start() == 0
    assert pipeline.slept == slept
