"""What a column of the table says of the split: its parts, times, or groups that stay together."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moleblend_ray.chemistry.scaffolds import FRACTIONS
from moleblend_ray.data.dataset.dataset_files import is_prepared
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.splits import (
    MoleculeGroups,
    NamedSplits,
    TimeSplit,
    is_split_name,
)
from moleblend_ray.data.sources import SourceFile, find_sources
from moleblend_ray.data.sources.cells import sd_properties, sd_text
from moleblend_ray.data.sources.damage import DamageError, unreadable
from moleblend_ray.data.sources.headers import delimited_form
from moleblend_ray.data.sources.parquet import parquet_file, strings
from moleblend_ray.data.sources.reading import open_items, open_records
from moleblend_ray.data.sources.rows import DELIMITERS, fields, without_empty_end
from moleblend_ray.errors import ConfigError, DataError

_MONTH: Final = re.compile(r"\d{4}-\d{2}")


def splits_of_column(source: str, column: str) -> NamedSplits:
    """The splits of :func:`rows_of_column`."""
    return NamedSplits(rows_of_column(source, column), None, f"column {column!r} of {source}")


def rows_of_column(source: str, column: str) -> dict[str, NDArray[np.int64]]:
    """Rows (K,) int64, ascending, by the word for train, valid or test that a column (or SD property) has in them.

    Rows whose cell is empty or missing are in no split. Raises ConfigError if the source has several files or a
    word is none of these (validation, val and dev mean valid), DataError if there is no such column.
    """
    rows = _rows_by_word(source, column, "train, valid or test")
    others = {word: found[0] for word, found in rows.items() if not is_split_name(word)}
    if others:
        row, word = min((row, word) for word, row in others.items())
        raise ConfigError(
            f"task.split_column: column {column!r} of {source} says {word!r} in row {row} (counted from 0), which is no "
            f"split, and {len(others)} such words in all; expected train, valid (validation, val, dev) or test in each "
            "row. If it holds dates or years, task.split=time tests on the newest rows; if it holds projects or the like, "
            "task.split=group keeps each in one part"
        )
    return {word: np.array(found, dtype=np.int64) for word, found in rows.items()}


def times_of_column(source: str, column: str) -> TimeSplit:
    """The split by the dates (ISO 8601, such as 2024-05-31 or 2024-05) or numbers (such as years) of a column (or SD property).

    Rows whose cell is empty or missing have no time. Raises ConfigError if the source has several files or a cell is no date or
    number, or some are dates and others numbers, DataError if there is no such column.
    """
    rows = _rows_by_word(source, column, "a date or a number")
    read: Callable[[str], float] = _number if any(map(_is_number, rows)) else _date
    times = np.full(1 + max(found[-1] for found in rows.values()), np.nan)
    for word, found in rows.items():
        try:
            times[found] = read(word)
        except ValueError as error:
            kind = (
                "a number, as in other rows,"
                if read is _number
                else "a date (such as 2024-05-31) or a number"
            )
            raise ConfigError(
                f"task.split_column: column {column!r} of {source} says {word!r} in row {found[0]} (counted from 0); expected "
                f"{kind} for task.split=time"
            ) from error
    return TimeSplit(times, FRACTIONS)


def groups_of_column(source: str, column: str) -> MoleculeGroups:
    """The groups of rows with one text (project, plate, source, ...) in a column (or SD property); spaces around it do not count.

    Rows whose cell is empty or missing are in no group. Raises ConfigError if the source has several files, DataError if there is
    no such column.
    """
    rows = _rows_by_word(source, column, "the name of a group")
    numbers = np.full(1 + max(found[-1] for found in rows.values()), -1, dtype=np.int64)
    for number, found in enumerate(rows.values()):
        numbers[found] = number
    return MoleculeGroups(numbers)


def _is_number(word: str) -> bool:
    try:
        _number(word)
    except ValueError:
        return False
    return True


def _number(word: str) -> float:
    if not math.isfinite(number := float(word)):
        raise ValueError(f"{word} is no time")
    return number


def _date(word: str) -> float:
    """Seconds since 1970; a month counts as its first day, and what has no time zone is in UTC."""
    found = datetime.fromisoformat(f"{word}-01" if _MONTH.fullmatch(word) else word)
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _rows_by_word(source: str, column: str, expected: str) -> dict[str, list[int]]:
    """Rows, ascending, by the text of the column; ``expected`` is what it should say."""
    if is_prepared(source):
        raise ConfigError(
            f"task.split_column: {source} is a prepared dataset, which keeps numbers only. Leave the column out to use "
            "the dataset's own splits (task.split=given), or give task.split_file"
        )
    files = find_sources(source)
    if len(files) != 1:
        names = ", ".join(storage.name_of(file.uri) for file in files[:3])
        raise ConfigError(
            f"task.split_column: rows are those of one file, but {source} has {len(files)} ({names}, ...). "
            "Give task.split_file with ids, or one file"
        )
    file = delimited_form(files[0], column)
    rows: dict[str, list[int]] = defaultdict(list)
    num_rows = 0
    try:
        for word in map(str.strip, _cells(file, column)):
            if word:
                rows[word].append(num_rows)
            num_rows += 1
    except DamageError as damage:
        raise unreadable(file.uri, num_rows, damage) from damage
    if not rows:
        raise DataError(
            f"task.split_column: column {column!r} of {source} is empty; expected {expected}"
        )
    return rows


def _cells(file: SourceFile, column: str) -> Iterator[str]:
    """The text of the column in each record of the file, in order; empty if a record has none."""
    if file.format == "parquet":
        yield from _parquet_cells(file, column)
    elif file.format == "sdf":
        with open_items(file) as items:
            for item in items:
                yield sd_properties(sd_text(item.text))[1].get(column, "")
    elif file.format in DELIMITERS:
        yield from _table_cells(file, column)
    else:
        raise _no_column(file, column, ())


def _table_cells(file: SourceFile, column: str) -> Iterator[str]:
    delimiter = DELIMITERS[file.format]
    with open_records(file) as records:
        header = next(records, b"").removeprefix(b"\xef\xbb\xbf")
    columns = [cell.strip() for cell in fields(header, delimiter) or []]
    if column not in columns:
        raise _no_column(file, column, columns)
    index = columns.index(column)
    with open_items(file) as items:
        for item in items:
            cells = without_empty_end(fields(item.text, delimiter) or [], len(columns))
            yield cells[index] if len(cells) == len(columns) else ""


def _parquet_cells(file: SourceFile, column: str) -> Iterator[str]:
    with parquet_file(file) as table:
        if column not in table.schema_arrow.names:
            raise _no_column(file, column, table.schema_arrow.names)
        for batch in table.iter_batches(columns=[column]):
            for text in strings(pa.Table.from_batches([batch]), column):
                yield text or ""


def _no_column(file: SourceFile, column: str, columns: Sequence[str]) -> DataError:
    there = ", ".join(columns) or "none"
    return DataError(
        f"task.split_column: {file.uri} has no column {column!r}; its columns: {there}"
    )
