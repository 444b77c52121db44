"""One source record (SMILES, SDF record, table row with geometry) -> :class:`Molecule` or :class:`Rejection`.

:func:`molecules_from_records` featurizes many records at a time. From Python, :func:`molecule_from_smiles`,
:func:`molecule_from_molblock` and :func:`molecule_from_geometry` do the same for one. None of them raises on bad input:
a record that cannot become a molecule gives a rejection with a reason code, so that a data set accounts for every row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase

from moleblend_ray.chemistry.binary import to_binary
from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.chemistry.conformers import (
    ConformerRequest,
    ConformerStatus,
    Embedding,
    request_conformers,
)
from moleblend_ray.chemistry.cost import may_be_slow
from moleblend_ray.chemistry.features import GraphArrays, graph_arrays
from moleblend_ray.chemistry.killable import WorkerStartError
from moleblend_ray.chemistry.limited import LimitExceededError, limited
from moleblend_ray.chemistry.record_reader import ReadMolecule, read_record
from moleblend_ray.chemistry.records import GeometryRow, MolBlock, SmilesText, SourceRecord
from moleblend_ray.chemistry.rejection import RejectedError, Rejection, RejectionCode, one_line
from moleblend_ray.vocabulary import ATOM_VOCAB_SIZES

_DUMMY = ATOM_VOCAB_SIZES[0] - 1

_BATCH: Final = 32
"""Records that go through one step of RDKit (parser, SMILES writer, binary writer) before the next step. The code of
a step then stays in the processor's caches, which is 15 % faster than molecule by molecule."""


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


class _Template(NamedTuple):
    """A molecule of N atoms of which conformers are to be made, in the order of atoms of its canonical SMILES."""

    binary: bytes
    """RDKit's binary form."""
    order: list[int]
    """(N,), index of each of its atoms in the featurized molecule."""


class _Named(NamedTuple):
    """A molecule with its canonical SMILES and its coordinates."""

    mol: Chem.Mol
    smiles: str
    made: Embedding
    position_mask: NDArray[np.bool_]
    template: _Template | None
    """None if no conformers are to be made."""


class _Draft(NamedTuple):
    """A molecule whose atoms and bonds have not been read yet."""

    smiles: str
    binary: bytes
    made: Embedding
    position_mask: NDArray[np.bool_]
    template: _Template | None


_Made = TypeVar("_Made")


def _drafts(
    batch: Sequence[SourceRecord | Rejection], config: FeaturizeConfig
) -> list[_Draft | Rejection]:
    slow = {
        place: _limited_draft(record, config)
        for place, record in enumerate(batch)
        if not isinstance(record, Rejection) and may_be_slow(record)
    }
    others = [record for place, record in enumerate(batch) if place not in slow]
    read, name = partial(read_record, config=config), partial(_name, config=config)
    kept = [_attempt(read, record) for record in others]
    named = [_attempt(name, molecule) for molecule in kept]
    quick = iter([_attempt(_draft, molecule) for molecule in named])
    drafts = [slow[place] if place in slow else next(quick) for place in range(len(batch))]
    if not config.conformers.generate:
        return drafts
    return [_attempt(partial(_with_conformers, config=config), draft) for draft in drafts]


def _limited_draft(record: SourceRecord, config: FeaturizeConfig) -> _Draft | Rejection:
    """The draft as a child process makes it, which is killed if it takes too long."""
    try:
        draft: _Draft | Rejection = limited(
            draft_of_record, record, config, timeout_s=config.timeout_s
        )
    except LimitExceededError as error:
        return Rejection(code=RejectionCode.TOO_COMPLEX, detail=one_line(error))
    return draft


def draft_of_record(record: SourceRecord, config: FeaturizeConfig) -> _Draft | Rejection:
    """All that RDKit does with a record but for conformers; to be called in a process that can be killed."""
    kept = _attempt(partial(read_record, config=config), record)
    return _attempt(_draft, _attempt(partial(_name, config=config), kept))


