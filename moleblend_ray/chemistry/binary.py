"""Atom and bond codes from RDKit's binary form of molecules, read by one compiled pass.

Reading the properties of atoms and bonds from Python takes about 12 calls per atom, as long as parsing the SMILES.
``Mol.ToBinary`` writes all of them in one call. Its format (``Code/GraphMol/MolPickler.cpp``) is versioned. A molecule
with another version, or with parts that the kernel does not read (queries, atom maps, dummy labels, residues, more than
255 atoms), is reported as unknown, and the caller asks RDKit atom by atom.

In this format an atom consists of its atomic number, a byte of flags, an int32 that says which of eight fields follow
(charge, chirality, hybridization, explicit hydrogens, two valences, radicals, isotope), and these fields. A bond
consists of its two atoms, a byte of flags, and type, direction and stereo if the flags say so. Fields with the default
value are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem

from moleblend_ray.compilation import kernel

_INT: Final = 4
_HEADER: Final = np.array([0xDEADBEEF, 0, 16, 4, 0], "<u4").view(np.uint8)
"""Byte order mark, tag, and version 16.4.0 of the format: the only one that is read here."""
_HEADER_BYTES: Final = len(_HEADER)
_NO_PROPERTIES: Final = 0
_MAX_ATOMS: Final = 255
"""Up to this number of atoms, indices are stored as bytes."""

_BEGIN_ATOMS: Final = 0x01
_BEGIN_BONDS: Final = 0x0B
_BEGIN_SSSR: Final = 0x14
_BEGIN_SYMMETRIC_SSSR: Final = 0x42
_BEGIN_FAST_RINGS: Final = 0x43

# Flags of an atom.
_IS_AROMATIC: Final = 1 << 6
_NO_IMPLICIT_HYDROGENS: Final = 1 << 5
_PLAIN_ATOM: Final = _IS_AROMATIC | _NO_IMPLICIT_HYDROGENS
# Fields of an atom, in the order in which they follow.
_CHARGE: Final = 1 << 1
_CHIRALITY: Final = 1 << 2
_HYBRIDIZATION: Final = 1 << 3
_EXPLICIT_HYDROGENS: Final = 1 << 4
_EXPLICIT_VALENCE: Final = 1 << 5
_IMPLICIT_VALENCE: Final = 1 << 6
_RADICALS: Final = 1 << 7
_ISOTOPE: Final = 1 << 8
_KNOWN_FIELDS: Final = 0x1FE
# Flags of a bond.
_BOND_IS_AROMATIC: Final = 1 << 6
_IS_CONJUGATED: Final = 1 << 5
_HAS_TYPE: Final = 1 << 3
_HAS_DIRECTION: Final = 1 << 2
_HAS_STEREO: Final = 1 << 1
_PLAIN_BOND: Final = _BOND_IS_AROMATIC | _IS_CONJUGATED | _HAS_TYPE | _HAS_DIRECTION | _HAS_STEREO

_SP3: Final = int(Chem.HybridizationType.SP3)
_SINGLE: Final = int(Chem.BondType.SINGLE)
_ZERO: Final = int(Chem.BondType.ZERO)

_CHIRAL_NEIGHBOURS: Final = 3
"""Fewest neighbours with which a chirality has a meaning; atoms whose hydrogens were removed may have fewer."""


class CodeTables(NamedTuple):
    """Tables from RDKit's values, as bytes, to codes; each (256,) uint8."""

    atomic_number: NDArray[np.uint8]
    chirality: NDArray[np.uint8]
    degree: NDArray[np.uint8]
    charge: NDArray[np.uint8]
    """Indexed by the charge in two's complement."""
    hydrogens: NDArray[np.uint8]
    radicals: NDArray[np.uint8]
    hybridization: NDArray[np.uint8]
    bond_type: NDArray[np.uint8]
    bond_stereo: NDArray[np.uint8]


class DecodedGraphs(NamedTuple):
    """M molecules of A atoms and E bonds in total, molecule after molecule."""

    is_known: NDArray[np.bool_]
    """(M,), False for molecules with parts that are not read here; their rows below are undefined."""
    num_atoms: NDArray[np.int32]
    """(M,)"""
    num_bonds: NDArray[np.int32]
    """(M,)"""
    atom_features: NDArray[np.uint8]
    """(A, 9), columns ``vocabulary.ATOM_FEATURE_NAMES``."""
    bonds: NDArray[np.uint16]
    """(E, 2), begin and end atom, each bond once, in RDKit's order."""
    bond_features: NDArray[np.uint8]
    """(E, 3), columns ``vocabulary.BOND_FEATURE_NAMES``."""


