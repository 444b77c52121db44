"""Collections of molecules as users have them: SD files, CSV/TSV and Parquet tables, one or many.

Two halves. *Reading* walks a file once and cuts it into chunks of raw records (:func:`read_chunks`), without
looking at any molecule; it is cheap and sequential, as a compressed text file cannot be split. *Parsing* turns a
chunk into records with identifiers and labels (:func:`parse_chunk`); it needs nothing but the chunk, so any
process can do it. A damaged file raises a DataError that names the record where reading stopped.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import logging
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import BinaryIO, Final, Literal, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moleblend_ray.chemistry.molecule import (
    GeometryRow,
    MolBlock,
    Rejection,
    RejectionCode,
    SmilesText,
    SourceRecord,
)
from moleblend_ray.data import storage
from moleblend_ray.data.shards import MANIFEST_NAME
from moleblend_ray.errors import ConfigError, DataError, without_credentials

logger = logging.getLogger(__name__)

Format = Literal["sdf", "csv", "tsv", "parquet"]

_EXTENSIONS: Final[dict[str, Format]] = {
    ".sdf": "sdf",
    ".sd": "sdf",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_EXPECTED: Final = ".sdf, .csv, .tsv (each also with .gz) or .parquet"
_DELIMITERS: Final[dict[str, str]] = {"csv": ",", "tsv": "\t"}
_GZIP_MAGIC: Final = b"\x1f\x8b"

_THREADS: Final = 16
_PROBE_BYTES: Final = 1 << 16
_BLOCK_BYTES: Final = 1 << 20
_SAMPLE_RECORDS: Final = 1000
"""Records looked at to tell numeric columns or properties from others."""
_MAX_RECORD_BYTES: Final = 16 << 20
_MAX_CHUNK_BYTES: Final = 64 << 20
_EXCERPT_CHARACTERS: Final = 200

_GEOMETRY_COLUMNS: Final = {
    "atomic_numbers": pa.list_(pa.int32()),
    "formal_charges": pa.list_(pa.int32()),
    "positions": pa.list_(pa.float32()),
    "bond_begin": pa.list_(pa.int32()),
    "bond_end": pa.list_(pa.int32()),
    "bond_order": pa.list_(pa.int32()),
}
_COUNT_COLUMNS: Final = frozenset({"n_atoms", "n_heavy"})
_MISSING: Final = frozenset({"", "na", "n/a", "null", "none", "?"})
_TRUTH: Final = {"true": 1.0, "false": 0.0}

_RECORD_END: Final = re.compile(rb"^\$\$\$\$[^\n]*\n", re.MULTILINE)
_LAST_RECORD_END: Final = re.compile(rb"^\$\$\$\$[^\n]*\n?\Z", re.MULTILINE)
_MOLBLOCK_END: Final = re.compile(r"^M  END.*\n?", re.MULTILINE)
_PROPERTY: Final = re.compile(
    r"^>.*?<(?P<name>[^>]*)>.*\n(?P<value>(?:[^\n]+(?:\n|\Z))*)", re.MULTILINE
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnConfig:
    """Which columns (or SD properties) mean what."""

    smiles_column: str = "smiles"
    """Column with the SMILES in tables."""
    id_column: str | None = None
    """Column or SD property with the molecule's id. None: ``mol_id`` of a Parquet table that has it, the title
    of an SD record, else file name and row number."""
    label_columns: tuple[str, ...] | None = None
    """Columns or SD properties to keep as labels. None: every other numeric one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file of a source."""

    uri: str
    format: Format
    compressed: bool
    """Gzip."""
    size: int
    """Bytes."""
    probe: str
    """SHA-256 of the first and last 64 KiB and the size: tells whether the file has changed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceLayout:
    """How to read and parse one file; small, and sent to every process that does."""

    file: SourceFile
    columns: tuple[str, ...]
    """Columns of a table in order, or the SD properties seen in the sample."""
    smiles_column: str | None
    """None where the file needs none: SD files and tables with geometry only."""
    id_column: str | None
    labels: tuple[str, ...]
    """Labels of the whole source, in the order of the shards' columns; this file may lack some."""
    own_labels: tuple[str, ...]
    """Those that this file has."""
    has_geometry: bool
    """A Parquet table with atoms, bonds and positions."""


