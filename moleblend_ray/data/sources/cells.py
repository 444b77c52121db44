"""Cells of tables and properties of SD records: what counts as a number, and the parts of a record."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.data.sources.text import decode

_MISSING: Final = frozenset({"", "na", "n/a", "null", "none", "?"})
_TRUTH: Final = {"true": 1.0, "false": 0.0}

_LAST_RECORD_END: Final = re.compile(rb"^\$\$\$\$[^\n]*\n?\Z", re.MULTILINE)
_MOLBLOCK_END: Final = re.compile(r"^M  END.*\n?", re.MULTILINE)
_PROPERTY: Final = re.compile(
    r"^>.*?<(?P<name>[^>]*)>.*\n(?P<value>(?:[^\n]+(?:\n|\Z))*)", re.MULTILINE
)


def number(text: str) -> float | None:
    """The number in a cell; NaN if it is missing, None if the cell holds something else."""
    try:
        value = float(text)
    except ValueError:
        word = text.strip().lower()
        return math.nan if word in _MISSING else _TRUTH.get(word)
    # float() also accepts "1_000", which looks like an identifier rather than a number.
    return None if math.isinf(value) or "_" in text else value


def is_numeric(cells: Iterable[str]) -> bool:
    """Whether all cells of a sample hold a number or nothing; true and false do not count as numbers here."""
    return all(number(cell) is not None and cell.strip().lower() not in _TRUTH for cell in cells)


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


def sd_text(raw: bytes) -> str:
    """An SD record as text, without its ``$$$$`` line and with Unix line ends."""
    return decode(_LAST_RECORD_END.sub(b"", raw)).replace("\r\n", "\n")


def sd_properties(text: str) -> tuple[str, dict[str, str]]:
    """The molblock and the properties of an SD record."""
    end = _MOLBLOCK_END.search(text)
    if end is None:
        return text, {}
    found = _PROPERTY.finditer(text, end.end())
    return text[: end.end()], {match["name"]: match["value"].strip() for match in found}


def smiles_and_name(line: bytes) -> tuple[str, str]:
    """SMILES and name in a line of a table of SMILES; the name is empty if there is none."""
    first, _, rest = decode(line).strip().partition("\t")
    if not rest:
        first, _, rest = first.partition(" ")
    return first.strip(), rest.strip()
