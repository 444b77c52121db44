"""How many blocks may be in progress at once: as many as the stream's share of the object store holds.

Ray Data counts the blocks that its operators hold, but neither those that its actors are about to deliver nor those
that the trainers have taken, and in a test it filled twice its limit. All our blocks have nearly the same size, so they
are counted here: a block counts from the moment when an actor is asked for it until a trainer has taken it and Ray has
freed its memory.
"""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.execution_callback import ExecutionCallback

from moleblend_ray.errors import ConfigError
from moleblend_ray.orchestration.cluster.executor import blocks_taken, forget_blocks

if TYPE_CHECKING:
    from ray.data._internal.execution.interfaces import PhysicalOperator
    from ray.data._internal.execution.resource_manager import ResourceManager
    from ray.data._internal.execution.streaming_executor import StreamingExecutor
    from ray.data._internal.execution.streaming_executor_state import Topology

BLOCKS_IN_ADVANCE: Final = 2
"""Blocks per stream that trainers take before they need them, on average."""

_FREE_S: Final = 1.5
"""Seconds until the memory of a released block is free: Ray's stores free memory once per second, and with a delay."""

_PAUSE_S: Final = 0.01
"""Seconds between two iterations of Ray's executor. Building a block, or training on it, takes longer."""

_CONFIG_KEY: Final = "moleblend.most_blocks"


def most_blocks(budget: int, block_bytes: float, num_streams: int) -> int:
    """Blocks that may be requested and not yet taken, so that they and those taken in advance fit into ``budget``
    bytes.

    Raises ConfigError if this is less than one block per stream, as trainers would then wait for each other forever.
    """
    blocks = int(budget // block_bytes)
    if blocks < (BLOCKS_IN_ADVANCE + 1) * num_streams:
        raise ConfigError(
            f"stream.object_store_gib: {budget / 2**20:.0f} MiB of the object store hold {blocks} blocks of "
            f"{block_bytes / 2**20:.1f} MiB, and {num_streams} streams need {BLOCKS_IN_ADVANCE + 1} each; give it "
            "more, or set fewer stream.steps_per_block"
        )
    return blocks - BLOCKS_IN_ADVANCE * num_streams


def limit_blocks(context: DataContext, most: int) -> None:
    """Let actors of the stream with this context begin a block only while fewer than ``most`` are in progress."""
    context.set_config(_CONFIG_KEY, most)
    context.set_config(
        ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, _BlockLimit]
    )


def pause_between_looks(context: DataContext) -> None:
    """Keep the executor of a stream with this context from busy waiting, and from taking more memory with each block.

    While finished blocks wait for trainers, Ray's loop does not sleep. It was seen to use 0.8 cores of a machine that
    trainers needed.
    """
    context.custom_execution_callback_classes.append(_PausingCallback)


class _PausingCallback(ExecutionCallback):
    """Ray Data's hook: called after each iteration of the executor."""

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Sleep for a moment, so that others can use the core."""
        forget_blocks(executor)
        time.sleep(_PAUSE_S)


class _BlockLimit(BackpressurePolicy):
    """Ray Data's hook: says whether an operator may start a task."""

    def __init__(
        self, data_context: DataContext, topology: Topology, resource_manager: ResourceManager
    ) -> None:
        super().__init__(data_context, topology, resource_manager)
        self._most: int = data_context.get_config(_CONFIG_KEY)
        *_, self._sink = topology
        self._taken: deque[tuple[float, int]] = deque([(-math.inf, 0)])

    def can_add_input(self, op: PhysicalOperator) -> bool:
        """Each input of the operator that builds becomes one block; other operators make no blocks."""
        if not op.get_autoscaling_actor_pools():
            return True
        if self._has_room(op):
            return True
        if op.num_active_tasks() == 0:
            # When no task runs and a trainer waits for a block, Ray starts one whatever the limits say.
            self._await_memory()
            return self._has_room(op)
        return False

    def _has_room(self, op: PhysicalOperator) -> bool:
        return op.metrics.num_inputs_received - self._freed(time.monotonic()) < self._most

    def _await_memory(self) -> None:
        """Sleep until Ray has freed the next block that was taken. The executor has nothing else to do meanwhile."""
        if len(self._taken) > 1:
            time.sleep(max(0.0, self._taken[1][0] + _FREE_S - time.monotonic()))

    def _freed(self, now: float) -> int:
        """Blocks whose memory would be free if the trainers had released each as soon as they took it."""
        taken = blocks_taken(self._sink)
        if taken > self._taken[-1][1]:
            self._taken.append((now, taken))
        while len(self._taken) > 1 and self._taken[1][0] <= now - _FREE_S:
            self._taken.popleft()
        return self._taken[0][1]
