"""What the beginning of a file tells about it, whatever its format: its columns, and which of them are labels."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from moleblend_ray.chemistry.config import SMILES_COLUMN
from moleblend_ray.chemistry.rejection import Rejection
from moleblend_ray.chemistry.xyz import QM9_PROPERTIES, parse_xyz
from moleblend_ray.data.dataset.manifest import LabelColumn
from moleblend_ray.data.sources.cells import (
    class_key,
    holds_number,
    is_numeric,
    sd_properties,
    sd_text,
)
from moleblend_ray.data.sources.columns import (
    ColumnError,
    no_column,
    require_column,
    require_distinct,
)
from moleblend_ray.data.sources.damage import DamageError
from moleblend_ray.data.sources.headers import as_delimited_table, column_names, delimited_form
from moleblend_ray.data.sources.parquet import (
    has_geometry,
    is_label_type,
    is_number_type,
    parquet_file,
)
from moleblend_ray.data.sources.published import PublishedTable, published_table
from moleblend_ray.data.sources.reading import (
    SAMPLE_RECORDS,
    first_records,
    open_items,
    open_records,
)
from moleblend_ray.data.sources.records import ColumnConfig, SourceFile
from moleblend_ray.data.sources.rows import DELIMITERS, fields, without_empty_end
from moleblend_ray.data.sources.text import REPLACEMENT, Beginning, decode
from moleblend_ray.errors import DataError, without_credentials

logger = logging.getLogger(__name__)

_DECIMAL_COMMA: Final = re.compile("[<>=~\u2264\u2265\\s]*[+-]?\\d+,\\d+")
_PANDAS_INDEX: Final = re.compile(r"__index_level_\d+__")
"""What pandas calls row numbers that it writes as a column."""
_SHOWN_WORDS: Final = 11
"""Different texts of a column that are kept to be shown: one more than an error shows."""
_COUNT_COLUMNS: Final = frozenset({"n_atoms", "n_heavy"})
_SMILES_TABLE: Final = ("smiles", "name")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileView:
    """What is known about one file before it is read."""

    file: SourceFile
    columns: tuple[str, ...] = ()
    smiles_column: str | None = None
    id_column: str | None = None
    numeric: tuple[LabelColumn, ...] = ()
    """Columns that are labels by default."""
    units: dict[str, str] = field(default_factory=dict)
    has_geometry: bool = False
    is_empty: bool = False
    is_whole: bool = True
    """Whether ``columns`` is complete; an SD file longer than the sample may have more properties."""
    without_values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Columns in which no cell of the whole file is a number (or, where such are asked for, a class) -> some of their different
    texts; none if the file is longer than the sample."""


def look_at(file: SourceFile, config: ColumnConfig) -> FileView:
    """The view of a file of any format, from its header or schema and a sample of its records.

    ColumnError for columns that it lacks, DataError if its beginning cannot be read.
    """
    if file.size == 0:
        return FileView(file=file, is_empty=True)
    if file.format == "parquet":
        return _look_at_parquet(file, config)
    if file.format == "sdf":
        return _look_at_sdf(file, config)
    if file.format == "xyz":
        return _look_at_xyz(file)
    if file.format == "smi":
        return _look_at_smiles(file, config)
    return _look_at_table(file, config)


