from __future__ import annotations

import re
import subprocess
import sys
import time

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers, rdMolAlign

from moleblend_ray.chemistry import conformers
from moleblend_ray.chemistry.config import ConformerConfig, FeaturizeConfig
from moleblend_ray.chemistry.conformers import (
    ConformerStatus,
    conformer_seed,
    embed_conformers,
    make_conformers,
)
from moleblend_ray.chemistry.killable import KillableWorker, WorkerStartError
from moleblend_ray.chemistry.molecule import Molecule, molecule_from_smiles
from moleblend_ray.chemistry.rejection import Rejection, RejectionCode

IBUPROFEN = "CC(C)Cc1ccc(C(C)C(=O)O)cc1"


def embed(smiles: str, **settings: object) -> np.ndarray:
    mol = Chem.MolFromSmiles(smiles)
    embedding = embed_conformers(mol, Chem.MolToSmiles(mol), ConformerConfig(**settings))  # type: ignore[arg-type]
    return embedding.positions


def test_the_same_molecule_and_seed_give_the_same_conformer_bit_for_bit() -> None:
    first = embed(IBUPROFEN)
    embed("CCO")  # what was embedded before does not matter
    np.testing.assert_array_equal(first, embed(IBUPROFEN))
    assert not np.allclose(first, embed(IBUPROFEN, seed=8))


def test_seeds_differ_between_molecules_and_fit_rdkit() -> None:
    seeds = {conformer_seed(7, f"{'C' * k}O") for k in range(200)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_several_conformers_differ_and_keep_atom_order_and_bond_lengths() -> None:
    positions = embed(IBUPROFEN, count=4)
    mol = Chem.MolFromSmiles(IBUPROFEN)
    assert positions.shape == (4, mol.GetNumAtoms(), 3)
    assert positions.dtype == np.float32
    bonds = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in mol.GetBonds()]
    lengths = np.linalg.norm(np.diff(positions[:, np.array(bonds)], axis=2), axis=-1)
    assert (lengths > 1.1).all()
    assert (lengths < 1.7).all()
    spread = np.linalg.norm(positions[:, None] - positions[None], axis=-1).max(axis=-1)
    assert (spread[~np.eye(4, dtype=bool)] > 0.1).all()


def test_fragments_of_a_salt_do_not_overlap() -> None:
    smiles = "c1ccccc1.c1ccccc1.[Na+].[Cl-]"
    positions = embed(smiles, count=2)
    fragments = Chem.GetMolFrags(Chem.MolFromSmiles(smiles))
    assert (len(positions), len(fragments)) == (2, 4)
    for conformer in positions:
        for k, first in enumerate(fragments):
            for second in fragments[k + 1 :]:
                gaps = conformer[list(first)][:, None] - conformer[list(second)][None]
                assert np.linalg.norm(gaps, axis=-1).min() > 2.0


@pytest.mark.parametrize(
    ("smiles", "settings", "status", "detail"),
    [
        ("CCO", {}, ConformerStatus.RELAXED, r""),
        ("CCO", {"mmff_max_iterations": 0}, ConformerStatus.EMBEDDED, r""),
        (
            IBUPROFEN,
            {"mmff_max_iterations": 1, "count": 2},
            ConformerStatus.RELAXED,
            r"not converged: 2 of 2 conformers after 1 MMFF94 iterations",
        ),
        (
            "C[Se]C",  # MMFF94 knows no selenium
            {},
            ConformerStatus.RELAXED,
            r"force field: UFF, as MMFF94 lacks parameters",
        ),
        (
            "C1#CC1",
            {},
            ConformerStatus.FAILED,
            r"embedding failed: 0 of 1 conformers, \d+ x [A-Z_]+(, \d+ x [A-Z_]+)*",
        ),
    ],
)
def test_status_and_detail_say_what_became_of_a_molecule(
    smiles: str, settings: dict[str, object], status: ConformerStatus, detail: str
) -> None:
    mol = Chem.MolFromSmiles(smiles)
    embedding = make_conformers(mol, smiles, ConformerConfig(**settings))  # type: ignore[arg-type]
    assert embedding.status is status
    assert re.fullmatch(detail, embedding.detail), embedding.detail
    assert len(embedding.energies) == len(embedding.positions)
    assert np.isfinite(embedding.energies).all() == (status is not ConformerStatus.EMBEDDED)


