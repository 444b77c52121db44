"""The skeletons of fragments do not depend on the order of atoms, and differ for fragments bonded in other ways."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import random_bonds

from moleblend_ray.relations.skeletons import Fragments, fragments
from moleblend_ray.vocabulary import ELEMENT_SYMBOLS


def of_graph(symbols: str, *bonds: tuple[int, int]) -> Fragments:
    """The fragments of one molecule."""
    elements = np.array([ELEMENT_SYMBOLS.index(name) for name in symbols.split()], dtype=np.uint8)
    ends = np.array(bonds, dtype=np.uint16).reshape(-1, 2)
    num_atoms, num_bonds = (np.array([len(each)], dtype=np.int32) for each in (elements, ends))
    return fragments(num_atoms, num_bonds, elements, ends)


def test_fragments_are_found_with_their_heavy_atoms_and_molecules() -> None:
    elements = np.array([5, 0, 7, 16, 6, 0, 0, 5, 5], dtype=np.uint8)
    bonds = np.array([[2, 0], [0, 1], [1, 0], [1, 0]], dtype=np.uint16)
    found = fragments(np.array([4, 1, 2, 2]), np.array([2, 0, 1, 1]), elements, bonds)
    assert found.molecules.tolist() == [0, 0, 1, 2, 3]
    assert found.num_heavy.tolist() == [2, 1, 1, 0, 2]


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_atoms_and_bonds_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_atoms = 30
    bonds = random_bonds(rng, num_atoms)
    bonds = bonds[rng.random(len(bonds)) < 0.9]
    elements = rng.choice([0, 5, 6, 7, 28], num_atoms, p=[0.2, 0.4, 0.2, 0.19, 0.01]).astype(
        np.uint8
    )
    order = rng.permutation(num_atoms)
    other = rng.permutation(np.argsort(order).astype(np.uint16)[bonds])[:, ::-1]
    counts = np.array([num_atoms], dtype=np.int32), np.array([len(bonds)], dtype=np.int32)
    one = fragments(*counts, elements, bonds)
    two = fragments(*counts, elements[order], np.ascontiguousarray(other))
    assert sorted(one.skeletons) == sorted(two.skeletons)
    assert sorted(one.num_heavy) == sorted(two.num_heavy)


def test_other_elements_and_other_bonds_are_told_apart_but_hydrogens_are_not() -> None:
    graphs = [
        of_graph("C C O", (0, 1), (1, 2)),
        of_graph("C C N", (0, 1), (1, 2)),
        of_graph("C C O", (0, 2), (1, 2)),
        of_graph("C C O", (0, 1), (1, 2), (0, 2)),
    ]
    assert len({int(graph.skeletons[0]) for graph in graphs}) == len(graphs)
    with_hydrogens = of_graph("H C C O H", (0, 1), (1, 2), (2, 3), (3, 4))
    assert with_hydrogens.skeletons == graphs[0].skeletons


def test_of_fragments_with_metals_the_elements_alone_count() -> None:
    one = of_graph("C O Zn", (0, 1), (1, 2))
    assert one.skeletons == of_graph("C O Zn", (0, 2), (1, 2)).skeletons
    assert one.skeletons != of_graph("C O Cu", (0, 1), (1, 2)).skeletons
