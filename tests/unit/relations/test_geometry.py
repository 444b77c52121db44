"""Closest pairs and keyed rotations of a block of conformers."""

from __future__ import annotations

import numpy as np
import pytest

from moleblend_ray.errors import DataError
from moleblend_ray.relations.geometry import closest_pair_distances, random_rotations, rotate


def test_closest_pair_equals_the_smallest_of_all_distances() -> None:
    rng = np.random.default_rng(0)
    num_atoms = np.array([7, 2, 30], np.int32)
    positions = rng.normal(size=(39, 3)).astype(np.float32)
    mask = np.ones(39, bool)
    mask[[0, 20]] = False
    expected = []
    for own, present in zip(np.split(positions, [7, 9]), np.split(mask, [7, 9]), strict=True):
        own = own[present].astype(np.float64)
        distances = np.linalg.norm(own[:, None] - own[None], axis=-1)
        expected.append(distances[np.triu_indices(len(own), 1)].min())
    found = closest_pair_distances(num_atoms, positions, mask)
    assert found.dtype == np.float32
    assert np.allclose(found, expected, rtol=1e-6)


def test_fewer_than_two_atoms_with_coordinates_have_no_closest_pair() -> None:
    positions = np.zeros((4, 3), np.float32)
    mask = np.array([True, False, True, False])
    found = closest_pair_distances(np.array([1, 3], np.int32), positions, mask)
    assert found.tolist() == [np.inf, np.inf]


def test_coincident_atoms_have_distance_zero() -> None:
    found = closest_pair_distances(
        np.array([2], np.int32), np.ones((2, 3), np.float32), np.ones(2, bool)
    )
    assert found.tolist() == [0.0]


def test_rotations_are_proper_orthogonal_and_a_function_of_the_key() -> None:
    keys = np.arange(1000, dtype=np.uint64)
    rotations = random_rotations(keys)
    products = rotations @ rotations.transpose(0, 2, 1)
    assert np.allclose(products, np.eye(3), atol=1e-6)
    assert np.allclose(np.linalg.det(rotations), 1, atol=1e-6)
    assert np.array_equal(random_rotations(keys[::-1])[::-1], rotations)
    assert len(np.unique(rotations[:, 0, 0])) > 990


def test_rotated_axes_are_spread_uniformly_over_the_sphere() -> None:
    directions = random_rotations(np.arange(20_000, dtype=np.uint64))[:, :, 2].astype(np.float64)
    assert np.abs(directions.mean(axis=0)).max() < 0.02
    # Each coordinate of a uniform direction is uniform in [-1, 1].
    assert np.abs((directions**2).mean(axis=0) - 1 / 3).max() < 0.01
    assert np.abs((directions**4).mean(axis=0) - 1 / 5).max() < 0.01


def test_rotation_keeps_distances_and_acts_molecule_by_molecule() -> None:
    rng = np.random.default_rng(1)
    num_atoms = np.array([3, 4], np.int32)
    positions = rng.normal(size=(7, 3)).astype(np.float32)
    rotations = random_rotations(np.array([5, 6], np.uint64))
    turned = rotate(num_atoms, positions, rotations)
    assert turned.dtype == np.float32
    assert np.allclose(turned[:3], positions[:3] @ rotations[0].T, atol=1e-6)
    assert np.allclose(turned[3:], positions[3:] @ rotations[1].T, atol=1e-6)
    with pytest.raises(DataError, match="do not fit"):
        rotate(num_atoms, positions[:-1], rotations)
