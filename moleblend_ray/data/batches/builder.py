"""From shards to micro-batches in one process: the part of the stream that needs no Ray.

The Ray stream runs :class:`MicroBatchBuilder` in CPU actors. :func:`local_step_batches` runs the same class in the
calling process, so both give the same bytes for the same step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.data.batches.batch import MicroBatch, StepBatch, build_steps
from moleblend_ray.data.batches.order import DataOrder, streams_of_rank
from moleblend_ray.data.config import OrderConfig, StreamConfig
from moleblend_ray.data.dataset.block import MoleculeBlock
from moleblend_ray.data.dataset.descriptors import with_targets
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.dataset.node_cache import NodeCache
from moleblend_ray.data.dataset.shard_reader import ShardReader
from moleblend_ray.data.dataset.shards import training_columns
from moleblend_ray.relations.geometry import random_rotations, rotate
from moleblend_ray.relations.hashing import keyed_hash

# First key words, which make the draws for a molecule independent.
_CONFORMER: Final = 3
_ROTATION: Final = 4


class MicroBatchBuilder:
    """Reads the molecules of training steps and packs them, with their relations, into micro-batches."""

    def __init__(
        self,
        data_uri: str,
        order: OrderConfig,
        stream: StreamConfig,
        split: str = "train",
        *,
        shared: bool = False,
        fingerprint: str | None = None,
    ) -> None:
        """``shared``: share decoded row groups with the other builders of this machine, until :meth:`close`.

        DataError if the data set has another ``fingerprint`` (None: any).
        """
        manifest = load_manifest(data_uri, expected=fingerprint)
        self._shared = NodeCache(manifest.fingerprint[:32], stream.cache_bytes) if shared else None
        self._order = DataOrder(manifest.num_molecules(split), order)
        self._stream = stream
        self._scaling = manifest.descriptor_scaling
        self._reader = ShardReader(
            data_uri,
            manifest,
            split,
            columns=training_columns(manifest),
            cache_bytes=stream.cache_bytes,
            shared=self._shared,
        )

    def close(self) -> None:
        """Stop using the shared row groups; the last builder of the machine removes them."""
        if self._shared is not None:
            self._shared.close()

    def build(self, first_step: int, num_steps: int, stream: int) -> list[MicroBatch]:
        """The micro-batches of consecutive steps of one stream, sorted by step, then by index."""
        molecules = self._order.stream_batches(first_step, num_steps, stream)
        steps = range(first_step, first_step + num_steps)
        step_of_row = np.repeat(np.arange(steps.start, steps.stop), molecules.shape[1])
        block = self._read(molecules.ravel(), step_of_row)
        return build_steps(block, steps, stream, self._stream.num_at_once)

    def _read(self, molecule_ids: NDArray[np.int64], steps: NDArray[np.int64]) -> MoleculeBlock:
        seed = self._order.config.seed
        # Without the lowest bit, a draw is a non-negative int64.
        draw = keyed_hash(seed, _CONFORMER, steps, molecule_ids) >> np.uint64(1)
        block = self._reader.read_block(molecule_ids, draw.astype(np.int64))
        block = with_targets(block, self._scaling)
        if not self._stream.random_rotation:
            return block
        rotations = random_rotations(keyed_hash(seed, _ROTATION, steps, molecule_ids))
        return replace(block, positions=rotate(block.num_atoms, block.positions, rotations))


def local_step_batches(
    data_uri: str,
    order: OrderConfig,
    stream: StreamConfig,
    *,
    first_step: int,
    num_steps: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[StepBatch]:
    """The steps of one rank, each built in this process when it is asked for."""
    streams = streams_of_rank(rank, world_size, order.num_streams)
    builder = MicroBatchBuilder(data_uri, order, stream)
    for step in range(first_step, first_step + num_steps):
        yield StepBatch(
            step=step,
            micro_batches=tuple(
                micro for number in streams for micro in builder.build(step, 1, number)
            ),
        )
