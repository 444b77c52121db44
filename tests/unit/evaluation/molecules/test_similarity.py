"""The nearest of many fingerprints is the one that RDKit finds."""

from __future__ import annotations

import numpy as np
import pytest
from rdkit import Chem, DataStructs
from rdkit.Chem import rdFingerprintGenerator

from moleblend_ray.chemistry.samples import make_samples
from moleblend_ray.errors import DataError
from moleblend_ray.evaluation.molecules.similarity import nearest_similarity, pack, packed_ecfp

GENERATOR = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
SMILES = [sample.smiles for sample in make_samples(700, seed=1)]


def vectors(smiles: list[str]) -> list[DataStructs.ExplicitBitVect]:
    return [GENERATOR.GetFingerprint(Chem.MolFromSmiles(text)) for text in smiles]


# More others than the kernel takes at a time, and a number that leaves a rest.
@pytest.mark.parametrize("num_others", [1, 255, 600])
def test_the_nearest_is_exactly_as_similar_as_rdkit_says(num_others: int) -> None:
    queries, others = SMILES[:100], SMILES[100 : 100 + num_others]
    known = vectors(others)
    expected = [max(DataStructs.BulkTanimotoSimilarity(query, known)) for query in vectors(queries)]
    found = nearest_similarity(packed_ecfp(queries), packed_ecfp(others))
    assert found.tolist() == expected


def test_a_row_that_is_left_out_does_not_count() -> None:
    smiles = sorted(set(SMILES))[:300]
    words, bits = packed_ecfp(smiles), vectors(smiles)
    rows = np.arange(len(smiles))
    found = nearest_similarity(words, words, leave_out=rows)
    expected = [
        max(DataStructs.BulkTanimotoSimilarity(bits[row], bits[:row] + bits[row + 1 :]))
        for row in rows
    ]
    assert found.tolist() == expected
    assert nearest_similarity(words, words).tolist() == [1.0] * len(smiles)


def test_fingerprints_of_any_density_and_width_agree_with_sums_of_bits() -> None:
    rng = np.random.default_rng(5)
    density = rng.random((80, 1))
    bits = (rng.random((80, 192)) < density).astype(np.uint8)
    bits[3] = 0
    common = bits.astype(np.int64) @ bits.T.astype(np.int64)
    either = bits.sum(1)[:, None] + bits.sum(1) - common
    expected = np.divide(common, either, out=np.zeros(common.shape), where=either > 0).max(axis=1)
    np.testing.assert_array_equal(nearest_similarity(pack(bits), pack(bits)), expected)


def test_without_bits_or_without_others_nothing_is_similar() -> None:
    words = packed_ecfp(["CCO", "not a molecule"])
    assert nearest_similarity(words, words).tolist() == [1.0, 0.0]
    assert nearest_similarity(words, words[:0]).tolist() == [0.0, 0.0]


def test_fingerprints_of_two_widths_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(1, 32\).*\(1, 16\).*equally many"):
        nearest_similarity(np.ones((1, 32), np.uint64), np.ones((1, 16), np.uint64))
