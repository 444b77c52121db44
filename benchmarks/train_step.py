"""A whole training step of the model, beside the device's matrix-product rate measured in the same run.

    python benchmarks/train_step.py [--preset base] [--batch 64 ...] [--micro-batch N] [--device cpu|cuda]
                                    [--dtype fp32|bf16] [--steps 10] [--compile] [--plain] [--operators]
                                    [--strategy none|fsdp|ddp]

The step is the trainer's own (`training/step.py`): forward, losses, backward, clipping, optimizer. Copies to the device and
random choices happen in the background, beside the step before; alone they take ``prepare_s``.
``model_gflop_per_molecule`` counts what real atoms and pairs need, padding excluded (`model/flops.py`); ``mfu`` is that over
the step's time and the rate of a matrix product measured just after it, the median over steps; each
batch has gone through a step before. ``peak_mib`` is the process's peak resident memory on a CPU, the
allocator's on a GPU. ``--plain`` times the step of `plain_model.py` in turn with it (``times_plain``, ``plain_peak_mib`` on
a GPU), after a check that both give the same losses. ``--operators`` adds the shares of the step's time by operator (on a GPU: by
kernel), from PyTorch's profiler, and on a GPU ``device_s``, the time of all kernels of a step, ``launches``, and ``host_waits``,
how often the host waits for the device in a step. Several batch sizes are measured one after the other by the same (compiled)
model; a micro-batch is the whole batch unless given. ``--strategy`` is that of the trainer, with this one process as its only worker
(NCCL on a GPU, gloo on a CPU): what sharding or replication adds to a step before anything is sent to others. Molecules are synthetic, with PCQM4Mv2's sizes. Needs neither Ray nor RDKit.
Prints one JSON line for each batch size last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
import torch.distributed as dist
from plain_model import PlainModel
from synthetic_molecules import synthetic_block

from moleblend_ray.data.batches.batch import StepBatch, build_micro_batches
from moleblend_ray.model.config import BlendConfig, LossConfig, ModelConfig
from moleblend_ray.model.flops import TRAINING_FACTOR, pretraining_flops
from moleblend_ray.model.fused import plain_code
from moleblend_ray.model.moleblend import MoleBlendModel
from moleblend_ray.training.config import OptimConfig, Precision, Strategy, TrainConfig
from moleblend_ray.training.distributed import evaluating
from moleblend_ray.training.learner import Learner, PretrainingObjective, build_learner
from moleblend_ray.training.mixed_precision import autocast
from moleblend_ray.training.prefetch import DeviceStep
from moleblend_ray.training.ranks import Ranks
from moleblend_ray.training.step import train_step
from moleblend_ray.training.throughput import (
    compiled_graphs,
    matrix_rate,
    peak_memory_bytes,
    seconds_of,
)

NUM_BATCHES = 4
PRESETS = Path(__file__).resolve().parents[1] / "conf" / "model"


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    config = preset(arguments.preset)
    with process_group(arguments.strategy, device):
        learner = new_learner(
            config,
            arguments.dtype,
            device,
            compiled=arguments.compile,
            strategy=arguments.strategy,
        )
        for batch in arguments.batch:
            print(json.dumps(line_of(learner, batch, arguments)), flush=True)


@contextlib.contextmanager
def process_group(strategy: Strategy, device: torch.device) -> Iterator[None]:
    """Within, this process is the only member of a process group, if ``strategy`` needs one."""
    if strategy == "none":
        yield
        return
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def line_of(learner: Learner, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """All that is asked for, with ``batch`` molecules a step."""
    device = learner.ranks.device
    micro_batch = arguments.micro_batch or batch
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    batches = [step_batch(number, batch, micro_batch) for number in range(NUM_BATCHES)]
    steps = [learner.prepare(one) for one in batches]
    line = {
        "benchmark": "train_step",
        "preset": arguments.preset,
        "parameters": sum(p.numel() for p in learner.model.parameters()),
        "batch": batch,
        "micro_batch": micro_batch,
        "device": device_name(device),
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "compile": arguments.compile,
        "strategy": arguments.strategy,
        **measure(learner, steps, arguments.steps, arguments.dtype),
        "prepare_s": round(
            statistics.median(seconds_of(partial(learner.prepare, one), device) for one in batches),
            4,
        ),
        "padding_share": round(padding_share(steps), 4),
        "pair_padding_share": round(pair_padding_share(steps), 4),
    }
    if arguments.compile:
        line["compiled_graphs"] = compiled_graphs()
    if arguments.plain:
        line |= compare(learner, steps, arguments.steps)
    if arguments.operators:
        line |= operators(learner, steps)
    return line


def measure(
    learner: Learner, steps: list[DeviceStep], repeats: int, precision: Precision
) -> dict[str, float]:
    """Times of the steps, taken in turn, each beside the matrix-product rate of that moment."""
    device = learner.ranks.device
    for step in steps:
        train_step(learner, step)
    # Before the matrix products, which take memory of their own.
    peak = peak_memory_bytes(device)
    seconds, rates, mfu = [], [], []
    for index in range(repeats):
        step = steps[index % NUM_BATCHES]
        seconds.append(seconds_of(partial(train_step, learner, step), device))
        # At once: the speed of a shared machine changes within seconds.
        rates.append(matrix_rate(device, precision))
        mfu.append(step_flops(learner.model.config, step.batch) / seconds[-1] / rates[-1])
    flops = statistics.fmean(step_flops(learner.model.config, step.batch) for step in steps)
    median = statistics.median(seconds)
    molecules = statistics.fmean(molecules_of(step) for step in steps)
    return {
        "step_s": round(median, 4),
        "molecules_per_s": round(molecules / median, 2),
        "model_gflop_per_molecule": round(flops / molecules / 1e9, 3),
        "matrix_tflop_per_s": round(statistics.median(rates) / 1e12, 4),
        "mfu": round(statistics.median(mfu), 4),
        "peak_mib": round(peak / 2**20),
    }


def compare(learner: Learner, steps: list[DeviceStep], repeats: int) -> dict[str, float]:
    """How many times longer the plain step takes, both timed in turn."""
    device = learner.ranks.device
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    plain = new_learner(learner.model.config, learner.train.precision, device)
    objective = PretrainingObjective(cast(MoleBlendModel, PlainModel(plain.model)), plain.loss)
    plain = replace(plain, objective=objective)
    check_equal(learner, plain, steps[0])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with plain_code():
        for step in steps:
            train_step(plain, step)
    peak = round((peak_memory_bytes(device) - held) / 2**20)
    ours, theirs = [], []
    for index in range(repeats):
        step = steps[index % NUM_BATCHES]
        ours.append(seconds_of(partial(train_step, learner, step), device))
        with plain_code():
            theirs.append(seconds_of(partial(train_step, plain, step), device))
    ratio = statistics.median(theirs) / statistics.median(ours)
    return {
        "plain_step_s": round(statistics.median(theirs), 4),
        "times_plain": round(ratio, 3),
        # A process has one peak on a CPU, and it was the other model's.
        **({"plain_peak_mib": peak} if device.type == "cuda" else {}),
    }


def check_equal(learner: Learner, plain: Learner, step: DeviceStep) -> None:
    """Both learners' losses on ``step``, without dropout and with the same weights, must agree."""
    plain.model.load_state_dict(learner.model.state_dict())
    losses = []
    for one in (learner, plain):
        code = plain_code() if one is plain else contextlib.nullcontext()
        with code, evaluating(one.objective), autocast(one.train.precision, one.ranks.device):
            losses.append(float(one.objective(step.molecules[0], step.blends[0], step.counts)[0]))
    tolerance = 1e-4 if learner.train.precision == "fp32" else 1e-2
    if abs(losses[0] - losses[1]) > tolerance * abs(losses[0]):
        raise AssertionError(f"the losses differ: {losses}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--operators", action="store_true")
    parser.add_argument("--strategy", choices=get_args(Strategy), default="none")
    arguments = parser.parse_args()
    if arguments.plain and arguments.strategy != "none":
        parser.error("--plain compares models of one process; leave --strategy out")
    return arguments


