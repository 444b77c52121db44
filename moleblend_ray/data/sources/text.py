"""Streams of bytes -> raw records: decompression, lines, SD records, rows of tables. Memory stays bounded."""

from __future__ import annotations

import bz2
import csv
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any, BinaryIO, Final

import pyarrow as pa

from moleblend_ray.data.sources.records import Format
from moleblend_ray.errors import DataError

MAX_RECORD_BYTES: Final = 16 << 20
# The csv module's own 128 KiB would let one long cell end the job; it becomes a rejected row instead.
csv.field_size_limit(MAX_RECORD_BYTES)

_BLOCK_BYTES: Final = 1 << 20
_ZSTD_BYTES: Final = 1 << 15
_MAX_EXPANSION: Final = 200
"""Molecules in text shrink to between a third and a thirtieth; beyond this, a file is made to fill memory or time."""
_EXPANSION_GRACE_BYTES: Final = 256 << 20

_GZIP_MAGIC: Final = b"\x1f\x8b"
_BZIP2_MAGIC: Final = re.compile(rb"BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90)")
_XZ_MAGIC: Final = b"\xfd7zXZ\0"
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"

COMPRESSIONS: Final = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
"""Suffix -> compression."""

DELIMITERS: Final[dict[str, str]] = {"csv": ",", "tsv": "\t"}

_RECORD_END: Final = re.compile(rb"^\$\$\$\$[^\n]*\n", re.MULTILINE)


class DamageError(Exception):
    """A text file cannot be read on; the caller knows at which record."""


def blocks_of(stream: BinaryIO) -> Iterator[bytes]:
    """The content of a binary file in pieces of up to 1 MiB."""
    return iter(partial(stream.read, _BLOCK_BYTES), b"")


def compression_of(head: bytes) -> str | None:
    """Compression of a file that begins so, one of the values of ``COMPRESSIONS``."""
    if head.startswith(_GZIP_MAGIC):
        return "gzip"
    if _BZIP2_MAGIC.match(head):
        return "bzip2"
    if head.startswith(_XZ_MAGIC):
        return "xz"
    return "zstd" if head.startswith(_ZSTD_MAGIC) else None


def decompressed(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The content of a compressed stream up to the very place where it is damaged; of others, the blocks.

    DamageError if the stream is corrupt or truncated, or expands like no text does.
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
    """What ``unpack`` makes of the blocks, as long as it is in proportion to them."""
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
    """A gzip stream of one or more members.

    ``gzip.GzipFile`` would throw away what it has of a block when the block cannot be completed.
    """
    member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    is_open = False
    for raw in blocks:
        rest = raw
        while rest:
            is_open = True
            try:
                yield member.decompress(rest, _BLOCK_BYTES)
            except zlib.error as error:
                raise DamageError(f"the gzip stream is corrupt ({error})") from error
            rest = member.unconsumed_tail
            if member.eof:
                rest = member.unused_data.lstrip(b"\0")  # zeros may pad an archive
                member, is_open = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16), False
    if is_open:
        raise DamageError("the gzip stream is truncated")


def _unpacked(name: str, make: Callable[[], Any], blocks: Iterator[bytes]) -> Iterator[bytes]:
    """A stream of one or more members of a decompressor like those of bz2 and lzma."""
    member, is_open = make(), False
    for raw in blocks:
        rest = raw
        while rest or (is_open and not member.needs_input and not member.eof):
            is_open = True
            try:
                yield member.decompress(rest, _BLOCK_BYTES)
            except (OSError, EOFError, lzma.LZMAError) as error:
                raise DamageError(f"the {name} stream is corrupt ({error})") from error
            rest = b""
            if member.eof:
                rest = member.unused_data.lstrip(b"\0")
                member, is_open = make(), False
    if is_open:
        raise DamageError(f"the {name} stream is truncated")


def _unpacked_zstd(blocks: Iterator[bytes]) -> Iterator[bytes]:
    try:
        stream = pa.CompressedInputStream(pa.PythonFile(_Readable(blocks), mode="r"), "zstd")
        # A read that meets damage gives nothing: small ones lose little of what comes before it.
        while piece := stream.read(_ZSTD_BYTES):
            yield piece
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DamageError(f"the zstd stream is corrupt or truncated ({reason})") from error


