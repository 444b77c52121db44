"""`moleblend plan`: collect figures (bundled, given or measured now), and plan. Starts no cluster.

Module ``plan_tables`` shows the report on a terminal.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from moleblend_ray.config.accept import accepted
from moleblend_ray.config.describe import json_values, redact
from moleblend_ray.config.plan import PlanConfig
from moleblend_ray.data.config import StreamConfig
from moleblend_ray.data.dataset.manifest import Manifest, load_manifest
from moleblend_ray.data.files import storage
from moleblend_ray.errors import ConfigError
from moleblend_ray.host import available_cpus
from moleblend_ray.model.flops import TRAINING_FACTOR
from moleblend_ray.planning.capacity import DataCosts, Setup, mean_atoms
from moleblend_ray.planning.figures import Figure, assumed, computed, given, measured
from moleblend_ray.planning.plan import Job, Plan, Premises
from moleblend_ray.planning.planner import flops_per_molecule, make_plan
from moleblend_ray.planning.rates import (
    ATOM_SHARES,
    ATOMS_PER_MOLECULE,
    Gpu,
    bundled,
    cpu_efficiency,
    gpu,
)
from moleblend_ray.planning.sizes import exchange, model_size
from moleblend_ray.quantities import number_text
from moleblend_ray.settings import to_dict
from moleblend_ray.training.config import Precision

if TYPE_CHECKING:
    from moleblend_ray.training.rehearsal import Found

logger = logging.getLogger(__name__)

PLAN_NAME: Final = "plan.json"
CHART_NAME: Final = "plan.png"

_GPU_BATCH, _CPU_BATCH = 1024, 64
_BENCHMARK_GFLOP: Final = 4.303
"""10^9 operations per molecule in the benchmark of CPU steps: base preset, training."""
_BENCHMARK_BATCH: Final = 64
_BENCHMARK_PARAMETERS: Final = 44_906_506
_LAUNCHED_LAYERS: Final = 12
"""Blocks of the model whose kernels were launched in the benchmark of GPU steps: base preset."""
_FORWARD_MFU: Final = "the same share of the peak with and without gradients"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanReport:
    """A plan, what was asked for, and where it was written."""

    plan: Plan
    config: PlanConfig
    """The configuration that was planned."""
    written: tuple[str, ...] = ()
    """URIs of plan.json and plan.png; empty without ``config.out``."""


def plan(config: PlanConfig) -> PlanReport:
    """Plan ``config``; with ``config.out`` also write the plan and its chart."""
    config = accepted(config, PlanConfig)
    manifest = load_manifest(config.data) if config.data else None
    found = measure_now(config, manifest) if config.measure else None
    setup = build_setup(config, manifest, found)
    workers = config.gpus or config.cpu_workers
    job = _job(config, setup, workers, manifest)
    kind = f"GPUs ({gpu(config.gpu).name})" if config.gpus else "CPU workers"
    result = make_plan(
        f"{job.molecules:,} molecules, {model_size(config.model).parameters:,} parameters, {workers} {kind}",
        Premises(job=job, setup=setup, failures=config.failures, prices=config.prices),
        workers,
        cpu_nodes=config.cpu_nodes,
        gpu_memory_gb=gpu(config.gpu).memory_gb if config.gpus else None,
    )
    if config.out is None:
        return PlanReport(plan=result, config=config)
    from moleblend_ray.planning import chart  # matplotlib takes a second

    document, image = (storage.join(config.out, name) for name in (PLAN_NAME, CHART_NAME))
    report = PlanReport(plan=result, config=config, written=(document, image))
    storage.write_json(document, json_values(to_dict(report)))
    storage.write_bytes(
        image, chart.plan_chart(result, workers, "GPUs" if config.gpus else "workers")
    )
    return report


def _job(config: PlanConfig, setup: Setup, workers: int, manifest: Manifest | None) -> Job:
    there = 0 if manifest is None else manifest.counts.rows_out
    molecules = int(config.molecules or there)
    if molecules < 1:
        raise ConfigError(f"data: {config.data} holds no molecules to plan for; give molecules=N")
    presentations = (
        int(config.steps) * workers * setup.batch
        if config.steps is not None
        else math.ceil(molecules * (config.epochs or 1.0))
    )
    return Job(
        molecules=molecules,
        presentations=presentations,
        prepare_per_core_s=_prepare_rate(config, described=setup.described),
        embed_per_trainer_s=_embed_rate(setup),
        first_step_s=bundled("first_step_s"),
    )


def _prepare_rate(config: PlanConfig, *, described: bool) -> Figure:
    rows = bundled("prepare_rows_per_core_s")
    per_core = measured(rows.value, "molecules/s", rows.source)
    for wanted, name, what in (
        (config.conformers, "conformers_per_core_s", "a conformer"),
        (described, "descriptors_per_core_s", "descriptors"),
    ):
        if wanted:
            made = bundled(name)
            seconds = 1 / per_core.value + 1 / made.value
            source = f"with {what} each: {made.source}"
            per_core = computed(1 / seconds, "molecules/s", source, per_core, made)
    return per_core


def _embed_rate(setup: Setup) -> Figure:
    """Vectors per second of one trainer's device. The same process reads the molecules and then runs the forward
    pass, in batches as large as those of training."""
    launch_s = 0.0 if setup.launch_s is None else setup.launch_s.value
    forward_s = max(setup.step_s.value, launch_s) / setup.batch / TRAINING_FACTOR
    read_s = (setup.costs.actor_us.value + setup.costs.trainer_host_us.value) / 1e6
    alike = assumed(1.0, "", _FORWARD_MFU, "forward passes of embed")
    return computed(
        1 / (forward_s + read_s),
        "molecules/s",
        f"a third of a training step, plus reading, in batches of {setup.batch:,} (batch_size)",
        setup.step_s,
        *(() if setup.launch_s is None else (setup.launch_s,)),
        setup.costs.actor_us,
        alike,
    )


def build_setup(config: PlanConfig, manifest: Manifest | None, found: Found | None) -> Setup:
    """Machines and figures of ``config``, with the ``manifest`` of its data and what was ``found`` on this machine, if
    any."""
    on_gpu = config.gpus > 0
    atom_counts = _atom_counts(config, manifest)
    batch = config.batch or (_GPU_BATCH if on_gpu else _CPU_BATCH)
    times = (
        _Times(step_s=_gpu_step_s(config, atom_counts, batch), launch_s=_launch_s(config))
        if on_gpu
        else _cpu_times(config, atom_counts, batch, found)
    )
    return Setup(
        model=config.model,
        atom_counts=atom_counts,
        batch=batch,
        step_s=times.step_s,
        launch_s=times.launch_s,
        costs=_data_costs(found),
        network=config.network,
        storage=config.storage,
        strategy=config.strategy,
        precision=_precision(config),
        replicas=config.fsdp_replicas,
        reshard=config.fsdp_reshard,
        gpus_per_node=config.gpus_per_node if on_gpu else 0,
        node_cores=config.cpu_node_cores or (32 if on_gpu else available_cpus()),
        contention=times.contention,
        exchange_gb_s=times.exchange_gb_s,
        message_s=times.message_s,
        ray_cores=times.ray_cores,
        shard_bytes=_shard_bytes(config, atom_counts, manifest),
        row_group_rows=manifest.row_group_rows if manifest is not None else None,
        described=_described(config, manifest),
    )


class _Times(NamedTuple):
    """The figures of :class:`Setup` about the time of a step; all but the first two are known without GPUs only."""

    step_s: Figure
    launch_s: Figure | None = None
    contention: Figure | None = None
    exchange_gb_s: Figure | None = None
    message_s: Figure | None = None
    ray_cores: Figure | None = None


def _precision(config: PlanConfig) -> Precision:
    return config.precision or ("bf16" if config.gpus else "fp32")


def _atom_counts(config: PlanConfig, manifest: Manifest | None) -> dict[int, float]:
    if manifest is not None:
        return {atoms: float(count) for atoms, count in manifest.counts.molecules_by_atoms.items()}
    if config.atoms is None:
        return {atoms: float(share) for atoms, share in ATOM_SHARES.items()}
    # Two sizes with exactly this mean. Real sizes spread more, which changes quadratic terms by some percent.
    low = math.floor(config.atoms)
    shares = {low: low + 1 - config.atoms, low + 1: config.atoms - low}
    return {atoms: share for atoms, share in shares.items() if share > 0}


def _shard_bytes(
    config: PlanConfig, atom_counts: Mapping[int, float], manifest: Manifest | None
) -> Figure:
    if manifest is not None:
        rows = sum(shard.num_rows for shard in manifest.shards_of("train"))
        size = sum(shard.num_bytes for shard in manifest.shards_of("train"))
        there = f"train shards of {redact(str(config.data))}"
        found = measured(size / max(1, rows), "B/molecule", there)
    else:
        figure = bundled("shard_bytes")
        found = computed(
            figure.value * mean_atoms(atom_counts) / ATOMS_PER_MOLECULE,
            "B/molecule",
            f"in proportion to the atoms: {figure.source}",
            figure,
        )
    counted = manifest is not None and manifest.descriptors is not None
    if counted or not _described(config, manifest):
        return found
    stored = bundled("descriptor_bytes")
    together = found.value + stored.value
    return computed(together, "B/molecule", f"with descriptors: {stored.source}", found, stored)


def _described(config: PlanConfig, manifest: Manifest | None) -> bool:
    """Whether molecules are prepared with descriptors, which the stream then carries, whether or not a head predicts them."""
    if manifest is not None:
        if config.model.descriptor_head and manifest.descriptors is None:
            raise ConfigError(
                f"model.descriptor_head: {redact(str(config.data))} has no descriptors to predict; plan without it, or for "
                "data prepared with featurize.descriptors=true"
            )
        return config.descriptors or manifest.descriptors is not None
    return config.descriptors or config.model.descriptor_head


def _data_costs(found: Found | None) -> DataCosts:
    costs = DataCosts(
        actor_us=bundled("actor_us"),
        decode_us=bundled("decode_us"),
        executor_us=bundled("executor_us"),
        trainer_host_us=bundled("trainer_host_us"),
        other_us=bundled("other_ray_us"),
    )
    if found is None:
        return costs
    return DataCosts(
        actor_us=_now(found.actor_us, "CPU us/molecule", "fetching, relating and packing"),
        decode_us=costs.decode_us,
        executor_us=costs.executor_us,
        trainer_host_us=_now(found.trainer_host_us, "CPU us/molecule", "unpacking and padding"),
        other_us=costs.other_us,
    )


def _now(value: float, unit: str, what: str) -> Figure:
    return measured(value, unit, f"{what}, on this machine just now")


def _gpu_step_s(config: PlanConfig, atom_counts: Mapping[int, float], batch: int) -> Figure:
    if config.rate is not None:
        return _given_step_s(config.rate, batch)
    device, flops = gpu(config.gpu), flops_per_molecule(config.model, atom_counts)
    peak = device.peak(_precision(config))
    return computed(
        batch * flops / (peak * config.mfu),
        "s",
        f"{flops / 1e9:.2f} GFLOP per molecule, divided by {config.mfu:g} of {peak / 1e12:g} TFLOP/s",
        _assumed_rate(device, config),
    )


def _launch_s(config: PlanConfig) -> Figure | None:
    """Measured for the base preset; None if the user's rate includes it."""
    if config.rate is not None:
        return None
    base = bundled("gpu_launch_s")
    # The embeddings, the heads and the optimizer together are taken for one more block.
    blocks = (config.model.num_layers + 1) / (_LAUNCHED_LAYERS + 1)
    alike = assumed(1.0, "", base.source, "hosts launch kernels like that of the H200 measured")
    return computed(
        base.value * blocks, "s", f"in proportion to the blocks: {base.source}", base, alike
    )