def to_binary(mol: Chem.Mol) -> bytes:
    """RDKit's binary form, without properties.

    Rings must have been found: a molecule whose rings RDKit has forgotten (it does so when it removes hydrogens) is not
    read here.
    """
    binary: bytes = mol.ToBinary(_NO_PROPERTIES)
    return binary


def from_binary(binary: bytes) -> Chem.Mol:
    """The molecule that :func:`to_binary` wrote."""
    make: Any = Chem.Mol  # RDKit's type stub says str instead of bytes
    mol: Chem.Mol = make(binary)
    return mol


def decode_graphs(binaries: Sequence[bytes], tables: CodeTables, stereo_type: int) -> DecodedGraphs:
    """The codes of sanitized molecules, each given in the form of :func:`to_binary`.

    Only bonds whose type has the code ``stereo_type`` get a stereo code.
    """
    data = np.frombuffer(b"".join(binaries), np.uint8)
    starts = np.zeros(len(binaries) + 1, np.int64)
    np.cumsum([len(binary) for binary in binaries], out=starts[1:])
    num_atoms = np.zeros(len(binaries), np.int32)
    num_bonds = np.zeros(len(binaries), np.int32)
    _read_sizes(data, starts, _HEADER, num_atoms, num_bonds)
    decoded = DecodedGraphs(
        np.zeros(len(binaries), np.bool_),
        num_atoms,
        num_bonds,
        np.zeros((num_atoms.sum(dtype=np.int64), 9), np.uint8),
        np.zeros((num_bonds.sum(dtype=np.int64), 2), np.uint16),
        np.zeros((num_bonds.sum(dtype=np.int64), 3), np.uint8),
    )
    _decode_all(data, starts, tables, stereo_type, decoded)
    return decoded


def is_known_format() -> bool:
    """Whether the installed RDKit writes the version of the binary form that is read here."""
    return to_binary(Chem.MolFromSmiles("C")).startswith(_HEADER.tobytes())


@kernel
def _int32(data, at):  # type: ignore[no-untyped-def]
    return (
        np.int64(data[at])
        | (np.int64(data[at + 1]) << 8)
        | (np.int64(data[at + 2]) << 16)
        | (np.int64(data[at + 3]) << 24)
    )


@kernel
def _read_sizes(data, starts, header, num_atoms, num_bonds):  # type: ignore[no-untyped-def]
    """Counts of atoms and bonds of molecules with the known header and byte-sized indices; 0 for all others."""
    for molecule in range(num_atoms.shape[0]):
        start = starts[molecule]
        if not np.array_equal(data[start : start + header.shape[0]], header):
            continue
        atoms = _int32(data, start + header.shape[0])
        if atoms <= _MAX_ATOMS:
            num_atoms[molecule] = atoms
            num_bonds[molecule] = _int32(data, start + header.shape[0] + _INT)


@kernel
def _decode_all(data, starts, tables, stereo_type, out):  # type: ignore[no-untyped-def]
    atom, bond = 0, 0
    for molecule in range(out.num_atoms.shape[0]):
        next_atom = atom + out.num_atoms[molecule]
        next_bond = bond + out.num_bonds[molecule]
        if next_atom > atom:
            out.is_known[molecule] = _decode(
                data,
                starts[molecule],
                tables,
                stereo_type,
                out.atom_features[atom:next_atom],
                out.bonds[bond:next_bond],
                out.bond_features[bond:next_bond],
            )
        atom, bond = next_atom, next_bond


@kernel
def _decode(data, start, tables, stereo_type, atoms, bonds, bond_features):  # type: ignore[no-untyped-def]
    """Fill the arrays of one molecule; False if it has parts that are not read here."""
    # The header is followed by the counts of atoms and bonds (int32 each) and a byte of flags.
    at = start + _HEADER_BYTES + 2 * _INT + 1
    if data[at] != _BEGIN_ATOMS:
        return False
    at = _decode_atoms(data, at + 1, tables, atoms)
    if at < 0 or data[at] != _BEGIN_BONDS:
        return False
    at = _decode_bonds(data, at + 1, tables, stereo_type, atoms, bonds, bond_features)
    if at < 0:
        return False
    if data[at] == _BEGIN_FAST_RINGS and (bond_features[:, 0] == tables.bond_type[_ZERO]).any():
        return (
            False  # these rings may contain dative bonds, which RDKit does not count as ring bonds
        )
    for atom in range(atoms.shape[0]):
        if atoms[atom, 2] - np.int64(atoms[atom, 4]) < _CHIRAL_NEIGHBOURS:
            atoms[atom, 1] = 0
        atoms[atom, 2] = tables.degree[atoms[atom, 2]]
        atoms[atom, 4] = tables.hydrogens[atoms[atom, 4]]
    return _decode_rings(data, at, atoms)


