"""What saving costs a run: training steps without saving, with it behind the steps, and with steps that wait for it.

    python benchmarks/checkpoint.py [--preset base] [--batch 64] [--every 10] [--rounds 3] [--threads 1]
                                    [--device cpu|cuda] [--out URI]

The three take turns, ``--rounds`` times, each ``--every`` steps with one save (the trainer's own, `training/saving.py`) before
the first. ``longer`` is the time of such a group of steps over that of one without saving, less 1. ``stage_s`` is the part that a step
waits for, ``save_s`` a whole save, ``load_s`` restoring it into the model and checking it on the way. ``bytes_to_theory``: the
files over 12 bytes a parameter (weight and two Adam moments, float32). ``--out`` may lie in object storage; by default it is a
temporary folder. With fewer ``--threads`` than cores, saving has a core to itself, as it has beside a GPU. One JSON line
comes last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from train_step import device_name, new_learner, preset, step_batch

from moleblend_ray.training.checkpoint import restore_training_state, training_state
from moleblend_ray.training.commits import latest_committed
from moleblend_ray.training.config import CheckpointConfig
from moleblend_ray.training.learner import Learner
from moleblend_ray.training.saving import CheckpointWriter
from moleblend_ray.training.step import train_step
from moleblend_ray.training.throughput import seconds_of

BYTES_A_PARAMETER = 12


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    learner = new_learner(preset(arguments.preset), arguments.dtype, device)
    with tempfile.TemporaryDirectory(prefix="moleblend-benchmark-") as folder:
        measured = measure(learner, arguments, arguments.out or folder)
    line = {
        "benchmark": "checkpoint",
        "preset": arguments.preset,
        "batch": arguments.batch,
        "every": arguments.every,
        "device": device_name(device),
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "torch": torch.__version__,
        **measured,
    }
    print(json.dumps(line))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out")
    return parser.parse_args()


def measure(learner: Learner, arguments: argparse.Namespace, out: str) -> dict[str, Any]:
    """Seconds of the groups of steps in each way of saving, of a save and of a load, and bytes."""
    device = learner.ranks.device
    batch = learner.prepare(step_batch(0, arguments.batch, arguments.batch))
    one_step = partial(train_step, learner, batch)
    one_step()
    numbers = iter(range(1, 10**6))
    stage_s: list[float] = []
    with (
        writer(learner, f"{out}/behind", asynchronous=True) as behind,
        writer(learner, f"{out}/waiting", asynchronous=False) as waiting,
    ):

        def save(checkpoints: CheckpointWriter) -> None:
            checkpoints.commit(
                next(numbers), training_state(learner.model, learner.optimizer), records=[]
            )

        def save_behind() -> None:
            stage_s.append(seconds_of(partial(save, behind), device))

        ways: dict[str, Callable[[], None]] = {
            "none": lambda: None,
            "async": save_behind,
            "sync": lambda: save(waiting),
        }
        save_behind()  # makes the buffers
        groups: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, begin in ways.items():
                behind.wait()  # no save may reach into another way's steps
                groups[name].append(
                    seconds_of(partial(group_of_steps, begin, one_step, arguments.every), device)
                )
        behind.wait()
        save_s = [seconds_of(partial(save, waiting), device) for _ in range(3)]
    commit = latest_committed(f"{out}/waiting")
    assert commit is not None
    restore = partial(
        restore_training_state,
        learner.model,
        learner.optimizer,
        f"{out}/waiting",
        commit.step,
        learner.ranks,
    )
    num_bytes = sum(file.num_bytes for file in commit.files)
    parameters = sum(parameter.numel() for parameter in learner.model.parameters())
    medians = {name: statistics.median(seconds) for name, seconds in groups.items()}
    ratios = {
        name: statistics.median(
            seconds / without for seconds, without in zip(groups[name], groups["none"], strict=True)
        )
        for name in ("async", "sync")
    }
    return {
        "step_s": {name: round(total / arguments.every, 4) for name, total in medians.items()},
        "longer": {name: round(ratio - 1, 4) for name, ratio in ratios.items()},
        "stage_s": round(statistics.median(stage_s[1:]), 3),
        "save_s": round(statistics.median(save_s), 3),
        "load_s": round(statistics.median(seconds_of(restore, device) for _ in range(3)), 3),
        "mib": round(num_bytes / 2**20, 1),
        "bytes_to_theory": round(num_bytes / (BYTES_A_PARAMETER * parameters), 4),
    }


def group_of_steps(begin: Callable[[], None], one_step: Callable[[], Any], count: int) -> None:
    begin()
    for _ in range(count):
        one_step()


def writer(learner: Learner, run_uri: str, *, asynchronous: bool) -> CheckpointWriter:
    return CheckpointWriter(
        CheckpointConfig(keep_last=1, asynchronous=asynchronous),
        run_uri,
        learner.ranks,
        identity={},
        config_fingerprint="",
        start_step=0,
    )


if __name__ == "__main__":
    main()
