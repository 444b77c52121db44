"""Which records may take RDKit very long, told in a microsecond before RDKit sees them.

What explodes is the number of rings, which can double with each independent ring (bonds - atoms + fragments). A
macrocycle of n rings that are joined at opposite atoms, such as a cycloparaphenylene or a cyclodextrin, has 2^n smallest
rings around it. RDKit lists them, and compares aromatic ones pair by pair: a cycloparaphenylene takes 0.1 s for n = 12,
1 s for 14 and 18 s for 16. Memory doubles too, to 1 GB for n = 19. Aromaticity is tried for combinations of up to six
fused rings, which takes half a minute for some networks of 100 rings, while fullerenes and graphene flakes take
milliseconds. With at most :data:`FEW_RINGS` independent rings there are at most 2^9 rings of any kind, and
no molecule was found that takes a second.
"""

from __future__ import annotations

import re
from typing import Final

import numpy as np

from moleblend_ray.chemistry.records import GeometryRow, MolBlock, SmilesText, SourceRecord
from moleblend_ray.compilation import kernel

FEW_RINGS: Final = 9
"""Independent rings of which no molecule is slow. One of 200 molecules of MoleculeNet's HIV has more, and none of
ZINC250k."""

_FEW_BONDS: Final = 24
"""Nor is one with this number of bonds, whichever they are."""
_MANY_ATOMS: Final = 512
"""For larger molecules, the cubes and squares of the number of atoms matter, too."""

_DIGITS: Final = b"0123456789"
_V3000_COUNTS: Final = re.compile(r"M  V30 COUNTS +(\d{1,9}) +(\d{1,9})\b")


def may_be_slow(record: SourceRecord) -> bool:
    """Whether RDKit could need more than a second for the record; True also if the record does not tell."""
    if isinstance(record, SmilesText):
        return smiles_may_be_slow(record.smiles)
    if isinstance(record, MolBlock):
        return _molblock_may_be_slow(record.block)
    return smiles_may_be_slow(record.smiles) or _row_may_be_slow(record)


def smiles_may_be_slow(smiles: str | None) -> bool:
    """The same for a SMILES. Each ring has two digits at least, so half of the digits bound the number of rings."""
    if not isinstance(smiles, str):
        return False  # rejected without RDKit
    if len(smiles) > _MANY_ATOMS:
        return True
    text = smiles.encode("ascii", "replace")
    return len(text) - len(text.translate(None, _DIGITS)) > 2 * FEW_RINGS


def _molblock_may_be_slow(block: str | None) -> bool:
    if not isinstance(block, str):
        return False
    header = block.split("\n", 4)
    if len(header) < 5:
        return False  # no atom follows
    counts, body = header[3:]
    if "V3000" in counts:
        return _v3000_may_be_slow(body)
    try:
        num_atoms, num_bonds = int(counts[:3]), int(counts[3:6])
    except ValueError:
        return True
    if num_atoms > _MANY_ATOMS:
        return True
    if num_bonds <= _FEW_BONDS:
        return False
    # One byte per character, as the columns are those of characters.
    text = np.frombuffer(body.encode("ascii", "replace"), np.uint8)
    return not 0 <= _rings_of_v2000(text, num_atoms, num_bonds) <= FEW_RINGS


def _v3000_may_be_slow(body: str) -> bool:
    counts = _V3000_COUNTS.search(body)
    if counts is None:
        return True
    num_atoms, num_bonds = int(counts[1]), int(counts[2])
    if num_atoms > _MANY_ATOMS:
        return True
    if num_bonds <= _FEW_BONDS:
        return False
    bonds = body.partition("M  V30 BEGIN BOND")[2].partition("\n")[2]
    text = np.frombuffer(bonds.encode("ascii", "replace"), np.uint8)
    return not 0 <= _rings_of_v3000(text, num_atoms, num_bonds) <= FEW_RINGS


