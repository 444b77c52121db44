"""Streams of bytes -> raw records: decompression, lines, SD records, rows of tables, in bounded memory."""

from __future__ import annotations

import bz2
import csv
import io
import lzma
import math
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any, BinaryIO, Final, Literal, Self

import pyarrow as pa

from moleblend_ray.data.sources.records import EXCERPT_CHARACTERS, Format
from moleblend_ray.errors import DataError

MAX_RECORD_BYTES: Final = 16 << 20
"""Most bytes of a record; of a larger one only the beginning is kept, for the quarantine."""
# With the csv module's default of 128 KiB, a long cell would make its row unreadable. Cells are limited as their rows
# are, in parts of up to twice the limit and a line.
csv.field_size_limit(3 * MAX_RECORD_BYTES)

_KEPT_BYTES: Final = 4 * EXCERPT_CHARACTERS
"""Bytes that are kept of a record that is too large: enough for an excerpt, as a character has at most four."""
_BLOCK_BYTES: Final = 1 << 20
_ZSTD_BYTES: Final = 1 << 15
_MAX_EXPANSION: Final = 200
"""Compressed molecules expand 3 to 30 times; a file that expands more than this is made to exhaust memory or time."""
_EXPANSION_GRACE_BYTES: Final = 256 << 20

_GZIP_MAGIC: Final = b"\x1f\x8b"
_BZIP2_MAGIC: Final = re.compile(rb"BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90)")
_XZ_MAGIC: Final = b"\xfd7zXZ\0"
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"

COMPRESSIONS: Final = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
"""Suffix -> compression."""

DELIMITERS: Final[dict[str, str]] = {"csv": ",", "tsv": "\t", "semicolon": ";"}

_RECORD_END: Final = re.compile(rb"^\$\$\$\$[^\n]*\n", re.MULTILINE)
_DELIMITER_LINE: Final = re.compile(rb'(?:\xef\xbb\xbf)?("?)sep=(?P<delimiter>[^\r\n])\1[\r\n]*')
"""The line before the header with which Excel is told the delimiter."""


class DamageError(Exception):
    """The rest of a text file cannot be read; the caller knows from which record on."""


class Beginning(bytes):
    """The first bytes of a record that is too large, in its place."""

    num_bytes: int
    """Bytes of the whole record."""

    def __new__(cls, record: bytes, num_bytes: int) -> Self:
        """Of ``record`` the first bytes are kept."""
        beginning = super().__new__(cls, record[:_KEPT_BYTES])
        beginning.num_bytes = num_bytes
        return beginning

    @property
    def problem(self) -> str:
        """Its size and the limit, for messages."""
        # Rounded up, so that it is never the limit itself.
        size = math.ceil(10 * self.num_bytes / (1 << 20)) / 10
        return f"{size:,.1f} MiB, more than the {MAX_RECORD_BYTES >> 20} MiB that a record may have"


def size_of(record: bytes) -> int:
    """Bytes that a record has in its file."""
    return record.num_bytes if isinstance(record, Beginning) else len(record)


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
    """The content of a stream of one or more members, by decompressors with the interface of those in bz2 and lzma."""
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


def split_records(blocks: Iterator[bytes], form: Format) -> Iterator[bytes]:
    """Raw records, each with its line end: of a table including the header, of ``smi`` without one. A line ``sep=;`` before
    the header of a table is left out.

    In the place of one that is too large there is its :class:`Beginning`.
    """
    if form == "xyz":
        return _whole(blocks, MAX_RECORD_BYTES)
    blocks = _with_line_feeds(blocks)
    if form == "sdf":
        return sd_records(blocks, MAX_RECORD_BYTES)
    if form == "smi":
        return _smiles_lines(blocks, MAX_RECORD_BYTES)
    return _without_delimiter_line(csv_records(blocks, DELIMITERS[form], MAX_RECORD_BYTES))


def stated_delimiter(record: bytes) -> str | None:
    """The delimiter that the first line of a table states (``sep=;``, for Excel); None if it is another line."""
    stated = _DELIMITER_LINE.fullmatch(record)
    return None if stated is None else decode(stated["delimiter"])


