"""One source record (SMILES, SDF record, table row with geometry) -> :class:`Molecule` or :class:`Rejection`.

:func:`molecules_from_records` featurizes many records at a time. From Python, :func:`molecule_from_smiles`,
:func:`molecule_from_molblock` and :func:`molecule_from_geometry` do the same for one. None of them raises on bad input:
a record that cannot become a molecule gives a rejection with a reason code, so that a data set accounts for every row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache, partial
from itertools import islice
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase

from moleblend_ray.chemistry.binary import to_binary
from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.chemistry.conformers import ConformerStatus, Embedding, make_conformers
from moleblend_ray.chemistry.features import GraphArrays, graph_arrays
from moleblend_ray.chemistry.killable import WorkerStartError
from moleblend_ray.vocabulary import ATOM_VOCAB_SIZES

_DUMMY = ATOM_VOCAB_SIZES[0] - 1


class RejectionCode(StrEnum):
    """Why a source record is not a molecule of the data set."""

    MISSING_SMILES = "missing_smiles"
    """The SMILES is null, empty or not a text."""
    UNPARSABLE_SMILES = "unparsable_smiles"
    """RDKit rejects the SMILES, because of its syntax or its chemistry."""
    INVALID_RECORD = "invalid_record"
    """An SDF record or geometry row is malformed."""
    SANITIZATION_FAILED = "sanitization_failed"
    """The record is well formed but chemically impossible (valence, kekulization)."""
    EMPTY_MOLECULE = "empty_molecule"
    """The record has no atoms."""
    TOO_MANY_ATOMS = "too_many_atoms"
    """More kept atoms than ``FeaturizeConfig.max_atoms``."""
    UNSUPPORTED_ATOM = "unsupported_atom"
    """A dummy, query or unknown element."""
    MULTIPLE_FRAGMENTS = "multiple_fragments"
    """Several fragments while ``FeaturizeConfig.salts`` is "reject"."""
    NON_FINITE_COORDINATES = "non_finite_coordinates"
    """A coordinate is NaN or infinite."""
    IMPLAUSIBLE_COORDINATES = "implausible_coordinates"
    """An atom is farther than 10^6 angstrom from the origin."""
    NO_COORDINATES = "no_coordinates"
    """No coordinates while ``FeaturizeConfig.require_coordinates`` is on."""
    OVERLAPPING_ATOMS = "overlapping_atoms"
    """Two atoms are closer than in any bond; this is found when rows become shards."""
    GEOMETRY_MISMATCH = "geometry_mismatch"
    """The coordinates and the SMILES of the record are of different molecules."""
    EXCLUDED = "excluded"
    """A list published with the collection advises against the molecule."""
    CONFORMER_FAILED = "conformer_failed"
    """No conformer could be made, and the configuration says to reject such molecules."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A record that was rejected."""

    code: RejectionCode
    detail: str
    """One sentence for the quarantine that says what was found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Molecule:
    """A featurized molecule of N atoms, E bonds and C conformers."""

    smiles: str
    """Canonical isomeric SMILES of the kept atoms. The arrays below have its order of atoms only if
    ``FeaturizeConfig.canonical_order`` is set."""
    atom_features: NDArray[np.uint8]
    """(N, 9), OGB codes, columns ``vocabulary.ATOM_FEATURE_NAMES``."""
    bonds: NDArray[np.uint16]
    """(E, 2), atom pairs, each bond once, in RDKit's order."""
    bond_features: NDArray[np.uint8]
    """(E, 3), OGB codes, columns ``vocabulary.BOND_FEATURE_NAMES``."""
    positions: NDArray[np.float32]
    """(C, N, 3), angstrom; C is 0 without coordinates. Zeros where ``position_mask`` is False."""
    position_mask: NDArray[np.bool_]
    """(C, N), which atoms have coordinates. Hydrogens that were added to a record have none."""
    conformer_status: ConformerStatus
    """Where the coordinates come from."""
    conformer_detail: str
    """Remarks on conformers that were made or could not be made (``conformers.Embedding``); usually empty."""
    conformer_energies: NDArray[np.float32]
    """(C,), kcal/mol, lowest first, of conformers that were relaxed here; NaN for all others."""

    @property
    def num_atoms(self) -> int:
        """N, the number of kept atoms."""
        return len(self.atom_features)

    @property
    def num_bonds(self) -> int:
        """E, the number of bonds, each counted once."""
        return len(self.bonds)

    @property
    def num_conformers(self) -> int:
        """C, the number of conformers; 0 without coordinates."""
        return len(self.positions)


