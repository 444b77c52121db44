"""Records of QM9 as published: coordinates in an extended XYZ layout, and bonds from the SMILES in the same file.

Layout of a molecule with N atoms (readme.txt of doi:10.6084/m9.figshare.c.978904): the number of atoms; a line
``gdb INDEX`` with 15 properties; N lines with element, x, y, z (angstrom) and Mulliken charge; the frequencies; the
SMILES from GDB-17 and from the relaxed geometry; the two InChIs. Exponents may be written as ``*^``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase

from moleblend_ray.chemistry.cost import smiles_may_be_slow
from moleblend_ray.chemistry.limited import LimitExceededError, limited
from moleblend_ray.chemistry.records import GeometryRow
from moleblend_ray.chemistry.rejection import Rejection, RejectionCode

QM9_PROPERTIES: Final[dict[str, str]] = {
    "A": "GHz",
    "B": "GHz",
    "C": "GHz",
    "mu": "Debye",
    "alpha": "bohr^3",
    "homo": "hartree",
    "lumo": "hartree",
    "gap": "hartree",
    "r2": "bohr^2",
    "zpve": "hartree",
    "u0": "hartree",
    "u298": "hartree",
    "h298": "hartree",
    "g298": "hartree",
    "cv": "cal/(mol K)",
}
"""Name -> unit, in the order of the property line."""

_REACH: Final = (1.25, 1.15, 1.35)
"""Heavy atoms are bonded if their distance is below this multiple of the sum of their covalent radii. The values are
tried in turn: no single one fits all molecules, as strained cages have unbonded atoms closer than some bonds."""
_HYDROGEN_REACH: Final = 1.35
_LONG_MULTIPLE_BOND: Final = 0.93
"""A double or triple bond longer than this multiple of the sum of radii may be elsewhere in a symmetric skeleton."""
_MAX_MAPPINGS: Final = 64
_MANY_ATOMS: Final = 64
"""More than twice as many as the largest molecule of QM9 has. For many atoms, mappings can be hard to find."""


class XyzRecord(NamedTuple):
    """One molecule of N atoms as in its file."""

    number: int
    """Number of the molecule in the collection, from 1."""
    atomic_numbers: NDArray[np.int32]
    """(N,)"""
    positions: NDArray[np.float64]
    """(N, 3), angstrom."""
    properties: dict[str, float]
    """Name -> value, with the names and units of ``QM9_PROPERTIES``."""
    smiles: tuple[str, ...]
    """The SMILES from the relaxed geometry, then the one from GDB-17 if it is another."""


def parse_xyz(text: str) -> XyzRecord | Rejection:
    """The record in the text of a file, or a rejection that says what is wrong with it; never raises."""
    lines = text.splitlines()
    try:
        num_atoms = int(lines[0])
        if num_atoms < 1 or len(lines) < num_atoms + 4:
            raise ValueError(f"{len(lines)} lines for {num_atoms} atoms")
        tag, index, *values = lines[1].split()
        if not tag.startswith("gdb") or len(values) != len(QM9_PROPERTIES):
            raise ValueError(f"the property line has {len(values)} numbers after {tag!r}")
        atoms = [line.split() for line in lines[2 : num_atoms + 2]]
        return XyzRecord(
            number=int(index),
            atomic_numbers=np.array([_atomic_number(atom[0]) for atom in atoms], np.int32),
            positions=np.array([[_number(cell) for cell in atom[1:4]] for atom in atoms]),
            properties=dict(zip(QM9_PROPERTIES, map(_number, values), strict=True)),
            smiles=tuple(dict.fromkeys(reversed(lines[num_atoms + 3].split()))),
        )
    # RuntimeError: RDKit does not know the element.
    except (ValueError, IndexError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:120]
        return Rejection(
            code=RejectionCode.INVALID_RECORD,
            detail=f"no record in the XYZ layout of QM9: {reason}",
        )


def bonded_geometry(record: XyzRecord) -> GeometryRow | Rejection:
    """The record with the bonds and charges of the first of its SMILES that fits its geometry.

    A SMILES fits if there is a mapping of its atoms to those of the geometry under which elements, bonded neighbours
    (by covalent radii) and numbers of hydrogens agree. Of several mappings, the one with the shortest multiple bonds is
    taken.
    """
    if not np.isfinite(record.positions).all():
        detail = "a coordinate is not finite"
        return Rejection(code=RejectionCode.NON_FINITE_COORDINATES, detail=detail)
    if len(record.atomic_numbers) <= _MANY_ATOMS and not any(
        map(smiles_may_be_slow, record.smiles)
    ):
        return fitted_geometry(record)
    try:
        row: GeometryRow | Rejection = limited(fitted_geometry, record)
    except LimitExceededError as error:
        return Rejection(code=RejectionCode.TOO_COMPLEX, detail=str(error))
    return row


def fitted_geometry(record: XyzRecord) -> GeometryRow | Rejection:
    """What :func:`bonded_geometry` returns, however long it takes."""
    with rdBase.BlockLogs():
        for smiles in record.smiles:
            row = _with_bonds_of(smiles, record)
            if row is not None:
                return row
    shown = " or ".join(record.smiles) or "no SMILES"
    return Rejection(
        code=RejectionCode.GEOMETRY_MISMATCH,
        detail=f"the geometry does not have the bonds of {shown}",
    )


def _number(text: str) -> float:
    return float(text.replace("*^", "e"))


@lru_cache(maxsize=256)
def _atomic_number(symbol: str) -> int:
    return int(Chem.GetPeriodicTable().GetAtomicNumber(symbol))


@lru_cache(maxsize=1)
def _radii() -> NDArray[np.float64]:
    """(119,), covalent radius by atomic number, angstrom."""
    table = Chem.GetPeriodicTable()
    return np.array([table.GetRcovalent(number) for number in range(119)])


class _Skeleton(NamedTuple):
    """The H heavy atoms of a geometry and their bonds; indices count heavy atoms only."""

    atoms: NDArray[np.intp]
    """(H,), index of each heavy atom in the record."""
    bonds: frozenset[tuple[int, int]]
    """Pairs (lower index, higher index)."""
    num_hydrogens: tuple[int, ...]
    """(H,), hydrogens bonded to each heavy atom."""
    reaches: NDArray[np.float64]
    """(H, H), distance of each pair as a multiple of the sum of their covalent radii."""


class _Drawing(NamedTuple):
    """The H heavy atoms of a SMILES and their bonds, as plain Python values."""

    atoms: list[tuple[int, int]]
    """(H,), atomic number and number of hydrogens."""
    charges: list[int]
    """(H,), formal charges."""
    bonds: list[tuple[int, int, int]]
    """Atoms and Kekule order of each bond."""

    def pairs(self, mapping: Sequence[int]) -> set[tuple[int, int]]:
        """The atoms of each bond (lower index, higher index) after mapping them."""
        ends = ((mapping[begin], mapping[end]) for begin, end, _ in self.bonds)
        return {(begin, end) if begin < end else (end, begin) for begin, end in ends}


def _drawing(smiles: str) -> _Drawing | None:
    mol: Chem.Mol | None = Chem.MolFromSmiles(smiles)
    if mol is None:
        return None
    Chem.Kekulize(mol, clearAromaticFlags=True)
    # By index, which is faster than iterating over RDKit's sequences of atoms and bonds.
    atoms = [mol.GetAtomWithIdx(index) for index in range(mol.GetNumAtoms())]
    bonds = [mol.GetBondWithIdx(index) for index in range(mol.GetNumBonds())]
    return _Drawing(
        [(atom.GetAtomicNum(), atom.GetTotalNumHs()) for atom in atoms],
        [atom.GetFormalCharge() for atom in atoms],
        [(b.GetBeginAtomIdx(), b.GetEndAtomIdx(), int(b.GetBondTypeAsDouble())) for b in bonds],
    )


def _with_bonds_of(smiles: str, record: XyzRecord) -> GeometryRow | None:
    drawing = _drawing(smiles)
    heavy = np.flatnonzero(record.atomic_numbers > 1)
    if drawing is None or len(drawing.atoms) != len(heavy):
        return None
    reaches = _reaches(record)
    owners = _hydrogen_owners(record, reaches, heavy)
    if owners is None:
        return None
    for reach in _REACH:
        skeleton = _skeleton(record, reaches, owners, heavy, reach)
        mapping = _mapping(drawing, record, skeleton)
        if mapping is not None:
            return _row(drawing, record, owners, heavy[list(mapping)])
    return None


def _reaches(record: XyzRecord) -> NDArray[np.float64]:
    """(N, N), distance of each pair of atoms as a multiple of the sum of their covalent radii."""
    places, radii = record.positions, _radii()[record.atomic_numbers]
    apart = places[:, None] - places
    distances: NDArray[np.float64] = np.sqrt(np.einsum("ijk,ijk->ij", apart, apart))
    return distances / (radii[:, None] + radii)


def _hydrogen_owners(
    record: XyzRecord, reaches: NDArray[np.float64], heavy: NDArray[np.intp]
) -> NDArray[np.intp] | None:
    """The nearest heavy atom of each hydrogen, in their order; None if a hydrogen is too far from all of them."""
    hydrogens = np.flatnonzero(record.atomic_numbers == 1)
    if not hydrogens.size:
        return np.empty(0, np.intp)
    to_heavy = reaches[hydrogens][:, heavy]
    if to_heavy.min(axis=1).max() > _HYDROGEN_REACH:
        return None
    owners: NDArray[np.intp] = heavy[to_heavy.argmin(axis=1)]
    return owners


def _skeleton(
    record: XyzRecord,
    reaches: NDArray[np.float64],
    owners: NDArray[np.intp],
    heavy: NDArray[np.intp],
    reach: float,
) -> _Skeleton:
    between = reaches[heavy][:, heavy]
    first, second = np.nonzero(between < reach)
    pairs = zip(first.tolist(), second.tolist(), strict=True)
    counts = np.bincount(owners, minlength=len(record.atomic_numbers))[heavy]
    return _Skeleton(
        heavy,
        frozenset((begin, end) for begin, end in pairs if begin < end),
        tuple(counts.tolist()),
        between,
    )


def _mapping(drawing: _Drawing, record: XyzRecord, skeleton: _Skeleton) -> Sequence[int] | None:
    """Index among the heavy atoms of the skeleton for each atom of the drawing; None if the graphs differ."""
    if len(drawing.bonds) != len(skeleton.bonds):
        return None
    numbers = record.atomic_numbers[skeleton.atoms].tolist()
    found = list(zip(numbers, skeleton.num_hydrogens, strict=True))
    if sorted(drawing.atoms) != sorted(found):
        return None
    same = range(len(found))
    drawn = drawing.pairs(same)
    # For nearly all molecules, the atoms are in the order of the SMILES.
    if (
        drawing.atoms == found
        and drawn == skeleton.bonds
        and not _has_long_multiple_bond(drawing, skeleton)
    ):
        return same
    matches = _graph(found, skeleton.bonds).GetSubstructMatches(
        _graph(drawing.atoms, drawn), uniquify=False, maxMatches=_MAX_MAPPINGS
    )
    best: Sequence[int] | None = min(
        matches, key=lambda match: _multiple_bond_length(drawing, skeleton, match), default=None
    )
    return best


def _graph(
    atoms: list[tuple[int, int]], bonds: frozenset[tuple[int, int]] | set[tuple[int, int]]
) -> Chem.Mol:
    """A graph of elements and single bonds; numbers of hydrogens are isotopes, which substructure search compares."""
    graph = Chem.RWMol()
    for number, num_hydrogens in atoms:
        atom = Chem.Atom(number)
        atom.SetIsotope(num_hydrogens + 1)
        atom.SetNoImplicit(True)
        graph.AddAtom(atom)
    for begin, end in bonds:
        graph.AddBond(begin, end, Chem.BondType.SINGLE)
    graph.UpdatePropertyCache(strict=False)
    return graph


def _has_long_multiple_bond(drawing: _Drawing, skeleton: _Skeleton) -> bool:
    return any(
        order > 1 and skeleton.reaches[begin, end] > _LONG_MULTIPLE_BOND
        for begin, end, order in drawing.bonds
    )


def _multiple_bond_length(drawing: _Drawing, skeleton: _Skeleton, mapping: Sequence[int]) -> float:
    """Total length of multiple bonds under the mapping, in sums of radii; triple bonds count twice."""
    return sum(
        (order - 1) * float(skeleton.reaches[mapping[begin], mapping[end]])
        for begin, end, order in drawing.bonds
    )


def _row(
    drawing: _Drawing, record: XyzRecord, owners: NDArray[np.intp], atoms: NDArray[np.intp]
) -> GeometryRow:
    """The record with the drawing's bonds; ``atoms`` are the record's atoms for those of the drawing."""
    charges = np.zeros(len(record.atomic_numbers), np.int32)
    charges[atoms] = drawing.charges
    drawn = np.array(drawing.bonds, np.int32).reshape(-1, 3)
    hydrogens = np.flatnonzero(record.atomic_numbers == 1)
    return GeometryRow(
        atomic_numbers=record.atomic_numbers,
        formal_charges=charges,
        positions=record.positions,
        bond_begin=np.concatenate([atoms[drawn[:, 0]], owners]).astype(np.int32),
        bond_end=np.concatenate([atoms[drawn[:, 1]], hydrogens]).astype(np.int32),
        bond_order=np.concatenate([drawn[:, 2], np.ones(len(hydrogens), np.int32)]),
    )
