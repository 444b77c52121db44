"""What `moleblend plan` predicts for two workers from measurements of one, beside the rate of a real run with two.

    python benchmarks/plan.py [--preset tiny] [--batch 64] [--steps 60] [--rounds 2] [--strategy fsdp] [--cpu-seconds]

Before each run and after the last one the planner's own rehearsal (`moleblend plan measure=true`) measures one worker's step, how much
longer it takes while another process computes as well, the exchange of messages, and what data actors cost. The run is
`moleblend pretrain` with two workers on a private Ray cluster, on synthetic molecules; counted are the steps after the first fifth, at
their median. ``ratio`` is predicted over measured molecules/s, from the medians of rehearsals and runs; the loads
around them differ, so single pairs scatter more. ``ray_cores`` is the CPU time a second that processes of Ray other than trainers took
during the runs. ``--cpu-seconds`` adds the CPU time of a step of each preset on one core, in which
waiting for a busy machine does not count. One JSON line comes last.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Ray's workers give way to other processes (niceness 15), which those of the rehearsal do not.
os.environ.setdefault("RAY_worker_niceness", "0")

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.compose import load_config
from moleblend_ray.config.plan import PlanConfig
from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.data.config import OrderConfig, StreamConfig
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.orchestration import plan as planning
from moleblend_ray.orchestration.cluster.session import ray_session
from moleblend_ray.orchestration.pretraining.pretrain import pretrain
from moleblend_ray.planning.capacity import throughput
from moleblend_ray.planning.sizes import checkpoint_bytes
from moleblend_ray.training.commits import latest_committed
from moleblend_ray.training.config import CheckpointConfig, TrackingConfig, TrainConfig
from moleblend_ray.training.metrics import read_records
from moleblend_ray.training.rehearsal import Found

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from synthetic import write_dataset

MOLECULES = 3000
CPU_PRESETS = {"tiny": 16, "mini": 16, "small": 8, "base": 4}


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="moleblend-plan-") as folder:
        data = f"{folder}/data"
        write_dataset(data, MOLECULES, shard_rows=500)
        config = plan_config(arguments, data)
        rehearsals, runs = [], []
        # One cluster for all rounds: its processes are then there while one worker is measured, as in a run.
        with ray_session(cluster_of(arguments), data_cpus=1.0):
            for number in range(arguments.rounds):
                rehearsals.append(rehearsal(config))
                runs.append(run(arguments, config, f"{folder}/run-{number}"))
            rehearsals.append(rehearsal(config))
        found = median_of(rehearsals)
        predicted, *each = (predict(config, one, arguments.workers) for one in (found, *rehearsals))
    measured = statistics.median(one["molecules_per_s"] for one in runs)
    line: dict[str, Any] = {
        "benchmark": "plan",
        "preset": arguments.preset,
        "strategy": arguments.strategy,
        "batch_a_worker": arguments.batch,
        "workers": arguments.workers,
        "predicted_molecules_per_s": round(predicted, 1),
        "measured_molecules_per_s": round(measured, 1),
        "ratio": round(predicted / measured, 3),
        "measured_of_runs": [one["molecules_per_s"] for one in runs],
        "predicted_of_rehearsals": [round(rate, 1) for rate in each],
        "one_worker_molecules_per_s": round(arguments.batch / found.step_s, 1),
        "ray_cores": round(statistics.median(one["ray_cores"] for one in runs), 3),
        "rehearsal": {
            name: significant(value) for name, value in dataclasses.asdict(found).items()
        },
        "checkpoint_bytes": runs[-1]["checkpoint_bytes"],
        "predicted_checkpoint_bytes": checkpoint_bytes(
            config.model, shards=arguments.workers if arguments.strategy == "fsdp" else 1
        ),
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
    }
    if arguments.cpu_seconds:
        line["cpu_seconds_of_a_step"] = cpu_seconds(arguments.batch)
    print(json.dumps(line))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--strategy", choices=("fsdp", "ddp"), default="fsdp")
    parser.add_argument("--cpu-seconds", action="store_true")
    return parser.parse_args()


def cluster_of(arguments: argparse.Namespace) -> ClusterConfig:
    return ClusterConfig(num_workers=arguments.workers, address="local")


def plan_config(arguments: argparse.Namespace, data: str) -> PlanConfig:
    overrides = [
        f"data={data}",
        f"model={arguments.preset}",
        f"cpu_workers={arguments.workers}",
        f"batch={arguments.batch}",
        f"strategy={arguments.strategy}",
        "measure=true",
    ]
    return load_config(PlanConfig, "plan", overrides)


def rehearsal(config: PlanConfig) -> Found:
    began = time.monotonic()
    found = planning.measure_now(config, load_manifest(str(config.data)))
    say(f"rehearsed in {time.monotonic() - began:.0f} s: {found}")
    return found


def predict(config: PlanConfig, found: Found, workers: int) -> float:
    """The planner's molecules/s from these measurements."""
    setup = planning.build_setup(config, load_manifest(str(config.data)), found)
    return throughput(setup, workers).rate.value