def _without_delimiter_line(records: Iterator[bytes]) -> Iterator[bytes]:
    """The rows of a table but for a first one that states the delimiter: the header tells it, too.

    One that states a delimiter which is not read stays, so that whoever reads the header can say so.
    """
    for first in records:
        is_known = stated_delimiter(first) in DELIMITERS.values()
        return records if is_known else chain([first], records)
    return records


def _whole(blocks: Iterator[bytes], max_bytes: int) -> Iterator[bytes]:
    """The whole text as one record."""
    content, num_bytes = b"", 0
    for block in blocks:
        content += block[: max_bytes - len(content)]
        num_bytes += len(block)
    yield Beginning(content, num_bytes) if num_bytes > max_bytes else content


def _with_line_feeds(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks; in a file whose lines end in carriage returns alone, these are replaced by line feeds."""
    for first in blocks:
        # In other files a lone carriage return is content, or would make additional blank lines.
        if b"\r" in first[:-1] and b"\n" not in first:
            return (block.replace(b"\r", b"\n") for block in chain([first], blocks))
        return chain([first], blocks)
    return iter(())


def sd_records(blocks: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    """The records of an SD file, each including its ``$$$$`` line; of one that is larger, its :class:`Beginning`."""
    rest, num_dropped = b"", 0
    for block in blocks:
        rest += block
        start = 0
        for match in _RECORD_END.finditer(rest):
            yield _bounded_record(rest[start : match.end()], num_dropped, max_bytes)
            start, num_dropped = match.end(), 0
        rest = rest[start:]
        if num_dropped + len(rest) > max_bytes:
            kept = _both_ends(rest)
            num_dropped += len(rest) - len(kept)
            rest = kept
    if num_dropped or rest.strip():
        # The last record may lack its $$$$ line; if the file was cut off, the parser rejects the molblock.
        yield _bounded_record(rest, num_dropped, max_bytes)


def _bounded_record(record: bytes, num_dropped: int, max_bytes: int) -> bytes:
    """A record from which ``num_dropped`` bytes were left out; its :class:`Beginning` if it is larger than ``max_bytes``."""
    num_bytes = num_dropped + len(record)
    return Beginning(record, num_bytes) if num_bytes > max_bytes else record


def _both_ends(record: bytes) -> bytes:
    """The first lines of an unfinished SD record, and of its last line as much as tells whether it ends the record."""
    last = record.rfind(b"\n") + 1
    head = record[: min(last, _KEPT_BYTES)]
    if head and not head.endswith(b"\n"):
        head += b"\n"
    return head + record[last : last + _KEPT_BYTES]


def lines_of(blocks: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    """Lines, each including its line end; of one that is larger, its :class:`Beginning`."""
    rest, num_dropped = b"", 0
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            num_bytes = num_dropped + len(line) + 1
            yield line + b"\n" if num_bytes <= max_bytes else Beginning(line, num_bytes)
            num_dropped = 0
        if num_dropped + len(rest) > max_bytes:
            num_dropped += max(0, len(rest) - _KEPT_BYTES)
            rest = rest[:_KEPT_BYTES]
    if rest:
        yield _bounded_record(rest, num_dropped, max_bytes)


def csv_records(blocks: Iterable[bytes], delimiter: str, max_bytes: int) -> Iterator[bytes]:
    """The rows of a table, in which quoted fields may contain line ends; blank lines between rows are skipped.

    The rows of a part that ends with a row are the same as in the whole: a chunk is divided once more when it is parsed.
    A line of more than ``max_bytes`` is a row of its own, whatever its quotes. In the place of a row that is larger there
    is its :class:`Beginning`.
    """
    lines = _Lines(lines_of(blocks, max_bytes))
    for line in lines:
        if isinstance(line, Beginning):
            yield line
        elif line.strip(b"\r\n"):
            yield _whole_row(line, lines, delimiter, max_bytes) if b'"' in line else line


class _Lines(Iterator[bytes]):
    """Lines, of which the last ones may be given back."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self._returned: deque[bytes] = deque()

    def __next__(self) -> bytes:
        return self._returned.popleft() if self._returned else next(self._lines)

    def give_back(self, lines: Iterable[bytes]) -> None:
        """These come next, in this order."""
        self._returned.extendleft(reversed(list(lines)))


def _whole_row(first: bytes, following: _Lines, delimiter: str, max_bytes: int) -> bytes:
    """The row that begins with line ``first``, with the lines that its quoted fields go on over; its ``Beginning`` if it
    is larger than ``max_bytes``.

    If these lines are no row (a stray quote ends in the middle of another row's cell, or is not closed before the end,
    a line that is too large or long after ``max_bytes``), ``first`` alone: whoever parses it finds that it is not one.
    """
    lines, ending = _part_of_row(chain([first], following), delimiter, max_bytes)
    if ending is None:
        following.give_back(lines[1:])
        return first
    record = b"".join(lines)
    num_bytes = len(record)
    if num_bytes > max_bytes:
        record = Beginning(record, num_bytes)
    while ending == "open":
        lines, ending = _part_of_row(following, delimiter, max_bytes, is_continued=True)
        if ending is None:
            following.give_back(lines)
        else:
            num_bytes += sum(map(len, lines))
            record = Beginning(record, num_bytes)
    return record


def _part_of_row(
    lines: Iterator[bytes], delimiter: str, max_bytes: int, *, is_continued: bool = False
) -> tuple[list[bytes], Literal["closed", "open"] | None]:
    """The lines up to the end of a row; if they exceed twice ``max_bytes`` before, these, and the row is open.

    None if they are no row, or no part of one: quotes are not where they belong, or the last cell of an open row exceeds
    ``max_bytes``, as the rows after a stray quote do. A row that is continued begins within quotes.
    """
    taken: list[bytes] = []
    ending: Literal["closed", "open"] | None = "closed"

    def feed() -> Iterator[str]:
        nonlocal ending
        num_bytes = 0
        yield from opening
        for line in lines:
            taken.append(line)
            if isinstance(line, Beginning):
                break
            yield decode(line)
            num_bytes += len(line)
            if num_bytes > 2 * max_bytes:
                ending = "open"
                return
        ending = None

    opening = ['"'] if is_continued else []
    try:
        cells = next(csv.reader(feed(), delimiter=delimiter))
    except csv.Error:
        return taken, None
    if ending == "closed" and len(taken) == 1 and not is_continued:
        return taken, ending
    if ending is None or (ending == "open" and len(cells[-1].encode()) > max_bytes):
        return taken, None
    closing = ['"'] if ending == "open" else []
    is_row = _is_strict(chain(opening, map(decode, taken), closing), delimiter)
    return taken, ending if is_row else None


def _is_strict(lines: Iterator[str], delimiter: str) -> bool:
    """Whether these lines are a row whose quotes are where they belong."""
    try:
        next(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error:
        return False
    return True


def _smiles_lines(blocks: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    """The lines that are not blank, except a header."""
    is_first = True
    for line in lines_of(blocks, max_bytes):
        is_too_large = isinstance(line, Beginning)
        if is_too_large or line.strip():
            if is_too_large or not (is_first and is_smiles_header(line)):
                yield line
            is_first = False


def is_smiles_header(line: bytes) -> bool:
    """Whether a line is the header of a table of SMILES: its first word contains "smiles"."""
    word = line.removeprefix(b"\xef\xbb\xbf").split(None, 1)[:1]
    return bool(word) and b"smiles" in word[0].lower()


def decode(raw: bytes) -> str:
    """UTF-8 as text, with replacement characters for what is not UTF-8."""
    return raw.decode("utf-8", "replace")


def fields(record: bytes, delimiter: str) -> list[str] | None:
    """The cells of a row; None if a quote is not closed, or if a carriage return stands outside quotes."""
    # As one line: split at a carriage return, all after it would be lost. The reader asks for a second one only within
    # quotes.
    reader = csv.reader((decode(record), ""), delimiter=delimiter)
    try:
        cells = next(reader)
    except csv.Error:
        return None
    return cells if reader.line_num == 1 else None


def without_empty_end(cells: list[str], num_columns: int) -> list[str]:
    """The cells of a row without empty ones that exceed the columns, as a delimiter at the end of the line makes them."""
    while len(cells) > num_columns and not cells[-1].strip():
        cells = cells[:-1]
    return cells


def unreadable(uri: str, record: int, error: Exception) -> DataError:
    """The error for a file that is damaged after ``record`` records."""
    reason = " ".join(str(error).split())
    return DataError(
        f"{uri} is damaged after record {record} (counted from 0, the header aside): {reason}. "
        "Replace the file and run the same command again; chunks converted so far are kept."
    )
