"""Records of QM9 as published: coordinates in an extended XYZ layout, bonds from the SMILES beside them.

Layout (readme.txt of doi:10.6084/m9.figshare.c.978904, N atoms): the number of atoms; a line ``gdb INDEX`` with
15 properties; N lines of element, x, y, z (angstrom) and Mulliken charge; the frequencies; the SMILES from GDB-17
and from the relaxed geometry; the InChIs likewise. Exponents may be spelled ``*^``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase

from moleblend_ray.chemistry.molecule import GeometryRow, Rejection, RejectionCode

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
"""Heavy atoms closer than this many sums of their covalent radii are bonded; tried in turn. Strained cages have
unbonded atoms closer than some bonds are long, so no single value fits all."""
_HYDROGEN_REACH: Final = 1.35
_LONG_MULTIPLE_BOND: Final = 0.93
"""A double or triple bond longer than this many sums of radii may belong elsewhere in a symmetric skeleton."""
_MAX_MAPPINGS: Final = 64


class XyzRecord(NamedTuple):
    """One molecule of N atoms as it stands in its file."""

    number: int
    """Number of the molecule in the collection, from 1."""
    atomic_numbers: NDArray[np.int32]
    """(N,)"""
    positions: NDArray[np.float64]
    """(N, 3), angstrom."""
    properties: dict[str, float]
    """By the names of ``QM9_PROPERTIES``, in their units."""
    smiles: tuple[str, ...]
    """From the relaxed geometry, then from GDB-17, without repeats."""


def parse_xyz(text: str) -> XyzRecord | Rejection:
    """The record of a file's text, or what is wrong with it; never raises."""
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
    # RuntimeError: RDKit knows no such element.
    except (ValueError, IndexError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:120]
        return Rejection(
            code=RejectionCode.INVALID_RECORD,
            detail=f"no record in the XYZ layout of QM9: {reason}",
        )


def bonded_geometry(record: XyzRecord) -> GeometryRow | Rejection:
    """The record with bonds and charges of the first of its SMILES whose atoms can be told in its geometry.

    A SMILES fits if elements, bonded neighbours (by covalent radii) and numbers of hydrogens agree atom by atom
    under some mapping; of several mappings, the one whose multiple bonds are shortest is taken.
    """
    if not np.isfinite(record.positions).all():
        detail = "a coordinate is not finite"
        return Rejection(code=RejectionCode.NON_FINITE_COORDINATES, detail=detail)
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


@lru_cache(maxsize=256)
def _radius(number: int) -> float:
    return float(Chem.GetPeriodicTable().GetRcovalent(number))


class _Skeleton(NamedTuple):
    """H heavy atoms of a geometry, by their place among the heavy atoms."""

    atoms: NDArray[np.intp]
    """(H,) index of each in the record."""
    bonds: frozenset[tuple[int, int]]
    """Pairs (lower, higher)."""
    num_hydrogens: tuple[int, ...]
    """(H,)"""


def _with_bonds_of(smiles: str, record: XyzRecord) -> GeometryRow | None:
    mol: Chem.Mol | None = Chem.MolFromSmiles(smiles)
    if mol is None or mol.GetNumAtoms() != np.count_nonzero(record.atomic_numbers > 1):
        return None
    Chem.Kekulize(mol, clearAromaticFlags=True)
    owners = _hydrogen_owners(record)
    if owners is None:
        return None
    for reach in _REACH:
        skeleton = _skeleton(record, owners, reach)
        mapping = _mapping(mol, record, skeleton)
        if mapping is not None:
            return _row(mol, record, owners, skeleton.atoms[list(mapping)])
    return None


def _hydrogen_owners(record: XyzRecord) -> NDArray[np.intp] | None:
    """For each hydrogen, in order, the nearest heavy atom; None if one is out of reach of all."""
    heavy = np.flatnonzero(record.atomic_numbers > 1)
    hydrogens = np.flatnonzero(record.atomic_numbers == 1)
    distances = np.linalg.norm(
        record.positions[hydrogens, None] - record.positions[None, heavy], axis=-1
    )
    radii = np.array([_radius(int(number)) for number in record.atomic_numbers[heavy]])
    excess = distances / (radii + _radius(1))
    nearest = excess.argmin(axis=1) if hydrogens.size else np.empty(0, np.intp)
    if (excess[np.arange(len(hydrogens)), nearest] > _HYDROGEN_REACH).any():
        return None
    owners: NDArray[np.intp] = heavy[nearest]
    return owners


