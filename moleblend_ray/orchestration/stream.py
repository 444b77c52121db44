"""Micro-batches for trainers from a Ray Data pipeline that keeps the exact data order.

Block number ``g * V + v`` holds the micro-batches of ``steps_per_block`` consecutive steps (group g) of
stream v. Ray hands blocks of equal row count round-robin to the consumers of an equal split when it must
preserve order, so with W consumers, W a divisor of V, consumer r gets exactly the streams v = r mod W.
Every block is one row: Ray can neither cut nor join them. Each micro-batch carries its (step, stream,
index), which :func:`~moleblend_ray.data.batch.step_batches` checks.

The plan (which block is which) comes from one lazy read task, so that a run of a million blocks starts as
fast as one of ten; putting the rows of the plan into the object store costs about 1 ms each.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import ray.data
import ray.train
from ray.data import ActorPoolStrategy, DataIterator, Dataset, ExecutionOptions
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from moleblend_ray.data.batch import (
    StepBatch,
    StreamConfig,
    num_micro_batches,
    pack_block,
    pack_error,
    step_batches,
)
from moleblend_ray.data.builder import MicroBatchBuilder
from moleblend_ray.data.order import OrderConfig
from moleblend_ray.errors import MoleBlendError

_PLAN_ROW_BYTES = 24


class _StreamPlan(Datasource):
    """Rows ``first_step, num_steps, stream``, one a block, group by group."""

    def __init__(
        self, first_step: int, num_groups: int, group_steps: int, num_streams: int
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._first_step = first_step
        self._num_groups = num_groups
        self._group_steps = group_steps
        self._num_streams = num_streams

    def estimate_inmemory_data_size(self) -> int:
        return self._num_groups * self._num_streams * _PLAN_ROW_BYTES

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002
        per_task_row_limit: int | None = None,  # noqa: ARG002
        data_context: object = None,  # noqa: ARG002
    ) -> list[ReadTask]:
        metadata = BlockMetadata(
            num_rows=self._num_groups * self._num_streams,
            size_bytes=self.estimate_inmemory_data_size(),
            input_files=None,
            exec_stats=None,
        )
        return [ReadTask(self._rows, metadata)]

    def _rows(self) -> Iterator[pa.Table]:
        for group in range(self._num_groups):
            first_step = self._first_step + group * self._group_steps
            for stream in range(self._num_streams):
                yield pa.table(
                    {
                        "first_step": [first_step],
                        "num_steps": [self._group_steps],
                        "stream": [stream],
                    }
                )


class _BlockBuilder:
    """The actor: one row of the plan in, one packed block out."""

    def __init__(self, data_uri: str, order: OrderConfig, stream: StreamConfig) -> None:
        self._arguments = (data_uri, order, stream)
        self._builder: MicroBatchBuilder | None = None

    def __call__(self, plan: pa.Table) -> pa.Table:
        (row,) = plan.to_pylist()
        # Our own errors travel as data and are raised in the trainer as they are; Ray would keep only their text,
        # and an error in the actor's constructor would start actor after actor.
        try:
            if self._builder is None:
                self._builder = MicroBatchBuilder(*self._arguments)
            return pack_block(
                self._builder.build(row["first_step"], row["num_steps"], row["stream"])
            )
        except MoleBlendError as error:
            return pack_error(error, row["first_step"], row["stream"])


def stream_dataset(
    data_uri: str, order: OrderConfig, stream: StreamConfig, first_step: int, num_steps: int
) -> Dataset:
    """The packed blocks of at least ``num_steps`` steps from ``first_step`` on.

    The last group is filled with the steps that would follow, so that all streams have as many blocks; a
    consumer stops by itself. Split it with ``streaming_split(W, equal=True)`` and no locality hints, or give
    :func:`stream_data_config` to the trainer.
    """
    num_groups = max(1, -(-num_steps // stream.steps_per_block))
    plan = _StreamPlan(first_step, num_groups, stream.steps_per_block, order.num_streams)
    # No CPU: it sleeps most of the time. Being unlike the actors' request, it also keeps Ray from fusing the
    # two operators, which would build every block in one task.
    rows = ray.data.read_datasource(plan, override_num_blocks=1, num_cpus=0)
    dataset: Dataset = rows.map_batches(
        _BlockBuilder,
        fn_constructor_args=(data_uri, order, stream),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=stream.min_actors, max_size=stream.max_actors),
        num_cpus=stream.actor_cpus,
    )
    # Each row becomes a block of its own; by default Ray would join the small rows of the plan.
    dataset.context.target_max_block_size = 1
    dataset.context.execution_options.preserve_order = True
    return dataset


def stream_data_config() -> ray.train.DataConfig:
    """The trainer's data settings under which each rank gets its streams in order."""
    return ray.train.DataConfig(
        enable_shard_locality=False,
        execution_options=ExecutionOptions(preserve_order=True),
    )


def shard_step_batches(
    shard: DataIterator,
    order: OrderConfig,
    stream: StreamConfig,
    *,
    rank: int,
    world_size: int,
    first_step: int | None = None,
) -> Iterator[StepBatch]:
    """The steps of one rank, from its share of :func:`stream_dataset`; ``first_step`` None: as the stream begins."""
    blocks = shard.iter_batches(
        batch_size=None,  # type: ignore[arg-type]
        batch_format="pyarrow",
        prefetch_batches=2 * order.num_streams // world_size,
    )
    return step_batches(
        blocks,
        rank=rank,
        world_size=world_size,
        num_streams=order.num_streams,
        num_micro=num_micro_batches(order.stream_batch_size, stream.micro_batch_size),
        first_step=first_step,
    )
