"""Damaged and hostile records through `prepare` on Ray: no crash, and every row in the shards or the quarantine.

   python benchmarks/fuzz_prepare.py [--records 100000] [--seed 0]

Half of the records are mutated SMILES, three tenths mutated SD records, the rest random bytes in tables and SD files.
Ends with an error if a row is missing or there twice. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.prepare import PrepareConfig
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.orchestration.preparation.prepare import prepare

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fuzzing import accounting_errors, write_sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "in"), Path(folder, "out")
        source.mkdir()
        rows = write_sources(source, arguments.records, arguments.seed)
        began = time.monotonic()
        prepare(
            PrepareConfig(
                source=str(source),
                out=str(out),
                rows_per_chunk=2000,
                cluster=ClusterConfig(num_data_actors=1),
            )
        )
        seconds = time.monotonic() - began
        errors = accounting_errors(out, rows)
        counts = load_manifest(str(out)).counts
    if errors:
        raise SystemExit("rows are not accounted for: " + "; ".join(errors))
    result = {
        "benchmark": "fuzz_prepare",
        "records": sum(rows),
        "rows_out": counts.rows_out,
        "rows_quarantined": counts.rows_quarantined,
        "quarantined_by_reason": counts.quarantined_by_reason,
        "unaccounted": 0,
        "records_per_s": round(sum(rows) / seconds),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
