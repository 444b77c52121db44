from __future__ import annotations

import time

import numpy as np
import pytest
from rdkit import Chem

from moleblend_ray.chemistry.config import ConformerConfig, FeaturizeConfig
from moleblend_ray.chemistry.conformers import (
    ConformerStatus,
    conformer_seed,
    embed_conformers,
)
from moleblend_ray.chemistry.molecule import Molecule, molecule_from_smiles

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
    for conformer in positions:
        for k, first in enumerate(fragments):
            for second in fragments[k + 1 :]:
                gaps = conformer[list(first)][:, None] - conformer[list(second)][None]
                assert np.linalg.norm(gaps, axis=-1).min() > 2.0


def test_status_says_whether_the_force_field_ran() -> None:
    def status(smiles: str, **settings: object) -> ConformerStatus:
        mol = Chem.MolFromSmiles(smiles)
        return embed_conformers(mol, smiles, ConformerConfig(**settings)).status  # type: ignore[arg-type]

    assert status("CCO") is ConformerStatus.RELAXED
    assert status("CCO", mmff_max_iterations=0) is ConformerStatus.EMBEDDED
    assert status("C[Se]C") is ConformerStatus.EMBEDDED  # MMFF94 knows no selenium
    assert status("C1#CC1") is ConformerStatus.FAILED


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


@pytest.mark.parametrize("count", [1, 3])
def test_embedding_ends_soon_after_its_time_is_up(count: int) -> None:
    """Stereocentres no such cage can have, and a chain: hopeless, and for minutes without a limit."""
    mol = Chem.MolFromSmiles("F[C@]12CC[C@@](Cl)(CC1)C2" + "C" * 60)
    started = time.monotonic()
    embedding = embed_conformers(mol, "any", ConformerConfig(timeout_s=1.0, count=count))
    assert embedding.status is ConformerStatus.FAILED
    assert embedding.positions.shape == (0, mol.GetNumAtoms(), 3)
    assert time.monotonic() - started < 8.0
