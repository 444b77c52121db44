"""Descriptors are RDKit's own, in its order; those that cannot be computed are NaN."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import Crippen, Descriptors, rdMolDescriptors

from moleblend_ray.chemistry import descriptors as module
from moleblend_ray.chemistry.descriptors import DESCRIPTOR_NAMES, descriptors, stored_descriptors
from moleblend_ray.vocabulary import STORED_DESCRIPTORS

ODD = ["CCO", "c1ccccc1", "Cn1cnc2c1c(=O)n(C)c(=O)n2C", "[Na+].[Cl-]", "[H][H]", "C[Si](C)(C)C"]


def column(values: np.ndarray, name: str) -> np.ndarray:
    return values[:, DESCRIPTOR_NAMES.index(name)]


def test_known_values_of_ethanol_benzene_and_caffeine() -> None:
    values = descriptors(ODD[:3])
    assert values.dtype == np.float64
    assert values.shape == (3, len(DESCRIPTOR_NAMES))
    assert column(values, "MolWt") == pytest.approx([46.069, 78.114, 194.194], abs=2e-3)
    assert column(values, "TPSA") == pytest.approx([20.23, 0.0, 61.82], abs=1e-2)
    assert column(values, "NumAromaticRings").tolist() == [0, 1, 2]
    assert column(values, "fr_Al_OH").tolist() == [1, 0, 0]


@pytest.mark.parametrize("smiles", ODD)
def test_each_value_is_that_of_rdkits_function_of_that_name(smiles: str) -> None:
    (values,) = descriptors([smiles])
    mol = Chem.MolFromSmiles(smiles)
    expected = {
        "MolWt": Descriptors.MolWt(mol),  # type: ignore[attr-defined]
        "MolLogP": Crippen.MolLogP(mol),  # type: ignore[attr-defined]
        "TPSA": rdMolDescriptors.CalcTPSA(mol),
        "NumHDonors": rdMolDescriptors.CalcNumHBD(mol),
        "Kappa2": rdMolDescriptors.CalcKappa2(mol),
    }
    found = {name: values[DESCRIPTOR_NAMES.index(name)] for name in expected}
    np.testing.assert_equal(found, expected)


def test_what_rdkit_cannot_compute_is_nan_and_the_rest_of_the_molecule_is_there() -> None:
    values = descriptors(["C[Hg]C"])
    assert np.isnan(column(values, "BCUT2D_CHGHI")).all()
    assert column(values, "MolWt") == pytest.approx([230.66], abs=0.05)


def test_a_smiles_that_is_none_has_no_values_and_shifts_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        values = descriptors(["CCO", "C1CC", "c1ccccc1"])
    assert "1 of 3 SMILES" in caplog.text
    assert np.isnan(values[1]).all()
    np.testing.assert_array_equal(values[[0, 2]], descriptors(["CCO", "c1ccccc1"]))


def test_shards_store_all_but_one_of_rdkits_descriptors_under_fixed_names() -> None:
    assert sorted(STORED_DESCRIPTORS) == sorted({*DESCRIPTOR_NAMES} - {"Ipc"})
    stored, values = stored_descriptors(ODD), descriptors(ODD)
    assert stored.dtype == np.float32
    for place, name in enumerate(STORED_DESCRIPTORS):
        known = np.isfinite(column(values, name))
        expected = np.where(known, column(values, name), np.nan).astype(np.float32)
        np.testing.assert_array_equal(stored[:, place], expected)


def test_a_descriptor_that_this_rdkit_lacks_or_that_overflows_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everything = stored_descriptors(["CCO"])[0]
    names = tuple(reversed([name for name in DESCRIPTOR_NAMES if name != "TPSA"]))
    values = descriptors(["CCO"])[:, [DESCRIPTOR_NAMES.index(name) for name in names]]
    values[0, names.index("MolWt")] = 1e60
    monkeypatch.setattr(module, "DESCRIPTOR_NAMES", names)
    monkeypatch.setattr(module, "descriptors", lambda *_: values)
    (found,) = stored_descriptors(["CCO"])
    lacking = [STORED_DESCRIPTORS.index(name) for name in ("TPSA", "MolWt")]
    assert np.isnan(found[lacking]).all()
    expected = everything.copy()
    expected[lacking] = np.nan
    np.testing.assert_array_equal(found, expected)
