"""Coordinates for molecules without any: seeded ETKDGv3, then MMFF94 or else UFF, lowest energy first."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers, rdMolAlign

from moleblend_ray.chemistry.config import ConformerConfig
from moleblend_ray.chemistry.killable import (
    KillableWorker,
    WorkerCrashedError,
    WorkerTimeoutError,
    shared_worker,
)

FRAGMENT_GAP: Final = 4.0
"""Distance (angstrom) between the bounding boxes of neighbouring fragments (salts) after embedding."""

DETAIL_SEPARATOR: Final = "; "
"""Separates the statements of a detail, each of which begins with its kind and a colon."""

_WORKER_MODULE: Final = "moleblend_ray.chemistry.conformer_worker"
_FAILURE_CAUSES: Final = {
    int(cause): str(name) for name, cause in rdDistGeom.EmbedFailureCauses.names.items()
}
_TIMEOUT_CAUSE: Final = int(rdDistGeom.EmbedFailureCauses.EXCEEDED_TIMEOUT)
_SHOWN_CAUSES: Final = 3


class ConformerStatus(StrEnum):
    """Where a molecule's coordinates come from."""

    SOURCE = "source"
    """Read from the source record."""
    RELAXED = "relaxed"
    """Embedded, then relaxed by a force field; if that did not converge, the detail says so."""
    EMBEDDED = "embedded"
    """Embedded only: no force field has parameters for the molecule, or it was turned off."""
    FAILED = "failed"
    """No coordinates: embedding failed, ran out of time or crashed."""
    NONE = "none"
    """No coordinates: the source has none, and none were asked for."""


class Embedding(NamedTuple):
    """The outcome of embedding one molecule."""

    positions: NDArray[np.float32]
    """(C, N, 3), angstrom, in the molecule's own order of atoms, lowest energy first; C is 0 if embedding failed."""
    energies: NDArray[np.float32]
    """(C,), kcal/mol, of the relaxed geometries with all hydrogens; NaN if no force field ran."""
    status: ConformerStatus
    detail: str
    """Remarks of the form ``kind: what``, joined by ``"; "``; usually empty.

    Kinds: ``timeout``, ``crashed``, ``embedding failed``, ``force field`` (UFF or none was used, as MMFF94 lacks
    parameters), ``not converged``.
    """


class ConformerRequest(NamedTuple):
    """A request to the child process."""

    binary: bytes
    """The molecule in RDKit's binary form."""
    canonical_smiles: str
    config: ConformerConfig


