"""Micro-batches sent to a rank: packed as blocks, regrouped into steps, checked when they arrive."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from synthetic import random_block

from moleblend_ray.data.batches.batch import build_steps
from moleblend_ray.data.batches.transport import pack_block, pack_error, step_batches
from moleblend_ray.errors import ConfigError, DataError, TrainingError


def test_micro_batches_built_together_are_packed_without_copying() -> None:
    block = random_block(np.random.default_rng(0), 30)
    micro_batches = build_steps(block, range(10, 13), 1, 4)
    for part, copied in [(micro_batches, False), (micro_batches[1:], True)]:
        payloads = pack_block(part).column("payloads").chunk(0).flatten()
        assert payloads.to_pylist() == [bytes(micro.payload) for micro in part]
        data = np.frombuffer(payloads.buffers()[2], np.uint8)
        assert np.shares_memory(data, micro_batches[0].payload) is not copied


def stream_blocks(
    num_streams: int, groups: int = 2, group_steps: int = 3, first_step: int = 4
) -> list[pa.Table]:
    """Blocks of the whole stream in order, with 6 molecules and 2 micro-batches per (step, stream)."""
    rng = np.random.default_rng(3)
    return [
        pack_block(
            build_steps(
                random_block(rng, 6 * group_steps),
                range(first_step + g * group_steps, first_step + (g + 1) * group_steps),
                stream,
                3,
            )
        )
        for g in range(groups)
        for stream in range(num_streams)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_rank_gets_every_step_with_its_streams_in_order(world_size: int) -> None:
    blocks = stream_blocks(4)
    for rank in range(world_size):
        steps = list(
            step_batches(
                blocks[rank::world_size],
                rank=rank,
                world_size=world_size,
                num_streams=4,
                num_micro=2,
                first_step=4,
            )
        )
        assert [batch.step for batch in steps] == [4, 5, 6, 7, 8, 9]
        streams = range(rank, 4, world_size)
        for batch in steps:
            tags = [(m.step, m.stream, m.index) for m in batch.micro_batches]
            assert tags == [(batch.step, stream, i) for stream in streams for i in range(2)]


def test_blocks_cut_out_of_a_longer_table_give_their_own_micro_batches() -> None:
    blocks = stream_blocks(1, groups=3)
    merged = pa.concat_tables(blocks).combine_chunks()
    cut = [merged.slice(row, 1) for row in range(3)]
    ours, expected = (
        [
            bytes(micro.payload)
            for step in step_batches(tables, rank=0, world_size=1, num_streams=1, num_micro=2)
            for micro in step.micro_batches
        ]
        for tables in (cut, blocks)
    )
    assert ours == expected
    assert len(ours) == 18


def test_micro_batches_of_a_step_in_another_order_are_an_error_naming_both() -> None:
    first, second, *others = build_steps(
        random_block(np.random.default_rng(3), 12), range(4, 6), 0, 3
    )
    table = pack_block([second, first, *others])
    with pytest.raises(
        TrainingError, match=r"expected step 4, stream 0, micro-batch 0, found .* micro-batch 1"
    ):
        list(step_batches([table], rank=0, world_size=1, num_streams=1, num_micro=2))


def test_a_step_views_the_memory_of_its_blocks() -> None:
    blocks = stream_blocks(1, groups=1)
    data = np.frombuffer(blocks[0].column("payloads").chunk(0).flatten().buffers()[2], np.uint8)
    steps = list(step_batches(blocks, rank=0, world_size=1, num_streams=1, num_micro=2))
    assert [len(batch.micro_batches) for batch in steps] == [2, 2, 2]
    for batch in steps:
        for micro in batch.micro_batches:
            assert np.shares_memory(micro.path_words, data)
            assert np.shares_memory(micro.payload, data)


def test_without_a_first_step_the_stream_begins_as_its_first_block_says() -> None:
    steps = list(step_batches(stream_blocks(2), rank=0, world_size=1, num_streams=2, num_micro=2))
    assert [batch.step for batch in steps] == [4, 5, 6, 7, 8, 9]


def consume(blocks: list[pa.Table], **changes: int) -> None:
    arguments = {"rank": 0, "world_size": 1, "num_streams": 2, "num_micro": 2, "first_step": 4}
    for _ in step_batches(blocks, **(arguments | changes)):
        pass


def test_gaps_and_wrong_orders_stop_naming_what_was_expected_and_found() -> None:
    blocks = stream_blocks(2)
    with pytest.raises(
        TrainingError, match=r"expected step 4, stream 0, micro-batch 0, found step 7, stream 0"
    ):
        consume(blocks[2:])
    with pytest.raises(TrainingError, match=r"expected step 4, stream 0.*found step 4, stream 1"):
        consume([blocks[1], blocks[0], *blocks[2:]])
    with pytest.raises(TrainingError, match=r"expected step 7, stream 0.* found step 7, stream 1"):
        consume([blocks[0], blocks[1], blocks[3]])
    with pytest.raises(
        TrainingError, match=r"step 7, stream 1, micro-batch 0, but the data stream ended"
    ):
        consume(blocks[:3])
    with pytest.raises(
        TrainingError, match=r"expected step 5, stream 0, micro-batch 0, found step 4"
    ):
        consume(blocks, first_step=5)
    with pytest.raises(ConfigError, match="2 streams cannot be divided among 3 workers"):
        consume(blocks, world_size=3)


def test_a_block_that_could_not_be_built_raises_its_error_where_it_is_consumed() -> None:
    blocks = stream_blocks(2)
    blocks[3] = pack_error(DataError("shard 7 is damaged"), 7, 1)
    with pytest.raises(DataError, match=r"step 7 of stream 1 .* DataError: shard 7 is damaged"):
        consume(blocks)