@kernel
def _decode_atoms(data, at, tables, atoms):  # type: ignore[no-untyped-def]
    """Fill all columns except ring membership, degree and hydrogens as counts; returns where the atoms end, or -1."""
    for atom in range(atoms.shape[0]):
        number, flags = data[at], data[at + 1]
        fields = _int32(data, at + 2)
        at += 2 + _INT
        # The flag of a dummy atom, whose label follows as a property, is not one of the plain flags.
        if flags & ~_PLAIN_ATOM or fields & ~_KNOWN_FIELDS:
            return -1
        charge, chirality, hybridization, hydrogens, radicals = 0, 0, _SP3, 0, 0
        if fields & _CHARGE:
            charge = data[at]
            at += 1
        if fields & _CHIRALITY:
            chirality = data[at]
            at += 1
        if fields & _HYBRIDIZATION:
            hybridization = data[at]
            at += 1
        if fields & _EXPLICIT_HYDROGENS:
            hydrogens = data[at]
            at += 1
        if fields & _EXPLICIT_VALENCE:
            at += 1
        if fields & _IMPLICIT_VALENCE:
            if not flags & _NO_IMPLICIT_HYDROGENS:
                hydrogens += data[at]
            at += 1
        if fields & _RADICALS:
            radicals = data[at]
            at += 1
        if fields & _ISOTOPE:
            at += _INT
        atoms[atom, 0] = tables.atomic_number[number]
        atoms[atom, 1] = tables.chirality[chirality]
        atoms[atom, 2] = hydrogens  # neighbours are added with the bonds
        atoms[atom, 3] = tables.charge[charge]
        atoms[atom, 4] = hydrogens
        atoms[atom, 5] = tables.radicals[radicals]
        atoms[atom, 6] = tables.hybridization[hybridization]
        atoms[atom, 7] = 1 if flags & _IS_AROMATIC else 0
        atoms[atom, 8] = 0
    return at


@kernel
def _decode_bonds(data, at, tables, stereo_type, atoms, bonds, bond_features):  # type: ignore[no-untyped-def]
    """Fill the bonds and add the neighbours to the atoms' degrees; returns where the bonds end, or -1."""
    for bond in range(bonds.shape[0]):
        begin, end, flags = data[at], data[at + 1], data[at + 2]
        at += 3
        if flags & ~_PLAIN_BOND:
            return -1
        kind, stereo = _SINGLE, 0
        if flags & _HAS_TYPE:
            kind = data[at]
            at += 1
        if flags & _HAS_DIRECTION:
            at += 1
        if flags & _HAS_STEREO:
            stereo = data[at]
            at += 2 + data[at + 1]  # skips the atoms that the stereo refers to
        code = tables.bond_type[kind]
        bonds[bond, 0] = begin
        bonds[bond, 1] = end
        bond_features[bond, 0] = code
        bond_features[bond, 1] = tables.bond_stereo[stereo] if code == stereo_type else 0
        bond_features[bond, 2] = 1 if flags & _IS_CONJUGATED else 0
        atoms[begin, 2] = min(np.int64(atoms[begin, 2]) + 1, 255)
        atoms[end, 2] = min(np.int64(atoms[end, 2]) + 1, 255)
    return at


@kernel
def _decode_rings(data, at, atoms):  # type: ignore[no-untyped-def]
    """Mark the atoms in rings, with whichever method RDKit found the rings; False if it has not."""
    kind = data[at]
    if kind != _BEGIN_SYMMETRIC_SSSR and kind != _BEGIN_SSSR and kind != _BEGIN_FAST_RINGS:
        return False
    num_rings = _int32(data, at + 1)
    at += 1 + _INT
    for _ in range(num_rings):
        size = data[at]
        for atom in data[at + 1 : at + 1 + size]:
            atoms[atom, 8] = 1
        at += 1 + size
    return True
