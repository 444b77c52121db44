"""Sending micro-batches from the actors that build them to the ranks that train: as Arrow tables of one row.

The columns of such a table are ``first_step``, ``stream``, ``error`` and ``payloads``. The last one is a list of the
buffers of consecutive micro-batches of one stream (:mod:`moleblend_ray.data.batches.batch`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moleblend_ray.data.batches.batch import MicroBatch, StepBatch, unpack_micro_batch
from moleblend_ray.data.batches.order import streams_of_rank
from moleblend_ray.errors import DataError, MoleBlendError, TrainingError


def pack_block(micro_batches: Sequence[MicroBatch]) -> pa.Table:
    """Micro-batches of one stream as a block of one row, ``first_step, stream, error, payloads``.

    A block has a single row because Ray may split a block between rows, but never within one.
    """
    data = _joined_payloads([micro.payload for micro in micro_batches])
    ends = np.cumsum([0, *(len(micro.payload) for micro in micro_batches)], dtype=np.int64)
    payloads = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(micro_batches), [None, pa.py_buffer(ends), pa.py_buffer(data)]
    )
    return _block_row(micro_batches[0].step, micro_batches[0].stream, None, payloads)


def _joined_payloads(payloads: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """The concatenated payloads: the buffer in which they were built if they are all of it, else a copy."""
    buffer = payloads[0].base
    if isinstance(buffer, np.ndarray) and all(payload.base is buffer for payload in payloads):
        whole = buffer.view(np.uint8)
        begins = [payload.__array_interface__["data"][0] for payload in payloads]
        ends = [begin + len(payload) for begin, payload in zip(begins, payloads, strict=True)]
        first = whole.__array_interface__["data"][0]
        if begins == [first, *ends[:-1]] and ends[-1] == first + len(whole):
            return whole
    return np.concatenate(payloads)


def pack_error(error: MoleBlendError, first_step: int, stream: int) -> pa.Table:
    """The block for steps that could not be built: :func:`step_batches` raises the error where they are consumed."""
    payloads = pa.array([], pa.large_binary())
    return _block_row(first_step, stream, f"{type(error).__name__}: {error}", payloads)


def _block_row(first_step: int, stream: int, error: str | None, payloads: pa.Array) -> pa.Table:
    return pa.table(
        {
            "first_step": pa.array([first_step], pa.int64()),
            "stream": pa.array([stream], pa.int64()),
            "error": pa.array([error], pa.string()),
            "payloads": pa.ListArray.from_arrays([0, len(payloads)], payloads),
        }
    )


def step_batches(
    blocks: Iterable[pa.Table],
    *,
    rank: int,
    world_size: int,
    num_streams: int,
    num_micro: int,
    first_step: int | None = None,
) -> Iterator[StepBatch]:
    """Regroup the blocks that one rank receives into its steps, and check that each micro-batch is the expected one.

    ``blocks`` are tables of :func:`pack_block`. They come in groups of one block per stream ``rank``,
    ``rank + world_size``, ..., and the blocks of a group hold the same consecutive steps. ``num_micro`` is the number
    of micro-batches per (step, stream). If ``first_step`` is None, the first block decides with which step the stream
    begins. A gap or a wrong order raises a ``TrainingError``.
    """
    streams = streams_of_rank(rank, world_size, num_streams)
    iterator = iter(blocks)
    step = first_step
    while group := [table for _, table in zip(streams, iterator, strict=False)]:
        if step is None:
            step = int(group[0].column("first_step")[0].as_py())
        payloads = [_payloads(table) for table in group]
        steps_in_group = len(payloads[0]) // num_micro
        for offset in range(steps_in_group):
            yield _step_batch(payloads, streams, offset, num_micro, step, rank)
            step += 1


def _step_batch(
    payloads: list[list[memoryview]],
    streams: range,
    offset: int,
    num_micro: int,
    step: int,
    rank: int,
) -> StepBatch:
    micro_batches = []
    for place, stream in enumerate(streams):
        for index in range(num_micro):
            expected = f"rank {rank} expected step {step}, stream {stream}, micro-batch {index}"
            row = offset * num_micro + index
            if place >= len(payloads) or row >= len(payloads[place]):
                raise TrainingError(f"{expected}, but the data stream ended before it")
            micro = unpack_micro_batch(payloads[place][row])
            if (micro.step, micro.stream, micro.index) != (step, stream, index):
                raise TrainingError(
                    f"{expected}, found step {micro.step}, stream {micro.stream}, micro-batch {micro.index}: "
                    "the data stream has a gap or a wrong order; restart from the last checkpoint"
                )
            micro_batches.append(micro)
    return StepBatch(step=step, micro_batches=tuple(micro_batches))


def _payloads(table: pa.Table) -> list[memoryview]:
    """The payloads of a block as views of its memory; DataError if the block could not be built."""
    error = table.column("error")[0].as_py()
    if error is not None:
        raise DataError(
            f"micro-batches from step {table.column('first_step')[0]} of stream {table.column('stream')[0]} "
            f"could not be built: {error}"
        )
    column = table.column("payloads")
    # combine_chunks() copies even a single chunk, which is the usual case as a block has one row.
    payloads = (column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()).flatten()
    if not len(payloads):
        return []
    data = memoryview(payloads.buffers()[2])
    ends = np.frombuffer(payloads.buffers()[1], dtype=np.int64)
    ends = ends[payloads.offset : payloads.offset + len(payloads) + 1]
    return [data[begin:end] for begin, end in pairwise(ends)]
