"""The meaning of a source's columns, from headers, schemas and a sample at the beginning of each file."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Final

from moleblend_ray.chemistry.config import SMILES_COLUMN
from moleblend_ray.chemistry.rejection import Rejection
from moleblend_ray.chemistry.xyz import QM9_PROPERTIES, parse_xyz
from moleblend_ray.data.sources.cells import holds_number, is_numeric, sd_properties, sd_text
from moleblend_ray.data.sources.parquet import (
    has_geometry,
    is_label_type,
    is_number_type,
    parquet_file,
)
from moleblend_ray.data.sources.parsing import parse_items
from moleblend_ray.data.sources.published import PublishedTable, published_table
from moleblend_ray.data.sources.reading import Item, open_items, open_records, take
from moleblend_ray.data.sources.records import (
    ColumnConfig,
    Format,
    LabelColumn,
    SourceFile,
    SourceLayout,
    SourceSet,
)
from moleblend_ray.data.sources.text import (
    DELIMITERS,
    Beginning,
    DamageError,
    decode,
    fields,
    is_smiles_header,
    stated_delimiter,
    unreadable,
    without_empty_end,
)
from moleblend_ray.errors import ConfigError, DataError, without_credentials

logger = logging.getLogger(__name__)

_DECIMAL_COMMA: Final = re.compile(r"[+-]?\d+,\d+")

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_DELIMITED: Final[tuple[Format, ...]] = ("csv", "semicolon", "tsv")

_THREADS: Final = 16
_SAMPLE_RECORDS: Final = 1000
"""Records from which is decided which columns or properties are numeric, and whether a geometry fits its table."""
_SAMPLE_BYTES: Final = 64 << 20
"""The sample ends with the record that brings it to this size."""
_PANDAS_INDEX: Final = re.compile(r"__index_level_\d+__")
"""What pandas calls row numbers that it writes as a column."""
_COUNT_COLUMNS: Final = frozenset({"n_atoms", "n_heavy"})
_SMILES_TABLE: Final = ("smiles", "name")


class ColumnError(ConfigError):
    """A setting of :class:`ColumnConfig` names a column that a source does not have, or that cannot be read so."""

    def __init__(self, setting: str, reason: str) -> None:
        super().__init__(setting, reason)

    @property
    def setting(self) -> str:
        """Name in :class:`ColumnConfig`; another command may have another name for it."""
        return str(self.args[0])

    @property
    def reason(self) -> str:
        """What is wrong."""
        return str(self.args[1])

    def __str__(self) -> str:
        return f"{self.setting}: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _View:
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
    without_numbers: frozenset[str] = frozenset()
    """Columns in which no cell of the whole file is a number; none if the file is longer than the sample."""


def inspect_sources(files: Sequence[SourceFile], config: ColumnConfig) -> SourceSet:
    """Columns and labels of all files, from headers, schemas and a sample at the beginning of each."""
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
    layouts = tuple(_layout(view, tuple(label.name for label in labels)) for view in views)
    for layout in layouts:
        if layout.file.geometry is not None:
            _check_geometry(layout)
    return SourceSet(
        layouts=layouts,
        labels=labels,
        labels_without_numbers=tuple(
            label.name for label in labels if _is_without_numbers(label.name, views)
        ),
    )


def _is_without_numbers(name: str, views: Sequence[_View]) -> bool:
    return all(
        name in view.without_numbers or (view.is_whole and name not in view.columns)
        for view in views
    )


def _layout(view: _View, labels: tuple[str, ...]) -> SourceLayout:
    return SourceLayout(
        file=view.file,
        columns=view.columns,
        smiles_column=view.smiles_column,
        id_column=view.id_column,
        labels=labels,
        # A property that is not in the sample of an SD file may come later in the file.
        own_labels=tuple(n for n in labels if n in view.columns or view.file.format == "sdf"),
        has_geometry=view.has_geometry,
    )


def _look_at(file: SourceFile, config: ColumnConfig) -> _View:
    if file.size == 0:
        return _View(file=file, is_empty=True)
    if file.format == "parquet":
        return _look_at_parquet(file, config)
    if file.format == "sdf":
        return _look_at_sdf(file, config)
    if file.format == "xyz":
        return _look_at_xyz(file)
    if file.format == "smi":
        return _look_at_smiles(file, config)
    return _look_at_table(file, config)


def delimited_form(file: SourceFile, column: str) -> SourceFile:
    """The file as a table with the delimiter of its header, which its ending does not tell (CSV from spreadsheets, lines
    of SMILES).

    ``column`` is one that is looked for: a name may contain another delimiter.
    """
    if file.format == "smi":
        return _delimited(file) or file
    if file.format not in ("csv", "tsv"):
        return file
    with open_records(file) as records:
        header = _first_records(file, records, 1)
    if not header:
        return file
    cells = {form: _cells_of_header(header[0], form) for form in _DELIMITED}
    forms = [form for form in (file.format, *_DELIMITED) if column in cells[form]]
    if not forms and len(cells[file.format]) <= 1:
        forms = [form for form in _DELIMITED if len(cells[form]) > 1]
    return replace(file, format=forms[0]) if forms else file


def _cells_of_header(record: bytes, form: Format) -> list[str]:
    cells = fields(record.removeprefix(_BYTE_ORDER_MARK), DELIMITERS[form]) or []
    return [cell.strip() for cell in cells]


def _look_at_table(file: SourceFile, config: ColumnConfig) -> _View:
    file = delimited_form(file, config.smiles_column)
    with open_records(file) as records:
        header = _first_records(file, records, 1)
        if not header:
            return _View(file=file, is_empty=True)
        columns = _header(file, header[0])
        sample = _first_records(file, records, _SAMPLE_RECORDS)
        is_whole = _is_at_end(records)
    known = published_table(columns) or PublishedTable(header=columns)
    smiles_column = _smiles_column(file, config, columns, known)
    id_column = config.id_column or known.id_column
    if id_column is not None:
        _require(file, "id_column", id_column, columns)
    parsed = (fields(record, DELIMITERS[file.format]) or [] for record in sample)
    whole = (without_empty_end(cells, len(columns)) for cells in parsed)
    rows = [cells for cells in whole if len(cells) == len(columns)]
    # A column without a name holds row numbers, or nothing but what follows a last delimiter.
    others = [
        index
        for index, name in enumerate(columns)
        if name and name not in (smiles_column, id_column)
    ]
    numeric = [columns[i] for i in others if rows and is_numeric(row[i] for row in rows)]
    without = [columns[i] for i in others if not holds_number(row[i] for row in rows)]
    asked = config.label_columns
    _warn_of_decimal_commas(
        file, columns, rows, [i for i in others if asked is None or columns[i] in asked]
    )
    if known.labels is not None:
        numeric = [name for name in known.labels if name in columns]
    return _View(
        file=file,
        columns=columns,
        smiles_column=smiles_column,
        id_column=id_column,
        numeric=tuple(LabelColumn(name, known.units.get(name)) for name in numeric),
        units=dict(known.units),
        is_empty=not sample,
        without_numbers=frozenset(without if is_whole else ()),
    )


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


def _smiles_column(
    file: SourceFile, config: ColumnConfig, columns: Sequence[str], known: PublishedTable
) -> str | None:
    if config.smiles_column == SMILES_COLUMN and config.smiles_column not in columns:
        if known.smiles_column in columns:
            return known.smiles_column
        if file.geometry is not None:
            return None
    return _require(file, "smiles_column", config.smiles_column, columns)


def _look_at_smiles(file: SourceFile, config: ColumnConfig) -> _View:
    """A table of SMILES and names; if its header has several columns between tabs, commas or semicolons, such a table."""
    with open_items(file) as items:
        records = (item.text for item in items)
        sample = _first_records(file, records, _SAMPLE_RECORDS)
    delimited = _delimited(file)
    if delimited is not None:
        return _look_at_table(delimited, config)
    if config.id_column not in (None, "name"):
        raise _no_column(file.uri, "id_column", str(config.id_column), _SMILES_TABLE)
    return _View(
        file=file,
        columns=_SMILES_TABLE,
        smiles_column="smiles",
        id_column="name",
        is_empty=not sample,
    )


def _delimited(file: SourceFile) -> SourceFile | None:
    """The file as a table if it is a plain one whose first line is such a header; else None."""
    if file.container is not None:
        return None
    with open_records(replace(file, format="tsv")) as records:
        first = _first_records(file, records, 1)
    forms: tuple[tuple[Format, bytes], ...] = (
        ("tsv", b"\t"),
        ("csv", b","),
        ("semicolon", b";"),
    )
    for form, delimiter in forms:
        cells = [cell.strip().lower() for cell in first[0].split(delimiter)] if first else []
        # "smiles<TAB>name" is the header of a plain table of SMILES.
        is_plain = form == "tsv" and len(cells) == 2 and is_smiles_header(first[0])
        if len(cells) > 1 and not is_plain and any(_says_smiles(cell) for cell in cells):
            return replace(file, format=form)
    return None


def _says_smiles(cell: bytes) -> bool:
    return b"smiles" in cell and b" " not in cell


def _look_at_sdf(file: SourceFile, config: ColumnConfig) -> _View:
    with open_records(file) as records:
        sample = _first_records(file, records, _SAMPLE_RECORDS)
        is_whole = _is_at_end(records)
    whole = [record for record in sample if not isinstance(record, Beginning)]
    is_whole = is_whole and len(whole) == len(sample)
    properties = [sd_properties(sd_text(record))[1] for record in whole]
    names = tuple(dict.fromkeys(name for record in properties for name in record))
    if config.id_column is not None and is_whole and sample:
        _require(file, "id_column", config.id_column, names)
    numeric = [
        name
        for name in names
        if name != config.id_column and is_numeric(record.get(name, "") for record in properties)
    ]
    without = [
        name for name in names if not holds_number(record.get(name, "") for record in properties)
    ]
    return _View(
        file=file,
        columns=names,
        id_column=config.id_column,
        numeric=tuple(LabelColumn(name, None) for name in numeric),
        is_empty=not sample,
        is_whole=is_whole,
        without_numbers=frozenset(without if is_whole else ()),
    )


def _look_at_xyz(file: SourceFile) -> _View:
    with open_records(file) as records:
        sample = _first_records(file, records, 1)
    record = parse_xyz(decode(sample[0])) if sample else None
    if isinstance(record, Rejection):
        raise DataError(
            f"{file.uri}: its first file is {record.detail}; expected dsgdb9nsd.xyz.tar.bz2 as published. "
            "Other XYZ files have no bonds: convert them to SDF."
        )
    return _View(
        file=file,
        columns=tuple(QM9_PROPERTIES),
        numeric=tuple(LabelColumn(name, unit) for name, unit in QM9_PROPERTIES.items()),
        units=dict(QM9_PROPERTIES),
        is_empty=record is None,
    )


def _look_at_parquet(file: SourceFile, config: ColumnConfig) -> _View:
    with parquet_file(file) as table:
        schema, num_rows = table.schema_arrow, table.metadata.num_rows
    columns = tuple(schema.names)
    _require_distinct(file, columns)
    for name in config.label_columns or ():
        if name in columns and not is_label_type(schema.field(name).type):
            raise ColumnError(
                "label_columns",
                f"{name!r} of {file.uri} is {schema.field(name).type}; expected numbers, true and false, or texts of "
                "them.",
            )
    with_geometry = has_geometry(file, schema)
    smiles_column: str | None = None
    # With geometry no SMILES are needed; but a SMILES column that was asked for by name must exist.
    if (
        not with_geometry
        or config.smiles_column in columns
        or config.smiles_column != SMILES_COLUMN
    ):
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
        field.name
        for field in schema
        if field.name not in used
        and is_number_type(field.type)
        and not _PANDAS_INDEX.fullmatch(field.name)
    ]
    return _View(
        file=file,
        columns=columns,
        smiles_column=smiles_column,
        id_column=id_column,
        numeric=tuple(LabelColumn(name, units.get(name)) for name in numeric),
        units=units,
        has_geometry=with_geometry,
        is_empty=num_rows == 0,
    )


def _check_geometry(layout: SourceLayout) -> None:
    """DataError if most of the first records of a geometry are of other molecules than the rows of its table."""
    file = layout.file
    assert file.geometry is not None
    with open_items(file) as items:
        sample = _first_items(file, items, _SAMPLE_RECORDS)
    with_geometry = [item for item in sample if item.geometry is not None]
    mismatches = [
        record
        for record in parse_items(with_geometry, layout, 0)
        if isinstance(record.content, Rejection) and record.content.code == "geometry_mismatch"
    ]
    if 2 * len(mismatches) > len(with_geometry):
        first = mismatches[0]
        assert isinstance(first.content, Rejection)
        raise DataError(
            f"{file.geometry.uri} is no geometry of {file.uri}: of the first {len(with_geometry)} records "
            f"{len(mismatches)} do not fit. Row {first.row}: {first.content.detail}. Give one of them only."
        )


def _first_records(file: SourceFile, records: Iterator[bytes], count: int) -> list[bytes]:
    return [item.text for item in _first_items(file, map(Item, records), count)]


def _first_items(file: SourceFile, items: Iterator[Item], count: int) -> list[Item]:
    """Up to ``count`` items; later damage is reported, with the number of the record, when the file is read."""
    found, damage = take(items, count, _SAMPLE_BYTES)
    if damage is not None and not found:
        raise unreadable(file.uri, 0, damage) from damage
    return found


def _header(file: SourceFile, record: bytes) -> tuple[str, ...]:
    if isinstance(record, Beginning):
        raise DataError(
            f"{file.uri}: its first line, in which names of columns are expected, has {record.problem}. Is it a table?"
        )
    if b"\0" in record:
        raise DataError(
            f"{file.uri}: its first line, in which names of columns are expected, is no text in UTF-8. Is it a workbook, or "
            "text in UTF-16? Save it as CSV in UTF-8."
        )
    stated = stated_delimiter(record)
    if stated is not None:
        raise DataError(
            f"{file.uri}: its first line says that {stated!r} separates the cells; expected commas, semicolons or tabs. "
            "Save it with one of these."
        )
    columns = tuple(_cells_of_header(record, file.format))
    _require_distinct(file, columns)
    return columns


def _require_distinct(file: SourceFile, columns: Sequence[str]) -> None:
    repeated = sorted({name for name in columns if columns.count(name) > 1 and name})
    if repeated:
        raise DataError(f"{file.uri} has columns {repeated} more than once. Rename them.")


def _is_at_end(records: Iterator[bytes]) -> bool:
    try:
        return next(records, None) is None
    except DamageError:
        return False


def _merge_labels(views: Sequence[_View]) -> tuple[LabelColumn, ...]:
    """Numeric columns of all files in order of appearance; ConfigError if two files state different units for one."""
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
    """The labels that were asked for; ConfigError for a name that no file has."""
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


def _no_column(where: str, setting: str, name: str, columns: Sequence[str]) -> ColumnError:
    folded = {column.lower(): column for column in columns}
    nearest = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.4)
    hint = f" Did you mean {folded[nearest[0]]!r}?" if nearest else ""
    shown = ", ".join(repr(column) for column in columns[:20]) or "none"
    more = f" and {len(columns) - 20} more" if len(columns) > 20 else ""
    if any("\ufffd" in column for column in columns):
        hint = " The names are not in UTF-8, save the file as such." + hint
    return ColumnError(setting, f"{where} has no {name!r}; it has {shown}{more}.{hint}")


def _names(files: Sequence[SourceFile]) -> str:
    shown = ", ".join(file.uri for file in files[:3])
    return shown + (f" and {len(files) - 3} more" if len(files) > 3 else "")
