"""Compressed streams of bytes -> their content, in bounded memory, up to where they are damaged."""

from __future__ import annotations

import bz2
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any, BinaryIO, Final

import pyarrow as pa

from moleblend_ray.data.sources.damage import DamageError

COMPRESSIONS: Final = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
"""Suffix -> compression."""

_BLOCK_BYTES: Final = 1 << 20
_ZSTD_BYTES: Final = 1 << 15
_MAX_EXPANSION: Final = 200
"""Compressed molecules expand 3 to 30 times; a file that expands more than this is made to exhaust memory or time."""
_EXPANSION_GRACE_BYTES: Final = 256 << 20

_GZIP_MAGIC: Final = b"\x1f\x8b"
_BZIP2_MAGIC: Final = re.compile(rb"BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90)")
_XZ_MAGIC: Final = b"\xfd7zXZ\0"
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_PADDING: Final = b"\0"
"""May stand between members, and behind the last."""


def blocks_of(stream: BinaryIO) -> Iterator[bytes]:
    """The content of a binary file in pieces of up to 1 MiB."""
    return iter(partial(stream.read, _BLOCK_BYTES), b"")


def compression_of(head: bytes) -> str | None:
    """Compression of a file that begins with ``head``: one of the values of ``COMPRESSIONS``, or None."""
    if head.startswith(_GZIP_MAGIC):
        return "gzip"
    if _BZIP2_MAGIC.match(head):
        return "bzip2"
    if head.startswith(_XZ_MAGIC):
        return "xz"
    return "zstd" if head.startswith(_ZSTD_MAGIC) else None


def decompressed(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The decompressed content of a stream, up to where it is damaged; the blocks themselves if not compressed.

    DamageError if the stream is corrupt or truncated, or expands more than texts of molecules do.
    """
    head = b""
    for block in blocks:
        head += block
        if len(head) >= 10:  # the longest of the magic numbers
            break
    kind = compression_of(head)
    whole = chain([head], blocks) if head else blocks
    if kind is None:
        return whole
    if kind == "zstd":
        return _bounded(_unpacked_zstd, whole)
    return _bounded(_UNPACK[kind], whole)


def _bounded(
    unpack: Callable[[Iterator[bytes]], Iterator[bytes]], blocks: Iterator[bytes]
) -> Iterator[bytes]:
    """The output of ``unpack``; DamageError if it is out of proportion to the blocks that went in."""
    num_read = num_made = 0

    def counted() -> Iterator[bytes]:
        nonlocal num_read
        for block in blocks:
            num_read += len(block)
            yield block

    for piece in unpack(counted()):
        num_made += len(piece)
        if num_made > _EXPANSION_GRACE_BYTES and num_made > _MAX_EXPANSION * num_read:
            raise DamageError(
                f"it expands to more than {_MAX_EXPANSION} times its size, as no molecules do"
            )
        yield piece


def _unpacked_gzip(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The content of a gzip stream of one or more members.

    ``gzip.GzipFile`` would discard the part of a block before the damage.
    """
    member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    is_open = False
    for raw in blocks:
        rest = raw if is_open else raw.lstrip(_PADDING)
        while rest:
            is_open = True
            try:
                yield member.decompress(rest, _BLOCK_BYTES)
            except zlib.error as error:
                raise DamageError(f"the gzip stream is corrupt ({error})") from error
            rest = member.unconsumed_tail
            if member.eof:
                rest = member.unused_data.lstrip(_PADDING)
                member, is_open = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16), False
    if is_open:
        raise DamageError("the gzip stream is truncated")


def _unpacked(name: str, make: Callable[[], Any], blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The content of a stream of one or more members, by decompressors with the interface of those in bz2 and lzma."""
    member, is_open = make(), False
    for raw in blocks:
        rest = raw if is_open else raw.lstrip(_PADDING)
        while rest or (is_open and not member.needs_input and not member.eof):
            is_open = True
            try:
                yield member.decompress(rest, _BLOCK_BYTES)
            except (OSError, EOFError, lzma.LZMAError) as error:
                raise DamageError(f"the {name} stream is corrupt ({error})") from error
            rest = b""
            if member.eof:
                rest = member.unused_data.lstrip(_PADDING)
                member, is_open = make(), False
    if is_open:
        raise DamageError(f"the {name} stream is truncated")


def _unpacked_zstd(blocks: Iterator[bytes]) -> Iterator[bytes]:
    try:
        stream = pa.CompressedInputStream(pa.PythonFile(_Readable(blocks), mode="r"), "zstd")
        # A read that meets damage returns nothing, so reads are small: little before the damage is lost.
        while piece := stream.read(_ZSTD_BYTES):
            yield piece
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DamageError(f"the zstd stream is corrupt or truncated ({reason})") from error


class _Readable(io.RawIOBase):
    """An iterator of blocks as a file object."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = next(self._blocks, b"")
        piece, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)


_UNPACK: Final[dict[str, Callable[[Iterator[bytes]], Iterator[bytes]]]] = {
    "gzip": _unpacked_gzip,
    "bzip2": partial(_unpacked, "bzip2", bz2.BZ2Decompressor),
    "xz": partial(_unpacked, "xz", lzma.LZMADecompressor),
}