def conformer_seed(seed: int, canonical_smiles: str) -> int:
    """The embedding seed of a molecule, 31 bits, which does not depend on its position in a file."""
    digest = hashlib.sha256(f"{seed}:{canonical_smiles}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


# -- in a process that can be killed ------------------------------------------------------------------


def _worker() -> KillableWorker:
    return shared_worker("-m", _WORKER_MODULE)


def make_conformers(mol: Chem.Mol, canonical_smiles: str, config: ConformerConfig) -> Embedding:
    """Run :func:`embed_conformers` in a child process that is killed after ``config.timeout_s``.

    A molecule that hangs or crashes RDKit has status ``failed``; this process continues. Raises WorkerStartError if no
    child can be started.
    """
    request = ConformerRequest(mol.ToBinary(), canonical_smiles, config)
    return request_conformers(request, mol.GetNumAtoms())


def request_conformers(request: ConformerRequest, num_atoms: int) -> Embedding:
    """:func:`make_conformers` of a molecule of which this process has the binary form only."""
    timeout_s = request.config.timeout_s
    try:
        embedding: Embedding = _worker().call(request, timeout_s)
    except WorkerTimeoutError:
        return _failed(num_atoms, f"timeout: not done after {timeout_s:g} s")
    except WorkerCrashedError as error:
        return _failed(num_atoms, f"crashed: {error}")
    return embedding


def _failed(num_atoms: int, detail: str) -> Embedding:
    return Embedding(
        np.empty((0, num_atoms, 3), dtype=np.float32),
        np.empty(0, dtype=np.float32),
        ConformerStatus.FAILED,
        detail,
    )


# -- in this process ----------------------------------------------------------------------------------


class _Relaxation(NamedTuple):
    status: ConformerStatus
    energies: NDArray[np.float64]
    """(C,), kcal/mol, or NaN."""
    details: tuple[str, ...]


def embed_conformers(mol: Chem.Mol, canonical_smiles: str, config: ConformerConfig) -> Embedding:
    """Embed ``mol`` (with or without explicit hydrogens), relax it, and return the positions of its own atoms.

    The same molecule, order of atoms, SMILES and settings give the same bits, unless time runs out. RDKit checks the
    time in whole seconds and only while it embeds, so this function may exceed ``config.timeout_s``, whereas
    :func:`make_conformers` does not. Embedding ends a second early, so that its result can still be relaxed.
    """
    deadline = time.monotonic() + config.timeout_s
    full = Chem.AddHs(mol)
    full.RemoveAllConformers()
    # ETKDG needs the rings, which RDKit forgets when hydrogens are added or removed.
    Chem.GetSymmSSSR(full)
    try:
        details = _embed(full, canonical_smiles, config, deadline)
        if not full.GetNumConformers():
            return _failed(mol.GetNumAtoms(), DETAIL_SEPARATOR.join(details))
        _separate_fragments(full)
        relaxation = _relax(full, config.mmff_max_iterations)
        kept = _kept_conformers(full, relaxation.energies, config)
    # RDKit raises C++ errors as RuntimeError, ValueError and classes of its own.
    except Exception as error:
        text = " ".join(str(error).replace(";", ",").split())
        return _failed(mol.GetNumAtoms(), f"embedding failed: {text[:200]}")
    positions = np.stack([conformer.GetPositions() for conformer in full.GetConformers()])[kept]
    # AddHs appends, so the molecule's own atoms come first.
    return Embedding(
        positions[:, : mol.GetNumAtoms()].astype(np.float32),
        relaxation.energies[kept].astype(np.float32),
        relaxation.status,
        DETAIL_SEPARATOR.join([*details, *relaxation.details]),
    )


def _embed(
    full: Chem.Mol, canonical_smiles: str, config: ConformerConfig, deadline: float
) -> list[str]:
    """Add conformers to ``full``; returns a remark if they are fewer than asked for.

    For cages, macrocycles and crowded molecules the usual start from a metric matrix fails. They get a second attempt,
    from random coordinates, in the remaining time.
    """
    parameters: Any = rdDistGeom.ETKDGv3()
    parameters.randomSeed = conformer_seed(config.seed, canonical_smiles)
    parameters.trackFailures = True
    causes: Counter[int] = Counter()
    for parameters.useRandomCoords in (False, True):
        seconds_left = deadline - time.monotonic()
        if parameters.useRandomCoords and seconds_left <= 1 and causes[_TIMEOUT_CAUSE]:
            break
        parameters.timeout = max(1, int(seconds_left - 0.5))
        # The returned ids are not counted: if time runs out, there is one, -1.
        rdDistGeom.EmbedMultipleConfs(full, config.count, parameters)
        causes.update(dict(enumerate(parameters.GetFailureCounts())))
        if full.GetNumConformers():
            break
    made = full.GetNumConformers()
    if made == config.count:
        return []
    if causes[_TIMEOUT_CAUSE]:
        return [f"timeout: {made} of {config.count} conformers within {config.timeout_s:g} s"]
    found = ", ".join(
        f"{count} x {_FAILURE_CAUSES[cause]}"
        for cause, count in causes.most_common(_SHOWN_CAUSES)
        if count
    )
    return [f"embedding failed: {made} of {config.count} conformers, {found or 'no cause given'}"]


def _separate_fragments(mol: Chem.Mol) -> None:
    """Place the fragments side by side along x, as RDKit embeds each of them around the origin."""
    fragments = [list(atoms) for atoms in Chem.GetMolFrags(mol)]
    if len(fragments) < 2:
        return
    for conformer in mol.GetConformers():
        positions = conformer.GetPositions()
        edge = positions[fragments[0], 0].max()
        for atoms in fragments[1:]:
            positions[atoms, 0] += edge + FRAGMENT_GAP - positions[atoms, 0].min()
            edge = positions[atoms, 0].max()
        conformer.SetPositions(positions)


def _relax(mol: Chem.Mol, max_iterations: int) -> _Relaxation:
    """Minimize each conformer, in one thread, with MMFF94, or with UFF if MMFF94 lacks parameters."""
    none = np.full(mol.GetNumConformers(), np.nan)
    if max_iterations == 0:
        return _Relaxation(ConformerStatus.EMBEDDED, none, ())
    details: list[str] = []
    optimize: Any
    if rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
        name, optimize = "MMFF94", rdForceFieldHelpers.MMFFOptimizeMoleculeConfs
    elif rdForceFieldHelpers.UFFHasAllMoleculeParams(mol):
        name, optimize = "UFF", rdForceFieldHelpers.UFFOptimizeMoleculeConfs
        details.append("force field: UFF, as MMFF94 lacks parameters")
    else:
        lacking = "force field: none, as MMFF94 and UFF lack parameters"
        return _Relaxation(ConformerStatus.EMBEDDED, none, (lacking,))
    results: Sequence[tuple[int, float]] = optimize(mol, numThreads=1, maxIters=max_iterations)
    unfinished = sum(flag != 0 for flag, _ in results)
    if unfinished:
        details.append(
            f"not converged: {unfinished} of {len(results)} conformers "
            f"after {max_iterations} {name} iterations"
        )
    energies = np.array([energy if flag >= 0 else np.nan for flag, energy in results])
    return _Relaxation(ConformerStatus.RELAXED, energies, tuple(details))


def _kept_conformers(
    mol: Chem.Mol, energies: NDArray[np.float64], config: ConformerConfig
) -> NDArray[np.int64]:
    """Indices of the conformers to keep, lowest energy first; in their own order if no force field ran."""
    order = np.argsort(energies, kind="stable")
    if config.energy_window_kcal_mol is not None:
        # Comparisons with NaN are false: without energies, all conformers are kept.
        order = order[~(energies[order] - energies[order[0]] > config.energy_window_kcal_mol)]
    if config.prune_rms_angstrom is None or len(order) < 2:
        return order
    distances = _rms_distances(mol)
    kept: list[int] = []
    for conformer in order.tolist():
        if (distances[conformer, kept] >= config.prune_rms_angstrom).all():
            kept.append(conformer)
    return np.array(kept, dtype=np.int64)


def _rms_distances(mol: Chem.Mol) -> NDArray[np.float64]:
    """(C, C), angstrom, RMSD of the heavy atoms after the best alignment over all mappings of symmetric atoms."""
    count = mol.GetNumConformers()
    heavy = Chem.RemoveAllHs(mol)
    distances = np.zeros((count, count))
    if heavy.GetNumAtoms() > 1:
        lower = np.tril_indices(count, -1)  # RDKit's order: (1, 0), (2, 0), (2, 1), ...
        distances[lower] = rdMolAlign.GetAllConformerBestRMS(heavy, numThreads=1)
    symmetric: NDArray[np.float64] = distances + distances.T
    return symmetric
