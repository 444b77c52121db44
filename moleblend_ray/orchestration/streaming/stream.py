"""Micro-batches for trainers from a Ray Data pipeline that keeps the exact data order.

Block number ``g * V + v`` holds the micro-batches of ``steps_per_block`` consecutive steps (group g) of stream v, where
V is the number of streams. If order must be preserved, Ray deals blocks with equal numbers of rows round-robin to the
consumers of an equal split. So with W consumers, W a divisor of V, consumer r gets exactly the streams v = r mod W.
Every block is one row, so Ray can neither split nor join blocks. Each micro-batch has its (step, stream, index), which
:func:`~moleblend_ray.data.batches.transport.step_batches` checks.

The blocks in progress are counted, so that they fit into ``stream.object_store_gib`` (:mod:`.budget`). The plan (which
block is which) comes from one lazy read task, so a run with a million blocks starts as fast as one with ten. Putting
the rows of the plan into the object store takes about 1 ms per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pyarrow as pa
import ray
import ray.data
from ray.data import (
    ActorPoolStrategy,
    DataContext,
    DataIterator,
    Dataset,
    ExecutionOptions,
    ExecutionResources,
)
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from moleblend_ray.data.batches.batch import StepBatch, mean_molecule_bytes, num_micro_batches
from moleblend_ray.data.batches.builder import MicroBatchBuilder
from moleblend_ray.data.batches.transport import pack_block, pack_error, step_batches
from moleblend_ray.data.config import OrderConfig, StreamConfig
from moleblend_ray.data.dataset.manifest import Manifest, load_manifest
from moleblend_ray.errors import MoleBlendError, TrainingError
from moleblend_ray.orchestration.cluster.executor import retries_limited
from moleblend_ray.orchestration.cluster.placement import (
    Labels,
    cluster_resources,
    how_many_fit,
    live_nodes,
    placed,
)
from moleblend_ray.orchestration.cluster.session import GIB
from moleblend_ray.orchestration.progress.progress import Reporter
from moleblend_ray.orchestration.streaming.budget import (
    BLOCKS_IN_ADVANCE,
    limit_blocks,
    most_blocks,
    pause_between_looks,
)
from moleblend_ray.orchestration.streaming.pool import POOL_CONFIG_KEY, PoolBounds, PoolSizer

if TYPE_CHECKING:
    from ray.train import DataConfig

_PLAN_ROW_BYTES = 24

_MAX_RETRIES: Final = 10
"""Retries of a block that ends its actor: more than of other work, as all trainers start anew after one failure more."""

_STORE_SHARE: Final = 0.3
"""Default share of the object store: Ray begins to spill at four fifths, and others use the store as well."""


class _StreamPlan(Datasource):
    """Rows ``first_step, num_steps, stream``, one per block, group by group."""

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
    """The actor that turns one row of the plan into one packed block."""

    def __init__(
        self,
        data_uri: str,
        order: OrderConfig,
        stream: StreamConfig,
        *,
        shared: bool,
        fingerprint: str,
    ) -> None:
        self._arguments = (data_uri, order, stream)
        self._shared = shared
        # An actor may start days after the stream, and the molecules of a step must still be the same ones.
        self._fingerprint = fingerprint
        self._builder: MicroBatchBuilder | None = None

    def __call__(self, plan: pa.Table) -> pa.Table:
        (row,) = plan.to_pylist()
        # Our own errors are sent as data and raised unchanged in the trainer. Ray would keep only their text, and an
        # error in the constructor would make it start one actor after the other.
        try:
            if self._builder is None:
                self._builder = MicroBatchBuilder(
                    *self._arguments, shared=self._shared, fingerprint=self._fingerprint
                )
            return pack_block(
                self._builder.build(row["first_step"], row["num_steps"], row["stream"])
            )
        except MoleBlendError as error:
            return pack_error(error, row["first_step"], row["stream"])

    def __del__(self) -> None:
        # Ray deletes the instance when it releases the actor: the only chance to leave the cache that actors share.
        if self._builder is not None:
            self._builder.close()


def stream_dataset(
    data_uri: str,
    order: OrderConfig,
    stream: StreamConfig,
    first_step: int,
    num_steps: int,
    *,
    fingerprint: str | None = None,
    reserved_cpus: float = 0.0,
    labels: Labels = None,
    reporter: Reporter | None = None,
) -> Dataset:
    """The packed blocks of at least ``num_steps`` steps from ``first_step`` on.

    The last group is filled with the steps that would follow, so that all streams have the same number of blocks; the
    consumer stops by itself. Split the dataset with ``streaming_split(W, equal=True)`` without locality hints, or give
    :func:`stream_data_config` to the trainer. Its actors run on nodes with ``labels`` and leave ``reserved_cpus`` of
    the cluster free; ``reporter`` shows decisions about their number. Raises ConfigError if the blocks are too large
    for the object store's budget, and DataError if the data set has another ``fingerprint`` (None: any).
    """
    budget = object_store_budget(stream, labels)
    manifest = load_manifest(data_uri, expected=fingerprint)
    groups = _groups_of(manifest, order, stream, num_steps, budget)
    plan = _StreamPlan(first_step, groups.num_groups, groups.num_steps, order.num_streams)
    # No CPU, as this task sleeps most of the time. Since the actors request something else, Ray does not fuse the two
    # operators, which would build every block in one task.
    rows = ray.data.read_datasource(plan, override_num_blocks=1, num_cpus=0)
    most = max(
        stream.min_actors, min(most_actors(stream, reserved_cpus, labels), groups.block_limit)
    )
    # Trainers would wait for ever for a block that there is not enough memory to build.
    with retries_limited(_MAX_RETRIES) as limit:
        dataset: Dataset = rows.map_batches(
            _BlockBuilder,
            fn_constructor_args=(data_uri, order, stream),
            fn_constructor_kwargs={"shared": most > 1, "fingerprint": manifest.fingerprint},
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=stream.min_actors, max_size=most),
            num_cpus=stream.actor_cpus,
            **limit,
            # Not for the whole dataset: the task of the plan stays on the node of the driver, which outlives the actors'
            # nodes.
            **placed(labels),
        )
    _configure(dataset.context, budget, groups.block_limit)
    if most > stream.min_actors:
        bounds = PoolBounds(
            fewest=stream.min_actors,
            most=most,
            molecules_per_block=groups.num_steps * order.stream_batch_size,
            reporter=reporter,
        )
        dataset.context.set_config(POOL_CONFIG_KEY, bounds)
        dataset.context.custom_execution_callback_classes.append(PoolSizer)
    return dataset


class _Groups(NamedTuple):
    """How the steps of a run are cut into groups: one group is one block of every stream."""

    num_groups: int
    num_steps: int
    """Steps of each group."""
    block_limit: int
    """Blocks that may be in progress, so that they fit into the object store's budget."""