def _given_step_s(rate: float, batch: int) -> Figure:
    return computed(
        batch / rate,
        "s",
        f"{number_text(rate)} molecules/s, given",
        given(rate, "molecules/s", "rate"),
    )


def _assumed_rate(device: Gpu, config: PlanConfig) -> Figure:
    return assumed(
        config.mfu,
        "",
        device.source,
        f"{device.name} reaches {100 * config.mfu:g} % of its data sheet in training",
    )


def _cpu_times(
    config: PlanConfig, atom_counts: Mapping[int, float], batch: int, found: Found | None
) -> _Times:
    if found is not None:
        return _Times(
            step_s=_now(found.step_s, "s", "a step of one worker alone"),
            contention=_now(
                found.contention,
                "",
                "a step while all workers train, divided by a step of one alone",
            ),
            exchange_gb_s=None
            if found.sent_bytes_per_s is None
            else _now(found.sent_bytes_per_s / 1e9, "GB/s", "messages of the model's size"),
            message_s=None
            if found.message_s is None
            else _now(found.message_s, "s", "an all-reduce of one number"),
            ray_cores=bundled("ray_cores"),
        )
    alone, independent = bundled("cpu_step_s"), bundled("cpu_independent_step_s")
    together, sent = bundled("cpu_ddp_together_s"), bundled("cpu_ddp_sent_mib")
    return _Times(
        step_s=(
            _bundled_cpu_step_s(config, atom_counts, batch)
            if config.rate is None
            else _given_step_s(config.rate, batch)
        ),
        contention=computed(
            independent.value / alone.value, "", independent.source, independent, alone
        ),
        exchange_gb_s=computed(
            sent.value * 2**20 / 1e9 / (together.value - independent.value),
            "GB/s",
            f"{sent.source}, divided by the time that it added to a step",
            sent,
            together,
        ),
        ray_cores=bundled("ray_cores"),
    )


