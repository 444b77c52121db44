"""The size of the actor pool follows from measured rates, within its bounds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from ray.data import DataContext
from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer
from ray.data._internal.execution.operators.map_operator import MapOperator

from moleblend_ray.orchestration.cluster.executor import NOTED_BLOCKS, forget_blocks, operators_of
from moleblend_ray.orchestration.streaming.pool import PoolBounds, Rates, wanted_actors

BOUNDS = PoolBounds(fewest=1, most=16, molecules_per_block=4096)


@pytest.mark.parametrize(
    ("build_s", "blocks_per_s", "starving", "running", "expected"),
    [
        (0.05, 1.0, 0.0, 1, 1),  # 5 % of one actor
        (0.05, 1.0, 0.0, 8, 1),  # a pool that is too large is told so
        (0.05, 60.0, 0.0, 4, 4),  # three busy ones and a fifth to spare
        (0.05, 18.0, 1.0, 1, 2),  # starving: one more
        (0.05, 72.0, 1.0, 4, 6),  # starving: half more
        (0.05, 300.0, 1.0, 16, 16),  # never above the bound
        (0.05, 0.0, 0.0, 3, 1),  # never below it
    ],
)
def test_actors_follow_the_trainers_appetite(
    build_s: float, blocks_per_s: float, starving: float, running: int, expected: int
) -> None:
    rates = Rates(build_s=build_s, blocks_per_s=blocks_per_s, starving_share=starving)
    assert wanted_actors(rates, running, BOUNDS) == expected


def test_operators_are_found_among_others_and_may_be_absent() -> None:
    pool: Any = object()
    plan, builder, sink = operator(), operator(pool), operator()
    found = operators_of(executor(plan, builder, sink))
    assert found == (builder, pool, sink)
    assert operators_of(executor(plan, sink)) is None


def test_what_ray_notes_of_each_block_is_dropped_but_for_the_newest_blocks() -> None:
    source = InputDataBuffer(DataContext(), [])
    plan: Any = MapOperator.create(Mock(), source, DataContext(), name="plan")
    notes = list(range(2 * NOTED_BLOCKS))
    plan._output_blocks_stats = notes
    forget_blocks(executor(source, plan))
    assert len(notes) == 2 * NOTED_BLOCKS  # few: not worth a copy in each iteration
    notes.append(2 * NOTED_BLOCKS)
    forget_blocks(executor(source, plan))
    assert plan.get_stats() == {"plan": list(range(NOTED_BLOCKS + 1, 2 * NOTED_BLOCKS + 1))}


def operator(*pools: Any) -> Any:
    return SimpleNamespace(get_autoscaling_actor_pools=lambda: list(pools))


def executor(*operators: Any) -> Any:
    return SimpleNamespace(_topology=operators)