def _groups_of(
    manifest: Manifest, order: OrderConfig, stream: StreamConfig, num_steps: int, budget: int
) -> _Groups:
    """Groups for at least ``num_steps`` steps; ConfigError if their blocks are too large for ``budget`` bytes."""
    molecule_bytes = mean_molecule_bytes(
        manifest.counts.molecules_by_atoms, described=manifest.descriptors is not None
    )
    step_bytes = order.stream_batch_size * molecule_bytes
    group_steps = min(stream.block_steps(order.num_streams, step_bytes, budget), max(1, num_steps))
    return _Groups(
        num_groups=max(1, -(-num_steps // group_steps)),
        num_steps=group_steps,
        block_limit=most_blocks(budget, group_steps * step_bytes, order.num_streams),
    )


def _configure(context: DataContext, budget: int, block_limit: int) -> None:
    """Settings with which Ray Data keeps blocks whole, in order, and of those in progress at most ``block_limit`` and
    ``budget`` bytes."""
    # The trainer's controller makes the dataset, on any node. Its progress bar would disturb that of the driver.
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Each row becomes its own block; by default Ray would join the small rows of the plan.
    context.target_max_block_size = 1
    context.execution_options = _execution_options(budget)
    limit_blocks(context, block_limit)
    pause_between_looks(context)


def most_actors(stream: StreamConfig, reserved_cpus: float, labels: Labels = None) -> int:
    """Upper bound of the pool: as configured, or as many as the free CPUs of the cluster (its nodes with
    ``labels``)."""
    if stream.max_actors is not None:
        return stream.max_actors
    cpus = cluster_resources().get("CPU", 0.0) - reserved_cpus
    if labels:
        cpus = min(cpus, cluster_resources(labels).get("CPU", 0.0))
    return max(stream.min_actors, how_many_fit(stream.actor_cpus, cpus))


def object_store_budget(stream: StreamConfig, labels: Labels = None) -> int:
    """Bytes of Ray's object stores for blocks in progress, as configured or a share of where they lie.

    A block stays in the store of the node that built it until its trainer releases it. So with ``labels`` the stores of
    the other nodes hold none of them, however large they are.
    """
    if stream.object_store_gib is not None:
        return int(stream.object_store_gib * GIB)
    stores = [_store_bytes(node) for node in live_nodes(labels)]
    if not stores:
        # An autoscaler will add one, of unknown size.
        stores = [min(map(_store_bytes, live_nodes()), default=0.0)]
    return int(sum(stores) * _STORE_SHARE)


def _store_bytes(node: Mapping[str, Any]) -> float:
    return float(node["Resources"].get("object_store_memory", 0.0))


def stream_data_config(stream: StreamConfig, labels: Labels = None) -> DataConfig:
    """Data settings of the trainer with which each rank gets its streams in order, within the budget."""
    # Here, as the actors that build blocks need nothing of Ray Train, whose import takes them half a second.
    from ray.train import DataConfig

    return DataConfig(
        enable_shard_locality=False,
        execution_options=_execution_options(object_store_budget(stream, labels)),
    )


def _execution_options(budget: int) -> ExecutionOptions:
    return ExecutionOptions(
        preserve_order=True,
        resource_limits=ExecutionResources.for_limits(object_store_memory=budget),
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
    """The steps of one rank from its share of :func:`stream_dataset`; ``first_step`` None: the first of the stream.

    TrainingError if the same block ends its actors again and again.
    """
    # With n here, Ray's threads hold about 2 + 2 n blocks in advance: as many as the budget allows. Other finished blocks
    # wait where they are counted.
    num_ahead = int(order.num_streams >= 2 * BLOCKS_IN_ADVANCE * world_size)
    return step_batches(
        _blocks(shard, num_ahead),
        rank=rank,
        world_size=world_size,
        num_streams=order.num_streams,
        num_micro=num_micro_batches(order.stream_batch_size, stream.num_at_once),
        first_step=first_step,
    )


def _blocks(shard: DataIterator, num_ahead: int) -> Iterator[pa.Table]:
    """The blocks of a share, up to ``num_ahead`` of them asked for before they are needed."""
    try:
        yield from shard.iter_batches(
            batch_size=None,  # type: ignore[arg-type]
            batch_format="pyarrow",
            prefetch_batches=num_ahead,
        )
    except ray.exceptions.RayTaskError as error:
        if not isinstance(error.cause, ray.exceptions.RayActorError):
            raise
        # Without the chain, whose first error says nothing of this.
        raise TrainingError(
            f"building the same micro-batches ended its data actor {_MAX_RETRIES + 1} times: it was killed for lack of memory, or "
            f"its machine was lost ({error.cause}). If memory is short, set fewer stream.max_actors or stream.steps_per_block, "
            "or less stream.cache_bytes"
        ) from None
