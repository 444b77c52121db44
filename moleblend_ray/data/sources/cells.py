"""Cells of tables and properties of SD records: what counts as a number, and the parts of a record."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.data.sources.classes import FEWEST_CLASSES, ClassLabel, names_of_class_labels
from moleblend_ray.data.sources.text import decode
from moleblend_ray.errors import ConfigError

_MISSING: Final = frozenset({"", "na", "n/a", "#n/a", "<na>", "null", "none", "?"})
"""In lower case; spreadsheets and pandas write those with signs."""
_TRUTH: Final = {"true": 1.0, "false": 0.0}

_RELATIONS: Final = {
    "=": "=",
    "==": "=",
    "~": "=",
    "<": "<",
    "<=": "<",
    "<<": "<",
    "\N{LESS-THAN OR EQUAL TO}": "<",
    ">": ">",
    ">=": ">",
    ">>": ">",
    "\N{GREATER-THAN OR EQUAL TO}": ">",
}
_LEADING_RELATION: Final = re.compile("\\s*(<=|<<|>=|>>|==|[<>=~\u2264\u2265])")
_SIDES: Final = {">": 0, "<": 1}
"""Index of what a bound says: the least value, or the greatest."""

_EXTENSION: Final = re.compile(r"(\|[^|]*\|)\s*(.*)", re.DOTALL)
"""The part of a CXSMILES between bars, which holds none itself, and a name after it."""

_LAST_RECORD_END: Final = re.compile(rb"^\$\$\$\$[^\n]*\n?\Z", re.MULTILINE)
_MOLBLOCK_END: Final = re.compile(r"^M  END.*\n?", re.MULTILINE)
_MOLBLOCK_IN_PROPERTY: Final = re.compile(
    r"^>.*\n(?:.*\n){3}.* V[23]000.*\n(?:(?!M  END).*\n)*M  END", re.MULTILINE
)
"""Its header lines come at once after the name, where a record that begins has the empty line after a value before it."""
_PROPERTY: Final = re.compile(
    r"^>.*?<(?P<name>.*)>.*\n(?P<value>(?:[^\n]+(?:\n|\Z))*)", re.MULTILINE
)
"""Names may contain the signs that are around them, and go from the first ``<`` to the last ``>`` of the line, as for RDKit."""


def number(text: str) -> float | None:
    """The number in a cell; NaN if it is missing, None if the cell holds something else."""
    try:
        value = float(text)
    except ValueError:
        word = text.strip().lower()
        return math.nan if word in _MISSING else _TRUTH.get(word)
    # float() also accepts "1_000", which looks like an identifier rather than a number.
    return None if math.isinf(value) or "_" in text else value


def _is_missing(text: str) -> bool:
    value = number(text)
    return value is not None and math.isnan(value)


def relation_of(text: str) -> str | None:
    """What a relation says of a number: ``=``, or ``<`` or ``>`` if the number is a bound; None if it is no relation.

    What is missing, as a number can be, and what is about a number (``~``), counts as equal. ChEMBL's files have quotes around
    relations.
    """
    word = text.strip(" \t'\"")
    return "=" if _is_missing(word) else _RELATIONS.get(word)


def censored_number(text: str, relation: str | None = "=") -> tuple[float, str] | None:
    """The number in a cell, which may begin with a relation (``>10``), and the relation. NaN if the cell is missing.

    None if there is no number, or if the ``relation`` that the record states elsewhere is none or another one.
    """
    sign = _LEADING_RELATION.match(text)
    value = number(text[sign.end() :] if sign else text)
    if value is None or (sign and math.isnan(value)):
        return None
    if math.isnan(value):
        return value, "="
    own = _RELATIONS[sign[1]] if sign else relation
    return None if own is None or relation not in ("=", own) else (value, own)


def is_numeric(cells: Iterable[str], censored: bool = False) -> bool:
    """Whether all cells of a sample hold a number (with ``censored``, or a bound) or nothing; true and false do not count as
    numbers here."""
    return all(_is_number(cell, censored) for cell in cells)


def _is_number(cell: str, censored: bool) -> bool:
    found = censored_number(cell) if censored else number(cell)
    return found is not None and cell.strip().lower() not in _TRUTH


def holds_number(cells: Iterable[str]) -> bool:
    """Whether any cell of a sample holds a number, or true or false."""
    values = map(number, cells)
    return any(value is not None and not math.isnan(value) for value in values)


def read_labels(
    names: Sequence[str], values: Mapping[str, str]
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Label values (L,), NaN where missing, and the names of labels whose cell holds something else than a number."""
    labels = np.full(len(names), np.nan)
    unreadable = []
    for index, name in enumerate(names):
        text = values.get(name, "")
        # Most cells of a sparse table are empty: skipping them is faster.
        if text:
            value = number(text)
            if value is None:
                unreadable.append(name)
            else:
                labels[index] = value
    return labels, tuple(unreadable)


