"""Which relations of a molecule a property model sees, and what its head reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import molecule_zoo as zoo
import numpy as np
import pytest
import torch

from moleblend_ray.errors import ConfigError
from moleblend_ray.model.config import ModelConfig, ReadoutConfig
from moleblend_ray.model.moleblend import (
    HYDROGEN,
    NUM_ELEMENTS,
    NUM_HYDROGENS_COLUMN,
    MoleBlendModel,
    PropertyModel,
    element_counts,
)

MODEL = ModelConfig(
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
READOUTS = ("token", "mean", "token+mean", "sum")


def property_model(num_targets: int = 2, **readout: Any) -> PropertyModel:
    torch.manual_seed(3)
    model = PropertyModel(MoleBlendModel(MODEL), num_targets, ReadoutConfig(**readout)).eval()
    # With the small initial weights the relations would hardly affect the outputs.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def outputs(model: PropertyModel, *molecules: zoo.ZooMolecule) -> np.ndarray:
    found: torch.Tensor = model(zoo.batch(list(molecules)))
    return found.numpy()


@pytest.mark.parametrize("readout", READOUTS)
def test_every_readout_is_independent_of_the_batch_and_of_the_order_of_atoms(readout: str) -> None:
    model = property_model(readout=readout)
    molecule = zoo.chain(7, seed=1)
    alone = outputs(model, molecule)[0]
    together = outputs(model, zoo.ring(12, seed=2), molecule, zoo.single_atom())[1]
    order = np.random.default_rng(0).permutation(7)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        outputs(model, molecule.permuted(order))[0], alone, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_sum_adds_what_the_head_says_of_each_atom_and_mean_reads_their_mean() -> None:
    batch = zoo.batch([zoo.chain(3), zoo.ring(6, seed=2)])
    summed, averaged = property_model(readout="sum"), property_model(readout="mean")
    tokens = summed.encoder(batch, None).tokens
    # Packed: graph token first, then the atoms, molecule by molecule.
    first, second = tokens[1:4], tokens[5:11]
    for rows, by_sum, by_mean in zip((first, second), summed(batch), averaged(batch), strict=True):
        torch.testing.assert_close(by_sum, summed.head(rows).sum(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(by_mean, averaged.head(rows.mean(0)), rtol=1e-4, atol=1e-5)


def test_the_relations_seen_are_the_ones_asked_for() -> None:
    molecule = zoo.ring(8, seed=4)
    stretched = molecule.moved(molecule.positions * 1.5)
    other_bonds = dataclasses.replace(molecule, bond_features=(molecule.bond_features + 1) % 2)
    # Other paths and degrees of the same atoms in the same places.
    opened = dataclasses.replace(
        molecule, bonds=molecule.bonds[:-1], bond_features=molecule.bond_features[:-1]
    )
    changes = {
        relations: [
            not np.allclose(outputs(model, molecule), outputs(model, changed), atol=1e-5)
            for changed in (stretched, other_bonds, opened)
        ]
        for relations in ("2d+3d", "2d", "3d")
        for model in [property_model(relations=relations)]
    }
    assert changes == {
        "2d+3d": [True, True, True],
        "2d": [False, True, True],
        "3d": [True, False, False],
    }


def test_without_coordinates_2d_is_what_all_relations_give() -> None:
    flat = zoo.ring(6, seed=5).without_positions()
    np.testing.assert_array_equal(
        outputs(property_model(relations="2d"), flat), outputs(property_model(), flat)
    )


def test_3d_does_not_change_when_the_molecule_is_turned() -> None:
    molecule = zoo.chain(6, seed=6)
    turned = molecule.moved(molecule.positions @ zoo.rotation().T)
    model = property_model(relations="3d")
    np.testing.assert_allclose(
        outputs(model, turned), outputs(model, molecule), rtol=1e-3, atol=1e-4
    )


def test_hydrogens_count_whether_they_are_atoms_or_not() -> None:
    molecule = zoo.chain(3)
    molecule.atom_features[:, 0] = (5, 7, HYDROGEN)  # C, O, H
    molecule.atom_features[:, NUM_HYDROGENS_COLUMN] = (3, 0, 0)
    counts = element_counts(zoo.batch([zoo.single_atom(), molecule]))[1]
    assert counts[HYDROGEN] == 4
    assert counts[5] == counts[7] == 1
    assert counts.sum() == 6


def test_the_element_reference_is_added_to_the_outputs() -> None:
    model = property_model()
    batch = zoo.batch([zoo.ring(6, seed=1), zoo.chain(4)])
    with torch.no_grad():
        before = model(batch)
        model.reference.copy_(torch.randn(NUM_ELEMENTS, 2))
        expected = before + element_counts(batch) @ model.reference
        torch.testing.assert_close(model(batch), expected)


def test_the_element_reference_is_float32_under_bfloat16() -> None:
    model = property_model()
    batch = zoo.batch([zoo.ring(6, seed=1), zoo.chain(4)])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(batch)
        # In bfloat16 energies of 1000 would be multiples of 4.
        model.reference.fill_(1000.125)
        expected = before.double() + 1000.125 * element_counts(batch).double().sum(1, keepdim=True)
        torch.testing.assert_close(model(batch).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"relations": "4d"}, "relations"),
        ({"readout": "max"}, "readout"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_impossible_readouts_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ReadoutConfig(**change)
