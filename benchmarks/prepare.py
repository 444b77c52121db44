"""`moleblend prepare` on one and on two actors: QM9 with its geometry, and 50,000 ZINC SMILES without any.

    python benchmarks/prepare.py [--source qm9 zinc] [--molecules 50000] [--shuffle]

Each source is prepared twice by the command's own code, into empty folders: with one actor and with two. The
speed-up is that of the conversion while all actors are at work; beside it stand the times from the first chunk's
start to the last one's end (the second actor comes some time after the first), and of the whole command, with the
start of a private Ray cluster (some seconds, whatever the size). In the same run, as what the
machine allows: RDKit alone reads SMILES in one process and in two. The sources are those beside the project if
they are there, else sample molecules made here. Prints one JSON line. ``benchmarks/results`` keeps some.
"""

from __future__ import annotations

import os

# One thread a process: the claim is about processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import gzip
import itertools
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from moleblend_ray.chemistry.samples import write_samples
from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.prepare import PrepareConfig
from moleblend_ray.orchestration.preparation.prepare import PrepareSummary, prepare

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PARSE = """
import sys, time
from rdkit import Chem
smiles = sys.stdin.read().split()
start = time.perf_counter()
for text in smiles:
    Chem.MolFromSmiles(text)
print(len(smiles) / (time.perf_counter() - start))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", nargs="+", default=["qm9", "zinc"], choices=["qm9", "zinc"])
    parser.add_argument("--molecules", type=int, default=50_000, help="of ZINC, or samples")
    parser.add_argument("--shuffle", action="store_true")
    arguments = parser.parse_args()
    result: dict[str, object] = {"benchmark": "prepare", "shuffle": arguments.shuffle}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.source:
            source = source_of(name, folder, arguments.molecules)
            result[name] = measure(source, folder, shuffle=arguments.shuffle)
        result["parse_speedup"] = parse_speedup(smiles_of(folder))
    result["driver_peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    result["cpus"] = os.cpu_count()
    print(json.dumps(result))


def source_of(name: str, folder: str, molecules: int) -> str:
    """A file of the kind of molecules that ``name`` means."""
    if name == "qm9" and (SHARED / "qm9.parquet").exists():
        return str(SHARED / "qm9.parquet")
    zinc = SHARED / "zinc250k_smiles.csv.gz"
    if name == "zinc" and zinc.exists():
        path = Path(folder) / "zinc.csv"
        with gzip.open(zinc, "rt") as lines:
            path.write_text("".join(itertools.islice(lines, molecules + 1)))
        return str(path)
    path = Path(folder) / f"{name}.parquet"
    write_samples(str(path), molecules)
    return str(path)


def measure(source: str, folder: str, *, shuffle: bool) -> dict[str, object]:
    """Figures of one source."""
    one, two = (run(source, os.path.join(folder, "out"), n, shuffle=shuffle) for n in (1, 2))
    assert one.fingerprint == two.fingerprint, "the number of actors must not change the data set"
    return {
        "source": Path(source).name,
        "molecules": one.rows_out,
        "molecules_per_s_1": round(one.converting_rows_per_s),
        "molecules_per_s_2": round(two.converting_rows_per_s),
        "speedup": round(two.converting_rows_per_s / one.converting_rows_per_s, 2),
        "converting_s_1": round(one.converting_seconds, 1),
        "converting_s_2": round(two.converting_seconds, 1),
        "wall_s_1": round(one.seconds, 1),
        "wall_s_2": round(two.seconds, 1),
        "actor_peak_mib": max(one.converting_peak_mib, two.converting_peak_mib),
        "bytes_per_molecule": round(one.bytes / one.rows_out),
    }


def run(source: str, out: str, num_actors: int, *, shuffle: bool) -> PrepareSummary:
    with tempfile.TemporaryDirectory(dir=os.path.dirname(out)) as fresh:
        return prepare(
            PrepareConfig(
                source=source,
                out=fresh,
                shuffle=shuffle,
                cluster=ClusterConfig(num_data_actors=num_actors),
            )
        )


def smiles_of(folder: str) -> bytes:
    """20,000 SMILES, one a line."""
    zinc = Path(folder) / "zinc.csv"
    if not zinc.exists():
        return b"\n".join([b"CC(=O)Oc1ccccc1C(=O)O"] * 20_000)
    return b"\n".join(line.split(b",")[0] for line in zinc.read_bytes().split(b"\n")[1:20_001])


def parse_speedup(smiles: bytes) -> float:
    """How much two processes of RDKit do together against one alone: what the machine allows."""

    def rate(processes: int) -> float:
        running = [
            subprocess.Popen(
                [sys.executable, "-c", PARSE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for _ in range(processes)
        ]
        for process in running:
            assert process.stdin is not None
            process.stdin.write(smiles)
            process.stdin.close()
        return sum(float(process.stdout.read()) for process in running if process.stdout)

    return round(rate(2) / rate(1), 2)


if __name__ == "__main__":
    main()
