"""The nearest of many fingerprints: our kernel on one core beside RDKit's BulkTanimotoSimilarity on the same pairs.

    python benchmarks/similarity.py [--queries 1000] [--others 20000] [--repeats 5]

Both find the Tanimoto similarity of each query to the most similar of the others (ECFP4, 2,048 bits), from
fingerprints that are there. They take turns, processor time counts, and the fastest turn of each. The molecules are
ZINC's beside the project if they are there, else samples made here. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rdkit import Chem, DataStructs, rdBase
from rdkit.Chem import rdFingerprintGenerator

from moleblend_ray.chemistry.samples import make_samples
from moleblend_ray.evaluation.molecules.similarity import (
    NUM_BITS,
    RADIUS,
    nearest_similarity,
    packed_ecfp,
)

ZINC = Path(__file__).resolve().parents[2] / "shared" / "data" / "zinc250k_smiles.csv.gz"
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--others", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    smiles = molecules(arguments.queries + arguments.others)
    queries, others = smiles[: arguments.queries], smiles[arguments.queries :]
    words = packed_ecfp(queries), packed_ecfp(others)
    # A tenth of the queries: RDKit is slow enough to be measured by them.
    few = vectors(queries[: max(1, len(queries) // 10)])
    known = vectors(others)
    nearest_similarity(words[0][:1], words[1][:1])  # compile
    ours, rdkit = [], []
    for _ in range(arguments.repeats):
        found, seconds = timed(lambda: nearest_similarity(*words))
        ours.append(len(queries) * len(others) / seconds)
        expected, seconds = timed(
            lambda: [max(DataStructs.BulkTanimotoSimilarity(query, known)) for query in few]
        )
        rdkit.append(len(few) * len(others) / seconds)
        assert found[: len(few)].tolist() == expected
    result = {
        "benchmark": "similarity",
        "queries": len(queries),
        "others": len(others),
        "million_pairs_per_s": round(max(ours) / 1e6, 1),
        "rdkit_million_pairs_per_s": round(max(rdkit) / 1e6, 1),
        "ratio": round(max(ours) / max(rdkit), 1),
        "rdkit": rdBase.rdkitVersion,
        "cpus": os.cpu_count(),
    }
    print(json.dumps(result))


def molecules(count: int) -> list[str]:
    if not ZINC.exists():
        return [sample.smiles for sample in make_samples(count, seed=0)]
    with gzip.open(ZINC, "rt") as lines:
        return [row["smiles"] for row in itertools.islice(csv.DictReader(lines), count)]


def vectors(smiles: list[str]) -> list[DataStructs.ExplicitBitVect]:
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=RADIUS, fpSize=NUM_BITS)
    return [generator.GetFingerprint(Chem.MolFromSmiles(text)) for text in smiles]


def timed(function: Callable[[], T]) -> tuple[T, float]:
    began = time.process_time()
    return function(), time.process_time() - began


if __name__ == "__main__":
    main()
