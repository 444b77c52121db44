"""Files of tables that one process leaves for others: segments, each compressed and with a checksum."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from moleblend_ray.data.files import storage
from moleblend_ray.errors import DataError

_THREADS: Final = 16
_HEADER: Final = struct.Struct("<IQ")
"""Header of a segment: CRC-32 of the compressed content that follows, and its size when decompressed."""


def encode_segment(table: pa.Table) -> bytes:
    """A table, without its schema, as bytes: the same for equal tables."""
    if not table.num_rows:
        return b""
    (batch,) = table.combine_chunks().to_batches()
    message = batch.serialize()
    packed: bytes = pa.compress(message, codec="zstd", asbytes=True)
    return _HEADER.pack(zlib.crc32(packed), message.size) + packed


def decode_segment(content: bytes, schema: pa.Schema, where: str) -> pa.RecordBatch:
    """The rows that :func:`encode_segment` encoded; DataError that names ``where`` if they are damaged."""
    if not content:
        return pa.RecordBatch.from_pylist([], schema=schema)
    if len(content) >= _HEADER.size:
        crc, size = _HEADER.unpack_from(content)
        packed = memoryview(content)[_HEADER.size :]
        if zlib.crc32(packed) == crc:
            message = pa.decompress(pa.py_buffer(packed), size, codec="zstd")
            return pa.ipc.read_record_batch(message, schema)
    raise _damaged(where)


def _damaged(where: str) -> DataError:
    return DataError(
        f"{where} is damaged. Delete it and run the same command again: what it held is made anew."
    )


def write_segments(uri: str, segments: Sequence[bytes]) -> bytes:
    """Write a file of offsets, (n + 1) uint64, and the n segments; returns its content."""
    offsets = np.zeros(len(segments) + 1, dtype="<u8")
    np.cumsum([len(segment) for segment in segments], out=offsets[1:])
    content = b"".join([(offsets + np.uint64(offsets.nbytes)).tobytes(), *segments])
    storage.write_bytes(uri, content)
    return content


@lru_cache(maxsize=4096)
def _offsets(uri: str, num_segments: int, digest: str) -> NDArray[np.uint64]:
    """The offsets of a file of segments; cached, as every bucket reads from every run."""
    del digest  # only part of the cache's key
    content = storage.read_range(uri, 0, 8 * (num_segments + 1))
    if len(content) != 8 * (num_segments + 1):
        raise _damaged(uri)
    return np.frombuffer(content, "<u8")


def read_segments(
    uris: Sequence[str], number: int, num_segments: int, digest: str, schema: pa.Schema
) -> pa.Table:
    """Segment ``number`` of every file, concatenated to one table of one chunk; DataError if one is damaged.

    Each file has ``num_segments`` segments; ``digest`` tells them from earlier files of the same names.
    """

    def read(uri: str) -> pa.RecordBatch:
        offsets = _offsets(uri, num_segments, digest)
        start, end = int(offsets[number]), int(offsets[number + 1])
        content = storage.read_range(uri, start, end - start) if end > start else b""
        return decode_segment(content, schema, uri)

    with ThreadPoolExecutor(_THREADS) as pool:
        batches = list(pool.map(read, uris))
    return pa.Table.from_batches(batches, schema=schema).combine_chunks()
