"""Hours, machines, bytes and cost of a collection, a model and a number of trainers: read :func:`make_plan` first."""

from __future__ import annotations

import math
from collections.abc import Mapping

from moleblend_ray.data.config import BLOCK_BYTES, StreamConfig
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.flops import TRAINING_FACTOR, ForwardFlops, pretraining_flops
from moleblend_ray.planning.alternatives import FEW_STEPS, changes, hints, scaling
from moleblend_ray.planning.capacity import (
    GB,
    WINDOWS_IN_WORK,
    Throughput,
    throughput,
)
from moleblend_ray.planning.plan import Plan, Premises
from moleblend_ray.planning.stages import (
    Pretraining,
    embed_stage,
    num_steps,
    object_store,
    prepare_stage,
    pretrain_stage,
    pretraining,
    state_bytes,
    total,
)


def make_plan(
    title: str,
    premises: Premises,
    workers: int,
    *,
    cpu_nodes: int | None = None,
    gpu_memory_gb: float | None = None,
) -> Plan:
    """The plan for ``workers`` trainers; ``cpu_nodes`` None: as many as they need.

    ``gpu_memory_gb`` is the memory of each GPU (10^9 bytes), None without GPUs. HopelessClusterError if the cluster
    fails faster than a run can start.
    """
    found = throughput(premises.setup, workers, cpu_nodes)
    run = pretraining(premises, found)
    stages = (
        prepare_stage(premises, found),
        pretrain_stage(premises, run),
        embed_stage(premises, found),
    )
    return Plan(
        title=title,
        rate=found.rate,
        binding=found.binding,
        stages=stages,
        total=total(stages, premises.prices),
        resources=found.resources,
        changes=changes(premises, found, cpu_nodes),
        scaling=scaling(premises, workers),
        settings=_settings(premises, run),
        assumptions=tuple(dict.fromkeys(name for stage in stages for name in stage.hours.rests_on)),
        hints=hints(premises, found, cpu_nodes),
        warnings=_warnings(premises, found, cpu_nodes, gpu_memory_gb),
    )


def flops_per_molecule(model: ModelConfig, atom_counts: Mapping[int, float]) -> float:
    """Mean operations per molecule in a training step, by the same formula as ``mfu``."""
    return TRAINING_FACTOR * _mean(pretraining_flops(model), atom_counts)


def _mean(forward: ForwardFlops, atom_counts: Mapping[int, float]) -> float:
    total = sum(atom_counts.values())
    moments = [
        sum(n**power * count for n, count in atom_counts.items()) / total for power in (1, 2)
    ]
    return forward.constant + forward.linear * moments[0] + forward.quadratic * moments[1]


def _settings(premises: Premises, run: Pretraining) -> dict[str, str]:
    """Overrides for `moleblend pretrain`."""
    setup, found = premises.setup, run.found
    every = max(1, round(run.reliability.interval_s / found.step_s))
    settings = {
        "cluster.num_workers": str(found.workers),
        "cluster.use_gpu": "true" if setup.on_gpu else "",
        "order.global_batch_size": str(found.workers * setup.batch),
        "order.num_streams": str(found.workers),
        "train.num_steps": str(num_steps(premises, found)),
        "train.strategy": setup.strategy if setup.strategy != "fsdp" else "",
        "train.fsdp_replicas": str(setup.replicas) if setup.replicas > 1 else "",
        "train.fsdp_reshard": "" if setup.reshard else "false",
        "train.precision": setup.precision if setup.precision != "fp32" else "",
        "checkpoint.every_steps": str(_two_digits(every)),
        # One forward and backward pass of a trainer in each step: a host launches the same kernels for each of them.
        "stream.micro_batch_size": str(setup.batch) if setup.on_gpu else "",
        "stream.max_actors": str(found.data_actors),
        "stream.steps_per_block": "" if found.blocks.is_default else str(found.blocks.steps),
    }
    window = setup.order.shuffle_window
    # A machine keeps one copy of each row group of the windows that the blocks in work belong to.
    rows = WINDOWS_IN_WORK * max(window, found.workers * setup.batch * found.blocks.steps)
    cache = rows * setup.rows_read * setup.decoded_bytes
    if setup.on_gpu and cache > StreamConfig().cache_bytes:
        settings["stream.cache_bytes"] = str(math.ceil(cache / 2**28) * 2**28)
    if setup.on_gpu:
        store = object_store(setup, found).value
        settings["stream.object_store_gib"] = f"{max(1.0, store / 2**30):.0f}"
    return {name: value for name, value in settings.items() if value}


def _two_digits(number: int) -> int:
    digits = max(0, len(str(number)) - 2)
    return max(1, round(number, -digits)) if digits else number


def _warnings(
    premises: Premises,
    found: Throughput,
    cpu_nodes: int | None,
    gpu_memory_gb: float | None,
) -> tuple[str, ...]:
    job, setup = premises.job, premises.setup
    lines = []
    state = state_bytes(setup, found)
    if gpu_memory_gb is not None and state > 0.7 * gpu_memory_gb * GB:
        lines.append(
            f"the state of the model takes {state / GB:.0f} GB of the {gpu_memory_gb:g} GB of a GPU, without "
            "activations: use strategy=fsdp, more GPUs or fewer replicas"
        )
    step_molecules = found.workers * setup.batch
    if step_molecules > job.molecules:
        lines.append(
            f"a step of {step_molecules:,} molecules is more than the collection has ({job.molecules:,}): lower batch"
        )
    steps = job.presentations / step_molecules
    if steps < FEW_STEPS:
        lines.append(
            f"only {math.ceil(steps):,} steps of {step_molecules:,} molecules: with so few updates the model may learn "
            "little; lower batch or use fewer trainers"
        )
    if cpu_nodes is not None and found.binding in ("data actors", "network out of CPU nodes"):
        lines.append(
            f"with cpu_nodes={cpu_nodes} the trainers wait for data: leave it out to see how many they need"
        )
    if found.amplification > 4:
        lines.append(
            f"{found.amplification:.0f} machines fetch and decode the same row group, as all of them build blocks of "
            "its shuffle window: fewer CPU nodes with more cores (cpu_node_cores) read less"
        )
    if not found.blocks.is_default:
        lines.append(
            f"blocks of {found.blocks.bytes / 2**20:.0f} MiB instead of {BLOCK_BYTES >> 20}, so that Ray Data's "
            "executor does not limit the run; blocks of this size were never tried"
        )
    return tuple(lines)