def _row_may_be_slow(row: GeometryRow) -> bool:
    try:
        num_atoms, num_bonds = len(row.atomic_numbers), len(row.bond_begin)
        if num_atoms > _MANY_ATOMS:
            return True
        if num_bonds <= _FEW_BONDS:
            return False
        begin = np.asarray(row.bond_begin, np.int64)
        end = np.asarray(row.bond_end, np.int64)
    except (TypeError, ValueError, OverflowError):
        return True
    plain = begin.shape == end.shape == (num_bonds,)
    return not plain or not 0 <= _independent_rings(begin, end, num_atoms) <= FEW_RINGS


_UNKNOWN: Final = -1
_NEWLINE: Final = ord("\n")
_SPACE: Final = ord(" ")
_ZERO: Final = ord("0")
_SHORTEST_ATOM: Final = 33
"""RDKit refuses shorter lines of atoms."""
_WIDTH: Final = 3
"""Columns of an atom's number in a V2000 line of a bond."""
_V3000_PREFIX: Final = len("M  V30 ")
_MINUS: Final = ord("-")


@kernel
def _independent_rings(begin, end, num_atoms):  # type: ignore[no-untyped-def]
    """Bonds that join two atoms which other bonds join already; -1 if an atom does not exist. Atoms count from 0."""
    above = np.arange(num_atoms)
    rings = 0
    for bond in range(begin.shape[0]):
        one, other = begin[bond], end[bond]
        if not (0 <= one < num_atoms and 0 <= other < num_atoms):
            return _UNKNOWN
        while above[one] != one:
            above[one] = above[above[one]]
            one = above[one]
        while above[other] != other:
            above[other] = above[above[other]]
            other = above[other]
        if one == other:
            rings += 1
        above[one] = other
    return rings


@kernel
def _rings_of_v2000(text, num_atoms, num_bonds):  # type: ignore[no-untyped-def]
    """Independent rings of the lines of atoms and bonds in ``text``; -1 if they are not plain."""
    begin, end = np.empty(num_bonds, np.int64), np.empty(num_bonds, np.int64)
    at = 0
    for _ in range(num_atoms):
        at = _next_line(text, at + _SHORTEST_ATOM)
    for bond in range(num_bonds):
        if at + 2 * _WIDTH > text.shape[0]:
            return _UNKNOWN
        begin[bond] = _number(text, at) - 1
        end[bond] = _number(text, at + _WIDTH) - 1
        at = _next_line(text, at + 2 * _WIDTH)
    return _independent_rings(begin, end, num_atoms)


@kernel
def _rings_of_v3000(text, num_atoms, num_bonds):  # type: ignore[no-untyped-def]
    """The same for V3000 lines of bonds, ``M  V30 NUMBER ORDER ATOM ATOM``, of which none continues on the next."""
    ends = np.empty((2, num_bonds), np.int64)
    at = 0
    for bond in range(num_bonds):
        at += _V3000_PREFIX
        for word in range(4):
            while at < text.shape[0] and text[at] == _SPACE:
                at += 1
            number = 0
            while at < text.shape[0] and _ZERO <= text[at] < _ZERO + 10 and number < 1 << 32:
                number = 10 * number + text[at] - _ZERO
                at += 1
            if word >= 2:
                ends[word - 2, bond] = number - 1
        at = _next_line(text, at)
        if at > text.shape[0] or text[at - 2] == _MINUS or text[at - 3] == _MINUS:
            return (
                _UNKNOWN  # the record ends, or the line continues, perhaps before a carriage return
            )
    return _independent_rings(ends[0], ends[1], num_atoms)


@kernel
def _next_line(text, at):  # type: ignore[no-untyped-def]
    while at < text.shape[0] and text[at] != _NEWLINE:
        at += 1
    return at + 1


@kernel
def _number(text, at):  # type: ignore[no-untyped-def]
    """The number in the columns from ``at``; 0, which no atom has, if there is something else."""
    number = 0
    for place in range(at, at + _WIDTH):
        digit = int(text[place]) - _ZERO
        if 0 <= digit <= 9:
            number = 10 * number + digit
        elif text[place] != _SPACE:
            return 0
    return number
