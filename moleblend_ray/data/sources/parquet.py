"""Parquet tables: cutting them into chunks, and their rows as records, with geometry if they have it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moleblend_ray.chemistry.records import GeometryRow, SmilesText
from moleblend_ray.chemistry.rejection import Rejection, RejectionCode
from moleblend_ray.data.files import storage
from moleblend_ray.data.sources.cells import number, read_censored, read_classes, relation_of
from moleblend_ray.data.sources.damage import unreadable as damaged
from moleblend_ray.data.sources.records import (
    EXCERPT_CHARACTERS,
    RawRecord,
    RowChunk,
    SourceFile,
    SourceLayout,
)
from moleblend_ray.data.sources.text import decode
from moleblend_ray.errors import DataError, without_credentials

logger = logging.getLogger(__name__)

_GEOMETRY_COLUMNS: Final = {
    "atomic_numbers": pa.list_(pa.int32()),
    "formal_charges": pa.list_(pa.int32()),
    "positions": pa.list_(pa.float32()),
    "bond_begin": pa.list_(pa.int32()),
    "bond_end": pa.list_(pa.int32()),
    "bond_order": pa.list_(pa.int32()),
}
_PIECE_ROWS: Final = 8192

_TEXT_TYPES: Final = (
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
)


_EXACT: Final = 2**53
"""Below it, every whole number is one of float64."""


def has_geometry(file: SourceFile, schema: pa.Schema) -> bool:
    """Whether the table has the geometry columns; logs if some are missing, DataError if one has another type."""
    present = [name for name in _GEOMETRY_COLUMNS if name in schema.names]
    if "positions" not in present:
        return False
    lacking = sorted(set(_GEOMETRY_COLUMNS) - set(present))
    if lacking:
        logger.warning(
            "%s has positions but not %s: its geometry is not used",
            without_credentials(file.uri),
            ", ".join(lacking),
        )
        return False
    for name in present:
        kind = schema.field(name).type
        is_list = (
            pa.types.is_list(kind)
            or pa.types.is_large_list(kind)
            or pa.types.is_fixed_size_list(kind)
        )
        if not (is_list and is_number_type(kind.value_type)):
            raise DataError(
                f"{file.uri}: column {name!r} is {kind}; expected a flat list of numbers a molecule."
            )
    return True


def is_number_type(kind: pa.DataType) -> bool:
    """Whether values of this type can be labels."""
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    )


def is_label_type(kind: pa.DataType) -> bool:
    """Whether a column of this type can be asked for as a label: numbers, truth values, or texts of them."""
    kind = _plain_type(kind)
    return (
        is_number_type(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_null(kind)
        or _is_text_type(kind)
    )


def _plain_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text_type(kind: pa.DataType) -> bool:
    # Some writers do not say of a column of bytes that it is text.
    return kind in _TEXT_TYPES


class ParquetPart(NamedTuple):
    """The rows of a Parquet file that become one chunk."""

    chunk_index: int
    first_row: int
    num_rows: int
    groups: tuple[int, ...]
    """The row groups to read."""
    skip: int
    """Rows of the first row group that belong to earlier chunks."""


def parquet_parts(file: SourceFile, rows_per_chunk: int) -> list[ParquetPart]:
    """The chunks of a Parquet file: small row groups are combined, large ones divided, up to ``rows_per_chunk``."""
    with parquet_file(file) as table:
        sizes = [table.metadata.row_group(i).num_rows for i in range(table.metadata.num_row_groups)]
    parts: list[ParquetPart] = []
    first_row = 0
    groups: list[int] = []
    rows = 0

    def close() -> None:
        nonlocal first_row, groups, rows
        if rows:
            parts.append(ParquetPart(len(parts), first_row, rows, tuple(groups), 0))
            first_row, groups, rows = first_row + rows, [], 0

    for index, size in enumerate(sizes):
        if rows + size > rows_per_chunk:
            close()
        if size <= rows_per_chunk:
            groups.append(index)
            rows += size
            continue
        for skip in range(0, size, rows_per_chunk):
            length = min(rows_per_chunk, size - skip)
            parts.append(ParquetPart(len(parts), first_row, length, (index,), skip))
            first_row += length
    close()
    return parts


def parquet_chunks(
    layout: SourceLayout, file_index: int, parts: Sequence[ParquetPart]
) -> Iterator[RowChunk]:
    """The chunks of these parts, in order; DataError naming the row where a page cannot be read."""
    wanted = [
        layout.smiles_column,
        layout.id_column,
        layout.relation_column,
        *layout.label_columns,
    ]
    wanted += [*_GEOMETRY_COLUMNS] if layout.has_geometry else []
    columns = [name for name in layout.columns if name in wanted]
    with parquet_file(layout.file) as file:
        at_hand: _DividedGroup | None = None
        for part in parts:
            try:
                if part.num_rows == _num_rows(file, part.groups):
                    table = file.read_row_groups(list(part.groups), columns)
                else:
                    if at_hand is None or at_hand.groups != part.groups:
                        at_hand = _DividedGroup(file, part.groups, columns)
                    table = at_hand.rows(part)
            except (pa.ArrowException, OSError) as error:
                raise damaged(layout.file.uri, part.first_row, error) from error
            yield RowChunk(
                file_index=file_index,
                chunk_index=part.chunk_index,
                first_row=part.first_row,
                num_rows=part.num_rows,
                is_text=False,
                payload=to_ipc(table),
            )


def _num_rows(file: pq.ParquetFile, groups: Sequence[int]) -> int:
    return sum(file.metadata.row_group(group).num_rows for group in groups)


class _DividedGroup:
    """A row group of several chunks, decoded a piece at a time: as a whole, a million rows with geometry take 1.3 GB."""

    def __init__(self, file: pq.ParquetFile, groups: tuple[int, ...], columns: list[str]) -> None:
        self.groups = groups
        self._pieces = file.iter_batches(_PIECE_ROWS, row_groups=list(groups), columns=columns)
        self._rest: list[pa.RecordBatch] = []
        """Of a piece that was taken in part."""
        self._num_taken = 0
        """Rows of the group before what is left."""

    def rows(self, part: ParquetPart) -> pa.Table:
        """The rows of ``part``, which come after those of earlier calls."""
        for _ in self._take(part.skip - self._num_taken):
            pass
        return pa.Table.from_batches(self._take(part.num_rows))

    def _take(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        """The next rows in pieces."""
        self._num_taken += num_rows
        while num_rows:
            piece = self._rest.pop() if self._rest else next(self._pieces, None)
            if piece is None:
                raise OSError("a row group has fewer rows than the footer of the file says")
            if piece.num_rows > num_rows:
                self._rest.append(piece.slice(num_rows))
                piece = piece.slice(0, num_rows)
            num_rows -= piece.num_rows
            yield piece


def to_ipc(table: pa.Table) -> bytes:
    """The table as an Arrow stream; the same rows give the same bytes."""
    sink = pa.BufferOutputStream()
    # Copied into one batch, so that the bytes do not depend on the table from which the rows were cut.
    table = pa.table(
        [pa.concat_arrays([pa.array([], column.type), *column.chunks]) for column in table.columns],
        schema=table.schema.remove_metadata(),
    )
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return cast(bytes, sink.getvalue().to_pybytes())


@contextmanager
def parquet_file(file: SourceFile) -> Iterator[pq.ParquetFile]:
    """The open file; DataError if it is not a Parquet file."""
    with storage.translate_errors("read", file.uri), storage.open_read(file.uri) as stream:
        try:
            table = pq.ParquetFile(stream, pre_buffer=True)
        except pa.ArrowException as error:
            raise DataError(
                f"{file.uri} is not a Parquet file or is damaged: {' '.join(str(error).split())}"
            ) from error
        yield table


def parse_parquet(chunk: RowChunk, layout: SourceLayout) -> Iterator[RawRecord]:
    """The records of a chunk of rows."""
    table = pa.ipc.open_stream(chunk.payload).read_all().combine_chunks()
    smiles = strings(table, layout.smiles_column)
    mol_ids = strings(table, layout.id_column)
    labels, unreadable, bounds = _label_matrix(table, layout)
    geometry = _geometry_rows(table, smiles) if layout.has_geometry else None
    for index in range(chunk.num_rows):
        text = smiles[index]
        yield RawRecord(
            chunk.first_row + index,
            mol_ids[index] or None,
            SmilesText(text or "") if geometry is None else geometry(index),
            labels[index],
            tuple(layout.labels[i] for i in np.flatnonzero(unreadable[index])),
            (text or "")[:EXCERPT_CHARACTERS],
            bounds[index] if layout.censored else None,
        )


def strings(table: pa.Table, name: str | None) -> list[str | None]:
    """(M,) the texts of a column, None where it has none (null or, of numbers, NaN), also if there is no such column."""
    if name is None or name not in table.column_names:
        return [None] * table.num_rows
    # Some libraries write NaN for missing numbers; as a text it would be one id, or one group, of all of them.
    return [
        None if value is None or value != value else _text(value).strip()
        for value in _plain(table[name]).to_pylist()
    ]


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column without a dictionary, and texts as bytes: what is not UTF-8 would be an error in Arrow."""
    column = column.cast(_plain_type(column.type))
    return column.cast(pa.large_binary()) if _is_text_type(column.type) else column