def _look_at_table(file: SourceFile, config: ColumnConfig) -> FileView:
    file = delimited_form(file, config.smiles_column)
    with open_records(file) as records:
        header = first_records(file, records, 1)
        if not header:
            return FileView(file=file, is_empty=True)
        columns = column_names(file, header[0])
        sample = first_records(file, records, SAMPLE_RECORDS)
        is_whole = _is_at_end(records)
    known = published_table(columns) or PublishedTable(header=columns)
    smiles_column = _smiles_column(file, config, columns, known)
    id_column = config.id_column or known.id_column
    if id_column is not None:
        require_column(file, "id_column", id_column, columns)
    parsed = (fields(record, DELIMITERS[file.format]) or [] for record in sample)
    whole = (without_empty_end(cells, len(columns)) for cells in parsed)
    rows = [cells for cells in whole if len(cells) == len(columns)]
    # A column without a name holds row numbers, or nothing but what follows a last delimiter.
    others = [
        index
        for index, name in enumerate(columns)
        if name and name not in (smiles_column, id_column, config.relation_column)
    ]
    censored = config.censored_labels
    numeric = [
        columns[i] for i in others if rows and is_numeric((row[i] for row in rows), censored)
    ]
    texts = {columns[i]: [row[i] for row in rows] for i in others}
    asked = config.label_columns
    _warn_of_decimal_commas(
        file, columns, rows, [i for i in others if asked is None or columns[i] in asked]
    )
    if id_column is not None:
        _warn_of_lost_characters(file, id_column, [row[columns.index(id_column)] for row in rows])
    if known.labels is not None:
        numeric = [name for name in known.labels if name in columns]
    return FileView(
        file=file,
        columns=columns,
        smiles_column=smiles_column,
        id_column=id_column,
        numeric=tuple(LabelColumn(name, known.units.get(name)) for name in numeric),
        units=dict(known.units),
        is_empty=not sample,
        without_values=_without_values(texts, config) if is_whole else {},
    )


def _without_values(
    texts: Mapping[str, Sequence[str]], config: ColumnConfig
) -> dict[str, tuple[str, ...]]:
    """Of columns and their cells, those columns in which none is a number or, if asked for, a class -> some different cells."""
    keys = {class_key(word) for word in config.classes}

    def has_value(cells: Sequence[str]) -> bool:
        return any(class_key(cell) in keys for cell in cells) if keys else holds_number(cells)

    return {
        name: tuple(dict.fromkeys(cell.strip() for cell in cells if cell.strip()))[:_SHOWN_WORDS]
        for name, cells in texts.items()
        if not has_value(cells)
    }


def _warn_of_decimal_commas(
    file: SourceFile,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    candidates: Sequence[int],
) -> None:
    """Name the columns, of those at the indices ``candidates``, that look like numbers with a comma: 1,500 may be 1.5 or
    1500, so they are not read as numbers."""
    found = [
        columns[index]
        for index in candidates
        if any(_DECIMAL_COMMA.fullmatch(row[index].strip()) for row in rows)
    ]
    if found:
        logger.warning(
            "%s: columns %s hold numbers with commas, which are not read: write decimal points",
            without_credentials(file.uri),
            ", ".join(found),
        )


def _warn_of_lost_characters(file: SourceFile, id_column: str, ids: Sequence[str]) -> None:
    """Say if ids hold what :func:`decode` puts in place of text in another encoding: different ids may become equal."""
    changed = next((one for one in ids if REPLACEMENT in one), None)
    if changed is not None:
        logger.warning(
            "%s: column %s is not in UTF-8, and ids lose characters (%s): save the file in UTF-8",
            without_credentials(file.uri),
            id_column,
            changed,
        )


def _smiles_column(
    file: SourceFile, config: ColumnConfig, columns: Sequence[str], known: PublishedTable
) -> str | None:
    if config.smiles_column == SMILES_COLUMN and config.smiles_column not in columns:
        if known.smiles_column in columns:
            return known.smiles_column
        if file.geometry is not None:
            return None
    return require_column(file, "smiles_column", config.smiles_column, columns)


def _look_at_smiles(file: SourceFile, config: ColumnConfig) -> FileView:
    """A table of SMILES and names; if its header has several columns between tabs, commas or semicolons, such a table."""
    with open_items(file) as items:
        records = (item.text for item in items)
        sample = first_records(file, records, SAMPLE_RECORDS)
    delimited = as_delimited_table(file)
    if delimited is not None:
        return _look_at_table(delimited, config)
    if config.id_column not in (None, "name"):
        raise no_column(file.uri, "id_column", str(config.id_column), _SMILES_TABLE)
    return FileView(
        file=file,
        columns=_SMILES_TABLE,
        smiles_column="smiles",
        id_column="name",
        is_empty=not sample,
    )


