"""SMILES and SD records to arrays on one core, beside RDKit's own parse of the same records.

    python benchmarks/featurize.py [--repeats 15]

One ratio for each kind of source: the rate of ``molecules_from_records`` as `prepare` calls it, canonical SMILES
included, over the rate of RDKit's parser alone. Both take turns within one run, and the medians count. The
sources are the real molecules beside the project where they are, else sample molecules made here. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from rdkit import Chem, rdBase

from moleblend_ray.chemistry.binary import to_binary
from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.chemistry.features import graph_arrays, graph_arrays_by_getters
from moleblend_ray.chemistry.molecule import (
    MolBlock,
    SmilesText,
    molecules_from_records,
)
from moleblend_ray.chemistry.samples import make_samples

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RECORDS = 1500
CONFIG = FeaturizeConfig()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    result = {"benchmark": "featurize", "cpus": os.cpu_count(), "rdkit": rdBase.rdkitVersion}
    for name, records in smiles_sources().items():
        measured = measure_smiles(records, repeats)
        print(f"{name}: {measured}")
        result |= measured if not result.get("ratio_to_parse") else prefixed(name, measured)
    for name, records in molblock_sources().items():
        measured = measure_molblocks(records, repeats)
        print(f"{name}: {measured}")
        result |= prefixed(name, measured)
    print(json.dumps(result))


def prefixed(name: str, measured: dict[str, float | str]) -> dict[str, float | str]:
    stem = name.split(".", 1)[0]
    kept = ("molecules_per_s", "ratio_to_parse")
    return {f"{stem}_{key}": measured[key] for key in kept}


def smiles_sources() -> dict[str, list[str]]:
    """The first is the one that counts: molecules like those of PCQM4Mv2."""
    if not SHARED_DATA.is_dir():
        return {"samples": [sample.smiles for sample in make_samples(RECORDS, seed=0)]}
    table = pq.read_table(SHARED_DATA / "pcqm4mv2_2k.parquet", columns=["smiles"])
    with gzip.open(SHARED_DATA / "zinc250k_smiles.csv.gz", "rt") as file:
        zinc = [row["smiles"] for row, _ in zip(csv.DictReader(file), range(RECORDS), strict=False)]
    return {"pcqm4mv2_2k.parquet": table["smiles"].to_pylist()[:RECORDS], "zinc250k": zinc}


def molblock_sources() -> dict[str, list[str]]:
    if SHARED_DATA.is_dir():
        with gzip.open(SHARED_DATA / "cascade_dft8k.sdf.gz", "rt") as file:
            text = file.read(8 << 20)
        return {"cascade_sdf": text.split("$$$$\n")[: RECORDS // 2]}
    molecules = (Chem.MolFromSmiles(sample.smiles) for sample in make_samples(300, seed=0))
    return {"samples_sdf": [Chem.MolToMolBlock(molecule) for molecule in molecules]}


def measure_smiles(records: Sequence[str], repeats: int) -> dict[str, float | str]:
    molecules = [Chem.MolFromSmiles(record) for record in records]
    binaries = [to_binary(molecule) for molecule in molecules]
    seconds = median_seconds(
        {
            "parse": lambda: each(Chem.MolFromSmiles, records),
            "whole": lambda: molecules_from_records(map(SmilesText, records), CONFIG),
            "canonical_smiles": lambda: each(Chem.MolToSmiles, molecules),
            "binary": lambda: each(to_binary, molecules),
            "arrays": lambda: graph_arrays(binaries),
            "arrays_by_getters": lambda: each(graph_arrays_by_getters, molecules),
        },
        repeats,
    )
    return rates(seconds, len(records))


def measure_molblocks(records: Sequence[str], repeats: int) -> dict[str, float | str]:
    seconds = median_seconds(
        {
            "parse": lambda: each(
                lambda text: Chem.MolFromMolBlock(text, sanitize=True, removeHs=False), records
            ),
            "whole": lambda: molecules_from_records(map(MolBlock, records), CONFIG),
        },
        repeats,
    )
    return rates(seconds, len(records))


def each(function: Callable[..., object], records: Sequence[object]) -> None:
    for record in records:
        function(record)


def median_seconds(functions: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median time of each; they take turns, so that a busy moment of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    with rdBase.BlockLogs():
        for _ in range(repeats):
            for name, function in functions.items():
                began = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def rates(seconds: dict[str, float], records: int) -> dict[str, float | str]:
    return {
        "records": records,
        "molecules_per_s": round(records / seconds["whole"]),
        "parse_molecules_per_s": round(records / seconds["parse"]),
        "ratio_to_parse": round(seconds["parse"] / seconds["whole"], 3),
        **{f"us_{name}": round(value / records * 1e6, 1) for name, value in seconds.items()},
    }


if __name__ == "__main__":
    main()
