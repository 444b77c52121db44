"""Atom and bond codes from SMILES equal those of the official pipeline, for every molecule of ``mols.npz``.

Folders come from ``--golden DIR`` (repeatable), by default the one beside the project if it exists. The README in a
folder describes the format.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.chemistry.molecule import Molecule, molecule_from_smiles

CONFIG = FeaturizeConfig(max_atoms=4096, dummy_atoms="other")


def golden_dirs(config: pytest.Config) -> list[Path]:
    """Folders that hold ``mols.npz``: those of ``--golden``, by default the one beside the project."""
    asked = [Path(folder) for folder in config.getoption("--golden")]
    folders = asked or [config.rootpath.parent / "shared" / "data" / "golden"]
    return [folder for folder in folders if (folder / "mols.npz").is_file()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_dir" in metafunc.fixturenames:
        metafunc.parametrize("golden_dir", golden_dirs(metafunc.config), ids=str, scope="module")


@dataclass
class Featurized:
    expected: dict[str, np.ndarray]
    molecules: list[Molecule]

    def atoms(self, name: str, index: int) -> np.ndarray:
        bounds = self.expected["atom_ptr"]
        return self.expected[name][bounds[index] : bounds[index + 1]]

    def edges(self, name: str, index: int) -> np.ndarray:
        bounds = self.expected["edge_ptr"]
        return self.expected[name][bounds[index] : bounds[index + 1]]


@pytest.fixture(scope="module")
def featurized(golden_dir: Path) -> Featurized:
    expected = dict(np.load(golden_dir / "mols.npz"))
    outcomes = [molecule_from_smiles(str(smiles), CONFIG) for smiles in expected["smiles"]]
    rejected = {
        str(smiles): outcome
        for smiles, outcome in zip(expected["smiles"], outcomes, strict=True)
        if not isinstance(outcome, Molecule)
    }
    assert not rejected
    assert len(outcomes) > 0
    return Featurized(expected, [one for one in outcomes if isinstance(one, Molecule)])


def test_atom_codes_are_exact(featurized: Featurized) -> None:
    wrong = [
        str(featurized.expected["smiles"][index])
        for index, molecule in enumerate(featurized.molecules)
        if not np.array_equal(molecule.atom_features, featurized.atoms("x_raw", index))
    ]
    assert wrong == []


def test_bonds_and_their_codes_are_exact_and_in_order(featurized: Featurized) -> None:
    for index, molecule in enumerate(featurized.molecules):
        directed = np.stack([molecule.bonds, molecule.bonds[:, ::-1]], axis=1).reshape(-1, 2)
        codes = np.repeat(molecule.bond_features, 2, axis=0)
        edges = featurized.edges("edge_index", index)
        np.testing.assert_array_equal(directed, edges, err_msg=molecule.smiles)
        np.testing.assert_array_equal(
            codes, featurized.edges("edge_attr", index), err_msg=molecule.smiles
        )


def test_degrees_counted_from_bonds_are_exact(featurized: Featurized) -> None:
    for index, molecule in enumerate(featurized.molecules):
        degrees = np.bincount(molecule.bonds.ravel(), minlength=molecule.num_atoms)
        np.testing.assert_array_equal(
            degrees, featurized.atoms("degree", index), err_msg=molecule.smiles
        )


def test_canonical_order_permutes_codes_and_keeps_the_graph(featurized: Featurized) -> None:
    config = FeaturizeConfig(max_atoms=4096, dummy_atoms="other", canonical_order=True)
    for smiles, molecule in zip(featurized.expected["smiles"], featurized.molecules, strict=True):
        canonical = molecule_from_smiles(str(smiles), config)
        again = molecule_from_smiles(molecule.smiles, CONFIG)
        assert isinstance(canonical, Molecule)
        assert isinstance(again, Molecule)
        assert canonical.smiles == molecule.smiles
        np.testing.assert_array_equal(canonical.atom_features, again.atom_features)
        np.testing.assert_array_equal(canonical.bonds, again.bonds)
        # Without the chirality code, which depends on the order of the neighbours.
        columns = [0, 2, 3, 4, 5, 6, 7, 8]
        assert sorted(map(tuple, canonical.atom_features[:, columns].tolist())) == sorted(
            map(tuple, molecule.atom_features[:, columns].tolist())
        )
