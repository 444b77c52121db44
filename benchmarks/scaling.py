"""Weak scaling of the training step over processes with one core each, and the bytes that they exchange.

    python benchmarks/scaling.py [--preset base] [--batch 32] [--steps 4] [--workers 2]

Each worker trains on ``--batch`` molecules a step, over gloo on this machine, with FSDP2, with FSDP2 that gathers once a step
(``fsdp_reshard=false``) and with DDP. ``efficiency`` is the
step's time of one worker, alone on the machine, over that of several; ``efficiency_to_independent`` compares with as many workers
that do not know of each other, since two virtual cores that share a physical one are slower together whatever they do.
``sent_mib`` is what the loopback interface carried in a step, all workers together, and ``theory_mib`` what the strategy has to
send: parameters gathered for the forward and again for the backward pass (float32), gradients reduced (float64 on a CPU under
FSDP2, so that the number of workers leaves no trace; float32 under DDP). Runs take turns. One JSON line comes last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from train_step import preset, step_batch

from moleblend_ray.model.config import BlendConfig, LossConfig, ModelConfig
from moleblend_ray.model.moleblend import MoleBlendModel
from moleblend_ray.training.config import OptimConfig, Strategy, TrainConfig
from moleblend_ray.training.learner import build_learner
from moleblend_ray.training.ranks import Ranks
from moleblend_ray.training.step import train_step

WAYS: dict[str, tuple[Strategy, bool]] = {
    "fsdp": ("fsdp", True),
    "fsdp_once": ("fsdp", False),
    "ddp": ("ddp", True),
}
"""``train.strategy`` and ``train.fsdp_reshard`` of each key of the result."""
WARM_UP_STEPS = 1
LOOPBACK = Path("/proc/net/dev")


def main() -> None:
    arguments = parse_arguments()
    if arguments.rank is not None:
        work(arguments)
        return
    workers = arguments.workers
    config = preset(arguments.preset)
    line: dict[str, Any] = {
        "benchmark": "scaling",
        "preset": arguments.preset,
        "batch_a_worker": arguments.batch,
        "workers": workers,
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
    }
    for way in WAYS:
        alone, independent, together = (
            [run(arguments, way, *shape) for _ in range(arguments.rounds)]
            for shape in ((1, 1), (1, workers), (workers, 1))
        )
        seconds = [
            min(result["step_s"] for result in results)
            for results in (alone, independent, together)
        ]
        line[way] = {
            "step_s_alone": round(seconds[0], 3),
            "step_s_independent": round(seconds[1], 3),
            "step_s": round(seconds[2], 3),
            "efficiency": round(seconds[0] / seconds[2], 3),
            "efficiency_to_independent": round(seconds[1] / seconds[2], 3),
            "sent_mib": round(together[0]["sent_bytes"] / 2**20, 1),
            "theory_mib": round(theory_bytes(config, way, workers) / 2**20, 1),
        }
    print(json.dumps(line))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, default="fsdp", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--group", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(arguments: argparse.Namespace, way: str, workers: int, groups: int) -> dict[str, float]:
    """``groups`` groups of ``workers`` processes at once, a core each; the slowest one's numbers."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    __file__,
                    *(f"--preset={arguments.preset}", f"--batch={arguments.batch}"),
                    *(f"--steps={arguments.steps}", f"--workers={workers}"),
                    *(f"--way={way}", f"--rank={rank}"),
                    *(f"--core={group * workers + rank}", f"--group={folder}/{group}"),
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
            for group in range(groups)
            for rank in range(workers)
        ]
        outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a worker failed; its error is above")
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    return max(results, key=lambda result: float(result["step_s"]))


def work(arguments: argparse.Namespace) -> None:
    """One worker: print the median time of its steps and what the loopback interface sent in one."""
    os.sched_setaffinity(0, {arguments.core % (os.cpu_count() or 1)})
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{arguments.group}",
        rank=arguments.rank,
        world_size=arguments.workers,
    )
    strategy, reshard = WAYS[arguments.way]
    learner = build_learner(
        preset(arguments.preset),
        train=TrainConfig(num_steps=10**6, strategy=strategy, fsdp_reshard=reshard),
        optim=OptimConfig(),
        blend=BlendConfig(),
        loss=LossConfig(),
        seed=0,
        ranks=Ranks(rank=arguments.rank, world_size=arguments.workers),
    )
    step = learner.prepare(step_batch(arguments.rank, arguments.batch, arguments.batch))
    seconds = []
    for number in range(WARM_UP_STEPS + arguments.steps):
        dist.barrier()
        if number == WARM_UP_STEPS:
            sent = loopback_bytes()
        begin = time.perf_counter()
        train_step(learner, step)
        seconds.append(time.perf_counter() - begin)
    dist.barrier()
    result = {
        "step_s": statistics.median(seconds[WARM_UP_STEPS:]),
        "sent_bytes": (loopback_bytes() - sent) / arguments.steps,
    }
    print(json.dumps(result))
    dist.destroy_process_group()


def loopback_bytes() -> int:
    """Bytes sent through the loopback interface since the machine started."""
    for line in LOOPBACK.read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise SystemExit(f"{LOOPBACK} has no loopback interface")


def theory_bytes(config: ModelConfig, way: str, workers: int) -> float:
    """What all workers together must send in a step.

    A gathering or a scattered reduction of n bytes over W workers sends n * (W - 1); a full reduction is one of each.
    """
    with torch.device("meta"):
        model = MoleBlendModel(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    layers = sum(parameter.numel() for parameter in model.encoder.layers.parameters())
    strategy, reshard = WAYS[way]
    if strategy == "ddp":
        return (workers - 1) * 2 * 4 * total
    # With `reshard`, the layers are gathered again in the backward pass; the rest of the model stays gathered.
    again = layers if reshard else 0
    return (workers - 1) * (4 * (total + again) + 8 * total)


if __name__ == "__main__":
    main()
