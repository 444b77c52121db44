"""Conformers on one core, by the child process that can be killed and by RDKit in this process.

    python benchmarks/conformers.py [--molecules 300] [--count 1] [--timeout-s 3.0] [--source table.csv.gz]

Both embed the same molecules, in turns of a few so that neither has the quieter machine. The source is a table
with a column ``smiles``: the ZINC molecules beside the project if they are there, else sample molecules made here;
molecules are taken at even distances. Prints one JSON line. ``benchmarks/results`` keeps some.

What the limits cost is measured by itself: a request that does nothing, a start of the child, and the delay by which
a molecule that takes for ever is given up.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy starts its pool

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from rdkit import Chem, rdBase

from moleblend_ray.chemistry.config import ConformerConfig
from moleblend_ray.chemistry.conformers import Embedding, embed_conformers, make_conformers
from moleblend_ray.chemistry.killable import KillableWorker
from moleblend_ray.chemistry.samples import write_samples

SHARED_SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "zinc250k_smiles.csv.gz"
TURN = 10
# Stereocentres no such cage can have, and a chain: minutes without a limit.
HOPELESS = "F[C@]12CC[C@@](Cl)(CC1)C2" + "C" * 60


def main() -> None:
    arguments = parse_arguments()
    config = ConformerConfig(generate=True, count=arguments.count, timeout_s=arguments.timeout_s)
    source, molecules = read_molecules(arguments.source, arguments.molecules)
    with rdBase.BlockLogs():
        result = measure(molecules, config)
        delay_s = late_by(config)
    line = {
        "benchmark": "conformers",
        "source": source,
        "molecules": len(molecules),
        "conformers_each": arguments.count,
        "timeout_s": arguments.timeout_s,
        **result,
        **child_costs(),
        "late_at_time_limit_s": round(delay_s, 3),
        "cpus": os.cpu_count(),
    }
    print(json.dumps(line))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--molecules", type=int, default=300)
    parser.add_argument("--count", type=int, default=1, help="conformers of each")
    parser.add_argument("--timeout-s", type=float, default=3.0)
    parser.add_argument("--source", type=Path, help="CSV or Parquet with a column smiles")
    return parser.parse_args()


def read_molecules(source: Path | None, count: int) -> tuple[str, list[Chem.Mol]]:
    """The name of the source, and ``count`` molecules at even distances (all if there are fewer)."""
    if source is None and SHARED_SAMPLE.is_file():
        source = SHARED_SAMPLE
    if source is None:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "samples.parquet"
            write_samples(made, num_molecules=count)
            return "samples", parsed(pd.read_parquet(made)["smiles"], count)
    table = pd.read_parquet(source) if source.suffix == ".parquet" else pd.read_csv(source)
    return source.name, parsed(table["smiles"], count)


def parsed(smiles: pd.Series, count: int) -> list[Chem.Mol]:
    step = max(1, len(smiles) // count)
    mols: Iterator[Chem.Mol | None] = (
        Chem.MolFromSmiles(text) for text in smiles.iloc[::step].iloc[:count]
    )
    return [mol for mol in mols if mol is not None]


def measure(molecules: Sequence[Chem.Mol], config: ConformerConfig) -> dict[str, object]:
    """Molecules a second both ways, and what became of the molecules in the child."""
    named = [(mol, Chem.MolToSmiles(mol)) for mol in molecules]
    ways = (make_conformers, embed_conformers)
    make_conformers(*named[0], config)  # start the child
    seconds: defaultdict[str, float] = defaultdict(float)
    made: dict[str, list[Embedding]] = {way.__name__: [] for way in ways}
    for turn in range(0, len(named), TURN):
        for way in ways if turn % (2 * TURN) else reversed(ways):
            started = time.perf_counter()
            made[way.__name__] += [
                way(mol, smiles, config) for mol, smiles in named[turn : turn + TURN]
            ]
            seconds[way.__name__] += time.perf_counter() - started
    child, here = (made[way.__name__] for way in ways)
    kinds = Counter(
        part.split(":")[0] for made in child for part in made.detail.split("; ") if part
    )
    return {
        "mean_heavy_atoms": round(statistics.mean(mol.GetNumAtoms() for mol in molecules), 2),
        "molecules_per_s": round(len(named) / seconds["make_conformers"], 2),
        "in_process_molecules_per_s": round(len(named) / seconds["embed_conformers"], 2),
        "ratio_to_in_process": round(seconds["embed_conformers"] / seconds["make_conformers"], 4),
        "share_by_status": shares(Counter(str(made.status) for made in child), len(child)),
        "share_by_detail": shares(kinds, len(child)),
        "same_as_in_process": sum(
            a.positions.tobytes() == b.positions.tobytes() for a, b in zip(child, here, strict=True)
        ),
    }


def shares(counts: Counter[str], total: int) -> dict[str, float]:
    return {name: round(count / total, 5) for name, count in sorted(counts.items())}


def late_by(config: ConformerConfig) -> float:
    """Seconds beyond the time limit after which a hopeless molecule is given up."""
    mol = Chem.MolFromSmiles(HOPELESS)
    make_conformers(Chem.MolFromSmiles("C"), "C", config)
    limit = ConformerConfig(timeout_s=0.5)
    started = time.perf_counter()
    make_conformers(mol, HOPELESS, limit)
    return time.perf_counter() - started - limit.timeout_s


def child_costs() -> dict[str, float]:
    """Milliseconds to start a child that can embed, and to have an embedding's worth of nothing back."""
    program = (
        "import moleblend_ray.chemistry.conformer_worker\n"
        "from moleblend_ray.chemistry.killable import serve\n"
        "serve(lambda request: request)"
    )
    starts, calls = [], []
    for _ in range(5):
        worker = KillableWorker(("-c", program))
        started = time.perf_counter()
        worker.call(b"", 10.0)
        starts.append(time.perf_counter() - started)
        request = bytes(2000)
        for _ in range(200):
            started = time.perf_counter()
            worker.call(request, 10.0)
            calls.append(time.perf_counter() - started)
        worker.close()
    return {
        "child_start_ms": round(1000 * statistics.median(starts), 1),
        "round_trip_ms": round(1000 * statistics.median(calls), 4),
    }


if __name__ == "__main__":
    main()
