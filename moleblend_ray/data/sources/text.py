"""Streams of bytes -> lines and SD records, in bounded memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Final, Self

from moleblend_ray.data.sources.records import EXCERPT_CHARACTERS

MAX_RECORD_BYTES: Final = 16 << 20
"""Most bytes of a record; of a larger one only the beginning is kept, for the quarantine."""
_KEPT_BYTES: Final = 4 * EXCERPT_CHARACTERS
"""Bytes that are kept of a record that is too large: enough for an excerpt, as a character has at most four."""
_RECORD_END: Final = re.compile(rb"^\$\$\$\$[^\n]*\n", re.MULTILINE)


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


def with_line_feeds(blocks: Iterator[bytes]) -> Iterator[bytes]:
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


def whole_text(blocks: Iterator[bytes], max_bytes: int) -> Iterator[bytes]:
    """The whole text as one record."""
    content, num_bytes = b"", 0
    for block in blocks:
        content += block[: max_bytes - len(content)]
        num_bytes += len(block)
    yield Beginning(content, num_bytes) if num_bytes > max_bytes else content


def smiles_lines(blocks: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
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


REPLACEMENT: Final = "\ufffd"
"""What stands in a text for bytes that are not UTF-8."""


def decode(raw: bytes) -> str:
    """UTF-8 as text, with replacement characters for what is not UTF-8."""
    return raw.decode("utf-8", "replace")