def _text(value: Any) -> str:
    # A column of whole numbers in which some are missing is one of floats in pandas.
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return str(int(value))
    return decode(value) if isinstance(value, bytes) else str(value)


def _label_matrix(
    table: pa.Table, layout: SourceLayout
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """Labels (M, L), NaN where missing, a mask (M, L) of values that are not finite numbers, and the least and greatest values
    (M, 2, L) of labels of which only a bound is known."""
    shape = table.num_rows, len(layout.labels)
    labels, unreadable = np.full(shape, np.nan), np.zeros(shape, dtype=np.bool_)
    bounds = np.full((shape[0], 2, shape[1]), np.nan)
    if layout.class_labels:
        for row, words in enumerate(_class_cells(table, layout)):
            labels[row], wrong = read_classes(layout.class_labels, words)
            unreadable[row] = [name in wrong for name in layout.labels]
        return labels, unreadable, bounds
    relations = _relations(table, layout)
    for index, name in enumerate(layout.labels):
        if name not in table.column_names:
            continue
        column = _plain(table[name])
        if layout.censored:
            cells = ["" if value is None else _text(value) for value in column.to_pylist()]
            labels[:, index], found, unreadable[:, index] = read_censored(cells, relations)
            bounds[:, :, index] = found.T
            continue
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.uint8())
        if pa.types.is_large_binary(column.type):
            numbers = [number(decode(text or b"")) for text in column.to_pylist()]
            unreadable[:, index] = [value is None for value in numbers]
            labels[:, index] = [math.nan if value is None else value for value in numbers]
            continue
        values = column.cast(pa.float64(), safe=False).to_numpy()
        unreadable[:, index] = np.isinf(values)
        labels[:, index] = np.where(np.isfinite(values), values, np.nan)
    return labels, unreadable, bounds


