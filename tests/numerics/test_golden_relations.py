"""Integer relations of every golden molecule equal the official code's, exactly (``--golden DIR``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from relations_support import BONDED, DISCONNECTED, bond_degrees, intermediate_atoms

from moleblend_ray.relations.topology import HOP_MASK, Topology, topology
from moleblend_ray.vocabulary import MAX_SPD, UNREACHABLE

DEFAULT_FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "golden"
GOLDEN_UNREACHABLE = 510
FEATURE_STRIDE = 512
"""Golden edge types are ``code + 2 + 512 * column``; 0 or -1 stand for no bond."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "folder" in metafunc.fixturenames:
        folders = [Path(folder) for folder in metafunc.config.getoption("--golden")]
        if not folders and DEFAULT_FOLDER.is_dir():
            folders = [DEFAULT_FOLDER]
        metafunc.parametrize("folder", folders, ids=[f.name for f in folders], scope="module")


@dataclass(frozen=True)
class Golden:
    arrays: dict[str, np.ndarray[Any, Any]]
    num_atoms: np.ndarray[Any, Any]
    num_bonds: np.ndarray[Any, Any]
    bonds: np.ndarray[Any, Any]
    bond_features: np.ndarray[Any, Any]

    def relations(self) -> Topology:
        return topology(self.num_atoms, self.num_bonds, self.bonds, self.bond_features)


@pytest.fixture(scope="module")
def golden(folder: Path) -> Golden:
    with np.load(folder / "mols.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    assert len(arrays["n_atoms"]) > 0
    return Golden(
        arrays=arrays,
        num_atoms=arrays["n_atoms"].astype(np.int32),
        num_bonds=(arrays["n_edges"] // 2).astype(np.int32),
        bonds=arrays["edge_index"][::2].astype(np.uint16),
        bond_features=arrays["edge_attr"][::2].astype(np.uint8),
    )


def path_codes(edge_types: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Golden edge types (..., 3) as path codes (...)."""
    kind, stereo, conjugated = (
        edge_types[..., column].astype(np.int64) - 2 - FEATURE_STRIDE * column
        for column in range(3)
    )
    return np.where(edge_types[..., 0] > 0, 1 + (kind * 6 + stereo) * 2 + conjugated, 0)


def test_directed_golden_bonds_are_pairs_of_opposite_directions(golden: Golden) -> None:
    edges, features = golden.arrays["edge_index"], golden.arrays["edge_attr"]
    assert np.array_equal(edges[::2], edges[1::2, ::-1])
    assert np.array_equal(features[::2], features[1::2])


def test_shortest_path_distances_are_equal(golden: Golden) -> None:
    expected = golden.arrays["spd"].astype(np.int64)
    expected = np.where(expected == GOLDEN_UNREACHABLE, UNREACHABLE, np.minimum(expected, MAX_SPD))
    assert np.array_equal(golden.relations().spd, expected)


def test_intermediate_atoms_of_floyd_warshall_are_equal(golden: Golden) -> None:
    expected = golden.arrays["fw_path"].astype(np.int64)
    expected = np.where(expected == GOLDEN_UNREACHABLE, DISCONNECTED, expected)
    expected[golden.arrays["spd"] == 0] = BONDED
    found = intermediate_atoms(golden.num_atoms, golden.num_bonds, golden.bonds)
    assert np.array_equal(found, expected)


def test_codes_of_single_bonds_are_equal(golden: Golden) -> None:
    found = golden.relations()
    bonded = found.spd == 1
    codes = path_codes(golden.arrays["attn_edge_type"])
    assert np.array_equal(np.where(bonded, found.path_codes[:, 0], 0), codes)


def test_first_five_hops_of_every_path_are_equal(golden: Golden) -> None:
    expected = path_codes(golden.arrays["edge_input_5"])
    assert np.array_equal(golden.relations().path_codes, expected)


def test_all_hops_of_every_path_are_equal(golden: Golden) -> None:
    """Our intermediate atoms and our codes of single bonds give every golden path in full length."""
    relations = golden.relations()
    middle = intermediate_atoms(golden.num_atoms, golden.num_bonds, golden.bonds)
    pair_ptr, full_ptr = golden.arrays["pair_ptr"], golden.arrays["edge_full_ptr"]
    for molecule, num_hops in enumerate(golden.arrays["max_dist"].astype(np.int64).tolist()):
        full = golden.arrays["edge_input_full"][full_ptr[molecule] : full_ptr[molecule + 1]]
        n = int(golden.num_atoms[molecule])
        expected = path_codes(full.reshape(n * n, num_hops, 3)).reshape(n, n, num_hops)
        own = slice(pair_ptr[molecule], pair_ptr[molecule + 1])
        codes = (relations.path_words[own] & HOP_MASK).reshape(n, n)
        walked = walked_codes(middle[own].reshape(n, n), codes)
        shared = min(num_hops, n)
        assert np.array_equal(walked[:, :, :shared], expected[:, :, :shared]), (
            f"molecule {molecule}"
        )
        # No simple path has more bonds than atoms: further hops are empty on both sides.
        assert not walked[:, :, shared:].any()
        assert not expected[:, :, shared:].any()


def walked_codes(
    middle: np.ndarray[Any, Any], first_codes: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Codes (n, n, n) of all bonds of each path, from the intermediate atom and the first code of each pair."""
    n = len(middle)
    a, b = np.indices((n, n))
    first = b.copy()
    for _ in range(n):
        split = middle[a, first]
        first = np.where(split >= 0, split, first)
    codes = np.zeros((n, n, n), np.int64)
    here = a
    for hop in range(n):
        onward = (middle != DISCONNECTED) & (here != b)
        there = np.where(onward, first[here, b], here)
        codes[..., hop] = np.where(onward, first_codes[here, there], 0)
        here = there
    return codes


def test_degrees_are_equal(golden: Golden) -> None:
    degrees = bond_degrees(golden.num_atoms, golden.num_bonds, golden.bonds)
    assert np.array_equal(degrees, golden.arrays["degree"])