class _Readable(io.RawIOBase):
    """Blocks as a file object."""

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


def split_records(blocks: Iterator[bytes], form: Format) -> Iterator[bytes]:
    """Raw records of a text, each with its line end; of a table the header first, of ``smi`` without any header."""
    if form == "xyz":
        return _whole(blocks)
    blocks = _with_line_feeds(blocks)
    if form == "sdf":
        return sd_records(blocks)
    if form == "smi":
        return _smiles_lines(blocks)
    return csv_records(blocks, DELIMITERS[form])


def _whole(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """All of the text as one record."""
    content = b""
    for block in blocks:
        content += block
        if len(content) > MAX_RECORD_BYTES:
            raise DamageError(f"a record of more than {MAX_RECORD_BYTES >> 20} MiB")
    yield content


def _with_line_feeds(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks; of a file whose lines end in a carriage return alone, with line feeds in their place."""
    for first in blocks:
        # In other files a lone carriage return is content, or a blank line too many.
        if b"\r" in first[:-1] and b"\n" not in first:
            return (block.replace(b"\r", b"\n") for block in chain([first], blocks))
        return chain([first], blocks)
    return iter(())


def sd_records(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The records of an SD file, each with its ``$$$$``."""
    rest = b""
    for block in blocks:
        rest += block
        start = 0
        for match in _RECORD_END.finditer(rest):
            yield rest[start : match.end()]
            start = match.end()
        rest = rest[start:]
        if len(rest) > MAX_RECORD_BYTES:
            raise DamageError(
                f"no $$$$ line within {MAX_RECORD_BYTES >> 20} MiB; is it an SD file?"
            )
    if rest.strip():
        # The last record of a file may lack its $$$$; if it was cut off, its molblock will say so.
        yield rest


def lines_of(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines with their ends."""
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line + b"\n"
        if len(rest) > MAX_RECORD_BYTES:
            raise DamageError(f"a line of more than {MAX_RECORD_BYTES >> 20} MiB; is it text?")
    if rest:
        yield rest


def csv_records(blocks: Iterable[bytes], delimiter: str) -> Iterator[bytes]:
    """The rows of a table; a quoted field may hold line ends. Blank lines between rows are none."""
    lines = lines_of(blocks)
    for line in lines:
        if not line.strip(b"\r\n"):
            continue
        yield _whole_row(line, lines, delimiter) if b'"' in line else line


def _whole_row(first: bytes, following: Iterator[bytes], delimiter: str) -> bytes:
    """The row that begins with ``first``, with as many following lines as the csv module asks for."""
    taken: list[bytes] = []

    def feed() -> Iterator[str]:
        for line in chain([first], following):
            taken.append(line)
            yield decode(line)
        raise DamageError("a quoted field is not closed")

    try:
        next(csv.reader(feed(), delimiter=delimiter))
    except csv.Error as error:
        raise DamageError(f"a row cannot be told from the next ({error})") from error
    return b"".join(taken)


def _smiles_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines that are not blank, without a header."""
    is_first = True
    for line in lines_of(blocks):
        if line.strip():
            if not (is_first and is_smiles_header(line)):
                yield line
            is_first = False


def is_smiles_header(line: bytes) -> bool:
    """Whether a line is the header of a table of SMILES: its first word is no SMILES but says "smiles"."""
    word = line.removeprefix(b"\xef\xbb\xbf").split(None, 1)[:1]
    return bool(word) and b"smiles" in word[0].lower()


def decode(raw: bytes) -> str:
    """Text of UTF-8, whatever else may be in it."""
    return raw.decode("utf-8", "replace")


def fields(record: bytes, delimiter: str) -> list[str] | None:
    """The cells of a row, None if it is none."""
    try:
        return next(csv.reader(io.StringIO(decode(record), newline=""), delimiter=delimiter))
    except csv.Error:
        return None


def unreadable(uri: str, record: int, error: Exception) -> DataError:
    """The error for a file that is damaged after so many records."""
    reason = " ".join(str(error).split())
    return DataError(
        f"{uri} is damaged after record {record} (counted from 0, the header aside): {reason}. "
        "Replace the file and run the same command again; chunks converted so far are kept."
    )
