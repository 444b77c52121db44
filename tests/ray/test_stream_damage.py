"""What cannot be built ends the stream where it is consumed, and says why: no step is left out, and no actor tried for ever."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest
from synthetic import write_dataset

from moleblend_ray.data.batches.batch import StepBatch
from moleblend_ray.data.config import OrderConfig, StreamConfig
from moleblend_ray.errors import DataError, TrainingError
from moleblend_ray.orchestration.streaming import stream as stream_module
from moleblend_ray.orchestration.streaming.stream import shard_step_batches, stream_dataset

pytestmark = pytest.mark.ray

ORDER = OrderConfig(global_batch_size=20, num_streams=2, shuffle_window=40, chunk_rows=20)
STREAM = StreamConfig(
    micro_batch_size=10, steps_per_block=1, min_actors=2, max_actors=2, actor_cpus=0.5
)
NUM_STEPS = 6


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("damage", ["footer", "missing"])
def test_a_stream_over_a_damaged_shard_ends_with_its_name(tmp_path: Path, damage: str) -> None:
    write_dataset(str(tmp_path), 120, max_atoms=8, shard_rows=40, row_group_rows=20)
    path = tmp_path / "train/00001.parquet"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        # Of the schema: before footers had checksums, Arrow ended the process at such a bit.
        footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        content[footer + 21] ^= 1 << 3
        path.write_bytes(content)
    dataset = stream_dataset(str(tmp_path), ORDER, STREAM, 0, NUM_STEPS)
    (shard,) = dataset.streaming_split(1, equal=True)
    found: list[StepBatch] = []
    with pytest.raises(DataError, match=r"train/00001\.parquet of .* is missing or damaged"):
        found.extend(shard_step_batches(shard, ORDER, STREAM, rank=0, world_size=1, first_step=0))
    assert [batch.step for batch in found] == list(range(len(found)))
    assert len(found) < NUM_STEPS


@pytest.mark.usefixtures("ray_cluster")
def test_actors_that_start_after_the_data_set_was_replaced_give_nothing_of_the_new_one(
    tmp_path: Path,
) -> None:
    write_dataset(str(tmp_path), 120, seed=1, max_atoms=8)
    dataset = stream_dataset(str(tmp_path), ORDER, STREAM, 0, NUM_STEPS)
    write_dataset(str(tmp_path), 120, seed=2, max_atoms=8)
    (shard,) = dataset.streaming_split(1, equal=True)
    with pytest.raises(DataError, match=f"{tmp_path} was replaced by another data set"):
        next(shard_step_batches(shard, ORDER, STREAM, rank=0, world_size=1, first_step=0))


@pytest.mark.usefixtures("ray_cluster")
def test_a_block_that_ends_every_actor_ends_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does for which there is not enough memory: by default Ray tries it again for ever, and trainers wait."""
    write_dataset(str(tmp_path / "data"), 120, max_atoms=8)
    tries = tmp_path / "tries"

    class Dying(stream_module._BlockBuilder):
        def __call__(self, plan: pa.Table) -> pa.Table:
            if plan["first_step"][0].as_py() == 2 and plan["stream"][0].as_py() == 1:
                with tries.open("a") as file:
                    file.write("once\n")
                os._exit(1)
            return super().__call__(plan)

    monkeypatch.setattr(stream_module, "_BlockBuilder", Dying)
    monkeypatch.setattr(stream_module, "_MAX_RETRIES", 3)
    dataset = stream_dataset(str(tmp_path / "data"), ORDER, STREAM, 0, NUM_STEPS)
    (shard,) = dataset.streaming_split(1, equal=True)
    found: list[StepBatch] = []
    with pytest.raises(TrainingError, match=r"ended its data actor 4 times.*stream\.max_actors"):
        found.extend(shard_step_batches(shard, ORDER, STREAM, rank=0, world_size=1, first_step=0))
    assert [batch.step for batch in found] == list(range(len(found)))
    assert len(found) <= 2
    assert tries.read_text().splitlines() == ["once"] * 4
