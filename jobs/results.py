"""What pretraining is worth: pretrain on 3D molecules, fine-tune, compare with baselines. `make results` runs it.

    python jobs/results.py [--data DIR] [--out runs/results] [--quick] [--only pretrain,qm9,moleculenet,large]

DIR holds the pretraining set (all `*.parquet` with coordinates, all `*.csv` or `*.csv.gz` with SMILES; `qm9.parquet`
with its labels) and `moleculenet/` with tables named after their tasks. Without DIR, sample molecules are used and
their computed logP is learned, which only shows the protocol. Every stage is one `moleblend` command, which is printed
before it runs. Finished stages are not repeated, so an interrupted command continues where it was. The script writes
`report.md` with the curve of pretraining and the leaderboards, and prints one JSON line at the end. docs/results.md
explains the protocol.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from moleblend_ray.cli import EXIT_ERROR, EXIT_UNFINISHED, console_logging
from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.data.files import storage
from moleblend_ray.errors import MoleBlendError
from moleblend_ray.orchestration.cluster.session import ray_session
from moleblend_ray.stages import Stages, StoppedError
from moleblend_ray.training.metrics import read_records

LARGE_TASKS = ("hiv", "muv")
"""Tasks with so many molecules that few epochs are enough."""

POOLS = (".parquet", ".csv", ".csv.gz")
"""Endings of files with molecules."""

LOSS_TITLES = {
    "loss_spd": "shortest path (nat)",
    "loss_edge": "bonds along the path (nat)",
    "loss_direction": "direction (1 - cosine)",
    "loss_distance": "distance (angstrom)",
    "loss_denoise": "denoising (1 - cosine)",
    "loss_environment": "atom environments (squared)",
    "loss_descriptor": "descriptors (squared)",
}

SAMPLES_NOTE = (
    "Molecules made by this project, with their computed logP: this shows the protocol, and not what pretraining is worth "
    "for measured properties."
)

STAGES = ("pretrain", "qm9", "moleculenet", "large")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much to compute."""

    model: str
    num_steps: int
    qm9_epochs: int
    epochs: int
    large_epochs: int
    num_trials: int
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    large_tasks: tuple[str, ...]
    baselines: tuple[str, ...]


FULL = Budget(
    model="mini",
    num_steps=4000,
    qm9_epochs=60,
    epochs=30,
    large_epochs=4,
    num_trials=3,
    seeds=(0, 1, 2),
    tasks=("bbbp", "clintox", "esol", "lipophilicity", "sider", "tox21", "toxcast"),
    large_tasks=LARGE_TASKS,
    baselines=("forest", "boosting", "descriptors", "scratch"),
)
QUICK = Budget(
    model="mini",
    num_steps=400,
    qm9_epochs=10,
    epochs=10,
    large_epochs=1,
    num_trials=1,
    seeds=(0, 1),
    tasks=("esol",),
    large_tasks=(),
    baselines=("forest", "descriptors", "scratch"),
)