def test_energies_are_those_of_rdkit_for_the_stored_conformers_lowest_first() -> None:
    mol = Chem.MolFromSmiles(IBUPROFEN)
    config = ConformerConfig(count=6)
    found = embed_conformers(mol, IBUPROFEN, config)
    full = Chem.AddHs(mol)
    parameters = rdDistGeom.ETKDGv3()
    parameters.randomSeed = conformer_seed(config.seed, IBUPROFEN)  # type: ignore[assignment]
    rdDistGeom.EmbedMultipleConfs(full, 6, parameters)
    rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(full, maxIters=config.mmff_max_iterations)
    properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(full)
    energies = np.array(
        [
            rdForceFieldHelpers.MMFFGetMoleculeForceField(full, properties, confId=k).CalcEnergy()
            for k in range(6)
        ]
    )
    order = np.argsort(energies)
    assert (np.diff(found.energies) >= 0).all()
    np.testing.assert_allclose(found.energies, energies[order], rtol=1e-6)
    own = np.stack([full.GetConformer(int(k)).GetPositions() for k in order])[
        :, : mol.GetNumAtoms()
    ]
    np.testing.assert_allclose(found.positions, own, atol=1e-5)


def test_energy_window_and_pruning_keep_what_their_definitions_say() -> None:
    mol = Chem.MolFromSmiles(IBUPROFEN)
    every = embed_conformers(mol, IBUPROFEN, ConformerConfig(count=12))
    windowed = embed_conformers(
        mol, IBUPROFEN, ConformerConfig(count=12, energy_window_kcal_mol=0.5)
    )
    inside = every.energies - every.energies[0] <= 0.5
    assert 1 <= len(windowed.positions) == inside.sum() < 12
    np.testing.assert_array_equal(windowed.positions, every.positions[inside])
    pruned = embed_conformers(mol, IBUPROFEN, ConformerConfig(count=12, prune_rms_angstrom=0.8))
    assert 1 < len(pruned.positions) < 12
    np.testing.assert_array_equal(pruned.positions[0], every.positions[0])
    copy = Chem.Mol(mol)
    for positions in pruned.positions:
        conformer = Chem.Conformer(mol.GetNumAtoms())
        conformer.SetPositions(positions.astype(np.float64))
        copy.AddConformer(conformer, assignId=True)
    assert min(rdMolAlign.GetAllConformerBestRMS(copy)) >= 0.8 - 1e-3


def test_relaxing_lowers_the_strain_of_bond_lengths() -> None:
    raw = embed("CCCCCC", mmff_max_iterations=0)
    relaxed = embed("CCCCCC")
    bonds = np.array([(k, k + 1) for k in range(5)])

    def spread(positions: np.ndarray) -> float:
        return float(np.linalg.norm(np.diff(positions[0][bonds], axis=1), axis=-1).std())

    assert spread(relaxed) < spread(raw)


@pytest.mark.parametrize("hydrogens", [False, True])
def test_made_coordinates_cover_every_kept_atom(hydrogens: bool) -> None:
    config = FeaturizeConfig(
        explicit_hydrogens=hydrogens, conformers=ConformerConfig(generate=True, count=2)
    )
    molecule = molecule_from_smiles("C[C@H](N)C(=O)O", config)
    assert isinstance(molecule, Molecule)
    assert molecule.num_atoms == (13 if hydrogens else 6)
    assert molecule.positions.shape == (2, molecule.num_atoms, 3)
    assert molecule.position_mask.all()


def hopeless() -> Chem.Mol:
    """Stereocentres no such cage can have, and a chain: takes minutes without a limit."""
    return Chem.MolFromSmiles("F[C@]12CC[C@@](Cl)(CC1)C2" + "C" * 60)


