"""Source records -> sanitized RDKit molecules of the atoms that are kept, or the reason why there is none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem

from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.chemistry.records import GeometryRow, MolBlock, SmilesText, SourceRecord
from moleblend_ray.chemistry.rejection import RejectedError, RejectionCode, one_line
from moleblend_ray.vocabulary import ATOM_VOCAB_SIZES

# For ten thousand atoms, RDKit takes minutes to find rings or to parse as many ring closures, which would stop a job of
# small molecules. So records far longer than those of small molecules are first checked. Characters per atom:
_LONG_SMILES: Final = 8
_LONGEST_SMILES: Final = 64
_LONG_MOLBLOCK: Final = 256  # an atom line, two bond lines and as many for hydrogens
_FEW_ATOMS: Final = 256

_NON_FINITE = re.compile(r"(?i)(?<![\w.])(?:nan|inf|infinity)(?![\w.])")

_DOUBLE_BOND = Chem.MolFromSmarts("*=*")

_KEKULE = {1: Chem.BondType.SINGLE, 2: Chem.BondType.DOUBLE, 3: Chem.BondType.TRIPLE}

_FARTHEST: Final = 1e6
"""Largest coordinate in angstrom: the squares of distances must stay finite in single precision, with digits to spare."""


class ReadMolecule(NamedTuple):
    """A sanitized molecule with the kept atoms."""

    mol: Chem.Mol
    num_placed: int
    """Number of atoms, from the first on, that have coordinates in the molecule's conformer, if it has one."""


def read_record(record: SourceRecord, config: FeaturizeConfig) -> ReadMolecule:
    """The molecule of a record; raises RejectedError, or whatever RDKit raises on odd input."""
    if isinstance(record, SmilesText):
        return _read_smiles(record.smiles, config)
    if isinstance(record, MolBlock):
        return _read_molblock(record.block, config)
    return _read_geometry(record, config)


def _read_smiles(smiles: str | None, config: FeaturizeConfig) -> ReadMolecule:
    if not isinstance(smiles, str) or not smiles.strip():
        raise RejectedError(RejectionCode.MISSING_SMILES, f"found {one_line(repr(smiles), 80)}")
    # RDKit would stop at a NUL and return the molecule before it; lone surrogates cannot be encoded as UTF-8.
    readable = "\0" not in smiles and (
        smiles.isascii() or smiles.encode("utf-8", "ignore").decode() == smiles
    )
    if readable and len(smiles) > _LONG_SMILES * max(config.max_atoms, _FEW_ATOMS):
        _check_long_smiles(smiles, config)
    mol: Chem.Mol | None = Chem.MolFromSmiles(smiles) if readable else None
    if mol is None:
        raise RejectedError(RejectionCode.UNPARSABLE_SMILES, _why_unparsable(smiles))
    return _keep(mol, config, has_positions=False, has_hydrogens=False)


def _check_long_smiles(smiles: str, config: FeaturizeConfig) -> None:
    """Reject a SMILES that certainly has too many atoms, before steps whose time grows faster than its length."""
    limit = _LONGEST_SMILES * max(config.max_atoms, _FEW_ATOMS)
    if len(smiles) > limit:
        raise RejectedError(
            RejectionCode.TOO_MANY_ATOMS,
            f"a SMILES of {len(smiles)} characters, expected at most {limit}; max_atoms is {config.max_atoms}",
        )
    _check_unsanitized(Chem.MolFromSmiles(smiles, sanitize=False), config)


def _check_unsanitized(mol: Chem.Mol | None, config: FeaturizeConfig) -> None:
    """Reject a molecule with too many heavy atoms. None is accepted here: the full parser says what is wrong."""
    if mol is None or mol.GetNumAtoms() == 0:
        return
    heavy_atoms = mol.GetNumHeavyAtoms()
    if config.salts != "keep":
        is_heavy = [atom.GetAtomicNum() != 1 for atom in mol.GetAtoms()]
        heavy_atoms = max(
            sum(map(is_heavy.__getitem__, fragment)) for fragment in Chem.GetMolFrags(mol)
        )
    if heavy_atoms > config.max_atoms:
        _check_size(heavy_atoms, config)


def _why_unparsable(smiles: str) -> str:
    shown = one_line(repr(smiles), 120)
    try:
        mol: Chem.Mol | None = Chem.MolFromSmiles(smiles, sanitize=False)
        if mol is None or "\0" in smiles:
            return f"not a SMILES: {shown}"
        Chem.SanitizeMol(mol)
    except MemoryError:
        raise  # not what is wrong with the record
    except Exception as error:  # RDKit raises various classes; only the text matters
        return one_line(f"{error} in {shown}")
    return f"stereo or hydrogens cannot be resolved in {shown}"


