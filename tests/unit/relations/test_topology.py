"""The relation kernels equal a plain Floyd-Warshall with recursive path recovery, pair by pair."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from relations_support import BONDED, DISCONNECTED, intermediate_atoms
from synthetic import random_bonds

from moleblend_ray.errors import DataError
from moleblend_ray.relations.topology import Topology, topology
from moleblend_ray.vocabulary import BOND_VOCAB_SIZES, MAX_SPD, NO_HOP, NUM_HOPS, UNREACHABLE

FAR = 10**6


def floyd_warshall(n: int, bonds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The algorithm of the official code: ascending k, strict improvement."""
    distance = np.full((n, n), FAR)
    middle = np.full((n, n), DISCONNECTED)
    for a, b in bonds.tolist():
        distance[a, b] = distance[b, a] = 1
        middle[a, b] = middle[b, a] = BONDED
    for a in range(n):
        distance[a, a], middle[a, a] = 0, BONDED
    for k in range(n):
        through = distance[:, k, None] + distance[None, k, :]
        better = through < distance
        distance[better] = through[better]
        middle[better] = k
    return distance, middle


def recovered_path(middle: np.ndarray, a: int, b: int) -> list[int]:
    """Atoms from a to b, both included."""
    if a == b:
        return [a]
    k = int(middle[a, b])
    return (
        [a, b] if k == BONDED else recovered_path(middle, a, k) + recovered_path(middle, k, b)[1:]
    )


def plain_topology(
    n: int, bonds: np.ndarray, features: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    distance, middle = floyd_warshall(n, bonds)
    code = np.zeros((n, n), int)
    for (a, b), (kind, stereo, conjugated) in zip(bonds.tolist(), features.tolist(), strict=True):
        code[a, b] = code[b, a] = 1 + (kind * 6 + stereo) * 2 + conjugated
    codes = np.full((n, n, NUM_HOPS), NO_HOP)
    for a in range(n):
        for b in range(n):
            if distance[a, b] < FAR:
                path = recovered_path(middle, a, b)
                hops = [code[x, y] for x, y in pairwise(path)][:NUM_HOPS]
                codes[a, b, : len(hops)] = hops
    spd = np.where(distance >= FAR, UNREACHABLE, np.minimum(distance, MAX_SPD))
    return spd.reshape(-1), codes.reshape(n * n, NUM_HOPS), middle.reshape(-1)


def one(n: int, bonds: list[tuple[int, int]] | np.ndarray) -> tuple[Topology, np.ndarray]:
    """Topology and bond features of a single molecule with random bond features."""
    bonds = np.array(bonds, np.uint16).reshape(-1, 2)
    rng = np.random.default_rng(len(bonds))
    features = rng.integers(0, BOND_VOCAB_SIZES, (len(bonds), 3)).astype(np.uint8)
    sizes = np.array([n], np.int32), np.array([len(bonds)], np.int32)
    return topology(*sizes, bonds, features), features


def assert_equals_plain(sizes: list[int], bonds: list[np.ndarray], seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = [rng.integers(0, BOND_VOCAB_SIZES, (len(b), 3)).astype(np.uint8) for b in bonds]
    num_atoms = np.array(sizes, np.int32)
    num_bonds = np.array([len(b) for b in bonds], np.int32)
    flat_bonds = np.concatenate(bonds)
    found = topology(num_atoms, num_bonds, flat_bonds, np.concatenate(features))
    middle = intermediate_atoms(num_atoms, num_bonds, flat_bonds)
    plain = [plain_topology(n, b, f) for n, b, f in zip(sizes, bonds, features, strict=True)]
    assert np.array_equal(found.spd, np.concatenate([spd for spd, _, _ in plain]))
    assert np.array_equal(found.path_codes, np.concatenate([codes for _, codes, _ in plain]))
    assert np.array_equal(middle, np.concatenate([k for _, _, k in plain]))


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 24), min_size=1, max_size=6),
    extra=st.floats(0, 1.5),
)
@settings(max_examples=80)
def test_block_equals_plain_floyd_warshall_on_random_graphs(
    seed: int, sizes: list[int], extra: float
) -> None:
    rng = np.random.default_rng(seed)
    assert_equals_plain(sizes, [random_bonds(rng, n, extra) for n in sizes], seed)


