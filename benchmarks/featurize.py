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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rdkit import Chem, rdBase

from moleblend_ray.chemistry.binary import to_binary
from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.chemistry.descriptors import stored_descriptors
from moleblend_ray.chemistry.features import graph_arrays, graph_arrays_by_getters
from moleblend_ray.chemistry.molecule import molecules_from_records
from moleblend_ray.chemistry.records import MolBlock, SmilesText
from moleblend_ray.chemistry.samples import make_samples
from moleblend_ray.data.dataset.shards import DESCRIPTOR_FIELD, encode_shard
from moleblend_ray.data.preparation.options import ConvertOptions

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RECORDS = 1500
TURN = 100
CONFIG = FeaturizeConfig()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    result: dict[str, object] = {
        "benchmark": "featurize",
        "cpus": os.cpu_count(),
        "rdkit": rdBase.rdkitVersion,
    }
    for name, records in smiles_sources().items():
        figures = measure_smiles(records, repeats)
        print(f"{name}: {figures}")
        result |= prefixed(name, figures) if "ratio_to_parse" in result else figures
    result["descriptor_bytes"] = round(descriptor_bytes(records), 1)
    for name, records in molblock_sources().items():
        figures = measure_molblocks(records, repeats)
        print(f"{name}: {figures}")
        result |= prefixed(name, figures)
    print(json.dumps(result))


def prefixed(name: str, figures: dict[str, float | str]) -> dict[str, float | str]:
    stem = name.split(".", 1)[0]
    kept = ("molecules_per_s", "ratio_to_parse", "descriptors_per_s")
    return {f"{stem}_{key}": figures[key] for key in kept if key in figures}


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
    return measured(
        {
            "parse": lambda part: each(Chem.MolFromSmiles, records[part]),
            "whole": lambda part: molecules_from_records(map(SmilesText, records[part]), CONFIG),
            "canonical_smiles": lambda part: each(Chem.MolToSmiles, molecules[part]),
            "binary": lambda part: each(to_binary, molecules[part]),
            "arrays": lambda part: graph_arrays(binaries[part]),
            "arrays_by_getters": lambda part: each(graph_arrays_by_getters, molecules[part]),
            "descriptors": lambda part: stored_descriptors(records[part]),
        },
        len(records),
        repeats,
    )


def descriptor_bytes(records: Sequence[str]) -> float:
    """Bytes per molecule that descriptors take in a shard."""
    column = pa.array(list(stored_descriptors(records)), DESCRIPTOR_FIELD.type)
    table = pa.table({DESCRIPTOR_FIELD.name: column})
    return len(encode_shard(table, ConvertOptions().row_group_rows)) / len(records)


def measure_molblocks(records: Sequence[str], repeats: int) -> dict[str, float | str]:
    parse = partial(Chem.MolFromMolBlock, sanitize=True, removeHs=False)
    return measured(
        {
            "parse": lambda part: each(parse, records[part]),
            "whole": lambda part: molecules_from_records(map(MolBlock, records[part]), CONFIG),
        },
        len(records),
        repeats,
    )


def each(function: Callable[..., object], records: Sequence[object]) -> None:
    for record in records:
        function(record)


def measured(
    functions: Mapping[str, Callable[[slice], object]], records: int, repeats: int
) -> dict[str, float | str]:
    """Median time of each over the repeats.

    They take turns after every few records, so that a busy moment of the machine meets all of them, and
    processor time counts.
    """
    times: dict[str, list[float]] = {name: [0.0] * repeats for name in functions}
    parts = [slice(begin, begin + TURN) for begin in range(0, records, TURN)]
    with rdBase.BlockLogs():
        for repeat, part in product(range(repeats), parts):
            for name, function in functions.items():
                began = time.process_time()
                function(part)
                times[name][repeat] += time.process_time() - began
    return rates({name: statistics.median(values) for name, values in times.items()}, records)


def rates(seconds: dict[str, float], records: int) -> dict[str, float | str]:
    described = (
        {"descriptors_per_s": round(records / seconds["descriptors"])}
        if "descriptors" in seconds
        else {}
    )
    return {
        "records": records,
        "molecules_per_s": round(records / seconds["whole"]),
        "parse_molecules_per_s": round(records / seconds["parse"]),
        "ratio_to_parse": round(seconds["parse"] / seconds["whole"], 3),
        **described,
        **{f"us_{name}": round(value / records * 1e6, 1) for name, value in seconds.items()},
    }


if __name__ == "__main__":
    main()
