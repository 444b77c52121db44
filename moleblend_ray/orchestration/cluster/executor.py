"""What Ray Data's executor does with work that ends its process, and the parts of it that a stream looks at, for which Ray has no
public names."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ray.util.annotations import RayDeprecationWarning

if TYPE_CHECKING:
    from ray.data._internal.actor_autoscaler.autoscaling_actor_pool import AutoscalingActorPool
    from ray.data._internal.execution.interfaces import PhysicalOperator
    from ray.data._internal.execution.streaming_executor import StreamingExecutor


MAX_RETRIES: Final = 3
"""Retries of work that kills its process or loses its machine. One failure more ends the run."""

NOTED_BLOCKS: Final = 1000
"""Newest blocks of each operator that Ray's summary of a stream tells of."""


@contextlib.contextmanager
def retries_limited(most: int = MAX_RETRIES) -> Iterator[dict[str, Any]]:
    """Options of ``map_batches``, to be called within the body, with which actors try the same work at most ``most`` times
    again: by default Ray does so for ever, and the command would neither go on nor end."""
    with warnings.catch_warnings():
        # Ray 2.60 deprecates this limit of retries, but has no other.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        yield {"max_task_retries": most}


class Operators(NamedTuple):
    """What a running stream consists of."""

    builder: PhysicalOperator
    """Builds blocks."""
    pool: AutoscalingActorPool
    """Its actors."""
    sink: PhysicalOperator
    """Hands the blocks to the trainers."""


def operators_of(executor: StreamingExecutor) -> Operators | None:
    """The operators of the stream that ``executor`` runs; None if it runs something without actors."""
    assert executor._topology is not None
    operators = list(executor._topology)
    for operator in operators:
        for pool in operator.get_autoscaling_actor_pools():
            return Operators(operator, pool, operators[-1])
    return None


def forget_blocks(executor: StreamingExecutor) -> None:
    """Drop what the operators noted of blocks that they have handed on, except of the newest ones.

    Ray keeps a note of each for the summary that it logs at the end: 0.7 kB for each block and operator, gigabytes in a run
    of millions of blocks, all in one process.
    """
    assert executor._topology is not None
    for operator in executor._topology:
        noted = getattr(operator, "_output_blocks_stats", None)
        if noted is not None and len(noted) > 2 * NOTED_BLOCKS:
            del noted[:-NOTED_BLOCKS]


def blocks_taken(sink: PhysicalOperator) -> int:
    """Blocks that trainers have taken from the last operator of a stream."""
    metrics = sink.metrics
    return int(metrics.block_outputs_taken - metrics.num_external_outqueue_blocks)
