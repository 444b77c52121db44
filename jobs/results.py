"""What pretraining is worth: pretrain on 3D molecules, fine-tune on labelled ones beside baselines. `make results` runs it.

    python jobs/results.py [--data DIR] [--out runs/results] [--quick] [--only pretrain,qm9,moleculenet,large]

DIR holds Parquet files of molecules with coordinates (all `*.parquet`: the pretraining set; `qm9.parquet` with its labels), and
`moleculenet/` with tables named after their tasks. Without it, molecules are made here and their computed logP
learned, which shows the protocol and no more. Every stage is one `moleblend` command, printed before it runs; what is
finished is not repeated, so an interrupted command goes on where it was. Writes `report.md` with the curve of pretraining
and the leaderboards, and prints one JSON line last. docs/results.md explains the protocol.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from moleblend_ray.cli import console_logging
from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.data import storage
from moleblend_ray.errors import MoleBlendError
from moleblend_ray.orchestration.local import ray_session
from moleblend_ray.stages import Stages
from moleblend_ray.training.metrics import read_records

LARGE_TASKS = ("hiv", "muv")
"""Too many molecules for conformers here: fine-tuned in 2D."""

STAGES = ("pretrain", "qm9", "moleculenet", "large")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is computed."""

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
    num_steps=6000,
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
            self.moleculenet("moleculenet", self.budget.tasks, self.budget.epochs, conformers=1)
        if "large" in only and self.budget.large_tasks:
            self.moleculenet(
                "large", self.budget.large_tasks, self.budget.large_epochs, conformers=0
            )

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
        return [
            uri for uri in files if uri.endswith(".parquet") and uri.rpartition("/")[0] == folder
        ]

    def pretrain(self, sources: Sequence[str]) -> None:
        self.run(
            "prepare",
            "prepare",
            f"{self.out}/data",
            f"source=[{','.join(sources)}]",
            f"out={self.out}/data",
            "shuffle=true",
            "label_columns=[]",
            "id_column=mol_id",
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
            "model.distance_head=true",
            "loss.distance_weight=0.5",
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
        )

    def moleculenet(self, name: str, tasks: Sequence[str], epochs: int, *, conformers: int) -> None:
        source = f"{self.data}/moleculenet"
        self.sweep(name, f"[{','.join(tasks)}]", source, epochs, f"task.conformers={conformers}")

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
        return 1
    Console(highlight=False).print(f"report: {evidence.out}/report.md")
    print(json.dumps({**report, "seconds": round(time.monotonic() - began_s, 1)}))
    return 0


def write_report(evidence: Evidence) -> dict[str, Any]:
    """Write `report.md` and the figure of pretraining; the figures that fit on a line."""
    lines = ["# Results", ""]
    figures: dict[str, Any] = {}
    if storage.exists(f"{evidence.checkpoint}/config.json"):
        records = read_records(evidence.checkpoint)
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
        lines += [storage.read_bytes(f"{evidence.out}/{name}/leaderboard.md").decode(), ""]
    storage.write_bytes(f"{evidence.out}/report.md", "\n".join(lines).encode())
    return figures


def pretraining_figure(records: Sequence[dict[str, Any]]) -> bytes:
    """Each loss over the steps, averaged over a hundredth of them, with the validation loss where it was computed."""
    names = [name for name in records[0] if name == "loss" or name.startswith("loss_")]
    figure = Figure(figsize=(2.6 * len(names), 2.6), layout="constrained")
    width = max(1, len(records) // 100)
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        groups = [records[begin : begin + width] for begin in range(0, len(records), width)]
        axes.plot(
            [group[-1]["step"] for group in groups],
            [sum(record[name] for record in group) / len(group) for group in groups],
            label="training",
        )
        validated = [record for record in records if f"valid_{name}" in record]
        axes.plot(
            [record["step"] for record in validated],
            [record[f"valid_{name}"] for record in validated],
            ".--",
            label="validation",
        )
        axes.set(title=name.removeprefix("loss_"), xlabel="step")
    figure.axes[0].legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
