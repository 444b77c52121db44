"""A whole training step of the model, beside the device's matrix-product rate measured in the same run.

    python benchmarks/train_step.py [--preset base] [--batch 64] [--micro-batch 64] [--device cpu|cuda]
                                    [--dtype fp32|bf16] [--steps 10] [--compile] [--plain] [--operators]

The step is the trainer's own (`training/loop.py`): random choices, forward, losses, backward, clipping, optimizer.
``model_gflop_per_molecule`` counts what real atoms and pairs need, padding excluded (`model/flops.py`); ``mfu`` is that over
the step's time and the rate of a matrix product measured just after it, the median over steps; each
batch has gone through a step before. ``peak_mib`` is the process's peak resident memory on a CPU, the
allocator's on a GPU. ``--plain`` times the step of `plain_model.py` in turn with it (``times_plain``, ``plain_peak_mib`` on
a GPU), after a check that both give the same losses. ``--operators`` adds the shares of the step's time by operator, from PyTorch's profiler. Molecules are synthetic, with
PCQM4Mv2's sizes. Needs neither Ray nor RDKit. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from plain_model import PlainModel
from synthetic_molecules import synthetic_block

from moleblend_ray.data.batch import StepBatch, build_micro_batches
from moleblend_ray.model.blending import draw_blend
from moleblend_ray.model.config import BlendConfig, LossConfig, ModelConfig
from moleblend_ray.model.flops import TRAINING_FACTOR, pretraining_flops
from moleblend_ray.model.losses import loss_counts
from moleblend_ray.model.moleblend import MoleBlendModel
from moleblend_ray.training.config import OptimConfig, Precision, TrainConfig
from moleblend_ray.training.distributed import Ranks, autocast, evaluating
from moleblend_ray.training.loop import Learner, PretrainingObjective, build_learner, train_step
from moleblend_ray.training.prefetch import DeviceStep, to_device
from moleblend_ray.training.throughput import matrix_rate, peak_memory_bytes, seconds_of

NUM_BATCHES = 4
PRESETS = Path(__file__).resolve().parents[1] / "conf" / "model"


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    config = preset(arguments.preset)
    learner = new_learner(config, arguments.dtype, device, compiled=arguments.compile)
    steps = [
        to_device(step_batch(step, arguments.batch, arguments.micro_batch), device)
        for step in range(NUM_BATCHES)
    ]
    line = {
        "benchmark": "train_step",
        "preset": arguments.preset,
        "parameters": sum(p.numel() for p in learner.model.parameters()),
        "batch": arguments.batch,
        "micro_batch": arguments.micro_batch,
        "device": device_name(device),
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "compile": arguments.compile,
        **measure(learner, steps, arguments),
        "padding_share": round(padding_share(steps), 4),
        "pair_padding_share": round(pair_padding_share(steps), 4),
    }
    if arguments.plain:
        line |= compare(learner, steps, arguments)
    if arguments.operators:
        line["operators"] = operators(learner, steps)
    print(json.dumps(line))


def measure(
    learner: Learner, steps: list[DeviceStep], arguments: argparse.Namespace
) -> dict[str, float]:
    """Times of the steps, taken in turn, each beside the matrix-product rate of that moment."""
    device = learner.ranks.device
    for step in steps:
        train_step(learner, step)
    # Before the matrix products, which take memory of their own.
    peak = peak_memory_bytes(device)
    seconds, rates, mfu = [], [], []
    for index in range(arguments.steps):
        step = steps[index % NUM_BATCHES]
        seconds.append(seconds_of(partial(train_step, learner, step), device))
        # At once: the speed of a shared machine changes within seconds.
        rates.append(matrix_rate(device, arguments.dtype))
        mfu.append(step_flops(learner.model.config, step.batch) / seconds[-1] / rates[-1])
    flops = statistics.fmean(step_flops(learner.model.config, step.batch) for step in steps)
    median = statistics.median(seconds)
    return {
        "step_s": round(median, 4),
        "molecules_per_s": round(arguments.batch / median, 2),
        "model_gflop_per_molecule": round(flops / arguments.batch / 1e9, 3),
        "matrix_tflop_per_s": round(statistics.median(rates) / 1e12, 4),
        "mfu": round(statistics.median(mfu), 4),
        "peak_mib": round(peak / 2**20),
    }


def compare(
    learner: Learner, steps: list[DeviceStep], arguments: argparse.Namespace
) -> dict[str, float]:
    """How many times longer the plain step takes, both timed in turn."""
    device = learner.ranks.device
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    plain = new_learner(learner.model.config, arguments.dtype, device)
    objective = PretrainingObjective(cast(MoleBlendModel, PlainModel(plain.model)), plain.loss)
    plain = replace(plain, objective=objective)
    check_equal(learner, plain, steps[0])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for step in steps:
        train_step(plain, step)
    peak = round((peak_memory_bytes(device) - held) / 2**20)
    ours, theirs = [], []
    for index in range(arguments.steps):
        step = steps[index % NUM_BATCHES]
        ours.append(seconds_of(partial(train_step, learner, step), device))
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
        molecules = step.molecules[0]
        blend = draw_blend(molecules, one.blend, one.seed)
        counts = loss_counts(molecules, blend, one.loss)
        with evaluating(one.objective), autocast(one.train.precision, one.ranks.device):
            losses.append(float(one.objective(molecules, blend, counts)[0]))
    tolerance = 1e-4 if learner.train.precision == "fp32" else 1e-2
    if abs(losses[0] - losses[1]) > tolerance * abs(losses[0]):
        raise AssertionError(f"the losses differ: {losses}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--operators", action="store_true")
    return parser.parse_args()


def preset(name: str) -> ModelConfig:
    """The model of ``conf/model/NAME.yaml``, flat files of numbers, read without a YAML library."""
    lines = (PRESETS / f"{name}.yaml").read_text().splitlines()
    values = (line.split("#")[0].partition(":") for line in lines)
    return ModelConfig(**{key: json.loads(value) for key, colon, value in values if colon})


def new_learner(
    config: ModelConfig, precision: Precision, device: torch.device, *, compiled: bool = False
) -> Learner:
    return build_learner(
        config,
        train=TrainConfig(num_steps=10**6, strategy="none", precision=precision, compile=compiled),
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


def operators(learner: Learner, steps: list[DeviceStep]) -> dict[str, float]:
    """Share of the step's own time, by operator, the twelve largest."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = learner.ranks.device.type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for step in steps:
            seconds_of(partial(train_step, learner, step), learner.ranks.device)
        name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = {event.key: getattr(event, name) for event in profile.key_averages()}
    total = sum(times.values())
    largest = sorted(times, key=times.__getitem__, reverse=True)[:12]
    return {key: round(times[key] / total, 4) for key in largest}


if __name__ == "__main__":
    main()
