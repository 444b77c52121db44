"""Files -> chunks of raw records."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from typing import Final, NamedTuple

import pyarrow as pa

from moleblend_ray.data.files import storage
from moleblend_ray.data.sources.archives import Member, contents
from moleblend_ray.data.sources.damage import DamageError, unreadable
from moleblend_ray.data.sources.parquet import ParquetPart, parquet_chunks, parquet_parts, to_ipc
from moleblend_ray.data.sources.published import read_exclusions
from moleblend_ray.data.sources.records import (
    EXCERPT_CHARACTERS,
    Format,
    RowChunk,
    SourceFile,
    SourceLayout,
)
from moleblend_ray.data.sources.rows import DELIMITERS, csv_records, without_delimiter_line
from moleblend_ray.data.sources.text import (
    MAX_RECORD_BYTES,
    Beginning,
    decode,
    sd_records,
    size_of,
    smiles_lines,
    whole_text,
    with_line_feeds,
)

MAX_CHUNK_BYTES: Final = 64 << 20
SAMPLE_RECORDS: Final = 1000
"""Records from which is decided which columns or properties are numeric, and whether a geometry fits its table."""
_SAMPLE_BYTES: Final = 64 << 20
"""A sample ends with the record that brings it to this size."""

RECORD_SCHEMA: Final = pa.schema(
    [
        pa.field("text", pa.binary(), nullable=False),
        pa.field("text_size", pa.int64(), nullable=False),
        pa.field("geometry", pa.binary()),
        pa.field("geometry_size", pa.int64()),
        pa.field("excluded", pa.bool_(), nullable=False),
    ]
)
"""Schema of a chunk whose records have several parts: the text (a row, or an XYZ file), the SD record that belongs to
it, and whether a published list excludes it. Chunks of other texts have it too if a record is too large. The sizes are
those in the file, and larger than what is here of such a record."""

_QM9_NUMBER: Final = re.compile(rb"\A(?:gdb_(\d+)\b|[^\n]*\n\s*gdb\w*\s+(\d+)\b)")
"""Number of a QM9 molecule: in the first cell of a row, or in the second line of an XYZ file."""


class Item(NamedTuple):
    """A raw record and the parts that belong to it."""

    text: bytes
    geometry: bytes | None = None
    excluded: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts in their files."""
        size = size_of(self.text)
        return size if self.geometry is None else size + size_of(self.geometry)


def read_chunks(
    layout: SourceLayout,
    file_index: int,
    rows_per_chunk: int,
    parts: Sequence[ParquetPart] | None = None,
) -> Iterator[RowChunk]:
    """The chunks of a file in order; for a Parquet file, only those of ``parts`` if given.

    A text chunk ends after ``rows_per_chunk`` records, or earlier with the record that brings it to 64 MiB. So where
    chunks end depends on the file's content and ``rows_per_chunk`` only. If the file is damaged, the complete chunks
    before the damage are yielded, then a DataError is raised.
    """
    if layout.file.size == 0:
        return
    if layout.file.format == "parquet":
        if parts is None:
            parts = parquet_parts(layout.file, rows_per_chunk)
        yield from parquet_chunks(layout, file_index, parts)
    else:
        yield from _text_chunks(layout, file_index, rows_per_chunk)


def _text_chunks(layout: SourceLayout, file_index: int, rows_per_chunk: int) -> Iterator[RowChunk]:
    chunk_index, first_row = 0, 0
    with open_items(layout.file) as items:
        while True:
            pending, damage = take(items, rows_per_chunk, MAX_CHUNK_BYTES)
            if damage is not None:
                raise unreadable(layout.file.uri, first_row + len(pending), damage) from damage
            if not pending:
                return
            is_text = layout.is_plain_text and not any(
                isinstance(item.text, Beginning) for item in pending
            )
            yield RowChunk(
                file_index=file_index,
                chunk_index=chunk_index,
                first_row=first_row,
                num_rows=len(pending),
                is_text=is_text,
                payload=b"".join(item.text for item in pending)
                if is_text
                else _payload_of_items(pending),
            )
            chunk_index, first_row = chunk_index + 1, first_row + len(pending)


def take(
    items: Iterator[Item], max_items: int, max_bytes: int
) -> tuple[list[Item], DamageError | None]:
    """The next ``max_items`` items, or fewer up to the one with which they reach ``max_bytes``.

    Where the file is damaged within them, the items before the damage, and the damage.
    """
    taken: list[Item] = []
    num_bytes = 0
    try:
        for item in islice(items, max_items):
            taken.append(item)
            num_bytes += item.num_bytes
            if num_bytes >= max_bytes:
                break
    except DamageError as damage:
        return taken, damage
    return taken, None


def first_records(file: SourceFile, records: Iterator[bytes], count: int) -> list[bytes]:
    """Up to ``count`` records from the beginning of a file, as :func:`first_items` has items."""
    return [item.text for item in first_items(file, map(Item, records), count)]


def first_items(file: SourceFile, items: Iterator[Item], count: int) -> list[Item]:
    """Up to ``count`` items from the beginning of a file; DataError if not even one can be read.

    Later damage is reported, with the number of the record, when the file is read.
    """
    found, damage = take(items, count, _SAMPLE_BYTES)
    if damage is not None and not found:
        raise unreadable(file.uri, 0, damage) from damage
    return found