def _skeleton(record: XyzRecord, owners: NDArray[np.intp], reach: float) -> _Skeleton:
    heavy = np.flatnonzero(record.atomic_numbers > 1)
    places = record.positions[heavy]
    radii = np.array([_radius(int(number)) for number in record.atomic_numbers[heavy]])
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    first, second = np.nonzero(np.triu(distances < reach * (radii[:, None] + radii), k=1))
    counts = np.bincount(owners, minlength=len(record.atomic_numbers))[heavy]
    return _Skeleton(
        heavy,
        frozenset(zip(first.tolist(), second.tolist(), strict=True)),
        tuple(counts.tolist()),
    )


def _mapping(mol: Chem.Mol, record: XyzRecord, skeleton: _Skeleton) -> tuple[int, ...] | None:
    """Place among the heavy atoms for each atom of ``mol``; None if the graphs differ."""
    if mol.GetNumBonds() != len(skeleton.bonds):
        return None
    numbers = record.atomic_numbers[skeleton.atoms].tolist()
    wanted = [(atom.GetAtomicNum(), atom.GetTotalNumHs()) for atom in mol.GetAtoms()]
    found = list(zip(numbers, skeleton.num_hydrogens, strict=True))
    if sorted(wanted) != sorted(found):
        return None
    same = tuple(range(len(found)))
    # The published order is that of the SMILES for nearly all molecules.
    if (
        wanted == found
        and {_pair(bond, same) for bond in mol.GetBonds()} == skeleton.bonds
        and not _has_long_multiple_bond(mol, record, skeleton)
    ):
        return same
    matches = _graph(found, skeleton.bonds).GetSubstructMatches(
        _graph(wanted, {_pair(bond, same) for bond in mol.GetBonds()}),
        uniquify=False,
        maxMatches=_MAX_MAPPINGS,
    )
    if not matches:
        return None
    places = record.positions[skeleton.atoms]
    best: tuple[int, ...] = min(
        map(tuple, matches), key=lambda match: _multiple_bond_length(mol, places, match)
    )
    return best


def _pair(bond: Chem.Bond, mapping: tuple[int, ...]) -> tuple[int, int]:
    begin, end = mapping[bond.GetBeginAtomIdx()], mapping[bond.GetEndAtomIdx()]
    return (begin, end) if begin < end else (end, begin)


def _graph(
    atoms: list[tuple[int, int]], bonds: frozenset[tuple[int, int]] | set[tuple[int, int]]
) -> Chem.Mol:
    """Elements and single bonds; hydrogens are counted in the isotope, which substructure search compares."""
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


def _has_long_multiple_bond(mol: Chem.Mol, record: XyzRecord, skeleton: _Skeleton) -> bool:
    for bond in mol.GetBonds():
        if bond.GetBondTypeAsDouble() > 1:
            ends = skeleton.atoms[[bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()]]
            length = np.linalg.norm(np.subtract(*record.positions[ends]))
            radii = sum(_radius(int(number)) for number in record.atomic_numbers[ends])
            if length > _LONG_MULTIPLE_BOND * radii:
                return True
    return False


def _multiple_bond_length(
    mol: Chem.Mol, places: NDArray[np.float64], mapping: tuple[int, ...]
) -> float:
    return sum(
        (bond.GetBondTypeAsDouble() - 1)
        * float(np.linalg.norm(np.subtract(*places[list(_pair(bond, mapping))])))
        for bond in mol.GetBonds()
    )


def _row(
    mol: Chem.Mol, record: XyzRecord, owners: NDArray[np.intp], atoms: NDArray[np.intp]
) -> GeometryRow:
    """Lists of atoms and bonds; ``atoms`` gives the atom of the record for each of ``mol``."""
    charges = np.zeros(len(record.atomic_numbers), np.int32)
    charges[atoms] = [atom.GetFormalCharge() for atom in mol.GetAtoms()]
    bonds = [
        (atoms[b.GetBeginAtomIdx()], atoms[b.GetEndAtomIdx()], int(b.GetBondTypeAsDouble()))
        for b in mol.GetBonds()
    ]
    hydrogens = np.flatnonzero(record.atomic_numbers == 1)
    bonds += [(owner, hydrogen, 1) for owner, hydrogen in zip(owners, hydrogens, strict=True)]
    begin, end, order = np.array(bonds, np.int32).reshape(-1, 3).T
    return GeometryRow(
        atomic_numbers=record.atomic_numbers,
        formal_charges=charges,
        positions=record.positions,
        bond_begin=begin,
        bond_end=end,
        bond_order=order,
    )