Outcome = Molecule | Rejection
"""The result of featurizing one record."""


class GeometryRow(NamedTuple):
    """One row of a table of molecules with geometry. Hydrogens may be listed or left implicit."""

    atomic_numbers: Sequence[int] | NDArray[np.integer]
    """(N,)"""
    formal_charges: Sequence[int] | NDArray[np.integer]
    """(N,)"""
    positions: Sequence[float] | NDArray[np.floating] | None
    """(3 N,) or (N, 3), angstrom; no coordinates if None, or if all are zero and there are several atoms."""
    bond_begin: Sequence[int] | NDArray[np.integer]
    """(E,): atom indices counted from 0."""
    bond_end: Sequence[int] | NDArray[np.integer]
    """(E,)"""
    bond_order: Sequence[int] | NDArray[np.integer]
    """(E,): Kekule order 1, 2 or 3."""
    smiles: str | None = None
    """Used instead of the lists if there are no coordinates, because it can state stereo and they cannot."""


class _RejectedError(Exception):
    """Carries a rejection out of nested calls, within this module."""

    def __init__(self, code: RejectionCode, detail: str) -> None:
        self.rejection = Rejection(code=code, detail=detail)


class SmilesText(NamedTuple):
    """A record that is a SMILES."""

    smiles: str | None


class MolBlock(NamedTuple):
    """A record that is a V2000 or V3000 block; what follows ``M  END`` is ignored."""

    block: str | None


SourceRecord = SmilesText | MolBlock | GeometryRow


def molecules_from_records(
    records: Iterable[SourceRecord | Rejection], config: FeaturizeConfig
) -> list[Outcome]:
    """Featurize records, with one outcome per record, in order; a rejection is returned unchanged.

    Many records at a time are faster than one by one: RDKit parses each of them, and one compiled pass then reads the
    atoms and bonds of all.
    """
    drafts: list[_Draft | Rejection] = []
    waiting = iter(records)
    # RDKit's messages about a molecule are in its rejection.
    with rdBase.BlockLogs():
        while batch := list(islice(waiting, _BATCH)):
            drafts += _drafts(batch, config)
    graphs = iter(graph_arrays([draft.binary for draft in drafts if isinstance(draft, _Draft)]))
    return [
        _finished(draft, next(graphs), config) if isinstance(draft, _Draft) else draft
        for draft in drafts
    ]


def molecule_from_smiles(smiles: str | None, config: FeaturizeConfig) -> Outcome:
    """Featurize a SMILES; atoms keep their order in it unless ``config`` asks for another."""
    return molecules_from_records([SmilesText(smiles)], config)[0]


def molecule_from_molblock(block: str | None, config: FeaturizeConfig) -> Outcome:
    """Featurize an SDF record (V2000 or V3000; what follows ``M  END`` is ignored).

    A record that is not marked as 3D and has no z coordinate is a depiction: its stereo comes from wedged bonds and its
    coordinates are not used. The stereo of a 3D record comes from the geometry.
    """
    return molecules_from_records([MolBlock(block)], config)[0]


def molecule_from_geometry(row: GeometryRow, config: FeaturizeConfig) -> Outcome:
    """Featurize lists of atoms, bonds and coordinates; stereo comes from the geometry.

    Hydrogens that are not in the lists are implied by the default valences, as in an SDF record.
    """
    return molecules_from_records([row], config)[0]


