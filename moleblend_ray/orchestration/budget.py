"""How many blocks may be on their way at once: as many as the stream's share of the object store holds.

Ray Data counts the blocks that its operators hold, not those that its actors are about to hand over nor those that the
trainers have taken, and was seen to fill twice the limit it was given. All our blocks have nearly the same size,
so here they are counted: from the moment that an actor is asked for one until a trainer has taken it and Ray has freed
another in its place.
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

if TYPE_CHECKING:
    from ray.data._internal.execution.interfaces import PhysicalOperator
    from ray.data._internal.execution.resource_manager import ResourceManager
    from ray.data._internal.execution.streaming_executor import StreamingExecutor
    from ray.data._internal.execution.streaming_executor_state import Topology

BLOCKS_IN_ADVANCE: Final = 2
"""Blocks of each stream that trainers take before they need them, on average."""

_FREE_S: Final = 1.5
"""Ray's object stores free what nobody holds any more once a second, and hear of it with a delay."""

_PAUSE_S: Final = 0.01
"""Seconds between two looks of Ray's executor for something to do. Blocks take longer to be built and to be trained on."""

_CONFIG_KEY: Final = "moleblend.most_blocks"


def most_blocks(budget: int, block_bytes: float, num_streams: int) -> int:
    """Blocks that may be asked for and not yet taken, so that with those taken in advance ``budget`` bytes hold all.

    Raises ConfigError if that is less than a block of each stream: trainers would then wait for each other for ever.
    """
    blocks = int(budget // block_bytes)
    if blocks < (BLOCKS_IN_ADVANCE + 1) * num_streams:
        raise ConfigError(
            f"stream.object_store_gib: {budget / 2**20:.0f} MiB of the object store hold {blocks} blocks of "
            f"{block_bytes / 2**20:.1f} MiB, and {num_streams} streams need {BLOCKS_IN_ADVANCE + 1} each; give it more, "
            "or set fewer stream.steps_per_block"
        )
    return blocks - BLOCKS_IN_ADVANCE * num_streams


def limit_blocks(context: DataContext, most: int) -> None:
    """Let actors of the stream with this context begin a block only while fewer than ``most`` are on their way."""
    context.set_config(_CONFIG_KEY, most)
    context.set_config(
        ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, _BlockLimit]
    )


def pause_between_looks(context: DataContext) -> None:
    """Keep the executor of a stream with this context from spinning.

    While finished blocks wait for the trainers to take them, Ray's loop never waits: it was seen to take 0.8 of a core, from
    trainers that share the machine.
    """
    context.custom_execution_callback_classes.append(_PausingCallback)


class _PausingCallback(ExecutionCallback):
    """Ray Data's hook: called after each look."""

    def on_execution_step(self, executor: StreamingExecutor) -> None:  # noqa: ARG002 - Ray's signature
        """Leave the core to others for a moment."""
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
        """Each input of the building operator becomes one block; other operators hold no blocks of their own."""
        if not op.get_autoscaling_actor_pools():
            return True
        if self._has_room(op):
            return True
        if op.num_active_tasks() == 0:
            # Ray would start a task regardless of all limits when none runs and a trainer waits for a block.
            self._await_memory()
            return self._has_room(op)
        return False

    def _has_room(self, op: PhysicalOperator) -> bool:
        return op.metrics.num_inputs_received - self._freed(time.monotonic()) < self._most

    def _await_memory(self) -> None:
        """Sleep until Ray has freed the next block that was taken; the executor has nothing else to do."""
        if len(self._taken) > 1:
            time.sleep(max(0.0, self._taken[1][0] + _FREE_S - time.monotonic()))

    def _freed(self, now: float) -> int:
        """Blocks whose memory is free, had the trainers let go of each as soon as they took it."""
        taken = blocks_taken(self._sink)
        if taken > self._taken[-1][1]:
            self._taken.append((now, taken))
        while len(self._taken) > 1 and self._taken[1][0] <= now - _FREE_S:
            self._taken.popleft()
        return self._taken[0][1]


def blocks_taken(sink: PhysicalOperator) -> int:
    """Blocks that trainers have taken from the last operator of a stream."""
    metrics = sink.metrics
    return int(metrics.block_outputs_taken - metrics.num_external_outqueue_blocks)
