"""Ray consumers of the stream see exactly the steps that one process builds, for any number of consumers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from synthetic import write_dataset

from moleblend_ray.data.batches.batch import StepBatch, unpack_micro_batch
from moleblend_ray.data.batches.builder import local_step_batches
from moleblend_ray.data.batches.order import DataOrder
from moleblend_ray.data.config import OrderConfig, StreamConfig
from moleblend_ray.orchestration.streaming.stream import (
    shard_step_batches,
    stream_data_config,
    stream_dataset,
)

pytestmark = pytest.mark.ray

NUM_MOLECULES = 400
ORDER = OrderConfig(seed=5, global_batch_size=32, num_streams=4, shuffle_window=128, chunk_rows=64)
STREAM = StreamConfig(
    micro_batch_size=3, steps_per_block=3, min_actors=2, max_actors=2, actor_cpus=0.5
)
# Large enough blocks that building them, not handing them over, is what a consumer waits for.
LARGE = OrderConfig(global_batch_size=1024, num_streams=4, shuffle_window=256, chunk_rows=64)
AUTOMATIC = StreamConfig(micro_batch_size=64, steps_per_block=8, actor_cpus=0.5)
# Consumers and first step of each stream; epochs are 12.5 steps long.
RUNS = {"one": (1, 0), "four": (4, 0), "two_from_the_middle": (2, 7)}
NUM_STEPS = 15

Payloads = dict[int, dict[tuple[int, int], bytes]]


def payloads(batches: list[StepBatch]) -> Payloads:
    """Step -> (stream, micro-batch) -> bytes."""
    return {
        batch.step: {(m.stream, m.index): bytes(m.payload) for m in batch.micro_batches}
        for batch in batches
    }


def consume(
    uri: str, world_size: int, first_step: int, stream: StreamConfig = STREAM
) -> list[Payloads]:
    """What each of ``world_size`` concurrent consumers receives."""
    dataset = stream_dataset(uri, ORDER, stream, first_step, NUM_STEPS)
    # As Ray Train does it: a copy of the data set with the trainer's execution options.
    dataset = dataset.copy(dataset)
    dataset.context.execution_options = stream_data_config(stream)._resolve_execution_options(
        "train"
    )
    shards = dataset.streaming_split(world_size, equal=True)
    received: list[Payloads] = [{} for _ in shards]

    def read(rank: int) -> None:
        steps = shard_step_batches(
            shards[rank],
            ORDER,
            stream,
            rank=rank,
            world_size=world_size,
            first_step=first_step,
        )
        received[rank] = payloads(list(steps))

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return received


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("stream"))
    write_dataset(folder, NUM_MOLECULES, max_conformers=2)
    return folder


@pytest.fixture(scope="module")
def received(ray_cluster: None, uri: str) -> dict[str, list[Payloads]]:
    """The runs, at the same time: most of each is Ray starting its actors."""
    with ThreadPoolExecutor(len(RUNS)) as pool:
        results = pool.map(lambda run: consume(uri, *run), RUNS.values())
        return dict(zip(RUNS, results, strict=True))


@pytest.mark.parametrize("run", list(RUNS))
def test_consumers_together_receive_the_bytes_of_a_single_process(
    uri: str, received: dict[str, list[Payloads]], run: str
) -> None:
    world_size, first_step = RUNS[run]
    expected = payloads(
        list(local_step_batches(uri, ORDER, STREAM, first_step=first_step, num_steps=NUM_STEPS))
    )
    assert len(received[run]) == world_size
    for rank, own in enumerate(received[run]):
        assert list(own) == list(range(first_step, first_step + NUM_STEPS))
        for step, micro_batches in own.items():
            assert micro_batches == {
                key: payload
                for key, payload in expected[step].items()
                if key[0] % world_size == rank
            }


def test_global_batches_are_those_of_the_data_order(
    received: dict[str, list[Payloads]],
) -> None:
    order = DataOrder(NUM_MOLECULES, ORDER)
    for step in range(NUM_STEPS):
        payload = [own[step] for own in received["four"]]
        ids = np.concatenate([molecule_ids(p) for own in payload for p in own.values()])
        assert np.array_equal(np.sort(ids), np.sort(order.global_batch(step)))


def molecule_ids(payload: bytes) -> np.ndarray:
    return unpack_micro_batch(payload).molecule_ids


def test_a_pool_that_grows_and_loses_an_actor_gives_the_same_steps(
    ray_cluster: None, tmp_path: Path
) -> None:
    """A consumer that never pauses starves, so the pool grows; then one of the actors is killed."""
    # Relations of large molecules take an actor far longer than a consumer takes to read them.
    uri, num_steps = str(tmp_path), 4000
    write_dataset(uri, NUM_MOLECULES, max_atoms=70)
    dataset = stream_dataset(uri, LARGE, AUTOMATIC, 0, num_steps)
    dataset.context.execution_options = stream_data_config(AUTOMATIC)._resolve_execution_options(
        "train"
    )
    (shard,) = dataset.streaming_split(1, equal=True)
    sums: list[int] = []
    killed = None
    for batch in shard_step_batches(shard, LARGE, AUTOMATIC, rank=0, world_size=1):
        sums.append(checksum(batch))
        if killed is None and batch.step % 20 == 0 and len(actors := building_actors()) > 1:
            os.kill(actors[0], signal.SIGKILL)
            killed = batch.step
        if killed is not None and batch.step == killed + 100:
            break
    assert killed is not None, "the pool did not grow"
    expected = local_step_batches(uri, LARGE, AUTOMATIC, first_step=0, num_steps=len(sums))
    assert sums == [checksum(batch) for batch in expected]


def checksum(batch: StepBatch) -> int:
    """Of the step and its micro-batches in their order."""
    value = batch.step
    for micro in batch.micro_batches:
        value = zlib.crc32(micro.payload.data, value)
    return value


def building_actors() -> list[int]:
    """Processes of the pool, among the descendants of this process."""
    import psutil  # Ray brings its own copy

    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if (
                process.cmdline()[:1]
                and "MapWorker(MapBatches(_BlockBuilder))" in process.cmdline()[0]
            ):
                found.append(process.pid)
    return found


SLOW_CONSUMER = """
import json, sys, threading, time
import ray
from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.data.config import OrderConfig, StreamConfig
from moleblend_ray.orchestration.cluster.session import GIB, ray_session
from moleblend_ray.orchestration.streaming.stream import (
    shard_step_batches, stream_data_config, stream_dataset,
)
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