def _attempt(step: Callable[[Any], _Made], given: object) -> _Made | Rejection:
    """The result of the step, or a rejection if it fails; a rejection is returned unchanged."""
    if isinstance(given, Rejection):
        return given
    try:
        return step(given)
    except RejectedError as rejected:
        return rejected.rejection
    except WorkerStartError:
        raise  # not the record's fault: all others would fail in the same way
    except MemoryError:
        return Rejection(
            code=RejectionCode.TOO_COMPLEX, detail="memory: RDKit got less than it needs"
        )
    # RDKit raises C++ errors as RuntimeError, ValueError and several classes of its own; one odd row of a hundred
    # million must not end a job.
    except Exception as error:
        return Rejection(code=RejectionCode.INVALID_RECORD, detail=one_line(error))


def _name(kept: ReadMolecule, config: FeaturizeConfig) -> _Named:
    mol, num_placed = kept
    smiles = Chem.MolToSmiles(mol)
    made, placed = _coordinates(mol, num_placed, config)
    lacks_conformers = config.conformers.generate and made.status is ConformerStatus.NONE
    template = None
    if config.canonical_order:
        mol, order = _in_canonical_order(mol, smiles)
        made, placed = made._replace(positions=made.positions[:, order]), placed[:, order]
        if lacks_conformers:
            template = _Template(mol.ToBinary(), list(range(mol.GetNumAtoms())))
    elif lacks_conformers:
        template = _template(mol, smiles)
    return _Named(mol, smiles, made, placed, template)


def _draft(named: _Named) -> _Draft:
    return _Draft(
        named.smiles, to_binary(named.mol), named.made, named.position_mask, named.template
    )


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


class _Coordinates(NamedTuple):
    made: Embedding
    position_mask: NDArray[np.bool_]


def _coordinates(mol: Chem.Mol, num_placed: int, config: FeaturizeConfig) -> _Coordinates:
    """The source's coordinates, which the first ``num_placed`` atoms have, or none."""
    num_atoms = mol.GetNumAtoms()
    if mol.GetNumConformers():
        positions = mol.GetConformer().GetPositions().astype(np.float32)[None]
        mask = np.ones((1, num_atoms), dtype=np.bool_)
        mask[:, num_placed:] = False
        unknown = np.full(1, np.nan, dtype=np.float32)
        return _Coordinates(Embedding(positions, unknown, ConformerStatus.SOURCE, ""), mask)
    if config.require_coordinates and not config.conformers.generate:
        raise RejectedError(RejectionCode.NO_COORDINATES, "the source has no 3D coordinates")
    return _no_coordinates(num_atoms)


def _template(mol: Chem.Mol, smiles: str) -> _Template:
    """For conformers that depend on the canonical SMILES only, not on the order of atoms in the source."""
    try:
        canonical, order = _in_canonical_order(mol, smiles)
    except RejectedError:
        # RDKit writes a few SMILES that it cannot read; these conformers depend on the source's order.
        canonical, order = mol, list(range(mol.GetNumAtoms()))
    return _Template(canonical.ToBinary(), order)


def _with_conformers(draft: _Draft, config: FeaturizeConfig) -> _Draft:
    """The draft with generated conformers, if it lacks them."""
    if draft.template is None:
        return draft
    binary, order = draft.template
    request = ConformerRequest(binary, draft.smiles, config.conformers)
    made = request_conformers(request, len(order))
    if made.status is ConformerStatus.FAILED and (
        config.require_coordinates or config.conformers.on_failure == "reject"
    ):
        raise RejectedError(
            RejectionCode.CONFORMER_FAILED, one_line(f"{made.detail}, for {draft.smiles}")
        )
    positions = np.empty_like(made.positions)
    positions[:, order] = made.positions
    return draft._replace(
        made=made._replace(positions=positions),
        position_mask=np.ones(positions.shape[:2], dtype=np.bool_),
        template=None,
    )


@lru_cache(maxsize=1024)
def _no_coordinates(num_atoms: int) -> _Coordinates:
    """Empty arrays, shared by all molecules of this size."""
    nothing = np.empty((0, num_atoms, 3), dtype=np.float32)
    made = Embedding(nothing, np.empty(0, dtype=np.float32), ConformerStatus.NONE, "")
    return _Coordinates(made, np.empty((0, num_atoms), dtype=np.bool_))


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
        raise RejectedError(
            RejectionCode.SANITIZATION_FAILED, f"canonical SMILES {smiles} does not parse back"
        )
    return renumbered, order
