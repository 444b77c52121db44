"""Prepares and streams in object storage on a private cluster, in a process whose environment says where that is.

    python storage_worker.py SOURCE OUT

Prints one JSON line: the hash of each micro-batch of the stream.
"""

from __future__ import annotations

import hashlib
import json
import sys

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.prepare import PrepareConfig
from moleblend_ray.data.batches.batch import StepBatch
from moleblend_ray.data.config import OrderConfig, StreamConfig
from moleblend_ray.orchestration.cluster.session import ray_session
from moleblend_ray.orchestration.preparation.prepare import prepare
from moleblend_ray.orchestration.streaming.stream import shard_step_batches, stream_dataset

ROWS_PER_CHUNK = 40
ROW_GROUP_ROWS = 16
NUM_STEPS = 4
ORDER = OrderConfig(seed=1, global_batch_size=16, num_streams=2, shuffle_window=64, chunk_rows=16)
STREAM = StreamConfig(
    micro_batch_size=8, steps_per_block=2, min_actors=1, max_actors=2, actor_cpus=0.5
)
CLUSTER = ClusterConfig(num_data_actors=2)


def digests(batches: list[StepBatch]) -> list[list[str]]:
    """Hash of each micro-batch of each step."""
    return [
        [hashlib.sha256(micro.payload.tobytes()).hexdigest() for micro in batch.micro_batches]
        for batch in batches
    ]


def main(source: str, out: str) -> None:
    with ray_session(CLUSTER):
        prepare(
            PrepareConfig(
                source=source,
                out=out,
                rows_per_chunk=ROWS_PER_CHUNK,
                row_group_rows=ROW_GROUP_ROWS,
                cluster=CLUSTER,
            )
        )
        dataset = stream_dataset(out, ORDER, STREAM, 0, NUM_STEPS)
        (shard,) = dataset.streaming_split(1, equal=True)
        steps = shard_step_batches(shard, ORDER, STREAM, rank=0, world_size=1, first_step=0)
        received = [batch for batch, _ in zip(steps, range(NUM_STEPS), strict=False)]
    print(json.dumps(digests(received)))


if __name__ == "__main__":
    main(*sys.argv[1:])