order = OrderConfig(global_batch_size=1024, num_streams=4, shuffle_window=256, chunk_rows=64)
stream = StreamConfig(
    micro_batch_size=64, steps_per_block=4, min_actors=2, max_actors=2, object_store_gib=30 / 1024
)
peak, over = 0, threading.Event()

def store():
    address = ray.get_runtime_context().gcs_address
    return get_memory_info_reply(get_state_from_address(address)).store_stats

def watch():
    global peak
    while not over.wait(0.05):
        peak = max(peak, store().object_store_bytes_used)

with ray_session(ClusterConfig(num_workers=1, local_cpus=4, object_store_gib=0.12)):
    dataset = stream_dataset(sys.argv[1], order, stream, 0, 120)
    options = stream_data_config(stream)._resolve_execution_options("train")
    dataset.context.execution_options = options
    (shard,) = dataset.streaming_split(1, equal=True)
    threading.Thread(target=watch, daemon=True).start()
    total = largest = 0
    for batch in shard_step_batches(shard, order, stream, rank=0, world_size=1):
        size = sum(len(micro.payload) for micro in batch.micro_batches)
        total, largest = total + size, max(largest, size)
        time.sleep(3.0 if batch.step == 0 else 0.01)
    over.set()
    spilled = store().spilled_bytes_total
print(json.dumps({"total": total, "block": largest, "peak": peak, "spilled": spilled}))
"""


def test_a_stream_far_larger_than_its_budget_stays_within_it_and_never_spills(uri: str) -> None:
    """In a cluster of its own, whose object store holds a fraction of the stream."""
    done = subprocess.run(
        [sys.executable, "-c", SLOW_CONSUMER, uri], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    budget = 30 << 20
    assert found["total"] > 4 * budget
    assert found["spilled"] == 0
    assert found["peak"] <= budget + 4 * found["block"]  # the group that the consumer is in
