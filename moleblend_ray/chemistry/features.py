"""Atom and bond features as integer codes, exactly those of OGB 1.3.6 (``ogb.utils.features``).

OGB looks up every value in a Python list, by the name of an enum if there is one; here each value is an index into a
table that is made once. Values outside a vocabulary get its last code, "other". Only double bonds have a stereo code;
that of all others (such as atropisomers, for which OGB raises) is STEREONONE.

:func:`graph_arrays` reads RDKit's binary form of a molecule (:mod:`moleblend_ray.chemistry.binary`). For molecules
which that does not cover, RDKit is asked atom by atom, with the same result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase

from moleblend_ray.chemistry.binary import (
    CodeTables,
    decode_graphs,
    from_binary,
    is_known_format,
)
from moleblend_ray.vocabulary import ATOM_VOCAB_SIZES, BOND_VOCAB_SIZES

logger = logging.getLogger(__name__)

_CHIRALITIES = ("CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW", "CHI_OTHER")
_HYBRIDIZATIONS = ("SP", "SP2", "SP3", "SP3D", "SP3D2")
_BOND_TYPES = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")
_BOND_STEREOS = ("STEREONONE", "STEREOZ", "STEREOE", "STEREOCIS", "STEREOTRANS", "STEREOANY")
_MAX_CHARGE = 5


def _table(values: Mapping[int, object], names: Sequence[str], other: int) -> bytes:
    """Code of each value of an RDKit enum: the index of its name in ``names``, else ``other``."""
    code_of = {int(value): str(name) for value, name in values.items()}
    return _translation(
        lambda value: names.index(code_of[value]) if code_of.get(value) in names else other
    )


def _translation(code_of: Callable[[int], int]) -> bytes:
    """A table for ``bytes.translate``: the code of every value from 0 to 255."""
    return bytes(code_of(value) for value in range(256))


_DUMMY = ATOM_VOCAB_SIZES[0] - 1  # atomic number 0 is "other"; elements go up to 118
_ATOMIC_NUMBER = _translation(lambda number: number - 1 if 0 < number <= _DUMMY else _DUMMY)
_CHIRALITY = _table(Chem.ChiralType.values, _CHIRALITIES, ATOM_VOCAB_SIZES[1] - 1)
_DEGREE = _translation(lambda degree: min(degree, ATOM_VOCAB_SIZES[2] - 1))
_CHARGE_OTHER = ATOM_VOCAB_SIZES[3] - 1
_HYDROGENS = _translation(lambda hydrogens: min(hydrogens, ATOM_VOCAB_SIZES[4] - 1))
_RADICALS = _translation(lambda radicals: min(radicals, ATOM_VOCAB_SIZES[5] - 1))
_HYBRIDIZATION = _table(Chem.HybridizationType.values, _HYBRIDIZATIONS, ATOM_VOCAB_SIZES[6] - 1)
_BOND_TYPE = _table(Chem.BondType.values, _BOND_TYPES, BOND_VOCAB_SIZES[0] - 1)
_BOND_STEREO = _table(Chem.BondStereo.values, _BOND_STEREOS, BOND_VOCAB_SIZES[1] - 1)
_DOUBLE = _BOND_TYPES.index("DOUBLE")
_BOND_ORDER = {1.0: 0, 2.0: _DOUBLE, 3.0: 2, 1.5: 3}  # indices in _BOND_TYPES
_DATIVE = Chem.MolFromSmarts("*->*")


class GraphArrays(NamedTuple):
    """The atoms and bonds of one molecule as codes."""

    atom_features: NDArray[np.uint8]
    """(N, 9), columns as in ``vocabulary.ATOM_FEATURE_NAMES``."""
    bonds: NDArray[np.uint16]
    """(E, 2), begin and end atom, each bond once, in RDKit's order."""
    bond_features: NDArray[np.uint8]
    """(E, 3), columns as in ``vocabulary.BOND_FEATURE_NAMES``."""


def _charge_code(charge: int) -> int:
    return charge + _MAX_CHARGE if -_MAX_CHARGE <= charge <= _MAX_CHARGE else _CHARGE_OTHER


_TABLES = CodeTables(
    *(
        np.frombuffer(table, np.uint8)
        for table in (
            _ATOMIC_NUMBER,
            _CHIRALITY,
            _DEGREE,
            _translation(lambda byte: _charge_code(byte - 256 if byte > 127 else byte)),
            _HYDROGENS,
            _RADICALS,
            _HYBRIDIZATION,
            _BOND_TYPE,
            _BOND_STEREO,
        )
    )
)