@pytest.mark.parametrize("extra", [0.05, 0.3, 1.0])
def test_molecules_beyond_64_atoms_equal_plain_floyd_warshall(extra: float) -> None:
    rng = np.random.default_rng(11)
    sizes = [64, 65, 90, 3, 130]
    assert_equals_plain(sizes, [random_bonds(rng, n, extra) for n in sizes], 12)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_every_graph_of_up_to_six_numbered_atoms_equals_plain_floyd_warshall(n: int) -> None:
    pairs = np.array([(a, b) for b in range(n) for a in range(b)], np.int64).reshape(-1, 2)
    graphs = (np.arange(2 ** len(pairs))[:, None] >> np.arange(len(pairs)) & 1).astype(bool)
    distance = np.full((len(graphs), n, n), FAR)
    middle = np.full((len(graphs), n, n), DISCONNECTED)
    for (a, b), bonded in zip(pairs.tolist(), graphs.T, strict=True):
        distance[bonded, a, b] = distance[bonded, b, a] = 1
        middle[bonded, a, b] = middle[bonded, b, a] = BONDED
    distance[:, range(n), range(n)] = 0
    middle[:, range(n), range(n)] = BONDED
    for k in range(n):
        through = distance[:, :, k, None] + distance[:, None, k, :]
        better = through < distance
        distance[better] = through[better]
        middle[better] = k

    # Every bond has a different code, which distinguishes paths.
    kinds = np.arange(len(pairs))
    features = np.stack([kinds // 12, kinds // 2 % 6, kinds % 2], axis=1).astype(np.uint8)
    code = np.zeros((n, n), int)
    for (a, b), kind in zip(pairs.tolist(), kinds.tolist(), strict=True):
        code[a, b] = code[b, a] = 1 + kind
    which, used = np.nonzero(graphs)
    sizes = np.full(len(graphs), n, np.int32), np.bincount(which, minlength=len(graphs))
    num_bonds = sizes[1].astype(np.int32)
    found = topology(sizes[0], num_bonds, pairs[used].astype(np.uint16), features[used])
    assert np.array_equal(
        intermediate_atoms(sizes[0], num_bonds, pairs[used].astype(np.uint16)), middle.ravel()
    )
    expected = np.where(distance == FAR, UNREACHABLE, distance)
    assert np.array_equal(found.spd, expected.ravel())
    codes = found.path_codes.reshape(len(graphs), n, n, NUM_HOPS)
    assert np.array_equal(codes, hop_codes(distance, middle, code))


def hop_codes(distance: np.ndarray, middle: np.ndarray, code: np.ndarray) -> np.ndarray:
    """First hops of every path of (graphs, n, n) splits, by walking from a to the first atom of each path."""
    graphs, n, _ = middle.shape
    g, a, b = np.indices((graphs, n, n))
    first = b.copy()
    for _ in range(n):
        split = middle[g, a, first]
        first = np.where(split >= 0, split, first)
    codes = np.zeros((graphs, n, n, NUM_HOPS), int)
    here = a
    for hop in range(NUM_HOPS):
        onward = (distance < FAR) & (here != b)
        there = np.where(onward, first[g, here, b], here)
        codes[..., hop] = np.where(onward, code[here, there], NO_HOP)
        here = there
    return codes


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 30))
@settings(max_examples=40)
def test_path_back_is_the_path_reversed(seed: int, n: int) -> None:
    bonds = random_bonds(np.random.default_rng(seed), n)
    found, _ = one(n, bonds)
    spd, codes = found.spd.reshape(n, n), found.path_codes.reshape(n, n, NUM_HOPS)
    for a in range(n):
        for b in range(n):
            hops = 0 if spd[a, b] == UNREACHABLE else min(spd[a, b], NUM_HOPS)
            if spd[a, b] <= NUM_HOPS:
                assert np.array_equal(codes[a, b, :hops], codes[b, a, :hops][::-1])
            assert (codes[a, b, hops:] == NO_HOP).all()


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 20))
@settings(max_examples=40)
def test_order_and_direction_of_the_bonds_do_not_matter(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    bonds = random_bonds(rng, n, extra=0.5)
    features = rng.integers(0, BOND_VOCAB_SIZES, (len(bonds), 3)).astype(np.uint8)
    sizes = np.array([n], np.int32), np.array([len(bonds)], np.int32)
    shuffle = rng.permutation(len(bonds))
    turned = rng.permuted(bonds[shuffle], axis=1)
    expected = topology(*sizes, bonds, features)
    found = topology(*sizes, turned, features[shuffle])
    assert np.array_equal(found.spd, expected.spd)
    assert np.array_equal(found.path_words, expected.path_words)


def test_equally_short_routes_take_the_lowest_possible_largest_atom() -> None:
    # A four-ring 0-1-3-2-0: from 0 to 3 through 1, not 2.
    bonds = [(0, 2), (2, 3), (0, 1), (1, 3)]
    found, features = one(4, bonds)
    code = 1 + (features[:, 0].astype(int) * 6 + features[:, 1]) * 2 + features[:, 2]
    assert found.path_codes.reshape(4, 4, 5)[0, 3].tolist() == [code[2], code[3], 0, 0, 0]


def test_single_atom_has_one_empty_pair() -> None:
    found, _ = one(1, [])
    assert found.spd.tolist() == [0]
    assert found.path_codes.tolist() == [[NO_HOP] * 5]


def test_fragments_are_unreachable_without_hops() -> None:
    found, _ = one(4, [(0, 1), (2, 3)])
    spd = found.spd.reshape(4, 4)
    assert (spd[:2, 2:] == UNREACHABLE).all()
    assert (spd[2:, :2] == UNREACHABLE).all()
    assert spd[0, 1] == spd[2, 3] == 1
    assert (found.path_codes.reshape(4, 4, 5)[:2, 2:] == NO_HOP).all()


def test_distance_of_a_500_atom_chain_saturates_below_unreachable() -> None:
    n = 500
    found, _ = one(n, [(i, i + 1) for i in range(n - 1)])
    spd = found.spd.reshape(n, n)
    assert spd[0, 253] == 253
    assert spd[0, 254] == spd[0, 255] == spd[0, 499] == MAX_SPD
    assert MAX_SPD < UNREACHABLE
    # The hops are those of the true path, however long it is.
    codes = found.path_codes.reshape(n, n, 5)
    assert np.array_equal(codes[0, 499], codes[0, 5])


def test_paths_over_20_bonds_keep_their_first_hops_and_distance() -> None:
    n = 24
    chain = [(i, i + 1) for i in range(n - 1)]
    found, features = one(n, chain)
    code = 1 + (features[:, 0].astype(int) * 6 + features[:, 1]) * 2 + features[:, 2]
    assert found.spd.reshape(n, n)[0, 23] == 23
    assert found.path_codes.reshape(n, n, 5)[0, 23].tolist() == code[:5].tolist()
    assert found.path_codes.reshape(n, n, 5)[23, 0].tolist() == code[-1:-6:-1].tolist()


def test_empty_block_gives_empty_relations() -> None:
    none = np.zeros(0, np.int32)
    found = topology(none, none, np.zeros((0, 2), np.uint16), np.zeros((0, 3), np.uint8))
    assert found.spd.shape == (0,)
    assert found.path_codes.shape == (0, 5)
    assert found.path_words.shape == (0,)


def test_damaged_bonds_are_refused_naming_the_molecule() -> None:
    sizes = np.array([2, 2], np.int32), np.array([1, 1], np.int32)
    features = np.zeros((2, 3), np.uint8)
    with pytest.raises(
        DataError, match=r"molecule 1 of the block has 2 atoms but bonds up to atom 2"
    ):
        topology(*sizes, np.array([[0, 1], [0, 2]], np.uint16), features)
    features[0, 0] = BOND_VOCAB_SIZES[0]
    with pytest.raises(DataError, match=r"molecule 0 of the block .* codes up to \[5, 0, 0\]"):
        topology(*sizes, np.array([[0, 1], [0, 1]], np.uint16), features)
    for bonds in ([[0, 0]], [[0, 1], [1, 2], [1, 0]], [[0, 2], [1, 2], [2, 1]], [[0, 1], [0, 1]]):
        one_molecule = np.array([3], np.int32), np.array([len(bonds)], np.int32)
        with pytest.raises(DataError, match=r"each bond must stand once and join two atoms"):
            topology(*one_molecule, np.array(bonds, np.uint16), np.zeros((len(bonds), 3), np.uint8))
    with pytest.raises(DataError, match="do not fit"):
        topology(*sizes, np.zeros((3, 2), np.uint16), np.zeros((3, 3), np.uint8))