def _bundled_cpu_step_s(config: PlanConfig, atom_counts: Mapping[int, float], batch: int) -> Figure:
    """Scaled from a measured step of the base preset: by operations, and what FSDP adds by parameters."""
    base, fsdp = bundled("cpu_step_s"), bundled("cpu_fsdp_step_s")
    flops_per_s = _BENCHMARK_BATCH * _BENCHMARK_GFLOP * 1e9 / base.value
    flops = flops_per_molecule(config.model, atom_counts)
    efficiency = cpu_efficiency(flops / 1e9)
    seconds = batch * flops / (flops_per_s * efficiency.value)
    if config.strategy == "fsdp":
        added = (fsdp.value - base.value) / _BENCHMARK_PARAMETERS
        seconds += added * model_size(config.model).parameters
    like = assumed(1.0, "", base.source, "cores like those of the benchmark")
    return computed(
        seconds, "s", f"in proportion to operations and parameters: {base.source}", base, fsdp, like
    )


def measure_now(config: PlanConfig, manifest: Manifest | None) -> Found:
    """Measure this machine with the molecules of ``config.data``."""
    assert config.data is not None
    assert manifest is not None
    if manifest.num_molecules("train") == 0:
        raise ConfigError(
            f"data: {config.data} has no molecules in its train split to measure with"
        )
    workers, batch = config.cpu_workers, config.batch or _CPU_BATCH
    traffic = exchange(
        config.model, workers, strategy=config.strategy, precision=_precision(config), on_gpu=False
    )
    sent = traffic.within_bytes + traffic.across_bytes
    from moleblend_ray.training.rehearsal import Rehearsal, rehearse  # torch takes seconds

    logger.info("measuring a step of %d workers on this machine: about a minute", workers)
    return rehearse(
        Rehearsal(
            data=config.data,
            model=config.model,
            batch=batch,
            micro_batch_size=StreamConfig().num_at_once,
            strategy=config.strategy,
            precision=_precision(config),
            workers=workers,
            threads=1,
            message_bytes=int(sent / max(1, traffic.messages)),
        )
    )