class LabelColumn(NamedTuple):
    """A label found in a source."""

    name: str
    unit: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSet:
    """All files of a source with what is known before reading them."""

    layouts: tuple[SourceLayout, ...]
    labels: tuple[LabelColumn, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowChunk:
    """Consecutive raw records of one file."""

    file_index: int
    """Index of the file in the source."""
    chunk_index: int
    """Index of the chunk in its file."""
    first_row: int
    """Index of the first record in the file."""
    num_rows: int
    payload: bytes
    """SD or CSV records as they stand in the file (without the header), or an Arrow stream of Parquet rows."""

    def digest(self) -> str:
        """Identity of the raw content."""
        return hashlib.blake2b(self.payload, digest_size=16).hexdigest()


class RawRecord(NamedTuple):
    """One source record, not yet a molecule."""

    row: int
    """Index in the file."""
    mol_id: str | None
    """None if the record gives none."""
    content: SourceRecord | Rejection
    """What the molecule is to be made of, or why there is nothing."""
    labels: NDArray[np.float64]
    """(L,) in the order of ``SourceLayout.labels``; NaN where missing."""
    unreadable: tuple[str, ...]
    """Labels whose cell holds something that is not a finite number."""
    excerpt: str
    """The record's SMILES, or its beginning."""


# --------------------------------------------------------------------------------------------------------------
# Finding files and their columns


def find_sources(*uris: str) -> list[SourceFile]:
    """The molecule files of each file, directory (recursively) or glob, in the order given, each's sorted by URI."""
    files = [file for uri in uris for file in _files_of(uri)]
    seen = Counter(file.uri for file in files)
    repeated = [uri for uri, count in seen.items() if count > 1]
    if repeated:
        raise ConfigError(
            f"source: {repeated[0]} is in two of {', '.join(uris)}; expected each file once. Leave one of them out."
        )
    return files


def _files_of(uri: str) -> list[SourceFile]:
    listed = storage.list_files(uri)
    for info in listed:
        if storage.name_of(info.uri) == MANIFEST_NAME and _is_data_set_manifest(info.uri):
            raise ConfigError(
                f"source: {uri} holds a prepared data set already, that of {info.uri}; expected raw "
                "molecules (SDF, CSV/TSV, Parquet). Give the source it was made of, or a glob that "
                "leaves it out."
            )
    known = [(info, _format_of(info.uri)) for info in listed]
    supported = [(info, form) for info, form in known if form is not None]
    with ThreadPoolExecutor(_THREADS) as pool:
        files = list(pool.map(lambda pair: _source_file(*pair), supported))
    if not files:
        found = ", ".join(storage.name_of(info.uri) for info in listed[:5]) or "no files"
        raise DataError(f"No molecules at {uri}: found {found}; expected {_EXPECTED}.")
    if len(files) < len(listed):
        logger.warning(
            "%s: %d files of other kinds are left out",
            without_credentials(uri),
            len(listed) - len(files),
        )
    return files


def inspect_sources(files: Sequence[SourceFile], config: ColumnConfig) -> SourceSet:
    """Columns and labels of all files, from headers, schemas and a first sample of each."""
    with ThreadPoolExecutor(_THREADS) as pool:
        views = list(pool.map(lambda file: _look_at(file, config), files))
    if all(view.is_empty for view in views):
        raise DataError(f"{_names(files)}: empty, no records to read.")
    for view in views:
        if view.is_empty:
            logger.warning("%s is empty: no records to read", without_credentials(view.file.uri))
    labels = _merge_labels(views)
    if config.label_columns is not None:
        labels = _chosen_labels(config.label_columns, views, labels)
    names = tuple(label.name for label in labels)
    layouts = tuple(
        SourceLayout(
            file=view.file,
            columns=view.columns,
            smiles_column=view.smiles_column,
            id_column=view.id_column,
            labels=names,
            # A property that the sample of an SD file lacks may still come later in it.
            own_labels=tuple(n for n in names if n in view.columns or view.file.format == "sdf"),
            has_geometry=view.has_geometry,
        )
        for view in views
    )
    return SourceSet(layouts=layouts, labels=labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class _View:
    """What one file shows before it is read."""

    file: SourceFile
    columns: tuple[str, ...] = ()
    smiles_column: str | None = None
    id_column: str | None = None
    numeric: tuple[LabelColumn, ...] = ()
    """Columns that are labels by default."""
    units: dict[str, str]
    has_geometry: bool = False
    is_empty: bool = False
    is_whole: bool = True
    """Whether ``columns`` are all there are (not so for an SD file longer than the sample)."""


def _is_data_set_manifest(uri: str) -> bool:
    """Whether a file of that name is ours: many programs call theirs so."""
    try:
        value = storage.read_json(uri)
    except DataError:
        return False
    return isinstance(value, dict) and {"format_version", "fingerprint", "shards"} <= set(value)


def _format_of(uri: str) -> Format | None:
    name = storage.name_of(uri).lower()
    form = next(
        (form for end, form in _EXTENSIONS.items() if name.removesuffix(".gz").endswith(end)), None
    )
    return None if form == "parquet" and name.endswith(".gz") else form


def _source_file(info: storage.FileInfo, form: Format) -> SourceFile:
    head = storage.read_range(info.uri, 0, min(info.size, _PROBE_BYTES)) if info.size else b""
    start = max(0, info.size - _PROBE_BYTES)
    tail = storage.read_range(info.uri, start, info.size - start) if start else b""
    probe = hashlib.sha256(head + tail + str(info.size).encode()).hexdigest()
    compressed = head.startswith(_GZIP_MAGIC)
    if storage.name_of(info.uri).lower().endswith(".gz") and info.size and not compressed:
        raise DataError(
            f"{info.uri} is not a gzip file: it begins with {head[:8]!r}. Rename or repack it."
        )
    return SourceFile(uri=info.uri, format=form, compressed=compressed, size=info.size, probe=probe)


def _look_at(file: SourceFile, config: ColumnConfig) -> _View:
    if file.size == 0:
        return _View(file=file, units={}, is_empty=True)
    if file.format == "parquet":
        return _look_at_parquet(file, config)
    if file.format == "sdf":
        return _look_at_sdf(file, config)
    return _look_at_table(file, config)


def _look_at_table(file: SourceFile, config: ColumnConfig) -> _View:
    with _text_records(file) as records:
        header = _first_records(file, records, 1)
        if not header:
            return _View(file=file, units={}, is_empty=True)
        columns = _header(file, header[0])
        sample = _first_records(file, records, _SAMPLE_RECORDS)
    smiles_column = _require(file, "smiles_column", config.smiles_column, columns)
    id_column = config.id_column and _require(file, "id_column", config.id_column, columns)
    parsed = (_fields(record, _DELIMITERS[file.format]) for record in sample)
    rows = [cells for cells in parsed if cells and len(cells) == len(columns)]
    others = [index for index, name in enumerate(columns) if name not in (smiles_column, id_column)]
    numeric = [columns[i] for i in others if rows and _is_numeric(row[i] for row in rows)]
    return _View(
        file=file,
        columns=columns,
        smiles_column=smiles_column,
        id_column=id_column,
        numeric=tuple(LabelColumn(name, None) for name in numeric),
        units={},
        is_empty=not sample,
    )


def _look_at_sdf(file: SourceFile, config: ColumnConfig) -> _View:
    with _text_records(file) as records:
        sample = _first_records(file, records, _SAMPLE_RECORDS)
    properties = [_sd_properties(_sd_text(record))[1] for record in sample]
    names = tuple(dict.fromkeys(name for record in properties for name in record))
    is_whole = len(sample) < _SAMPLE_RECORDS
    if config.id_column is not None and is_whole and sample:
        _require(file, "id_column", config.id_column, names)
    numeric = [
        name
        for name in names
        if name != config.id_column and _is_numeric(record.get(name, "") for record in properties)
    ]
    return _View(
        file=file,
        columns=names,
        id_column=config.id_column,
        numeric=tuple(LabelColumn(name, None) for name in numeric),
        units={},
        is_empty=not sample,
        is_whole=is_whole,
    )


def _look_at_parquet(file: SourceFile, config: ColumnConfig) -> _View:
    with _parquet_file(file) as table:
        schema, num_rows = table.schema_arrow, table.metadata.num_rows
    columns = tuple(schema.names)
    has_geometry = _has_geometry(file, schema)
    smiles_column: str | None = None
    # Geometry alone makes a molecule; a SMILES column that was asked for by name must be there all the same.
    if not has_geometry or config.smiles_column in columns or config.smiles_column != "smiles":
        smiles_column = _require(file, "smiles_column", config.smiles_column, columns)
    id_column = config.id_column or ("mol_id" if "mol_id" in columns else None)
    if id_column is not None:
        _require(file, "id_column", id_column, columns)
    units = {
        field.name: field.metadata[b"unit"].decode()
        for field in schema
        if field.metadata and b"unit" in field.metadata
    }
    used = {smiles_column, id_column, *_COUNT_COLUMNS}
    numeric = [
        field.name for field in schema if field.name not in used and _is_number_type(field.type)
    ]
    return _View(
        file=file,
        columns=columns,
        smiles_column=smiles_column,
        id_column=id_column,
        numeric=tuple(LabelColumn(name, units.get(name)) for name in numeric),
        units=units,
        has_geometry=has_geometry,
        is_empty=num_rows == 0,
    )


def _has_geometry(file: SourceFile, schema: pa.Schema) -> bool:
    """Whether the table has the geometry columns; says so if it has only some, or of another type."""
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
        if not (is_list and _is_number_type(kind.value_type)):
            raise DataError(
                f"{file.uri}: column {name!r} is {kind}; expected a flat list of numbers a molecule."
            )
    return True


def _is_number_type(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    )


def _merge_labels(views: Sequence[_View]) -> tuple[LabelColumn, ...]:
    """Numeric columns of all files in order of appearance; one that two files give in two units is refused."""
    merged: dict[str, tuple[LabelColumn, SourceFile]] = {}
    for view in views:
        for label in view.numeric:
            known, file = merged.setdefault(label.name, (label, view.file))
            if label.unit and known.unit and label.unit != known.unit:
                raise ConfigError(
                    f"label_columns: {label.name!r} is in {known.unit} in {file.uri} and in {label.unit} "
                    f"in {view.file.uri}. Prepare them apart, or give label_columns without it."
                )
            if label.unit and not known.unit:
                merged[label.name] = (label, view.file)
    return tuple(label for label, _ in merged.values())


def _chosen_labels(
    names: Sequence[str], views: Sequence[_View], numeric: Sequence[LabelColumn]
) -> tuple[LabelColumn, ...]:
    """The labels asked for; a name that no file can have is refused."""
    units = {label.name: label.unit for label in numeric}
    available = tuple(dict.fromkeys(column for view in views for column in view.columns))
    for name in names:
        if name in available:
            continue
        if all(view.is_whole for view in views):
            raise _no_column(
                _names([view.file for view in views]), "label_columns", name, available
            )
        logger.warning(
            "label_columns: no record has %r among the first %d of each file", name, _SAMPLE_RECORDS
        )
    for view in views:
        for name, unit in view.units.items():
            units[name] = units.get(name) or unit
    return tuple(LabelColumn(name, units.get(name)) for name in names)


def _require(file: SourceFile, setting: str, name: str, columns: Sequence[str]) -> str:
    if name not in columns:
        raise _no_column(file.uri, setting, name, columns)
    return name


def _no_column(where: str, setting: str, name: str, columns: Sequence[str]) -> ConfigError:
    folded = {column.lower(): column for column in columns}
    nearest = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.4)
    hint = f" Did you mean {folded[nearest[0]]!r}?" if nearest else ""
    shown = ", ".join(repr(column) for column in columns[:20]) or "none"
    more = f" and {len(columns) - 20} more" if len(columns) > 20 else ""
    return ConfigError(f"{setting}: {where} has no {name!r}; it has {shown}{more}.{hint}")


def _names(files: Sequence[SourceFile]) -> str:
    shown = ", ".join(file.uri for file in files[:3])
    return shown + (f" and {len(files) - 3} more" if len(files) > 3 else "")


# --------------------------------------------------------------------------------------------------------------
# Reading: file -> chunks of raw records


class ParquetPart(NamedTuple):
    """Rows of a Parquet file that make one chunk."""

    chunk_index: int
    first_row: int
    num_rows: int
    groups: tuple[int, ...]
    """Row groups to read."""
    skip: int
    """Rows of the first of them that belong to earlier chunks."""


def parquet_parts(file: SourceFile, rows_per_chunk: int) -> list[ParquetPart]:
    """How a Parquet file is cut: whole row groups are put together, larger ones divided, up to ``rows_per_chunk``."""
    with _parquet_file(file) as table:
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


def read_chunks(
    layout: SourceLayout,
    file_index: int,
    rows_per_chunk: int,
    parts: Sequence[ParquetPart] | None = None,
) -> Iterator[RowChunk]:
    """The chunks of a file in order; of a Parquet file, those of ``parts`` only, if given.

    A text chunk ends after ``rows_per_chunk`` records, or before with the record that makes it 64 MiB: where
    chunks end depends on the file's content and ``rows_per_chunk`` alone. If the file turns out to be damaged,
    the complete chunks before come first, then a DataError.
    """
    if layout.file.size == 0:
        return
    if layout.file.format == "parquet":
        if parts is None:
            parts = parquet_parts(layout.file, rows_per_chunk)
        yield from _parquet_chunks(layout, file_index, parts)
    else:
        yield from _text_chunks(layout, file_index, rows_per_chunk)


def _text_chunks(layout: SourceLayout, file_index: int, rows_per_chunk: int) -> Iterator[RowChunk]:
    chunk_index, first_row = 0, 0
    with _text_records(layout.file) as records:
        if layout.file.format != "sdf":
            next(records, None)  # the header
        while True:
            pending: list[bytes] = []
            num_bytes = 0
            try:
                for record in islice(records, rows_per_chunk):
                    pending.append(record)
                    num_bytes += len(record)
                    if num_bytes >= _MAX_CHUNK_BYTES:
                        break
            except _DamageError as damage:
                raise _unreadable(layout.file, first_row + len(pending), damage) from damage
            if not pending:
                return
            yield RowChunk(
                file_index=file_index,
                chunk_index=chunk_index,
                first_row=first_row,
                num_rows=len(pending),
                payload=b"".join(pending),
            )
            chunk_index, first_row = chunk_index + 1, first_row + len(pending)


def _parquet_chunks(
    layout: SourceLayout, file_index: int, parts: Sequence[ParquetPart]
) -> Iterator[RowChunk]:
    wanted = [layout.smiles_column, layout.id_column, *layout.own_labels]
    wanted += [*_GEOMETRY_COLUMNS] if layout.has_geometry else []
    columns = [name for name in layout.columns if name in wanted]
    at_hand: tuple[tuple[int, ...], pa.Table] | None = None
    with _parquet_file(layout.file) as file:
        for part in parts:
            if at_hand is None or at_hand[0] != part.groups:
                try:
                    at_hand = (part.groups, file.read_row_groups(list(part.groups), columns))
                except (pa.ArrowException, OSError) as error:
                    raise _unreadable(layout.file, part.first_row, error) from error
            table = at_hand[1].slice(part.skip, part.num_rows)
            yield RowChunk(
                file_index=file_index,
                chunk_index=part.chunk_index,
                first_row=part.first_row,
                num_rows=part.num_rows,
                payload=_to_ipc(table),
            )


def _to_ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    # One batch of its own buffers: the bytes depend on the rows alone, not on how they were cut out.
    table = pa.table(
        [pa.concat_arrays([pa.array([], column.type), *column.chunks]) for column in table.columns],
        schema=table.schema.remove_metadata(),
    )
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return cast(bytes, sink.getvalue().to_pybytes())


class _DamageError(Exception):
    """A text file cannot be read on; the caller knows at which record."""


def _unreadable(file: SourceFile, record: int, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(
        f"{file.uri} is damaged after record {record} (counted from 0, the header aside): {reason}. "
        "Replace the file and run the same command again; chunks converted so far are kept."
    )


@contextmanager
def _parquet_file(file: SourceFile) -> Iterator[pq.ParquetFile]:
    with storage.translate_errors("read", file.uri), storage.open_read(file.uri) as stream:
        try:
            table = pq.ParquetFile(stream, pre_buffer=True)
        except pa.ArrowException as error:
            raise DataError(
                f"{file.uri} is not a Parquet file or is damaged: {' '.join(str(error).split())}"
            ) from error
        yield table


@contextmanager
def _text_records(file: SourceFile) -> Iterator[Iterator[bytes]]:
    """The raw records of a text file (for a table: header first), each with its line end; _DamageError if damaged."""
    with storage.translate_errors("read", file.uri), storage.open_read(file.uri) as stream:
        blocks = _with_line_feeds(_inflated(stream) if file.compressed else _blocks(stream))
        if file.format == "sdf":
            yield _sd_records(blocks)
        else:
            yield _csv_records(blocks, _DELIMITERS[file.format])


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    return iter(partial(stream.read, _BLOCK_BYTES), b"")


def _inflated(stream: BinaryIO) -> Iterator[bytes]:
    """The content of a gzip stream of one or more members, up to the very place where it is damaged.

    ``gzip.GzipFile`` would throw away what it has of a block when the block cannot be completed.
    """
    member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    is_open = False
    for raw in _blocks(stream):
        rest = raw
        while rest:
            is_open = True
            try:
                yield member.decompress(rest, _BLOCK_BYTES)
            except zlib.error as error:
                raise _DamageError(f"the gzip stream is corrupt ({error})") from error
            rest = member.unconsumed_tail
            if member.eof:
                rest = member.unused_data.lstrip(b"\0")  # zeros may pad an archive
                member, is_open = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16), False
    if is_open:
        raise _DamageError("the gzip stream is truncated")


def _with_line_feeds(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks; of a file whose lines end in a carriage return alone, with line feeds in their place."""
    for first in blocks:
        # In other files a lone carriage return is content, or a blank line too many.
        if b"\r" in first[:-1] and b"\n" not in first:
            return (block.replace(b"\r", b"\n") for block in chain([first], blocks))
        return chain([first], blocks)
    return iter(())


def _sd_records(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        rest += block
        start = 0
        for match in _RECORD_END.finditer(rest):
            yield rest[start : match.end()]
            start = match.end()
        rest = rest[start:]
        if len(rest) > _MAX_RECORD_BYTES:
            raise _DamageError(
                f"no $$$$ line within {_MAX_RECORD_BYTES >> 20} MiB; is it an SD file?"
            )
    if rest.strip():
        # The last record of a file may lack its $$$$; if it was cut off, its molblock will say so.
        yield rest


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines with their ends."""
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line + b"\n"
        if len(rest) > _MAX_RECORD_BYTES:
            raise _DamageError(f"a line of more than {_MAX_RECORD_BYTES >> 20} MiB; is it text?")
    if rest:
        yield rest


def _csv_records(blocks: Iterable[bytes], delimiter: str) -> Iterator[bytes]:
    """The rows of a table; a quoted field may hold line ends. Blank lines between rows are none."""
    lines = _lines(blocks)
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
            yield _decode(line)
        raise _DamageError("a quoted field is not closed")

    try:
        next(csv.reader(feed(), delimiter=delimiter))
    except csv.Error as error:
        raise _DamageError(f"a row cannot be told from the next ({error})") from error
    return b"".join(taken)


def _decode(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _fields(record: bytes, delimiter: str) -> list[str] | None:
    """The cells of a row, None if it is none."""
    try:
        return next(csv.reader(io.StringIO(_decode(record), newline=""), delimiter=delimiter))
    except csv.Error:
        return None


def _header(file: SourceFile, record: bytes) -> tuple[str, ...]:
    cells = _fields(record.removeprefix(b"\xef\xbb\xbf"), _DELIMITERS[file.format]) or []
    columns = tuple(cell.strip() for cell in cells)
    repeated = sorted({name for name in columns if columns.count(name) > 1 and name})
    if repeated:
        raise DataError(
            f"{file.uri}: the header has columns {repeated} more than once. Rename them."
        )
    return columns


def _first_records(file: SourceFile, records: Iterator[bytes], count: int) -> list[bytes]:
    """Up to ``count`` records; damage further on is left to the reading to report, with the record's number."""
    found: list[bytes] = []
    try:
        for record in islice(records, count):
            found.append(record)  # noqa: PERF402 - those before the damage are wanted, too
    except _DamageError as damage:
        if not found:
            raise _unreadable(file, 0, damage) from damage
    return found


# --------------------------------------------------------------------------------------------------------------
# Parsing: chunk -> records with identifiers and labels


def parse_chunk(chunk: RowChunk, layout: SourceLayout) -> Iterator[RawRecord]:
    """The chunk's records, ``chunk.num_rows`` of them, in order."""
    if layout.file.format == "sdf":
        return _parse_sdf(chunk, layout)
    if layout.file.format == "parquet":
        return _parse_parquet(chunk, layout)
    return _parse_table(chunk, layout)


def _parse_sdf(chunk: RowChunk, layout: SourceLayout) -> Iterator[RawRecord]:
    for row, raw in enumerate(_sd_records([chunk.payload]), chunk.first_row):
        text = _sd_text(raw)
        block, properties = _sd_properties(text)
        title = text.partition("\n")[0].strip()
        mol_id = properties.get(layout.id_column, "") if layout.id_column else title
        labels, unreadable = _read_labels(layout.labels, properties)
        yield RawRecord(
            row, mol_id or None, MolBlock(block), labels, unreadable, text[:_EXCERPT_CHARACTERS]
        )


def _sd_text(raw: bytes) -> str:
    """An SD record without its delimiter, lines ended as on Unix."""
    return _decode(_LAST_RECORD_END.sub(b"", raw)).replace("\r\n", "\n")


def _sd_properties(text: str) -> tuple[str, dict[str, str]]:
    """The molblock of an SD record, and its properties."""
    end = _MOLBLOCK_END.search(text)
    if end is None:
        return text, {}
    found = _PROPERTY.finditer(text, end.end())
    return text[: end.end()], {match["name"]: match["value"].strip() for match in found}


def _parse_table(chunk: RowChunk, layout: SourceLayout) -> Iterator[RawRecord]:
    delimiter = _DELIMITERS[layout.file.format]
    records = _csv_records([chunk.payload], delimiter)
    for row, raw in enumerate(records, chunk.first_row):
        cells = _fields(raw, delimiter)
        found = "no readable row" if cells is None else f"{len(cells)} fields"
        while cells and len(cells) > len(layout.columns) and not cells[-1].strip():
            cells.pop()
        if cells is None or len(cells) != len(layout.columns):
            detail = f"{found} where the header has {len(layout.columns)}"
            rejection = Rejection(code=RejectionCode.INVALID_RECORD, detail=detail)
            nothing = np.full(len(layout.labels), np.nan)
            yield RawRecord(row, None, rejection, nothing, (), _decode(raw)[:_EXCERPT_CHARACTERS])
            continue
        by_name = dict(zip(layout.columns, cells, strict=True))
        assert layout.smiles_column is not None
        smiles = by_name[layout.smiles_column].strip()
        mol_id = by_name[layout.id_column].strip() if layout.id_column else ""
        labels, unreadable = _read_labels(layout.labels, by_name)
        yield RawRecord(
            row,
            mol_id or None,
            SmilesText(smiles),
            labels,
            unreadable,
            smiles[:_EXCERPT_CHARACTERS],
        )


def _read_labels(
    names: Sequence[str], values: Mapping[str, str]
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Label values (L,), NaN where missing, and the names of those that hold no finite number."""
    labels = np.full(len(names), np.nan)
    unreadable = []
    for index, name in enumerate(names):
        text = values.get(name, "")
        # Most cells of a sparse table are empty: nothing more to find out about them.
        if text:
            number = _number(text)
            if number is None:
                unreadable.append(name)
            else:
                labels[index] = number
    return labels, tuple(unreadable)


def _number(text: str) -> float | None:
    """A cell's number, NaN for a missing one, None for what is neither."""
    try:
        number = float(text)
    except ValueError:
        word = text.strip().lower()
        return math.nan if word in _MISSING else _TRUTH.get(word)
    # float() also takes "1_000", which no chemist writes and some identifiers look like.
    return None if math.isinf(number) or "_" in text else number


def _is_numeric(cells: Iterable[str]) -> bool:
    """Whether a sample of a column holds numbers or nothing; true and false alone make no label."""
    return all(_number(cell) is not None and cell.strip().lower() not in _TRUTH for cell in cells)


def _parse_parquet(chunk: RowChunk, layout: SourceLayout) -> Iterator[RawRecord]:
    table = pa.ipc.open_stream(chunk.payload).read_all().combine_chunks()
    smiles = _strings(table, layout.smiles_column)
    mol_ids = _strings(table, layout.id_column)
    labels, unreadable = _label_matrix(table, layout.labels)
    geometry = _geometry_rows(table, smiles) if layout.has_geometry else None
    for index in range(chunk.num_rows):
        text = smiles[index]
        yield RawRecord(
            chunk.first_row + index,
            mol_ids[index] or None,
            SmilesText(text or "") if geometry is None else geometry(index),
            labels[index],
            tuple(layout.labels[i] for i in np.flatnonzero(unreadable[index])),
            (text or "")[:_EXCERPT_CHARACTERS],
        )


def _strings(table: pa.Table, name: str | None) -> list[str | None]:
    if name is None or name not in table.column_names:
        return [None] * table.num_rows
    return [str(value).strip() if value is not None else None for value in table[name].to_pylist()]


def _label_matrix(
    table: pa.Table, names: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Labels (M, L), NaN where missing, and where a value is there but no finite number."""
    labels = np.full((table.num_rows, len(names)), np.nan)
    unreadable = np.zeros(labels.shape, dtype=np.bool_)
    for index, name in enumerate(names):
        if name not in table.column_names:
            continue
        column = table[name]
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.uint8())
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            numbers = [_number(text or "") for text in column.to_pylist()]
            unreadable[:, index] = [number is None for number in numbers]
            labels[:, index] = [math.nan if number is None else number for number in numbers]
            continue
        values = column.cast(pa.float64(), safe=False).to_numpy()
        unreadable[:, index] = np.isinf(values)
        labels[:, index] = np.where(np.isfinite(values), values, np.nan)
    return labels, unreadable


def _geometry_rows(
    table: pa.Table, smiles: Sequence[str | None]
) -> Callable[[int], GeometryRow | Rejection]:
    """A function from a row's index to its geometry."""
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
