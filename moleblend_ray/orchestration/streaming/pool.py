"""How many actors build micro-batches: as many as the trainers need by measured rates, within the configured bounds.

Ray's own rule adds one actor in each iteration of its scheduler as long as the object store has room for blocks, so a
new stream takes every CPU that it may, whatever the trainers need. Here the size of the pool follows from two measured
rates: blocks per second that the trainers take, and seconds per block that one actor needs. It grows further only while
the trainers find no block ready. Ray still starts and stops the actors.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ray.data._internal.execution.execution_callback import ExecutionCallback

from moleblend_ray.orchestration.cluster.executor import Operators, blocks_taken, operators_of
from moleblend_ray.orchestration.progress.progress import Reporter

if TYPE_CHECKING:
    from ray.data._internal.actor_autoscaler.autoscaling_actor_pool import AutoscalingActorPool
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

logger = logging.getLogger(__name__)

POOL_CONFIG_KEY: Final = "moleblend.actor_pool"
"""Key of the :class:`PoolBounds` in the context of a dataset."""

_INTERVAL_S: Final = 2.0
_BUSY_SHARE: Final = 0.8
_STARVING_SHARE: Final = 0.8
_GROWTH: Final = 0.5
_PATIENCE_S: Final = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolBounds:
    """Bounds that a stream sets for its pool."""

    fewest: int
    most: int
    molecules_per_block: int
    """Used for the report only."""
    reporter: Reporter | None = None
    """Shows the decisions; None: they are only in the log of the process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Rates measured since the last decision."""

    build_s: float
    """Seconds per block that one actor needs."""
    blocks_per_s: float
    """Blocks per second that the trainers took."""
    starving_share: float
    """Share of the time in which no block was ready for them."""


def wanted_actors(rates: Rates, running: int, bounds: PoolBounds) -> int:
    """Number of actors that the trainers need if each actor is idle for a fifth of its time.

    Trainers that wait for data take fewer blocks than they could, so then the pool grows by half at a time.
    """
    wanted = math.ceil(rates.blocks_per_s * rates.build_s / _BUSY_SHARE)
    if rates.starving_share >= _STARVING_SHARE:
        wanted = max(wanted, running + max(1, math.floor(running * _GROWTH)))
    return min(max(wanted, bounds.fewest), bounds.most)


class PoolSizer(ExecutionCallback):
    """Ray Data's hook: sets the pool's upper bound every few seconds."""

    def __init__(self) -> None:
        self._operators: Operators | None = None
        self._began: _Totals | None = None
        self._samples = 0
        self._starving = 0
        self._last_needed_s = 0.0

    def before_execution_starts(self, executor: StreamingExecutor) -> None:
        """Find the pool, and set it to its smallest size until something is measured."""
        self._bounds: PoolBounds = executor._data_context.get_config(POOL_CONFIG_KEY)
        self._operators = operators_of(executor)
        if self._operators is not None:
            _set_most(self._operators.pool, self._bounds.fewest)
        if self._bounds.reporter is not None:
            self._bounds.reporter.forward_logs(level=logging.INFO)

    def on_execution_step(self, executor: StreamingExecutor) -> None:  # noqa: ARG002
        """Called in each iteration of Ray's scheduler."""
        if self._operators is None:
            return
        pool = self._operators.pool
        self._samples += 1
        self._starving += not self._operators.sink.metrics.num_external_outqueue_blocks
        now = _totals(self._operators)
        if self._began is None or pool.num_pending_actors() or not now.built:
            # Neither the start of the actors nor the first filling of the buffers tells anything about the rates.
            self._restart(now)
        elif now.time_s - self._began.time_s >= _INTERVAL_S and now.built > self._began.built:
            self._decide(now, self._began, pool)
            self._restart(now)

    def _restart(self, now: _Totals) -> None:
        self._began, self._samples, self._starving = now, 0, 0

    def _decide(self, now: _Totals, began: _Totals, pool: AutoscalingActorPool) -> None:
        rates = Rates(
            build_s=(now.build_s - began.build_s) / (now.built - began.built),
            blocks_per_s=(now.taken - began.taken) / (now.time_s - began.time_s),
            starving_share=self._starving / self._samples,
        )
        wanted = wanted_actors(rates, pool.current_size(), self._bounds)
        if wanted >= pool.max_size():
            self._last_needed_s = now.time_s
        if wanted > pool.max_size() or now.time_s - self._last_needed_s >= _PATIENCE_S:
            self._resize(pool, wanted, rates)

    def _resize(self, pool: AutoscalingActorPool, wanted: int, rates: Rates) -> None:
        if wanted == pool.max_size():
            return
        logger.info(
            "data actors: %d -> %d (of %d to %d): building takes %.1f us per molecule, the trainers take %.0f "
            "molecules/s and find nothing ready in %.0f %% of the time",
            pool.max_size(),
            wanted,
            self._bounds.fewest,
            self._bounds.most,
            1e6 * rates.build_s / self._bounds.molecules_per_block,
            rates.blocks_per_s * self._bounds.molecules_per_block,
            100 * rates.starving_share,
        )
        _set_most(pool, wanted)


def _set_most(pool: AutoscalingActorPool, most: int) -> None:
    # Ray has no function for this; its autoscaler reads the bound in every iteration.
    pool._config = replace(pool._config, max_size=most)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Totals:
    time_s: float
    build_s: float
    built: int
    taken: int


def _totals(operators: Operators) -> _Totals:
    metrics = operators.builder.metrics
    return _Totals(
        time_s=time.monotonic(),
        build_s=metrics.block_generation_time,
        built=metrics.num_task_outputs_generated,
        taken=blocks_taken(operators.sink),
    )
