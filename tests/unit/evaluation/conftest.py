"""Small labelled collections made from SMILES, without files and without Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.chemistry.molecule import Molecule, molecule_from_smiles
from moleblend_ray.data.dataset.block import MoleculeBlock, undescribed
from moleblend_ray.evaluation.models.finetune import StartingPoint
from moleblend_ray.evaluation.molecules.dataset import LabelledMolecules
from moleblend_ray.model.config import ModelConfig

MakeLabelled = Callable[..., LabelledMolecules]

SUBSTITUENTS = ("C", "CC", "O", "N", "F", "N#C")
RINGS = (
    "c1ccccc1", "c1ccncc1", "C1CCCCC1", "C1CCNCC1", "c1ccsc1", "c1ccoc1", "C1CCOCC1", "c1cnccn1",
    "C1CCCC1", "C1CCC1", "c1ccc2ccccc2c1", "c1ccc2ncccc2c1", "C1CCOC1", "c1cncnc1", "C1CCCCCC1", "c1ccc2occc2c1",
)  # fmt: skip


def all_smiles() -> list[str]:
    """96 distinct molecules of 16 ring systems."""
    return [substituent + ring for ring in RINGS for substituent in SUBSTITUENTS]


def block_of(molecules: Sequence[Molecule]) -> MoleculeBlock:
    """The graphs of molecules, without coordinates."""
    num_atoms = np.array([molecule.num_atoms for molecule in molecules], dtype=np.int32)
    return MoleculeBlock(
        molecule_ids=np.arange(len(molecules), dtype=np.int64),
        num_atoms=num_atoms,
        num_bonds=np.array([molecule.num_bonds for molecule in molecules], dtype=np.int32),
        atom_features=np.concatenate([molecule.atom_features for molecule in molecules]),
        bonds=np.concatenate([molecule.bonds for molecule in molecules]),
        bond_features=np.concatenate([molecule.bond_features for molecule in molecules]),
        positions=np.zeros((int(num_atoms.sum()), 3), dtype=np.float32),
        position_mask=np.zeros(int(num_atoms.sum()), dtype=np.bool_),
        descriptors=undescribed(len(molecules)),
    )


def molecules_of(smiles: Sequence[str], **settings: Any) -> list[Molecule]:
    """The molecules of SMILES, all of which must be ones."""
    found = [molecule_from_smiles(text, FeaturizeConfig(**settings)) for text in smiles]
    assert all(isinstance(molecule, Molecule) for molecule in found)
    return [molecule for molecule in found if isinstance(molecule, Molecule)]


@pytest.fixture
def make_labelled() -> MakeLabelled:
    """Builds LabelledMolecules from SMILES and labels (M, T)."""

    def build(smiles: Sequence[str], labels: np.ndarray) -> LabelledMolecules:
        molecules = molecules_of(smiles)
        labels = np.asarray(labels, dtype=np.float64).reshape(len(molecules), -1)
        return LabelledMolecules(
            block=block_of(molecules),
            mol_ids=tuple(f"mol_{row}" for row in range(len(molecules))),
            smiles=tuple(molecule.smiles for molecule in molecules),
            labels=labels,
            columns=tuple(f"y{column}" for column in range(labels.shape[1])),
            fingerprint="0" * 64,
            num_unlabelled=0,
            num_quarantined=0,
        )

    return build


@pytest.fixture
def tiny_start() -> StartingPoint:
    """A new encoder of two narrow layers, without dropout."""
    model = ModelConfig(
        num_layers=2,
        dim=32,
        ffn_dim=32,
        num_heads=4,
        num_kernels=8,
        pair_dim=4,
        attention_dropout=0.0,
        activation_dropout=0.0,
        drop_path=0.0,
    )
    return StartingPoint(model=model, encoder=None, fingerprint=None)