_BATCH: Final = 32
"""Records that go through one step of RDKit (parser, SMILES writer, binary writer) before the next step. The code of
a step then stays in the processor's caches, which is 15 % faster than molecule by molecule."""


class _Kept(NamedTuple):
    """A sanitized molecule with the kept atoms."""

    mol: Chem.Mol
    num_placed: int
    """Number of atoms, from the first on, that have coordinates in the molecule's conformer, if it has one."""


class _Named(NamedTuple):
    """A molecule with its canonical SMILES and its coordinates."""

    mol: Chem.Mol
    smiles: str
    made: Embedding
    position_mask: NDArray[np.bool_]


class _Draft(NamedTuple):
    """A molecule whose atoms and bonds have not been read yet."""

    smiles: str
    binary: bytes
    made: Embedding
    position_mask: NDArray[np.bool_]


_Made = TypeVar("_Made")


def _drafts(
    batch: Sequence[SourceRecord | Rejection], config: FeaturizeConfig
) -> list[_Draft | Rejection]:
    read, name = partial(_read, config=config), partial(_name, config=config)
    kept = [_attempt(read, record) for record in batch]
    named = [_attempt(name, molecule) for molecule in kept]
    return [_attempt(_draft, molecule) for molecule in named]


def _attempt(step: Callable[[Any], _Made], given: object) -> _Made | Rejection:
    """The result of the step, or a rejection if it fails; a rejection is returned unchanged."""
    if isinstance(given, Rejection):
        return given
    try:
        return step(given)
    except _RejectedError as rejected:
        return rejected.rejection
    except WorkerStartError:
        raise  # not the record's fault: all others would fail in the same way
    # RDKit raises C++ errors as RuntimeError, ValueError and several classes of its own; one odd row of a hundred
    # million must not end a job.
    except Exception as error:
        return Rejection(code=RejectionCode.INVALID_RECORD, detail=_one_line(error))


def _read(record: SourceRecord, config: FeaturizeConfig) -> _Kept:
    if isinstance(record, SmilesText):
        return _read_smiles(record.smiles, config)
    if isinstance(record, MolBlock):
        return _read_molblock(record.block, config)
    return _read_geometry(record, config)


def _name(kept: _Kept, config: FeaturizeConfig) -> _Named:
    mol, num_placed = kept
    smiles = Chem.MolToSmiles(mol)
    made, placed = _coordinates(mol, smiles, num_placed, config)
    if config.canonical_order:
        mol, order = _in_canonical_order(mol, smiles)
        made, placed = made._replace(positions=made.positions[:, order]), placed[:, order]
    return _Named(mol, smiles, made, placed)


def _draft(named: _Named) -> _Draft:
    return _Draft(named.smiles, to_binary(named.mol), named.made, named.position_mask)


def _finished(draft: _Draft, graph: GraphArrays, config: FeaturizeConfig) -> Outcome:
    first = (
        -1 if config.dummy_atoms == "other" else graph.atom_features[:, 0].tobytes().find(_DUMMY)
    )
    if first >= 0:
        return Rejection(
            code=RejectionCode.UNSUPPORTED_ATOM,
            detail=f"atom {first} has no element (a dummy, R-group or query atom)",
        )
    return Molecule(
        smiles=draft.smiles,
        atom_features=graph.atom_features,
        bonds=graph.bonds,
        bond_features=graph.bond_features,
        positions=draft.made.positions,
        position_mask=draft.position_mask,
        conformer_status=draft.made.status,
        conformer_detail=draft.made.detail,
        conformer_energies=draft.made.energies,
    )


def _one_line(message: object, limit: int = 200) -> str:
    """The message on one line, cut to ``limit`` characters, that can be stored as UTF-8."""
    text = " ".join(str(message).split())
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= limit else text[: limit - 3] + "..."