def class_key(text: str) -> str | float:
    """What a cell must have in common with the word of a class to be of it: the number, or the text without case and blanks
    around it."""
    value = number(text)
    return text.strip().casefold() if value is None or math.isnan(value) else value


def class_labels(columns: Iterable[str], words: Sequence[str]) -> tuple[ClassLabel, ...]:
    """The labels that columns of these classes become. Of two classes, the second is 1. ConfigError for equal classes and
    labels."""
    keys = [class_key(word) for word in words]
    if len(set(keys)) < len(keys):
        raise ConfigError(f"classes: expected different ones, found {list(words)}")
    ones = keys[1:] if len(keys) == FEWEST_CLASSES else keys
    labels = tuple(
        ClassLabel(name, column, {key: float(key == one) for key in keys})
        for column in columns
        for name, one in zip(names_of_class_labels(column, words), ones, strict=True)
    )
    names = [label.name for label in labels]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"classes: two columns would have the label {twice[0]!r}. Rename one of them, or leave it out"
        )
    return labels


def read_classes(
    labels: Sequence[ClassLabel], cells: Mapping[str, str]
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Label values (L,), NaN where missing, and the names of labels whose cell holds another class, each cell for the first of
    its labels."""
    found = np.full(len(labels), np.nan)
    wrong: dict[str, str] = {}
    for index, label in enumerate(labels):
        text = cells.get(label.column, "")
        value = label.values.get(class_key(text))
        if value is not None:
            found[index] = value
        elif not _is_missing(text):
            wrong.setdefault(label.column, label.name)
    return found, tuple(wrong.values())


def read_censored(
    cells: Sequence[str], relations: Sequence[str | None]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Values of K cells (K,), the least and greatest values (2, K) of those that hold a bound, and which cells (K,) hold
    something else; NaN where there is none.

    ``relations`` (K,) are what records state elsewhere than in these cells, as :func:`relation_of` reads it.
    """
    values, bounds = np.full(len(cells), np.nan), np.full((2, len(cells)), np.nan)
    unreadable = np.zeros(len(cells), dtype=np.bool_)
    for index, (cell, relation) in enumerate(zip(cells, relations, strict=True)):
        if not cell:
            continue
        found = censored_number(cell, relation)
        if found is None:
            unreadable[index] = True
        elif found[1] == "=":
            values[index] = found[0]
        else:
            bounds[_SIDES[found[1]], index] = found[0]
    return values, bounds, unreadable


def sd_text(raw: bytes) -> str:
    """An SD record as text, without its ``$$$$`` line, with Unix line ends, and without a byte order mark before its title."""
    text = decode(_LAST_RECORD_END.sub(b"", raw)).replace("\r\n", "\n")
    return text.removeprefix("\ufeff")


def sd_properties(text: str) -> tuple[str, dict[str, str]]:
    """The molblock and the properties of an SD record.

    A property that is there more than once with different values has all of them, with semicolons, and so is no number: which one
    is right, nobody knows.
    """
    end = _MOLBLOCK_END.search(text)
    if end is None:
        return text, {}
    found = [
        (match["name"], match["value"].strip()) for match in _PROPERTY.finditer(text, end.end())
    ]
    properties = dict(found)
    if len(properties) < len(found):
        values: dict[str, dict[str, None]] = {name: {} for name in properties}
        for name, value in found:
            values[name][value] = None
        properties = {name: "; ".join(different) for name, different in values.items()}
    return text[: end.end()], properties


def count_molblocks(text: str) -> int:
    """The molblocks of an SD record, without those that are values of properties: several where a ``$$$$`` line is missing."""
    # Cheap for nearly all records, which have one.
    if text.count("\nM  END") < 2:
        return text.count("\nM  END")
    return len(_MOLBLOCK_END.findall(_MOLBLOCK_IN_PROPERTY.sub("", text)))


def smiles_and_name(line: bytes) -> tuple[str, str]:
    """SMILES and name in a line of a table of SMILES; the name is empty if there is none.

    The extension of a CXSMILES (ChemAxon Extended SMILES, ``C[C@H](N)O |&1:1| name``) stays with the SMILES.
    """
    first, _, rest = decode(line).strip().partition("\t")
    if not rest:
        first, _, rest = first.partition(" ")
    first, rest = first.strip(), rest.strip()
    if extension := _EXTENSION.fullmatch(rest):
        return f"{first} {extension[1]}", extension[2]
    return first, rest