def median_of(rehearsals: list[Found]) -> Found:
    values = {
        field.name: statistics.median(getattr(one, field.name) for one in rehearsals)
        for field in dataclasses.fields(Found)
    }
    return Found(**values)


def run(arguments: argparse.Namespace, config: PlanConfig, out: str) -> dict[str, Any]:
    """A real run: its molecules/s and the bytes of its checkpoint."""
    began = time.monotonic()
    workers = arguments.workers
    with looks_each_second() as looks:
        pretrain(run_config(arguments, config, out))
    records = read_records(out)[arguments.steps // 5 :]
    commit = latest_committed(out)
    assert commit is not None
    step_s = statistics.median(record["step_s"] for record in records)
    rate = round(workers * arguments.batch / step_s, 1)
    cores = ray_cores(looks, workers)
    say(
        f"ran {arguments.steps} steps in {time.monotonic() - began:.0f} s: {rate} molecules/s, {cores} cores for Ray"
    )
    return {
        "molecules_per_s": rate,
        "ray_cores": cores,
        "checkpoint_bytes": sum(file.num_bytes for file in commit.files),
    }


def run_config(arguments: argparse.Namespace, config: PlanConfig, out: str) -> PretrainConfig:
    workers = arguments.workers
    return PretrainConfig(
        data=str(config.data),
        out=out,
        model=config.model,
        order=OrderConfig(
            global_batch_size=workers * arguments.batch,
            num_streams=workers,
            shuffle_window=512,
            chunk_rows=64,
        ),
        stream=StreamConfig(max_actors=1),
        train=TrainConfig(num_steps=arguments.steps, strategy=arguments.strategy, validate_every=0),
        checkpoint=CheckpointConfig(every_steps=10**6),
        tracking=TrackingConfig(mode="disabled"),
        cluster=cluster_of(arguments),
    )


class Look(NamedTuple):
    """CPU seconds of each process so far, by its number."""

    at_s: float
    trainers: dict[int, float]
    others: dict[int, float]


@contextlib.contextmanager
def looks_each_second() -> Iterator[list[Look]]:
    """What this process and all below it had used, second by second, within the body."""
    looks: list[Look] = []
    over = threading.Event()

    def keep_looking() -> None:
        while not over.wait(1.0):
            looks.append(look())

    thread = threading.Thread(target=keep_looking, daemon=True)
    thread.start()
    try:
        yield looks
    finally:
        over.set()
        thread.join()


def look() -> Look:
    import psutil  # Ray brings its own copy

    found = Look(time.monotonic(), {}, {})
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times, title = process.cpu_times(), " ".join(process.cmdline())
        except psutil.Error:
            continue  # ended meanwhile
        side = found.trainers if "RayTrainWorker" in title else found.others
        side[process.pid] = times.user + times.system
    return found


def ray_cores(looks: Sequence[Look], workers: int) -> float:
    """CPU seconds a second of what does not train, the median over the seconds in which trainers kept computing."""
    found = []
    for before, now in itertools.pairwise(looks):
        seconds = now.at_s - before.at_s
        if _spent(before.trainers, now.trainers) > 0.6 * workers * seconds:
            found.append(_spent(before.others, now.others) / seconds)
    return round(statistics.median(found[len(found) // 5 :]), 3)


def _spent(before: dict[int, float], now: dict[int, float]) -> float:
    return sum(value - before[pid] for pid, value in now.items() if pid in before)


def cpu_seconds(batch: int) -> dict[str, float]:
    """Preset -> CPU seconds of a step on one core, the median."""
    import torch
    from train_step import new_learner, preset, step_batch

    from moleblend_ray.training.step import train_step

    torch.set_num_threads(1)
    device = torch.device("cpu")
    found = {}
    for name, count in CPU_PRESETS.items():
        learner = new_learner(preset(name), "fp32", device)
        steps = [learner.prepare(step_batch(number, batch, batch)) for number in range(2)]
        for step in steps:
            train_step(learner, step)
        times = []
        for number in range(count):
            began = time.process_time()
            train_step(learner, steps[number % 2])
            times.append(time.process_time() - began)
        found[name] = round(statistics.median(times), 4)
    return found


def significant(value: float) -> float:
    return float(f"{value:.4g}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
