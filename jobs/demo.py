"""The whole system on sample molecules: what `make demo` runs.

Every stage is one `moleblend` command, which is printed before it runs and can be repeated by hand. At the end there
are a table of what was done and where, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from moleblend_ray.cli import EXIT_ERROR, EXIT_UNFINISHED, console_logging
from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.errors import MoleBlendError
from moleblend_ray.orchestration.cluster.session import ray_session
from moleblend_ray.stages import Stages, StoppedError

logger = logging.getLogger("moleblend_ray.demo")

NUM_WORKERS = 2
DATA_ACTORS = 2


@dataclass(kw_only=True)
class Demo(Stages):
    """The stages under one folder, on one Ray cluster."""

    out: str
    num_molecules: int
    num_steps: int

    def run_all(self) -> None:
        samples, data = f"{self.out}/samples.parquet", f"{self.out}/data"
        run, sweep, embeddings = f"{self.out}/run", f"{self.out}/sweep", f"{self.out}/embeddings"
        self.run(
            "samples",
            "samples",
            samples,
            f"out={samples}",
            f"num_molecules={self.num_molecules}",
        )
        self.run(
            "prepare",
            "prepare",
            data,
            f"source={samples}",
            f"out={data}",
            "rows_per_chunk=1024",
            f"cluster.num_data_actors={DATA_ACTORS}",
        )
        self.run(
            "pretrain",
            "pretrain",
            run,
            f"data={data}",
            f"out={run}",
            "model=tiny",
            "order.global_batch_size=128",
            "order.num_streams=2",
            "optim.learning_rate=1e-3",
            "optim.warmup_steps=20",
            f"train.num_steps={self.num_steps}",
            "train.log_every=10",
            f"checkpoint.every_steps={max(self.num_steps // 3, 1)}",
            f"cluster.num_workers={NUM_WORKERS}",
        )
        self.run(
            "sweep",
            "sweep",
            sweep,
            f"checkpoint={run}",
            "task.name=logp",
            "task.columns=[logp]",
            "task.kind=regression",
            f"task.source={data}",
            f"out={sweep}",
            "num_trials=4",
            "grace_epochs=1",
            "search.epochs=[2,4]",
            "search.learning_rate=[1e-4,2e-3]",
            "search.batch_size=[64,128]",
            "final_seeds=[0,1]",
            # Without descriptors, as logp is one of them. A model from scratch would take as long as the sweep again.
            "baseline.kinds=[forest]",
            "baseline.num_trees=50",
        )
        self.run(
            "embed",
            "embed",
            embeddings,
            f"checkpoint={run}",
            f"source={samples}",
            f"out={embeddings}",
            "batch_size=256",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/demo", help="folder or URI of everything it makes")
    parser.add_argument("--num-molecules", type=int, default=5000, help="sample molecules")
    parser.add_argument("--num-steps", type=int, default=200, help="pretraining steps")
    options = parser.parse_args(arguments)
    demo = Demo(out=options.out, num_molecules=options.num_molecules, num_steps=options.num_steps)
    started_s = time.monotonic()
    try:
        with (
            console_logging(verbose=False),
            ray_session(ClusterConfig(num_workers=NUM_WORKERS), data_cpus=DATA_ACTORS),
        ):
            demo.run_all()
    except MoleBlendError as error:
        print(f"demo: {error}", file=sys.stderr)
        return EXIT_UNFINISHED if isinstance(error, StoppedError) else EXIT_ERROR
    report = demo_report(demo, time.monotonic() - started_s)
    Console(highlight=False).print(summary_table(demo, report))
    print(json.dumps(report))
    return 0 if heads_learned(report) else 1


def demo_report(demo: Demo, seconds: float) -> dict[str, Any]:
    """The figures of the demo, flat and ready for JSON."""
    prepared = demo.done["prepare"].summary
    pretrained = demo.done["pretrain"].summary
    return {
        "molecules_in": prepared.rows_in,
        "molecules_out": prepared.rows_out,
        "quarantined": prepared.rows_quarantined,
        "steps": pretrained.steps,
        "loss_first": pretrained.loss_first,
        "loss_last": pretrained.loss_last,
        "world_size": pretrained.world_size,
        "sweep_trials": demo.done["sweep"].summary.trials,
        "embeddings": demo.done["embed"].summary.embeddings,
        "seconds": round(seconds, 1),
    }


def heads_learned(report: dict[str, Any]) -> bool:
    """Whether every loss is lower at the end of pretraining than at its start; logs those that are not."""
    first, last = report["loss_first"], report["loss_last"]
    stuck = [name for name in first if not last[name] < first[name]]
    for name in stuck:
        logger.error("%s did not fall: %.4f -> %.4f", name, first[name], last[name])
    return not stuck


def summary_table(demo: Demo, report: dict[str, Any]) -> Table:
    """What was done, where it is, how long it took."""
    first, last = report["loss_first"]["loss"], report["loss_last"]["loss"]
    sweep = demo.done["sweep"].summary
    done = {
        "samples": f"{report['molecules_in']:,} molecules with conformers and labels",
        "prepare": f"{report['molecules_out']:,} in shards, {report['quarantined']:,} quarantined",
        "pretrain": f"{report['steps']} steps on {report['world_size']} workers, loss {first:.3f} -> {last:.3f}",
        "sweep": f"{report['sweep_trials']} trials, test {sweep.metric} {sweep.test_score:.3f}",
        "embed": f"{report['embeddings']:,} vectors",
    }
    table = Table(title="moleblend-ray demo", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("done")
    table.add_column("where", overflow="fold")
    table.add_column("seconds", justify="right")
    for name, stage in demo.done.items():
        table.add_row(name, done[name], stage.where, f"{stage.seconds:.0f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