def _read_molblock(block: str | None, config: FeaturizeConfig) -> ReadMolecule:
    if not isinstance(block, str) or not block.strip():
        raise RejectedError(RejectionCode.INVALID_RECORD, "the record is empty")
    if len(block) > _LONG_MOLBLOCK * max(config.max_atoms, _FEW_ATOMS):
        _check_unsanitized(Chem.MolFromMolBlock(block, sanitize=False, removeHs=False), config)
    mol: Chem.Mol | None = Chem.MolFromMolBlock(block, sanitize=True, removeHs=False)
    if mol is None:
        raise _why_invalid(block)
    if mol.GetNumConformers() == 0:
        return _keep(mol, config, has_positions=False, has_hydrogens=True)
    conformer = mol.GetConformer()
    positions = conformer.GetPositions()
    # If a molecule is flat to 0.001 angstrom and has a "cis or trans" mark, RDKit treats it as a depiction even if the
    # record says 3D. In real depictions all z are exactly zero.
    is_3d = conformer.Is3D() or (_is_tagged_3d(block) and bool(positions[:, 2].any()))
    has_positions = _has_positions(positions) and is_3d
    if has_positions:
        conformer.Set3D(True)
        _forget_undecided_stereo(mol)
        Chem.AssignStereochemistryFrom3D(mol)
    return _keep(mol, config, has_positions=has_positions, has_hydrogens=True)


def _is_tagged_3d(block: str) -> bool:
    """Whether the dimension code, in columns 21 and 22 of the second line, says 3D."""
    header = block.split("\n", 2)
    return len(header) > 1 and header[1][20:22] == "3D"


def _forget_undecided_stereo(mol: Chem.Mol) -> None:
    """Remove "cis or trans" marks, which RDKit would prefer to the geometry.

    RDKit itself writes them for every double bond whose stereo it has not perceived.
    """
    for ends in mol.GetSubstructMatches(_DOUBLE_BOND, maxMatches=mol.GetNumBonds() + 1):
        bond = mol.GetBondBetweenAtoms(*ends)
        if bond.GetStereo() == Chem.BondStereo.STEREOANY:
            bond.SetStereo(Chem.BondStereo.STEREONONE)
            bond.SetBondDir(Chem.BondDir.NONE)


def _why_invalid(block: str) -> RejectedError:
    mol: Chem.Mol | None = Chem.MolFromMolBlock(block, sanitize=False, removeHs=False)
    if mol is not None:
        try:
            Chem.SanitizeMol(mol)
        except MemoryError:
            raise  # not what is wrong with the record
        except Exception as error:  # RDKit raises various classes; only the text matters
            return RejectedError(RejectionCode.SANITIZATION_FAILED, one_line(error))
        return RejectedError(RejectionCode.SANITIZATION_FAILED, "stereo cannot be resolved")
    lines = block.partition("M  END")[0].splitlines()[4:]
    for line in lines:
        if _NON_FINITE.search(line):
            return RejectedError(RejectionCode.NON_FINITE_COORDINATES, one_line(line, 80))
    return RejectedError(
        RejectionCode.INVALID_RECORD,
        f"not a V2000 or V3000 record of {len(block)} characters: {one_line(repr(block[:60]))}",
    )


def _read_geometry(row: GeometryRow, config: FeaturizeConfig) -> ReadMolecule:
    positions = _positions_of(row)
    if positions is None and row.smiles:
        return _read_smiles(row.smiles, config)
    mol = _mol_of(row, config)
    try:
        Chem.SanitizeMol(mol)
    except MemoryError:
        raise  # not what is wrong with the record
    except Exception as error:  # RDKit raises various classes; only the text matters
        raise RejectedError(RejectionCode.SANITIZATION_FAILED, one_line(error)) from error
    if positions is not None:
        conformer = Chem.Conformer(len(positions))
        conformer.SetPositions(positions)
        mol.AddConformer(conformer)
        Chem.AssignStereochemistryFrom3D(mol)
    return _keep(mol, config, has_positions=positions is not None, has_hydrogens=True)


def _positions_of(row: GeometryRow) -> NDArray[np.float64] | None:
    if row.positions is None or len(row.positions) == 0:
        return None
    positions = np.asarray(row.positions, dtype=np.float64)
    if positions.size != 3 * len(row.atomic_numbers):
        raise RejectedError(
            RejectionCode.INVALID_RECORD,
            f"{positions.size} coordinates for {len(row.atomic_numbers)} atoms; expected 3 for each",
        )
    positions = np.ascontiguousarray(positions.reshape(-1, 3))
    return positions if _has_positions(positions) else None