def _look_at_sdf(file: SourceFile, config: ColumnConfig) -> FileView:
    with open_records(file) as records:
        sample = first_records(file, records, SAMPLE_RECORDS)
        is_whole = _is_at_end(records)
    whole = [record for record in sample if not isinstance(record, Beginning)]
    is_whole = is_whole and len(whole) == len(sample)
    properties = [sd_properties(sd_text(record))[1] for record in whole]
    names = tuple(dict.fromkeys(name for record in properties for name in record))
    if config.id_column is not None and is_whole and sample:
        require_column(file, "id_column", config.id_column, names)
    numeric = [
        name
        for name in names
        if name not in (config.id_column, config.relation_column)
        and is_numeric((record.get(name, "") for record in properties), config.censored_labels)
    ]
    texts = {name: [record.get(name, "") for record in properties] for name in names}
    return FileView(
        file=file,
        columns=names,
        id_column=config.id_column,
        numeric=tuple(LabelColumn(name, None) for name in numeric),
        is_empty=not sample,
        is_whole=is_whole,
        without_values=_without_values(texts, config) if is_whole else {},
    )


def _look_at_xyz(file: SourceFile) -> FileView:
    with open_records(file) as records:
        sample = first_records(file, records, 1)
    record = parse_xyz(decode(sample[0])) if sample else None
    if isinstance(record, Rejection):
        raise DataError(
            f"{file.uri}: its first file is {record.detail}; expected dsgdb9nsd.xyz.tar.bz2 as published. "
            "Other XYZ files have no bonds: convert them to SDF."
        )
    return FileView(
        file=file,
        columns=tuple(QM9_PROPERTIES),
        numeric=tuple(LabelColumn(name, unit) for name, unit in QM9_PROPERTIES.items()),
        units=dict(QM9_PROPERTIES),
        is_empty=record is None,
    )


def _look_at_parquet(file: SourceFile, config: ColumnConfig) -> FileView:
    with parquet_file(file) as table:
        schema, num_rows = table.schema_arrow, table.metadata.num_rows
    columns = tuple(schema.names)
    require_distinct(file, columns)
    for name in config.label_columns or ():
        if name in columns and not is_label_type(schema.field(name).type):
            raise ColumnError(
                "label_columns",
                f"{name!r} of {file.uri} is {schema.field(name).type}; expected numbers, true and false, or texts.",
            )
    with_geometry = has_geometry(file, schema)
    smiles_column: str | None = None
    # With geometry no SMILES are needed; but a SMILES column that was asked for by name must exist.
    if (
        not with_geometry
        or config.smiles_column in columns
        or config.smiles_column != SMILES_COLUMN
    ):
        smiles_column = require_column(file, "smiles_column", config.smiles_column, columns)
    id_column = config.id_column or ("mol_id" if "mol_id" in columns else None)
    if id_column is not None:
        require_column(file, "id_column", id_column, columns)
    units = {
        field.name: field.metadata[b"unit"].decode()
        for field in schema
        if field.metadata and b"unit" in field.metadata
    }
    used = {smiles_column, id_column, config.relation_column, *_COUNT_COLUMNS}
    numeric = [
        field.name
        for field in schema
        if field.name not in used
        and is_number_type(field.type)
        and not _PANDAS_INDEX.fullmatch(field.name)
    ]
    return FileView(
        file=file,
        columns=columns,
        smiles_column=smiles_column,
        id_column=id_column,
        numeric=tuple(LabelColumn(name, units.get(name)) for name in numeric),
        units=units,
        has_geometry=with_geometry,
        is_empty=num_rows == 0,
    )


def _is_at_end(records: Iterator[bytes]) -> bool:
    try:
        return next(records, None) is None
    except DamageError:
        return False