def test_a_molecule_that_hangs_rdkit_costs_its_time_limit_and_no_more() -> None:
    make_conformers(Chem.MolFromSmiles("CCO"), "CCO", ConformerConfig())  # a warm child
    mol = hopeless()
    started = time.monotonic()
    embedding = make_conformers(mol, "any", ConformerConfig(timeout_s=0.2))
    assert 0.2 <= time.monotonic() - started < 0.7
    assert embedding.status is ConformerStatus.FAILED
    assert embedding.detail == "timeout: not done after 0.2 s"
    assert embedding.positions.shape == (0, mol.GetNumAtoms(), 3)
    after = make_conformers(Chem.MolFromSmiles("CCO"), "CCO", ConformerConfig())
    assert after.status is ConformerStatus.RELAXED


def test_embedding_in_this_process_ends_soon_after_its_time_is_up() -> None:
    started = time.monotonic()
    embedding = embed_conformers(hopeless(), "any", ConformerConfig(timeout_s=1.0, count=3))
    assert embedding.status is ConformerStatus.FAILED
    assert embedding.detail == "timeout: 0 of 3 conformers within 1 s"
    assert time.monotonic() - started < 8.0


def test_a_crash_of_rdkit_fails_the_molecule_and_not_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = (
        "import os, signal\n"
        "from moleblend_ray.chemistry.killable import serve\n"
        "serve(lambda request: os.kill(os.getpid(), signal.SIGSEGV))"
    )
    crashing = KillableWorker(("-c", program))
    monkeypatch.setattr(conformers, "_worker", lambda: crashing)
    config = FeaturizeConfig(conformers=ConformerConfig(generate=True))
    molecule = molecule_from_smiles("CCO", config)
    assert isinstance(molecule, Molecule)
    assert molecule.conformer_status is ConformerStatus.FAILED
    assert molecule.conformer_detail == "crashed: SIGSEGV"
    rejecting = ConformerConfig(generate=True, on_failure="reject")
    rejection = molecule_from_smiles("CCO", FeaturizeConfig(conformers=rejecting))
    assert isinstance(rejection, Rejection)
    assert rejection.code is RejectionCode.CONFORMER_FAILED
    assert rejection.detail == "crashed: SIGSEGV, for CCO"


def test_a_child_that_cannot_start_is_no_fault_of_the_molecule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = KillableWorker(("-m", "no_such_module"))
    monkeypatch.setattr(conformers, "_worker", lambda: broken)
    with pytest.raises(WorkerStartError):
        molecule_from_smiles("CCO", FeaturizeConfig(conformers=ConformerConfig(generate=True)))


@pytest.mark.parametrize("smiles", [IBUPROFEN, "C[C@H](N)C(=O)O", "[Na+].CC(=O)[O-]", "F/C=C\\F"])
def test_the_child_process_gives_what_this_process_gives_bit_for_bit(smiles: str) -> None:
    mol = Chem.MolFromSmiles(smiles)
    config = ConformerConfig(count=3, prune_rms_angstrom=0.1)
    here, there = (
        function(mol, smiles, config) for function in (embed_conformers, make_conformers)
    )
    np.testing.assert_array_equal(here.positions, there.positions)
    np.testing.assert_array_equal(here.energies, there.energies)
    assert here[2:] == there[2:]


def test_the_conformer_of_a_molecule_does_not_depend_on_the_order_of_its_atoms() -> None:
    config = FeaturizeConfig(conformers=ConformerConfig(generate=True, count=2))
    mol = Chem.MolFromSmiles(IBUPROFEN)
    found = set()
    for seed in range(6):
        order = np.random.default_rng(seed).permutation(mol.GetNumAtoms()).tolist()
        shuffled = Chem.MolToSmiles(Chem.RenumberAtoms(mol, order), canonical=False)
        molecule = molecule_from_smiles(shuffled, config)
        assert isinstance(molecule, Molecule)
        by_position = np.lexsort(molecule.positions[0].T)
        found.add(
            molecule.positions[:, by_position].tobytes() + molecule.conformer_energies.tobytes()
        )
        elements = molecule.atom_features[by_position, 0].tobytes()
        found.add(elements)
    assert len(found) == 2  # one geometry, one sequence of elements along it


def test_the_child_process_starts_without_torch_ray_or_arrow() -> None:
    code = (
        "import moleblend_ray.chemistry.conformer_worker, sys\n"
        "sys.exit(bool({'torch', 'ray', 'pyarrow', 'numba', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
