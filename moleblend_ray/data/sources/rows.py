"""Lines -> the rows of tables (CSV), whose quoted fields may contain line ends, and the cells of a row."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Final, Literal

from moleblend_ray.data.sources.text import MAX_RECORD_BYTES, Beginning, decode, lines_of

# With the csv module's default of 128 KiB, a long cell would make its row unreadable. Cells are limited as their rows
# are, in parts of up to twice the limit and a line.
csv.field_size_limit(3 * MAX_RECORD_BYTES)

DELIMITERS: Final[dict[str, str]] = {"csv": ",", "tsv": "\t", "semicolon": ";"}

_DELIMITER_LINE: Final = re.compile(rb'(?:\xef\xbb\xbf)?("?)sep=(?P<delimiter>[^\r\n])\1[\r\n]*')
"""The line before the header with which Excel is told the delimiter."""


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


def stated_delimiter(record: bytes) -> str | None:
    """The delimiter that the first line of a table states (``sep=;``, for Excel); None if it is another line."""
    stated = _DELIMITER_LINE.fullmatch(record)
    return None if stated is None else decode(stated["delimiter"])


def without_delimiter_line(records: Iterator[bytes]) -> Iterator[bytes]:
    """The rows of a table but for a first one that states the delimiter: the header tells it, too.

    One that states a delimiter which is not read stays, so that whoever reads the header can say so.
    """
    for first in records:
        is_known = stated_delimiter(first) in DELIMITERS.values()
        return records if is_known else chain([first], records)
    return records


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