def _class_cells(table: pa.Table, layout: SourceLayout) -> Iterator[dict[str, str]]:
    """The cells of each row that hold classes, by column."""
    columns = layout.label_columns
    texts = [strings(table, name) for name in columns]
    for row in range(table.num_rows):
        yield {name: column[row] or "" for name, column in zip(columns, texts, strict=True)}


def _relations(table: pa.Table, layout: SourceLayout) -> list[str | None]:
    """What each row says of all of its labels."""
    return [relation_of(text or "") for text in strings(table, layout.relation_column)]


def _geometry_rows(
    table: pa.Table, smiles: Sequence[str | None]
) -> Callable[[int], GeometryRow | Rejection]:
    """A function that returns the geometry of a row by its index."""
    lists = {
        name: pa.concat_arrays([pa.array([], kind), *table[name].cast(kind, safe=False).chunks])
        for name, kind in _GEOMETRY_COLUMNS.items()
    }
    offsets = {name: column.offsets.to_numpy() for name, column in lists.items()}
    values = {name: column.values.to_numpy(zero_copy_only=False) for name, column in lists.items()}
    holes = {
        name for name, column in lists.items() if column.null_count or column.values.null_count
    }

    def row(index: int) -> GeometryRow | Rejection:
        for name in holes:
            entry = lists[name][index]
            if not entry.is_valid and name != "positions":
                return Rejection(code=RejectionCode.INVALID_RECORD, detail=f"{name} is null")
            if entry.is_valid and entry.values.null_count:
                return Rejection(code=RejectionCode.INVALID_RECORD, detail=f"a null in {name}")
        parts = {
            name: values[name][offsets[name][index] : offsets[name][index + 1]] for name in lists
        }
        if "positions" in holes and not lists["positions"][index].is_valid:
            parts["positions"] = None
        return GeometryRow(**parts, smiles=smiles[index])

    return row
