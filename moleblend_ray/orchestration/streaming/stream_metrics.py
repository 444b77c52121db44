"""Metrics of the stream of a pretraining run, from Ray Data's executor (see :mod:`~moleblend_ray.orchestration.progress.metrics`).

Ray Data sends the class of the callback to all of its processes, including data actors, and they import this module. So
it must not import torch, which takes each of them seconds and hundreds of megabytes.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Final

from ray.data import Dataset
from ray.data._internal.execution.execution_callback import ExecutionCallback

from moleblend_ray.orchestration.cluster.executor import Operators, blocks_taken, operators_of
from moleblend_ray.orchestration.progress.metrics import PERIOD_S, Publisher

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

_RUN_CONFIG_KEY: Final = "moleblend.run"


def publish_stream(dataset: Dataset, run: str) -> None:
    """Let Ray Data's executor of this stream publish metrics of actors and queues, with the label ``run``."""
    dataset.context.set_config(_RUN_CONFIG_KEY, run)
    dataset.context.custom_execution_callback_classes.append(_StreamCallback)


class _StreamCallback(ExecutionCallback):
    """Ray Data's hook, called in every iteration of its scheduler in the process of the executor."""

    def __init__(self) -> None:
        self._publisher: Publisher | None = None
        self._operators: Operators | None = None
        self._looked_s = -math.inf
        self._totals: dict[str, float] = {}

    def before_execution_starts(self, executor: StreamingExecutor) -> None:
        """Find the operators that build blocks and that deliver them."""
        self._publisher = Publisher(run=executor._data_context.get_config(_RUN_CONFIG_KEY))
        self._operators = operators_of(executor)

    def on_execution_step(self, executor: StreamingExecutor) -> None:  # noqa: ARG002 - Ray's signature
        """Publish once per second. There is no thread that would publish after the end of the stream."""
        now_s = time.monotonic()
        if self._publisher is None or now_s - self._looked_s < PERIOD_S:
            return
        self._looked_s = now_s
        if self._operators is not None:
            self._look(self._publisher, self._operators)
        self._publisher.publish()

    def _look(self, publisher: Publisher, operators: Operators) -> None:
        builder, pool, sink = operators
        publisher.set("moleblend_stream_actors", pool.num_running_actors())
        publisher.set("moleblend_stream_pending_actors", pool.num_pending_actors())
        publisher.set("moleblend_stream_max_actors", pool.max_size())
        publisher.set("moleblend_stream_building_blocks", builder.num_active_tasks())
        publisher.set("moleblend_stream_queued_blocks", sink.metrics.num_external_outqueue_blocks)
        self._count("moleblend_stream_blocks_total", builder.metrics.num_task_outputs_generated)
        self._count("moleblend_stream_taken_blocks_total", blocks_taken(sink))
        self._count("moleblend_stream_build_seconds_total", builder.metrics.block_generation_time)

    def _count(self, name: str, total: float) -> None:
        """Increase a counter to the number that Ray Data has counted."""
        assert self._publisher is not None
        self._publisher.add(name, max(0.0, total - self._totals.get(name, 0.0)))
        self._totals[name] = total