def graph_arrays(binaries: Sequence[bytes]) -> list[GraphArrays]:
    """The OGB codes of sanitized molecules, each given in the form of ``binary.to_binary``."""
    _warn_of_unknown_format()
    decoded = decode_graphs(binaries, _TABLES, _DOUBLE)
    atom_ends = np.cumsum(decoded.num_atoms, dtype=np.int64).tolist()
    bond_ends = np.cumsum(decoded.num_bonds, dtype=np.int64).tolist()
    known = decoded.is_known.tolist()
    arrays = []
    atom = bond = 0
    for index, (next_atom, next_bond) in enumerate(zip(atom_ends, bond_ends, strict=True)):
        if known[index]:
            atoms, bonds = slice(atom, next_atom), slice(bond, next_bond)
            arrays.append(
                GraphArrays(
                    decoded.atom_features[atoms], decoded.bonds[bonds], decoded.bond_features[bonds]
                )
            )
        else:
            mol = from_binary(binaries[index])
            Chem.GetSymmSSSR(mol)  # its rings may be missing, or found by another method
            arrays.append(graph_arrays_by_getters(mol))
        atom, bond = next_atom, next_bond
    return arrays


@cache
def _warn_of_unknown_format() -> None:
    if not is_known_format():
        logger.warning(
            "RDKit %s writes molecules in a binary format that is not known here: atoms and bonds are read one by "
            "one, which makes featurizing half as fast",
            rdBase.rdkitVersion,
        )


def graph_arrays_by_getters(mol: Chem.Mol) -> GraphArrays:
    """The OGB codes of any sanitized molecule, from RDKit's getters; this takes longer than parsing the molecule."""
    return GraphArrays(_atom_features(mol), *_bond_arrays(mol))


def _atom_features(mol: Chem.Mol) -> NDArray[np.uint8]:
    """(N, 9), the 9 OGB codes of every atom.

    Computed column by column, so that per atom only RDKit's getters are called (0.1 us each) and no Python code runs.
    Getters that return an enum take 0.5 us, so the chirality is read only for atoms with three or more neighbours
    (RDKit's parsers keep none on others). ``GetAtomWithIdx`` is three times as fast as iterating over ``GetAtoms()``.
    """
    atoms = list(map(mol.GetAtomWithIdx, range(mol.GetNumAtoms())))
    degrees = bytes(map(Chem.Atom.GetTotalDegree, atoms))
    hydrogens = bytes(map(Chem.Atom.GetTotalNumHs, atoms))
    chiralities = bytearray(len(atoms))
    for index, (degree, count) in enumerate(zip(degrees, hydrogens, strict=True)):
        if degree - count > 2:
            chiralities[index] = _CHIRALITY[atoms[index].GetChiralTag()]
    charges = map(_charge_code, map(Chem.Atom.GetFormalCharge, atoms))
    columns = (
        bytes(map(Chem.Atom.GetAtomicNum, atoms)).translate(_ATOMIC_NUMBER),
        chiralities,
        degrees.translate(_DEGREE),
        bytes(charges),
        hydrogens.translate(_HYDROGENS),
        bytes(map(Chem.Atom.GetNumRadicalElectrons, atoms)).translate(_RADICALS),
        bytes(map(Chem.Atom.GetHybridization, atoms)).translate(_HYBRIDIZATION),
        bytes(map(Chem.Atom.GetIsAromatic, atoms)),
        bytes(map(Chem.Atom.IsInRing, atoms)),
    )
    return _rows(columns)


def _bond_arrays(mol: Chem.Mol) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Atom pairs (E, 2) and the 3 OGB codes (E, 3) of every bond; only double bonds have a stereo code."""
    bonds = list(map(mol.GetBondWithIdx, range(mol.GetNumBonds())))
    kinds = _bond_kinds(mol, bonds)
    stereos = bytearray(len(bonds))
    for index, kind in enumerate(kinds):
        if kind == _DOUBLE:
            stereos[index] = _BOND_STEREO[bonds[index].GetStereo()]
    ends = np.empty((len(bonds), 2), dtype=np.uint16)
    ends[:, 0] = list(map(Chem.Bond.GetBeginAtomIdx, bonds))
    ends[:, 1] = list(map(Chem.Bond.GetEndAtomIdx, bonds))
    return ends, _rows((kinds, stereos, bytes(map(Chem.Bond.GetIsConjugated, bonds))))


def _bond_kinds(mol: Chem.Mol, bonds: Sequence[Chem.Bond]) -> bytes:
    """The code of each bond's type: from its order, which is faster to get, unless that is ambiguous."""
    # The order of dative bonds is 1 too.
    if not mol.HasSubstructMatch(_DATIVE):
        try:
            return bytes(map(_BOND_ORDER.__getitem__, map(Chem.Bond.GetBondTypeAsDouble, bonds)))
        # KeyError: another order (quadruple bond). RuntimeError: a bond without an order (hydrogen bond).
        except (KeyError, RuntimeError):
            pass
    return bytes(map(Chem.Bond.GetBondType, bonds)).translate(_BOND_TYPE)


def _rows(columns: Sequence[bytes | bytearray]) -> NDArray[np.uint8]:
    """Columns of bytes as a writable, contiguous array (rows, columns)."""
    flat = np.frombuffer(b"".join(columns), dtype=np.uint8)
    return flat.reshape(len(columns), len(columns[0])).T.copy()