# -- reading ------------------------------------------------------------------------------------------


# For ten thousand atoms, RDKit takes minutes to find rings or to parse as many ring closures, which would stop a job of
# small molecules. So records far longer than those of small molecules are first checked. Characters per atom:
_LONG_SMILES: Final = 8
_LONGEST_SMILES: Final = 64
_LONG_MOLBLOCK: Final = 256  # an atom line, two bond lines and as many for hydrogens
_FEW_ATOMS: Final = 256


def _check_long_smiles(smiles: str, config: FeaturizeConfig) -> None:
    """Reject a SMILES that certainly has too many atoms, before steps whose time grows faster than its length."""
    limit = _LONGEST_SMILES * max(config.max_atoms, _FEW_ATOMS)
    if len(smiles) > limit:
        raise _RejectedError(
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


def _read_smiles(smiles: str | None, config: FeaturizeConfig) -> _Kept:
    if not isinstance(smiles, str) or not smiles.strip():
        raise _RejectedError(RejectionCode.MISSING_SMILES, f"found {_one_line(repr(smiles), 80)}")
    # RDKit would stop at a NUL and return the molecule before it; lone surrogates cannot be encoded as UTF-8.
    readable = "\0" not in smiles and (
        smiles.isascii() or smiles.encode("utf-8", "ignore").decode() == smiles
    )
    if readable and len(smiles) > _LONG_SMILES * max(config.max_atoms, _FEW_ATOMS):
        _check_long_smiles(smiles, config)
    mol: Chem.Mol | None = Chem.MolFromSmiles(smiles) if readable else None
    if mol is None:
        raise _RejectedError(RejectionCode.UNPARSABLE_SMILES, _why_unparsable(smiles))
    return _keep(mol, config, has_positions=False, has_hydrogens=False)


def _why_unparsable(smiles: str) -> str:
    shown = _one_line(repr(smiles), 120)
    try:
        mol: Chem.Mol | None = Chem.MolFromSmiles(smiles, sanitize=False)
        if mol is None or "\0" in smiles:
            return f"not a SMILES: {shown}"
        Chem.SanitizeMol(mol)
    except Exception as error:  # RDKit raises various classes; only the text matters
        return _one_line(f"{error} in {shown}")
    return f"stereo or hydrogens cannot be resolved in {shown}"


_NON_FINITE = re.compile(r"(?i)(?<![\w.])(?:nan|inf|infinity)(?![\w.])")


def _read_molblock(block: str | None, config: FeaturizeConfig) -> _Kept:
    if not isinstance(block, str) or not block.strip():
        raise _RejectedError(RejectionCode.INVALID_RECORD, "the record is empty")
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


_DOUBLE_BOND = Chem.MolFromSmarts("*=*")


def _forget_undecided_stereo(mol: Chem.Mol) -> None:
    """Remove "cis or trans" marks, which RDKit would prefer to the geometry.

    RDKit itself writes them for every double bond whose stereo it has not perceived.
    """
    for ends in mol.GetSubstructMatches(_DOUBLE_BOND, maxMatches=mol.GetNumBonds() + 1):
        bond = mol.GetBondBetweenAtoms(*ends)
        if bond.GetStereo() == Chem.BondStereo.STEREOANY:
            bond.SetStereo(Chem.BondStereo.STEREONONE)
            bond.SetBondDir(Chem.BondDir.NONE)


def _why_invalid(block: str) -> _RejectedError:
    mol: Chem.Mol | None = Chem.MolFromMolBlock(block, sanitize=False, removeHs=False)
    if mol is not None:
        try:
            Chem.SanitizeMol(mol)
        except Exception as error:  # RDKit raises various classes; only the text matters
            return _RejectedError(RejectionCode.SANITIZATION_FAILED, _one_line(error))
        return _RejectedError(RejectionCode.SANITIZATION_FAILED, "stereo cannot be resolved")
    lines = block.partition("M  END")[0].splitlines()[4:]
    for line in lines:
        if _NON_FINITE.search(line):
            return _RejectedError(RejectionCode.NON_FINITE_COORDINATES, _one_line(line, 80))
    return _RejectedError(
        RejectionCode.INVALID_RECORD,
        f"not a V2000 or V3000 record of {len(block)} characters: {_one_line(repr(block[:60]))}",
    )


_KEKULE = {1: Chem.BondType.SINGLE, 2: Chem.BondType.DOUBLE, 3: Chem.BondType.TRIPLE}


def _read_geometry(row: GeometryRow, config: FeaturizeConfig) -> _Kept:
    positions = _positions_of(row)
    if positions is None and row.smiles:
        return _read_smiles(row.smiles, config)
    mol = _mol_of(row, config)
    try:
        Chem.SanitizeMol(mol)
    except Exception as error:  # RDKit raises various classes; only the text matters
        raise _RejectedError(RejectionCode.SANITIZATION_FAILED, _one_line(error)) from error
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
        raise _RejectedError(
            RejectionCode.INVALID_RECORD,
            f"{positions.size} coordinates for {len(row.atomic_numbers)} atoms; expected 3 for each",
        )
    positions = np.ascontiguousarray(positions.reshape(-1, 3))
    return positions if _has_positions(positions) else None


_FARTHEST: Final = 1e6
"""Largest coordinate in angstrom: the squares of distances must stay finite in single precision, with digits to spare."""


def _has_positions(positions: NDArray[np.float64]) -> bool:
    """Whether these are real coordinates; several atoms that are all in the origin come from a file without any."""
    extent = float(np.abs(positions).max()) if len(positions) else 0.0
    if 0.0 < extent <= _FARTHEST:  # the usual case, with a single pass over the array
        return True
    plausible = np.abs(positions) <= _FARTHEST
    if not plausible.all():
        atom = int(np.argmin(plausible.all(axis=1)))
        is_finite = bool(np.isfinite(positions[atom]).all())
        raise _RejectedError(
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
        raise _RejectedError(
            RejectionCode.INVALID_RECORD,
            f"{len(numbers)} atoms and {len(charges)} charges; "
            f"{', '.join(str(len(values)) for values in bonds)} bond begins, ends and orders",
        )
    # Checked first, as building takes 1 us per atom, and sanitization can take seconds.
    _check_size(len(numbers) - numbers.count(1), config)
    mol = Chem.RWMol()
    for number, charge in zip(numbers, charges, strict=True):
        if not 0 <= number < ATOM_VOCAB_SIZES[0]:
            raise _RejectedError(RejectionCode.UNSUPPORTED_ATOM, f"atomic number {number}")
        mol.AddAtom(_atom(number, charge))
    for begin, end, order in zip(*bonds, strict=True):
        kind = _KEKULE.get(order)
        if kind is None or not (0 <= begin < len(numbers) and 0 <= end < len(numbers)):
            raise _RejectedError(
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


# -- featurizing --------------------------------------------------------------------------------------


def _keep(
    mol: Chem.Mol, config: FeaturizeConfig, *, has_positions: bool, has_hydrogens: bool
) -> _Kept:
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
    return _Kept(mol, num_placed)


class _Coordinates(NamedTuple):
    made: Embedding
    position_mask: NDArray[np.bool_]


def _coordinates(
    mol: Chem.Mol, smiles: str, num_placed: int, config: FeaturizeConfig
) -> _Coordinates:
    """The source's coordinates, which the first ``num_placed`` atoms have; without these, generated ones or none."""
    num_atoms = mol.GetNumAtoms()
    if mol.GetNumConformers():
        positions = mol.GetConformer().GetPositions().astype(np.float32)[None]
        mask = np.ones((1, num_atoms), dtype=np.bool_)
        mask[:, num_placed:] = False
        unknown = np.full(1, np.nan, dtype=np.float32)
        return _Coordinates(Embedding(positions, unknown, ConformerStatus.SOURCE, ""), mask)
    if config.conformers.generate:
        made = _made_coordinates(mol, smiles, config)
        return _Coordinates(made, np.ones(made.positions.shape[:2], dtype=np.bool_))
    if config.require_coordinates:
        raise _RejectedError(RejectionCode.NO_COORDINATES, "the source has no 3D coordinates")
    return _no_coordinates(num_atoms)


def _made_coordinates(mol: Chem.Mol, smiles: str, config: FeaturizeConfig) -> Embedding:
    """Generated conformers, which depend on the canonical SMILES only, not on the order of atoms in the source."""
    try:
        canonical, order = _in_canonical_order(mol, smiles)
    except _RejectedError:
        # RDKit writes a few SMILES that it cannot read; these conformers depend on the source's order.
        canonical, order = mol, list(range(mol.GetNumAtoms()))
    made = make_conformers(canonical, smiles, config.conformers)
    if made.status is ConformerStatus.FAILED and (
        config.require_coordinates or config.conformers.on_failure == "reject"
    ):
        raise _RejectedError(
            RejectionCode.CONFORMER_FAILED, _one_line(f"{made.detail}, for {smiles}")
        )
    positions = np.empty_like(made.positions)
    positions[:, order] = made.positions
    return made._replace(positions=positions)


@lru_cache(maxsize=1024)
def _no_coordinates(num_atoms: int) -> _Coordinates:
    """Empty arrays, shared by all molecules of this size."""
    nothing = np.empty((0, num_atoms, 3), dtype=np.float32)
    made = Embedding(nothing, np.empty(0, dtype=np.float32), ConformerStatus.NONE, "")
    return _Coordinates(made, np.empty((0, num_atoms), dtype=np.bool_))


def _check_size(num_atoms: int, config: FeaturizeConfig) -> None:
    if num_atoms == 0:
        raise _RejectedError(RejectionCode.EMPTY_MOLECULE, "the record has no atoms")
    if num_atoms > config.max_atoms:
        raise _RejectedError(
            RejectionCode.TOO_MANY_ATOMS, f"{num_atoms} atoms; max_atoms is {config.max_atoms}"
        )


def _one_fragment(mol: Chem.Mol, config: FeaturizeConfig) -> Chem.Mol:
    fragments = Chem.GetMolFrags(mol)
    if len(fragments) < 2:
        return mol
    if config.salts == "reject":
        raise _RejectedError(RejectionCode.MULTIPLE_FRAGMENTS, f"{len(fragments)} fragments")
    molecules: tuple[Chem.Mol, ...] = Chem.GetMolFrags(mol, asMols=True)
    return max(molecules, key=_fragment_size)  # the first of equals


def _fragment_size(fragment: Chem.Mol) -> tuple[int, float]:
    return fragment.GetNumHeavyAtoms(), sum(atom.GetMass() for atom in fragment.GetAtoms())


def _in_canonical_order(mol: Chem.Mol, smiles: str) -> tuple[Chem.Mol, list[int]]:
    """The molecule with the order of atoms in its canonical SMILES, and the index of each of its atoms in ``mol``.

    The SMILES is parsed, rather than the atoms of ``mol`` renumbered, so that the order of bonds and the chirality
    codes depend on the SMILES only, too.
    """
    order = [int(index) for index in re.findall(r"\d+", mol.GetProp("_smilesAtomOutputOrder"))]
    parameters: Any = Chem.SmilesParserParams()
    parameters.removeHs = False
    renumbered: Chem.Mol | None = Chem.MolFromSmiles(smiles, parameters)
    if renumbered is None or renumbered.GetNumAtoms() != len(order):
        raise _RejectedError(
            RejectionCode.SANITIZATION_FAILED, f"canonical SMILES {smiles} does not parse back"
        )
    return renumbered, order
