"""Clusters are those of RDKit's implementation, and the split keeps each in one part."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem, DataStructs
from rdkit.Chem import rdFingerprintGenerator
from rdkit.ML.Cluster import Butina

from moleblend_ray.chemistry.samples import make_samples
from moleblend_ray.chemistry.scaffolds import Split, murcko_scaffold
from moleblend_ray.evaluation.splits.clusters import butina_clusters, butina_split

FRACTIONS = (0.8, 0.1, 0.1)


def distances(fingerprints: Sequence[DataStructs.ExplicitBitVect]) -> list[float]:
    return [
        1 - similarity
        for row in range(1, len(fingerprints))
        for similarity in DataStructs.BulkTanimotoSimilarity(fingerprints[row], fingerprints[:row])
    ]


def second_clusters(
    fingerprints: Sequence[DataStructs.ExplicitBitVect], cutoff: float
) -> list[list[int]]:
    found = Butina.ClusterData(distances(fingerprints), len(fingerprints), cutoff, isDistData=True)
    return [sorted(cluster) for cluster in found]


def second_split(smiles: Sequence[str]) -> list[list[int]]:
    """DeepChem's rule, from its description: clusters by size, each into the first part that has room."""
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)
    fingerprints = [generator.GetFingerprint(Chem.MolFromSmiles(text)) for text in smiles]
    parts: list[list[int]] = [[], [], []]
    for cluster in sorted(second_clusters(fingerprints, 0.6), key=lambda found: -len(found)):
        if len(parts[0]) + len(cluster) <= 0.8 * len(smiles):
            parts[0] += cluster
        elif len(parts[0]) + len(parts[1]) + len(cluster) <= 0.9 * len(smiles):
            parts[1] += cluster
        else:
            parts[2] += cluster
    return [sorted(part) for part in parts]


def lists(split: Split) -> list[list[int]]:
    return [part.tolist() for part in split]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("cutoff", [0.2, 0.6, 0.8])
def test_clusters_and_their_order_are_rdkits(seed: int, cutoff: float) -> None:
    """With bits so few that many distances and numbers of neighbours are equal, and some fingerprints have no bit."""
    random = np.random.default_rng(seed)
    bits = (random.random((60, 64)) < random.choice([0.03, 0.1, 0.3], size=(60, 1))).astype(
        np.uint8
    )
    bits[:3] = bits[3:6]
    bits[50] = 0
    vectors = []
    for row in bits:
        vector = DataStructs.ExplicitBitVect(64)
        vector.SetBitsFromList(np.flatnonzero(row).tolist())
        vectors.append(vector)
    words = np.packbits(bits, axis=1).view(np.uint64)
    found = [cluster.tolist() for cluster in butina_clusters(words, cutoff)]
    assert found == second_clusters(vectors, cutoff)


def test_clusters_of_more_fingerprints_than_a_tile_holds() -> None:
    words = np.repeat(1 << np.arange(60, dtype=np.uint64), 40)[:, None]
    order = np.random.default_rng(0).permutation(len(words))
    clusters = butina_clusters(words[order], 0.6)
    assert sorted(map(len, clusters)) == [40] * 60
    assert all(len(np.unique(words[order][cluster])) == 1 for cluster in clusters)


def test_the_split_is_that_of_a_second_implementation_and_divides_scaffolds() -> None:
    smiles = [sample.smiles for sample in make_samples(150, num_processes=1)]
    split = butina_split(smiles, FRACTIONS)
    assert lists(split) == second_split(smiles)
    scaffolds = [{murcko_scaffold(smiles[row]) for row in part} for part in split]
    assert scaffolds[0] & scaffolds[2], "a cluster is no scaffold"


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["esol", "bbbp"])
def test_the_split_of_a_real_file_is_that_of_a_second_implementation(
    name: str, shared_data: Path
) -> None:
    with gzip.open(shared_data / f"moleculenet/{name}.csv.gz", "rt") as file:
        texts = [row["smiles"] for row in csv.DictReader(file)]
    smiles = [text for text in texts if Chem.MolFromSmiles(text) is not None]
    assert lists(butina_split(smiles, FRACTIONS)) == second_split(smiles)


def test_copies_of_a_molecule_stay_in_one_part() -> None:
    smiles = [sample.smiles for sample in make_samples(60, num_processes=1)] * 2
    train, valid, test = (set(np.array(smiles)[part]) for part in butina_split(smiles, FRACTIONS))
    assert not train & valid
    assert not (train | valid) & test
