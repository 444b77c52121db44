"""Memory and speed of the global shuffle at growing sizes under one memory bound, in one process.

    python benchmarks/shuffle.py [--molecules 500000] [--growth 1 4] [--memory-gib 0.25] [--deduplicate]

A converted chunk of the source (50,000 ZINC SMILES' first 8,192 beside the project if they are there, else sample
molecules) is staged again and again, each time as other records, until there are as many molecules as asked; then
the passes of the shuffle run one after the other in a fresh process, which tells its peak memory. The bound is for
molecules: what the process has beyond it, it has from the start (``base_mib``). Prints one JSON line.
"""

from __future__ import annotations

import os

# One thread: the figures are those of one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import gzip
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moleblend_ray.chemistry.samples import write_samples
from moleblend_ray.data.dataset.dataset_files import staged_path
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.exchange import StagedChunk, plan_exchange
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.segments import encode_segment
from moleblend_ray.data.preparation.shard_writer import featurize_chunk
from moleblend_ray.data.preparation.shuffle import run_unit
from moleblend_ray.data.preparation.staging import staged_table
from moleblend_ray.data.sources import find_sources, inspect_sources, read_chunks

ZINC = Path(__file__).resolve().parents[2] / "shared" / "data" / "zinc250k_smiles.csv.gz"
ROWS_PER_CHUNK = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--molecules", type=int, default=500_000)
    parser.add_argument("--growth", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--memory-gib", type=float, default=0.25)
    parser.add_argument("--deduplicate", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(shuffle(arguments.child, arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "molecules.parquet")
        pq.write_table(converted(folder), path)
        sizes = [
            in_a_fresh_process(path, [f"--molecules={arguments.molecules * factor}"])
            for factor in arguments.growth
        ]
    first, last = sizes[0], sizes[-1]
    growth = {
        "peak_growth": round(last["peak_mib"] / first["peak_mib"], 3),
        "seconds_per_molecule_growth": round(
            (last["seconds"] / last["molecules"]) / (first["seconds"] / first["molecules"]), 3
        ),
    }
    shared = {"memory_gib": arguments.memory_gib, "deduplicate": arguments.deduplicate}
    print(json.dumps({"benchmark": "shuffle", **shared, **growth, "sizes": sizes}))


def in_a_fresh_process(path: str, changes: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], *changes, f"--child={path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def converted(folder: str) -> pa.Table:
    """One chunk of the source as rows of a shard."""
    source = os.path.join(folder, "source.csv" if ZINC.exists() else "source.parquet")
    if ZINC.exists():
        with gzip.open(ZINC, "rt") as lines:
            Path(source).write_text("".join(itertools.islice(lines, ROWS_PER_CHUNK + 1)))
    else:
        write_samples(source, ROWS_PER_CHUNK)
    options = ConvertOptions()
    sources = inspect_sources(find_sources(source), options.columns)
    (layout,) = sources.layouts
    chunk = next(iter(read_chunks(layout, 0, ROWS_PER_CHUNK)))
    return featurize_chunk(chunk, layout, (), options.featurize).molecules


def shuffle(path: str, arguments: argparse.Namespace) -> dict[str, float | dict[str, float]]:
    """Stage, shuffle and measure."""
    molecules = pq.read_table(path).combine_chunks()
    with tempfile.TemporaryDirectory() as out:
        base = peak_mib()
        chunks = [
            stage(out, molecules, index, deduplicate=arguments.deduplicate)
            for index in range(-(-arguments.molecules // molecules.num_rows))
        ]
        exchange, units_of_passes = plan_exchange(
            out,
            ["source"],
            (),
            chunks,
            ConvertOptions(
                row_group_rows=1024,
                rows_per_shard=65536,
                shuffle=True,
                deduplicate="inchikey" if arguments.deduplicate else "none",
            ),
            memory_bytes=int(arguments.memory_gib * 2**30),
        )
        passes: dict[str, float] = {}
        for units in units_of_passes:
            start = time.perf_counter()
            for unit in units:
                run_unit(exchange, unit)
            passes[units[0].kind] = round(time.perf_counter() - start, 2)
    return {
        "molecules": sum(chunk.num_rows for chunk in chunks),
        "data_mib": sum(chunk.memory_bytes for chunk in chunks) >> 20,
        "groups": len(exchange.group_starts),
        "buckets": exchange.num_buckets,
        "base_mib": base,
        "peak_mib": peak_mib(),
        "passes_s": passes,
        "seconds": round(sum(passes.values()), 2),
    }


def stage(out: str, molecules: pa.Table, index: int, *, deduplicate: bool) -> StagedChunk:
    """The molecules once more, as records of their own; with ``deduplicate`` every second one is new."""
    first = index * molecules.num_rows
    rows = pa.array(np.arange(first, first + molecules.num_rows))
    own = molecules.set_column(
        molecules.column_names.index("source_row"), molecules.schema.field("source_row"), rows
    )
    # Keys of the form of an InChIKey; only equality matters.
    keys = [f"{n if n % 2 else first + n:025d}-N" for n in range(molecules.num_rows)]
    codes = np.zeros(molecules.num_rows, np.uint8)
    staged = staged_table(own, 0, codes, keys if deduplicate else None, seed=0)
    content = encode_segment(staged)
    storage.write_bytes(storage.join(out, staged_path(0, index)), content)
    digest = storage.sha256_bytes(content)
    return StagedChunk(0, index, first, molecules.num_rows, staged.nbytes, digest)


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


if __name__ == "__main__":
    main()