def _payload_of_items(items: Sequence[Item]) -> bytes:
    """The items as an Arrow stream, which :func:`items_of_payload` reads."""
    rows = [
        {
            "text": item.text,
            "text_size": size_of(item.text),
            "geometry": item.geometry,
            "geometry_size": None if item.geometry is None else size_of(item.geometry),
            "excluded": item.excluded,
        }
        for item in items
    ]
    return to_ipc(pa.Table.from_pylist(rows, schema=RECORD_SCHEMA))


def items_of_payload(payload: bytes) -> Iterator[Item]:
    """The items of a chunk whose payload has ``RECORD_SCHEMA``."""
    for row in pa.ipc.open_stream(payload).read_all().to_pylist():
        text = _restored(row["text"], row["text_size"])
        geometry = row["geometry"]
        if geometry is not None:
            geometry = _restored(geometry, row["geometry_size"])
        yield Item(text, geometry, row["excluded"])


def _restored(record: bytes, num_bytes: int) -> bytes:
    return record if len(record) == num_bytes else Beginning(record, num_bytes)


@contextmanager
def open_items(file: SourceFile) -> Iterator[Iterator[Item]]:
    """The records of a text file without its header; iterating raises DamageError where the file is damaged."""
    with ExitStack() as stack:
        records = stack.enter_context(open_records(file))
        if file.format in DELIMITERS:
            next(records, None)  # the header
        items: Iterator[Item] = map(Item, records)
        if file.geometry is not None:
            items = _joined(items, stack.enter_context(open_records(file.geometry)), file.geometry)
        if file.exclusions is not None:
            items = _marked(items, read_exclusions(file.exclusions))
        yield items


@contextmanager
def open_records(file: SourceFile) -> Iterator[Iterator[bytes]]:
    """The raw records of a text file, including the header of a table, each with its line end; of one that is too
    large, its ``Beginning``.

    Iterating raises DamageError where the file is damaged.
    """
    with storage.translate_errors("read", file.uri), storage.open_read(file.uri) as stream:
        yield _records(file, contents(file, stream))


def _records(file: SourceFile, members: Iterable[Member]) -> Iterator[bytes]:
    header: bytes | None = None
    for name, blocks in members:
        records = _split(blocks, file.format)
        if file.format in DELIMITERS:
            first = next(records, None)
            if header is None:
                header = first
                records = chain([first], records) if first is not None else records
            elif first is not None and (
                isinstance(first, Beginning) or _bare(first) != _bare(header)
            ):
                raise DamageError(
                    f"the header of {name} is not that of the files before it: {_shown(first)} and not {_shown(header)}"
                )
        end = b"$$$$\n" if file.format == "sdf" else b"\n"
        for record in records:
            is_whole = record.endswith(end) or isinstance(record, Beginning)
            yield record if is_whole else _with_end(record, file.format)


def _split(blocks: Iterator[bytes], form: Format) -> Iterator[bytes]:
    """The raw records of one text, each with its line end: of a table including the header, of ``smi`` without one.

    A line ``sep=;`` before the header of a table is left out. In the place of a record that is too large there is its
    ``Beginning``.
    """
    if form == "xyz":
        return whole_text(blocks, MAX_RECORD_BYTES)
    blocks = with_line_feeds(blocks)
    if form == "sdf":
        return sd_records(blocks, MAX_RECORD_BYTES)
    if form == "smi":
        return smiles_lines(blocks, MAX_RECORD_BYTES)
    return without_delimiter_line(csv_records(blocks, DELIMITERS[form], MAX_RECORD_BYTES))


def _bare(header: bytes) -> bytes:
    """Without line end and byte order mark: files of one archive may come from several programs."""
    return header.removeprefix(codecs.BOM_UTF8).rstrip()


def _shown(header: bytes) -> str:
    return repr(decode(_bare(header))[:EXCERPT_CHARACTERS])


def _with_end(record: bytes, file_format: str) -> bytes:
    """A member's last record, which may lack its end: the next member's first one must not run into it."""
    whole = record if record.endswith(b"\n") else record + b"\n"
    if file_format != "sdf" or whole.rstrip().rpartition(b"\n")[2].startswith(b"$$$$"):
        return whole
    return whole + b"$$$$\n"


def _joined(items: Iterator[Item], geometries: Iterator[bytes], file: SourceFile) -> Iterator[Item]:
    """Each row with the geometry of the same number; rows after the last geometry have none."""
    try:
        for item in items:
            yield item._replace(geometry=next(geometries, None))
        if next(geometries, None) is not None:
            raise DamageError("it has more records than its table has rows")
    except DamageError as damage:
        raise DamageError(f"in it or in its geometry {file.uri}: {damage}") from damage


def _marked(items: Iterator[Item], excluded: frozenset[int]) -> Iterator[Item]:
    for item in items:
        found = _QM9_NUMBER.match(item.text)
        yield item._replace(excluded=found is not None and int(found[1] or found[2]) in excluded)
