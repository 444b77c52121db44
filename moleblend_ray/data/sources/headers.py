"""The header of a table of text: its delimiter and the names of its columns."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from moleblend_ray.data.sources.columns import require_distinct
from moleblend_ray.data.sources.reading import first_records, open_records
from moleblend_ray.data.sources.records import Format, SourceFile
from moleblend_ray.data.sources.rows import DELIMITERS, fields, stated_delimiter
from moleblend_ray.data.sources.text import Beginning, is_smiles_header
from moleblend_ray.errors import DataError

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_DELIMITED: Final[tuple[Format, ...]] = ("csv", "semicolon", "tsv")


def delimited_form(file: SourceFile, column: str) -> SourceFile:
    """The file as a table with the delimiter of its header, which its ending does not tell (CSV from spreadsheets, lines
    of SMILES).

    ``column`` is one that is looked for: a name may contain another delimiter.
    """
    if file.format == "smi":
        return as_delimited_table(file) or file
    if file.format not in ("csv", "tsv"):
        return file
    with open_records(file) as records:
        header = first_records(file, records, 1)
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


def as_delimited_table(file: SourceFile) -> SourceFile | None:
    """A file of lines as a table, if its first line names several columns of which one is of SMILES; else None.

    Members of archives are not looked at.
    """
    if file.container is not None:
        return None
    with open_records(replace(file, format="tsv")) as records:
        first = first_records(file, records, 1)
    forms: tuple[Format, ...] = ("tsv", "csv", "semicolon")
    for form in forms if first else ():
        cells = [cell.strip().lower() for cell in first[0].split(DELIMITERS[form].encode())]
        # "smiles<TAB>name" is the header of a plain table of SMILES.
        is_plain = form == "tsv" and len(cells) == 2 and is_smiles_header(first[0])
        if len(cells) > 1 and not is_plain and any(_says_smiles(cell) for cell in cells):
            return replace(file, format=form)
    return None


def _says_smiles(cell: bytes) -> bool:
    return b"smiles" in cell and b" " not in cell


def column_names(file: SourceFile, record: bytes) -> tuple[str, ...]:
    """The names in the first record of a table; DataError if it is no line of names, or one is there twice."""
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
    require_distinct(file, columns)
    return columns