def preset(name: str) -> ModelConfig:
    """The model of ``conf/model/NAME.yaml``, flat files of numbers, read without a YAML library."""
    lines = (PRESETS / f"{name}.yaml").read_text().splitlines()
    values = (line.split("#")[0].partition(":") for line in lines)
    return ModelConfig(**{key: json.loads(value) for key, colon, value in values if colon})


def new_learner(
    config: ModelConfig,
    precision: Precision,
    device: torch.device,
    *,
    compiled: bool = False,
    strategy: Strategy = "none",
) -> Learner:
    return build_learner(
        config,
        train=TrainConfig(
            num_steps=10**6, strategy=strategy, precision=precision, compile=compiled
        ),
        optim=OptimConfig(),
        blend=BlendConfig(),
        loss=LossConfig(),
        seed=0,
        ranks=Ranks(device=device),
    )


def step_batch(step: int, num_molecules: int, micro_batch_size: int) -> StepBatch:
    micro_batches = build_micro_batches(
        synthetic_block(num_molecules, seed=step), step, 0, micro_batch_size
    )
    return StepBatch(step=step, micro_batches=tuple(micro_batches))


def step_flops(config: ModelConfig, batch: StepBatch) -> float:
    forward = pretraining_flops(config)
    return TRAINING_FACTOR * sum(
        float(forward.of(micro.num_atoms).sum()) for micro in batch.micro_batches
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def padding_share(steps: list[DeviceStep]) -> float:
    """Of the atom slots, those that hold no atom."""
    parts = [part for step in steps for part in step.molecules]
    slots = sum(part.num_molecules * part.max_atoms for part in parts)
    return 1.0 - sum(len(part.atom_index) for part in parts) / slots


def pair_padding_share(steps: list[DeviceStep]) -> float:
    """Of the slots of token pairs, those that hold none."""
    parts = [part for step in steps for part in step.molecules]
    slots = sum(part.num_molecules * (part.max_atoms + 1) ** 2 for part in parts)
    return 1.0 - sum(float(((part.num_atoms + 1) ** 2).sum()) for part in parts) / slots


def operators(learner: Learner, steps: list[DeviceStep]) -> dict[str, Any]:
    """Shares of the step's own time by operator or kernel, the largest first, and what a GPU and its host do in a step."""
    device = learner.ranks.device
    on_gpu = device.type == "cuda"
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(
        activities=[kinds.CPU, *([kinds.CUDA] if on_gpu else [])]
    ) as profile:
        for step in steps:
            train_step(learner, step)
        seconds_of(lambda: None, device)
    events = profile.key_averages()
    if not on_gpu:
        return {"operators": largest_shares({e.key: e.self_cpu_time_total for e in events})}
    on_device = [e for e in events if e.device_type.name == "CUDA"]
    times = {e.key: e.self_device_time_total for e in on_device}
    counts = {e.key: e.count for e in events}
    waits = sum(counts.get(name, 0) for name in ("cudaStreamSynchronize", "cudaEventSynchronize"))
    return {
        "operators": largest_shares(times, 30),
        "device_s": round(sum(times.values()) / 1e6 / len(steps), 5),
        "launches": round(sum(e.count for e in on_device) / len(steps)),
        "host_waits": waits / len(steps),
    }


def largest_shares(times: Mapping[str, float], number: int = 12) -> dict[str, float]:
    """Shares by name; names of C++ kernels without what is the same in all of them, and their arguments."""
    total = sum(times.values())
    by_name: dict[str, float] = {}
    for key, time in times.items():
        name = re.sub(r"at::native::|\(anonymous namespace\)::|void |at::|c10::", "", key)[:110]
        by_name[name] = by_name.get(name, 0.0) + time
    largest = sorted(by_name, key=by_name.__getitem__, reverse=True)[:number]
    return {name: round(by_name[name] / total, 4) for name in largest}


def molecules_of(step: DeviceStep) -> int:
    return sum(part.num_molecules for part in step.molecules)


if __name__ == "__main__":
    main()
