"""Coordinates for molecules that come without: seeded ETKDGv3, then MMFF94."""

from __future__ import annotations

import hashlib
import math
import time
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from moleblend_ray.chemistry.config import ConformerConfig

FRAGMENT_GAP = 4.0
"""Angstrom between the boxes of neighbouring fragments (salts) after embedding."""


class ConformerStatus(StrEnum):
    """Where a molecule's coordinates come from."""

    SOURCE = "source"
    """Read from the source record."""
    RELAXED = "relaxed"
    """Embedded, then MMFF94 until it converged or used up its iterations."""
    EMBEDDED = "embedded"
    """Embedded only: MMFF94 has no parameters for the molecule, or was switched off."""
    FAILED = "failed"
    """Embedding was tried and failed or ran out of time: no coordinates."""
    NONE = "none"
    """The source has none and none were asked for."""


class Embedding(NamedTuple):
    """The outcome of embedding one molecule."""

    positions: NDArray[np.float32]
    """(C, N, 3), angstrom, in the molecule's own atom order; C is 0 if it failed."""
    status: ConformerStatus


def conformer_seed(seed: int, canonical_smiles: str) -> int:
    """The embedding seed of one molecule, 31 bits: the same wherever the molecule stands in a file."""
    digest = hashlib.sha256(f"{seed}:{canonical_smiles}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def embed_conformers(mol: Chem.Mol, canonical_smiles: str, config: ConformerConfig) -> Embedding:
    """Embed ``mol`` (hydrogens implicit or not), relax it, and return the positions of its own atoms.

    Cages and crowded molecules defeat the metric-matrix start; they get a second attempt from random
    coordinates in what is left of the time. A deadline makes the outcome depend on the machine only
    for molecules near it, and then the status says ``failed``.
    """
    full = Chem.AddHs(mol)
    full.RemoveAllConformers()
    Chem.GetSymmSSSR(full)  # ETKDG reads the rings, which removing or adding hydrogens forgets
    deadline = time.monotonic() + config.timeout_s
    parameters: Any = rdDistGeom.ETKDGv3()
    parameters.randomSeed = conformer_seed(config.seed, canonical_smiles)
    for parameters.useRandomCoords in (False, True):
        seconds_left = deadline - time.monotonic()
        if seconds_left <= 0:
            break
        parameters.timeout = math.ceil(seconds_left)
        # Count conformers rather than the ids this returns: out of time, it returns one, -1.
        rdDistGeom.EmbedMultipleConfs(full, config.count, parameters)
        if full.GetNumConformers():
            break
    if not full.GetNumConformers():
        return Embedding(
            np.empty((0, mol.GetNumAtoms(), 3), dtype=np.float32), ConformerStatus.FAILED
        )
    _separate_fragments(full)
    status = _relax(full, config.mmff_max_iterations)
    positions = np.stack([conformer.GetPositions() for conformer in full.GetConformers()])
    # AddHs appends, so the molecule's own atoms come first.
    return Embedding(positions[:, : mol.GetNumAtoms()].astype(np.float32), status)


def _separate_fragments(mol: Chem.Mol) -> None:
    """Line the fragments up along x: RDKit embeds each by itself, all around the origin."""
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


def _relax(mol: Chem.Mol, max_iterations: int) -> ConformerStatus:
    if max_iterations == 0 or not rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
        return ConformerStatus.EMBEDDED
    rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(mol, numThreads=1, maxIters=max_iterations)
    return ConformerStatus.RELAXED
