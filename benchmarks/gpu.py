"""All that is measured on one GPU, the most important first, within a time limit.

    python benchmarks/gpu.py [--out runs/gpu] [--seconds 540] [--parts train_step fsdp ...]

Runs the tests of a whole step in bfloat16 (where pytest is installed) and the other benchmarks of this folder, each in a process
of its own, so that a part that fails or hangs costs the others nothing. Needs PyTorch with CUDA and Triton, but neither Ray nor
RDKit nor a network, and so runs on a bare machine. ``OUT/PART.log`` is what a part printed, written while it runs;
``OUT/PART.jsonl`` are its results. The last line of the output is JSON: for each part ``ok``, ``failed``, ``out of time`` or
``not begun``, and its seconds. The exit status is 1 unless all are ``ok``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
STEP = ("benchmarks/train_step.py", "--device", "cuda", "--dtype", "bf16")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A process of the whole."""

    name: str
    """Of its files, and for ``--parts``."""

    arguments: tuple[str, ...]
    """Of Python, run in the repository."""

    purpose: str
    """What it answers."""


PARTS = (
    Part(
        name="train_step",
        arguments=(*STEP, "--batch", "4096", "1024", "--operators", "--plain"),
        purpose="MFU, times of kernels, host waits, and how many times longer the plain model takes",
    ),
    Part(
        name="tests",
        arguments=(
            *("-m", "pytest", "-q", "-k", "bfloat16", "-p", "no:cacheprovider"),
            "tests/unit/model/test_gpu_code.py",
        ),
        purpose="whether the kernels compute in bfloat16 what PyTorch's operations do",
    ),
    Part(
        name="fsdp",
        arguments=(*STEP, "--batch", "4096", "--strategy", "fsdp", "--operators"),
        purpose="what FSDP2 over NCCL adds to a step of one worker",
    ),
    Part(
        name="attention",
        arguments=("benchmarks/attention.py", *STEP[1:], "--batch", "1024"),
        purpose="attention beside the ways rejected",
    ),
    Part(
        name="heads",
        arguments=("benchmarks/heads.py", *STEP[1:], "--batch", "1024"),
        purpose="pair heads beside the ways rejected",
    ),
    Part(
        name="memory",
        arguments=(*STEP, "--batch", "512", "1024", "2048", "4096", "8192", "16384"),
        purpose="memory and molecules per second against the batch size",
    ),
    Part(
        name="large",
        arguments=(*STEP, "--preset", "large", "--batch", "1024", "2048", "--operators"),
        purpose="MFU of the next larger preset",
    ),
    Part(
        name="compiled",
        arguments=(*STEP, "--batch", "4096", "--compile"),
        purpose="whether torch.compile of the blocks gains anything",
    ),
)


def main() -> int:
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU here; the benchmarks of a CPU are run one by one")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + arguments.seconds
    outcomes = {}
    for part in PARTS:
        if part.name in arguments.parts:
            print(f"{part.name}: {part.purpose} ...", flush=True)
            outcomes[part.name] = run(part, out, deadline)
            print(f"{part.name}: {json.dumps(outcomes[part.name])}", flush=True)
    print(json.dumps({"benchmark": "gpu", "parts": outcomes}))
    return 0 if all(outcome["outcome"] == "ok" for outcome in outcomes.values()) else 1


def parse_arguments() -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "gpu")
    parser.add_argument("--seconds", type=float, default=540.0, help="limit of all parts together")
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    return parser.parse_args()


def run(part: Part, out: Path, deadline: float) -> dict[str, str | float]:
    """Run ``part`` until ``deadline`` (of the monotonic clock) at the latest, and say how it ended."""
    begin = time.monotonic()
    if begin >= deadline:
        return {"outcome": "not begun"}
    log = out / f"{part.name}.log"
    with log.open("w") as file:
        try:
            process = subprocess.run(
                [sys.executable, "-u", *part.arguments],
                cwd=REPOSITORY,
                env=environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=deadline - begin,
            )
            outcome = "failed" if process.returncode else "ok"
        except subprocess.TimeoutExpired:
            outcome = "out of time"
    results = [line for line in log.read_text().splitlines() if line.startswith('{"benchmark"')]
    if results:
        (out / f"{part.name}.jsonl").write_text("\n".join(results) + "\n")
    return {"outcome": outcome, "seconds": round(time.monotonic() - begin, 1)}


def environment() -> dict[str, str]:
    """This process's, with the package of this checkout first on Python's path."""
    paths = (str(REPOSITORY), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


if __name__ == "__main__":
    raise SystemExit(main())