def _has_positions(positions: NDArray[np.float64]) -> bool:
    """Whether these are real coordinates; several atoms that are all in the origin come from a file without any."""
    extent = float(np.abs(positions).max()) if len(positions) else 0.0
    if 0.0 < extent <= _FARTHEST:  # the usual case, with a single pass over the array
        return True
    plausible = np.abs(positions) <= _FARTHEST
    if not plausible.all():
        atom = int(np.argmin(plausible.all(axis=1)))
        is_finite = bool(np.isfinite(positions[atom]).all())
        raise RejectedError(
            RejectionCode.IMPLAUSIBLE_COORDINATES
            if is_finite
            else RejectionCode.NON_FINITE_COORDINATES,
            f"atom {atom} is at {positions[atom].tolist()}",
        )
    return len(positions) == 1 or bool(positions.any())


def _mol_of(row: GeometryRow, config: FeaturizeConfig) -> Chem.Mol:
    numbers = _integers(row.atomic_numbers)
    charges = _integers(row.formal_charges)
    bonds = (_integers(row.bond_begin), _integers(row.bond_end), _integers(row.bond_order))
    if len(charges) != len(numbers) or len({len(values) for values in bonds}) != 1:
        raise RejectedError(
            RejectionCode.INVALID_RECORD,
            f"{len(numbers)} atoms and {len(charges)} charges; "
            f"{', '.join(str(len(values)) for values in bonds)} bond begins, ends and orders",
        )
    # Checked first, as building takes 1 us per atom, and sanitization can take seconds.
    _check_size(len(numbers) - numbers.count(1), config)
    mol = Chem.RWMol()
    for number, charge in zip(numbers, charges, strict=True):
        if not 0 <= number < ATOM_VOCAB_SIZES[0]:
            raise RejectedError(RejectionCode.UNSUPPORTED_ATOM, f"atomic number {number}")
        mol.AddAtom(_atom(number, charge))
    for begin, end, order in zip(*bonds, strict=True):
        kind = _KEKULE.get(order)
        if kind is None or not (0 <= begin < len(numbers) and 0 <= end < len(numbers)):
            raise RejectedError(
                RejectionCode.INVALID_RECORD,
                f"bond {begin}-{end} of order {order} among {len(numbers)} atoms; "
                "expected indices counted from 0 and order 1, 2 or 3",
            )
        mol.AddBond(begin, end, kind)
    return mol


@lru_cache(maxsize=4096)
def _atom(number: int, charge: int) -> Chem.Atom:
    """An atom that ``AddAtom`` copies; cached, as creating it takes longer than adding it."""
    atom = Chem.Atom(number)
    atom.SetFormalCharge(charge)
    return atom


def _integers(values: Sequence[int] | NDArray[np.integer]) -> list[int]:
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


def _keep(
    mol: Chem.Mol, config: FeaturizeConfig, *, has_positions: bool, has_hydrogens: bool
) -> ReadMolecule:
    """The sanitized ``mol`` reduced to the kept atoms; its conformer remains only if ``has_positions``."""
    if not has_positions:
        mol.RemoveAllConformers()
    if config.salts != "keep":
        mol = _one_fragment(mol, config)
    num_placed = mol.GetNumAtoms()
    if config.explicit_hydrogens:
        mol = Chem.AddHs(mol)
    elif has_hydrogens:
        # The molecule is sanitized, and doing so again would double the time: only the counts of hydrogens are stale,
        # and the rings are forgotten.
        mol = Chem.RemoveHs(mol, sanitize=False)
        mol.UpdatePropertyCache(strict=False)
        Chem.FastFindRings(mol)
        num_placed = mol.GetNumAtoms()
    _check_size(mol.GetNumAtoms(), config)
    return ReadMolecule(mol, num_placed)


def _one_fragment(mol: Chem.Mol, config: FeaturizeConfig) -> Chem.Mol:
    fragments = Chem.GetMolFrags(mol)
    if len(fragments) < 2:
        return mol
    if config.salts == "reject":
        raise RejectedError(RejectionCode.MULTIPLE_FRAGMENTS, f"{len(fragments)} fragments")
    molecules: tuple[Chem.Mol, ...] = Chem.GetMolFrags(mol, asMols=True)
    return max(molecules, key=_fragment_size)  # the first of equals


def _fragment_size(fragment: Chem.Mol) -> tuple[int, float]:
    return fragment.GetNumHeavyAtoms(), sum(atom.GetMass() for atom in fragment.GetAtoms())


def _check_size(num_atoms: int, config: FeaturizeConfig) -> None:
    if num_atoms == 0:
        raise RejectedError(RejectionCode.EMPTY_MOLECULE, "the record has no atoms")
    if num_atoms > config.max_atoms:
        raise RejectedError(
            RejectionCode.TOO_MANY_ATOMS, f"{num_atoms} atoms; max_atoms is {config.max_atoms}"
        )
