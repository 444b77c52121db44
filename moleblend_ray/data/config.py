"""Settings of the data order and of the stream of micro-batches. Without Numba, so that configurations compose fast."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

from moleblend_ray.checks import above, at_least, check_all
from moleblend_ray.settings import typed

BLOCKS_PER_STREAM: Final = 6
"""Blocks that the object store should hold for each stream."""
CPU_MICRO_BATCH: Final = 64
GPU_MICRO_BATCH: Final = 1024
"""Molecules of a micro-batch where none is asked for. On a GPU, 5 GiB of memory for the base preset and PCQM4Mv2."""

BLOCK_BYTES: Final = 12 << 20
"""A block costs Ray some 20 ms of CPU time whatever its size: little beside the 100 ms that this one takes to build."""
MAX_BLOCK_STEPS: Final = 64


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class OrderConfig:
    """The order of the molecules. It depends on every field, so none may change within a run."""

    seed: int = 0
    """Key of both shuffles."""

    global_batch_size: int = 256
    """Molecules per optimizer step, over all workers."""

    num_streams: int = 4
    """Streams into which each step is divided. Any number of workers that divides it sees the same global batches."""

    shuffle_window: int = 65536
    """Molecules within which single rows are shuffled. A larger window mixes better, but each machine that builds
    micro-batches decodes and caches all row groups of a window."""

    chunk_rows: int = 2048
    """Consecutive molecules that are moved together before rows are shuffled; ideally the rows of a row group."""

    def __post_init__(self) -> None:
        """Refuse sizes that make no order."""
        check_all(
            *at_least(self, 1, "global_batch_size", "num_streams", "shuffle_window", "chunk_rows"),
            (
                -(2**63) <= self.seed < 2**63,
                f"seed: expected -2**63 to 2**63 - 1, found {self.seed}",
            ),
            (
                self.num_streams < 1 or self.global_batch_size % self.num_streams == 0,
                f"num_streams: expected a divisor of global_batch_size ({self.global_batch_size}), "
                f"found {self.num_streams}",
            ),
        )

    @property
    def stream_batch_size(self) -> int:
        """Molecules per (step, stream)."""
        return self.global_batch_size // self.num_streams


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How micro-batches are built, and by how many processes."""

    micro_batch_size: int | None = None
    """Most molecules of a micro-batch, which is the input of one forward and backward pass. null: 64 on CPUs and 1,024 on GPUs, whose
    hosts launch all kernels again for each; there take more as memory allows."""

    steps_per_block: int | None = None
    """Optimizer steps whose micro-batches of one stream form one Ray block. null: as many as make a block of about
    12 MiB, fewer if six blocks per stream would not fit into object_store_gib, and at most 64."""

    min_actors: int = 1
    """Fewest CPU actors that build micro-batches."""

    max_actors: int | None = None
    """Most CPU actors that build micro-batches; null: as many as the CPUs that the workers leave free. Within these
    limits, their number follows from the measured rates of building and training."""

    actor_cpus: float = 1.0
    """CPUs that each building actor reserves."""

    cache_bytes: int = 512 * 2**20
    """Bytes of decoded row groups that the building actors of a machine keep together."""

    object_store_gib: float | None = None
    """Most memory of Ray's object store, in GiB over the whole cluster, for micro-batches that wait for training,
    besides one block per stream that is being trained on; null: three tenths of the stores of the nodes that build them.
    Building pauses while it is full."""

    random_rotation: bool = False
    """Rotate each conformer at random, differently in each step, keyed by (seed, step, molecule id)."""

    def __post_init__(self) -> None:
        """Refuse sizes that make no stream."""
        check_all(
            *at_least(self, 1, "micro_batch_size", "min_actors", "cache_bytes", "steps_per_block"),
            (
                self.max_actors is None or self.max_actors >= self.min_actors,
                f"max_actors: expected null or at least min_actors ({self.min_actors}), found {self.max_actors}",
            ),
            *above(self, 0, "object_store_gib", "actor_cpus"),
        )

    @property
    def num_at_once(self) -> int:
        """``micro_batch_size``, or that of CPUs where it is null."""
        return self.micro_batch_size or CPU_MICRO_BATCH

    def for_device(self, *, is_gpu: bool) -> StreamConfig:
        """With a ``micro_batch_size`` for the kind of device that trains, if it is null."""
        size = self.micro_batch_size or (GPU_MICRO_BATCH if is_gpu else CPU_MICRO_BATCH)
        return dataclasses.replace(self, micro_batch_size=size)

    def block_steps(self, num_streams: int, step_bytes: float, budget: int) -> int:
        """Steps per block, if a step takes ``step_bytes`` per stream and the object store has ``budget`` bytes."""
        if self.steps_per_block is not None:
            return self.steps_per_block
        block_bytes = min(BLOCK_BYTES, budget / (BLOCKS_PER_STREAM * num_streams))
        steps = min(max(1, int(block_bytes // step_bytes)), MAX_BLOCK_STEPS)
        return 1 << steps.bit_length() - 1  # a power of two divides more numbers of steps
