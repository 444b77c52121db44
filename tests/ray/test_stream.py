"""Ray consumers of the stream see exactly the steps that one process builds, for any number of consumers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from synthetic import write_dataset

from moleblend_ray.data.batch import StepBatch, StreamConfig, unpack_micro_batch
from moleblend_ray.data.builder import local_step_batches
from moleblend_ray.data.order import DataOrder, OrderConfig
from moleblend_ray.orchestration.stream import (
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