@dataclass(kw_only=True)
class Evidence(Stages):
    """All stages under one folder."""

    data: str | None
    out: str
    budget: Budget
    threads: int

    def run_all(self, only: Sequence[str]) -> None:
        if self.data is None:
            self.on_samples()
            return
        if "pretrain" in only:
            self.pretrain(self.pretraining_sources())
        if "qm9" in only:
            self.qm9()
        if "moleculenet" in only:
            self.moleculenet("moleculenet", self.budget.tasks, self.budget.epochs)
        if "large" in only and self.budget.large_tasks:
            self.moleculenet("large", self.budget.large_tasks, self.budget.large_epochs)

    @property
    def checkpoint(self) -> str:
        return f"{self.out}/pretrain"

    def on_samples(self) -> None:
        samples = f"{self.out}/samples.parquet"
        self.run("samples", "samples", samples, f"out={samples}", "num_molecules=5000")
        self.pretrain([samples])
        self.sweep(
            "samples",
            "logp",
            samples,
            self.budget.epochs,
            "task.kind=regression",
            "task.columns=[logp]",
            "task.train_molecules=1000",
            "task.valid_molecules=400",
            # logP is itself one of the descriptors.
            f"baseline.kinds=[{','.join(kind for kind in self.budget.baselines if kind != 'descriptors')}]",
        )
        board = f"{self.out}/samples"
        self.run("leaderboard", "leaderboard", board, f"run={board}")

    def pretraining_sources(self) -> list[str]:
        folder = storage.absolute(str(self.data)).rstrip("/")
        files = [file.uri for file in storage.list_files(folder)]
        return [uri for uri in files if uri.endswith(POOLS) and uri.rpartition("/")[0] == folder]

    def pretrain(self, sources: Sequence[str]) -> None:
        self.run(
            "prepare",
            "prepare",
            f"{self.out}/data",
            f"source=[{','.join(sources)}]",
            f"out={self.out}/data",
            "shuffle=true",
            "label_columns=[]",
            f"cluster.num_data_actors={self.threads}",
        )
        steps = self.budget.num_steps
        self.run(
            "pretrain",
            "pretrain",
            self.checkpoint,
            f"data={self.out}/data",
            f"out={self.checkpoint}",
            f"model={self.budget.model}",
            "experiment=views",
            "model.attention_dropout=0",
            "model.activation_dropout=0",
            "model.drop_path=0",
            "order.global_batch_size=128",
            "order.num_streams=1",
            "stream.micro_batch_size=64",
            "train.strategy=none",
            "cluster.num_workers=1",
            f"cluster.cpus_per_worker={self.threads}",
            f"train.num_steps={steps}",
            "train.log_every=100",
            "train.validate_every=500",
            "optim.learning_rate=5e-4",
            f"optim.warmup_steps={min(500, steps // 10)}",
            "checkpoint.every_steps=500",
        )

    def qm9(self) -> None:
        self.sweep(
            "qm9",
            "[qm9_gap,qm9_alpha]",
            f"{self.data}/qm9.parquet",
            self.budget.qm9_epochs,
            "task.id_column=mol_id",
            "task.train_molecules=1000",
            "task.valid_molecules=500",
            "finetune.atom_reference=true",
            # Alpha is nearly a sum over atoms, the gap is not.
            "search.choices={readout:[token,sum]}",
        )

    def moleculenet(self, name: str, tasks: Sequence[str], epochs: int) -> None:
        source = f"{self.data}/moleculenet"
        more = ("task.conformers=0", "finetune.relations=2d")
        self.sweep(name, f"[{','.join(tasks)}]", source, epochs, *more)

    def sweep(self, name: str, tasks: str, source: str, epochs: int, *more: str) -> None:
        budget = self.budget
        self.run(
            name,
            "sweep",
            f"{self.out}/{name}",
            f"task.name={tasks}",
            f"task.source={source}",
            f"checkpoint={self.checkpoint}",
            f"out={self.out}/{name}",
            f"num_trials={budget.num_trials}",
            "search.learning_rate=[1e-4,2e-3]",
            "search.batch_size=[32]",
            f"search.epochs=[{epochs},{epochs}]",
            f"grace_epochs={max(1, epochs // 5)}",
            f"final_seeds=[{','.join(map(str, budget.seeds))}]",
            f"finetune.patience={max(3, epochs // 3)}",
            "finetune.activation_dropout=0.1",
            f"baseline.kinds=[{','.join(budget.baselines)}]",
            *more,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of molecules, as above; none: samples")
    parser.add_argument("--out", default="runs/results", help="folder of everything it makes")
    parser.add_argument("--quick", action="store_true", help="a reduced version, in minutes")
    parser.add_argument("--only", default=",".join(STAGES), help="stages to run")
    parser.add_argument("--threads", type=int, default=2, help="CPUs to use")
    options = parser.parse_args(arguments)
    only = options.only.split(",")
    if not set(only) <= set(STAGES):
        parser.error(f"--only: expected some of {', '.join(STAGES)}, found {options.only}")
    evidence = Evidence(
        data=options.data,
        out=options.out,
        budget=QUICK if options.quick else FULL,
        threads=options.threads,
    )
    began_s = time.monotonic()
    try:
        with (
            console_logging(verbose=False),
            ray_session(ClusterConfig(num_workers=options.threads), data_cpus=options.threads),
        ):
            evidence.run_all(only)
        report = write_report(evidence)
    except MoleBlendError as error:
        print(f"results: {error}", file=sys.stderr)
        return EXIT_UNFINISHED if isinstance(error, StoppedError) else EXIT_ERROR
    Console(highlight=False).print(f"report: {evidence.out}/report.md")
    print(json.dumps({**report, "seconds": round(time.monotonic() - began_s, 1)}))
    return 0


def write_report(evidence: Evidence) -> dict[str, Any]:
    """Write `report.md` and the figure of pretraining; returns the numbers for the JSON line."""
    lines = ["# Results", ""]
    figures: dict[str, Any] = {}
    # None before the first checkpoint, where other stages were chosen and pretraining was stopped.
    if records := read_records(evidence.checkpoint):
        storage.write_bytes(f"{evidence.out}/pretraining.png", pretraining_figure(records))
        figures["steps"] = len(records)
        lines += [
            f"{len(records):,} steps of pretraining.",
            "",
            "![pretraining](pretraining.png)",
            "",
        ]
    for name in ("samples", "qm9", "moleculenet", "large"):
        board = f"{evidence.out}/{name}/leaderboard.json"
        if not storage.exists(board):
            continue
        figures[name] = storage.read_json(board)["standings"]
        lines += [
            _section(name, storage.read_bytes(f"{evidence.out}/{name}/leaderboard.md").decode())
        ]
    storage.write_bytes(f"{evidence.out}/report.md", "\n".join(lines).encode())
    return figures


def _section(name: str, leaderboard: str) -> str:
    """The Markdown of a leaderboard in the folder `name` as a part of the report above it: with a lower level of headings,
    and with its figure found from there."""
    text = re.sub(r"^#", "##", leaderboard, flags=re.MULTILINE).replace(
        "](figures/", f"]({name}/figures/"
    )
    if name == "samples":
        heading, _, rest = text.partition("\n")
        text = f"{heading}\n\n{SAMPLES_NOTE}\n{rest}"
    return text


def pretraining_figure(records: Sequence[dict[str, Any]]) -> bytes:
    """Each loss against the molecules seen, averaged over a hundredth of the steps, with validation losses."""
    names = [name for name in LOSS_TITLES if name in records[0]]
    seen = np.cumsum([record["molecules"] for record in records]) / 1e3
    width = max(1, len(records) // 100)
    rows = -(-len(names) // 3)
    figure = Figure(figsize=(10, 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, 3, squeeze=False).ravel()
    for axes, name in zip(grid, names, strict=False):
        ends = range(width, len(records) + 1, width)
        means = [np.mean([record[name] for record in records[end - width : end]]) for end in ends]
        axes.plot([seen[end - 1] for end in ends], means, label="training", color="#2b6cb0")
        validated = [index for index, record in enumerate(records) if f"valid_{name}" in record]
        axes.plot(
            seen[validated],
            [records[index][f"valid_{name}"] for index in validated],
            "o",
            markersize=4,
            color="#c05621",
            label="validation",
        )
        axes.set_title(LOSS_TITLES[name], fontsize="medium")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    for axes in grid[max(0, len(names) - 3) : len(names)]:
        axes.set_xlabel("thousand molecules")
    figure.axes[0].legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
