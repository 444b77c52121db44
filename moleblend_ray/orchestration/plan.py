"""`moleblend plan`: gather figures (bundled, given, or measured now), plan, show. Starts no cluster."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moleblend_ray.config.builder import build, to_dict
from moleblend_ray.config.compose import compose, group_choices
from moleblend_ray.config.describe import json_values, redact
from moleblend_ray.config.paths import with_absolute_paths
from moleblend_ray.config.plan import PlanConfig
from moleblend_ray.data import storage
from moleblend_ray.data.batch import StreamConfig
from moleblend_ray.data.shards import Manifest, load_manifest
from moleblend_ray.errors import ConfigError
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.flops import TRAINING_FACTOR
from moleblend_ray.planning.capacity import DataCosts, Setup
from moleblend_ray.planning.figures import Basis, Figure, assumed, computed, given, measured
from moleblend_ray.planning.planner import Job, Plan, flops_per_molecule, make_plan
from moleblend_ray.planning.rates import ATOM_SHARES, Gpu, bundled, cpu_efficiency, gpu
from moleblend_ray.planning.sizes import exchange, model_size
from moleblend_ray.training.config import Precision

if TYPE_CHECKING:
    from moleblend_ray.training.rehearsal import Found

logger = logging.getLogger(__name__)

PLAN_NAME: Final = "plan.json"
CHART_NAME: Final = "plan.png"

_GPU_BATCH, _CPU_BATCH = 1024, 64
_PCQM_ATOMS: Final = 14.87
_ZINC_ATOMS: Final = 23.26
_BENCHMARK_GFLOP: Final = 4.303
"""Of a molecule in the benchmark of CPU steps: base preset, training."""
_BENCHMARK_BATCH: Final = 64
_BENCHMARK_PARAMETERS: Final = 44_906_506
_FORWARD_MFU: Final = "as large a share of the peak without gradients as with them"

_COLOURS: Final = {
    Basis.GIVEN: "cyan",
    Basis.MEASURED: "green",
    Basis.ASSUMED: "yellow",
    Basis.COMPUTED: "dim",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanReport:
    """A plan, and where it was written."""

    plan: Plan
    written: tuple[str, ...]
    """URIs of plan.json and plan.png."""


def plan(config: PlanConfig) -> PlanReport:
    """Plan ``config``; with ``config.out`` also write it, and its chart."""
    config = with_absolute_paths(config)
    manifest = load_manifest(config.data) if config.data else None
    found = measure_now(config, manifest) if config.measure else None
    setup = build_setup(config, manifest, found)
    workers = config.gpus or config.cpu_workers
    job = _job(config, setup, workers, manifest)
    kind = f"GPUs ({gpu(config.gpu).name})" if config.gpus else "CPU workers"
    result = make_plan(
        f"{job.molecules:,} molecules, {model_size(config.model).parameters:,} parameters, {workers} {kind}",
        job,
        setup,
        workers,
        cpu_nodes=config.cpu_nodes,
        failures=config.failures,
        prices=config.prices,
        gpu_memory_gb=gpu(config.gpu).memory_gb if config.gpus else None,
    )
    report = PlanReport(plan=result, written=())
    if config.out is None:
        return report
    from moleblend_ray.planning import chart  # matplotlib takes a second

    document, image = (storage.join(config.out, name) for name in (PLAN_NAME, CHART_NAME))
    storage.write_json(document, _document(report, config))
    storage.write_bytes(
        image, chart.plan_chart(result, workers, "GPUs" if config.gpus else "workers")
    )
    return PlanReport(plan=result, written=(document, image))


# --------------------------------------------------------------------------------------------------- figures


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
        prepare_per_core_s=_prepare_rate(conformers=config.conformers),
        embed_per_trainer_s=_embed_rate(setup),
        first_step_s=bundled("first_step_s"),
    )


def _prepare_rate(*, conformers: bool) -> Figure:
    rows = bundled("prepare_rows_per_core_s")
    per_core = measured(rows.value / 2, "molecules/s", f"half of {rows.value:,.0f}: {rows.source}")
    if not conformers:
        return per_core
    made = bundled("conformers_per_core_s")
    seconds = 1 / per_core.value + 1 / made.value
    return computed(
        1 / seconds, "molecules/s", f"with a conformer each: {made.source}", per_core, made
    )


def _embed_rate(setup: Setup) -> Figure:
    """Vectors of one trainer's device: a forward pass, after the same process has read the molecules."""
    forward_s = setup.step_s.value / setup.batch / TRAINING_FACTOR
    read_s = (setup.costs.actor_us.value + setup.costs.trainer_host_us.value) / 1e6
    alike = assumed(1.0, "", _FORWARD_MFU, "forward passes of embed")
    return computed(
        1 / (forward_s + read_s),
        "molecules/s",
        "a third of a training step, and reading",
        setup.step_s,
        setup.costs.actor_us,
        alike,
    )


def build_setup(config: PlanConfig, manifest: Manifest | None, found: Found | None) -> Setup:
    """Machines and figures of ``config``; ``manifest`` of its data and what was ``found`` on this machine, if any."""
    on_gpu = config.gpus > 0
    setup = Setup(
        model=config.model,
        atom_counts=_atom_counts(config, manifest),
        batch=config.batch or (_GPU_BATCH if on_gpu else _CPU_BATCH),
        step_s=assumed(1.0, "s", "not known yet", "nothing"),
        costs=_data_costs(found),
        network=config.network,
        storage=config.storage,
        strategy=config.strategy,
        precision=_precision(config),
        replicas=config.fsdp_replicas,
        gpus_per_node=config.gpus_per_node if on_gpu else 0,
        node_cores=config.cpu_node_cores or (32 if on_gpu else _own_cores()),
        shard_bytes=assumed(1.0, "B", "not known yet", "nothing"),
    )
    changes: dict[str, Any] = {"shard_bytes": _shard_bytes(config, setup, manifest)}
    changes |= (
        {"step_s": _gpu_step_s(config, setup)} if on_gpu else _cpu_figures(config, setup, found)
    )
    return _replaced(setup, **changes)


def _replaced(setup: Setup, **changes: Any) -> Setup:

    return dataclasses.replace(setup, **changes)


def _own_cores() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _precision(config: PlanConfig) -> Precision:
    return config.precision or ("bf16" if config.gpus else "fp32")


def _atom_counts(config: PlanConfig, manifest: Manifest | None) -> dict[int, float]:
    if manifest is not None:
        return {atoms: float(count) for atoms, count in manifest.counts.molecules_by_atoms.items()}
    if config.atoms is None:
        return {atoms: float(share) for atoms, share in ATOM_SHARES.items()}
    # Two sizes around the mean that have it exactly: what quadratic terms see of the spread is some percent.
    low = math.floor(config.atoms)
    shares = {low: low + 1 - config.atoms, low + 1: config.atoms - low}
    return {atoms: share for atoms, share in shares.items() if share > 0}


def _shard_bytes(config: PlanConfig, setup: Setup, manifest: Manifest | None) -> Figure:
    if manifest is not None:
        rows = sum(shard.num_rows for shard in manifest.shards_of("train"))
        size = sum(shard.num_bytes for shard in manifest.shards_of("train"))
        return measured(
            size / max(1, rows), "B/molecule", f"train shards of {redact(str(config.data))}"
        )
    figure = bundled("shard_bytes")
    return computed(
        figure.value * setup.mean_atoms / _PCQM_ATOMS,
        "B/molecule",
        f"in proportion to atoms: {figure.source}",
        figure,
    )


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


def _gpu_step_s(config: PlanConfig, setup: Setup) -> Figure:
    if config.rate is not None:
        rate = given(config.rate, "molecules/s", "rate")
        return computed(
            setup.batch / config.rate, "s", f"{config.rate:,.0f} molecules/s, given", rate
        )
    device, flops = gpu(config.gpu), flops_per_molecule(setup)
    return computed(
        setup.batch * flops / (device.peak(setup.precision) * config.mfu),
        "s",
        f"{flops / 1e9:.2f} GFLOP a molecule over {config.mfu:g} of {device.peak(setup.precision) / 1e12:g} TFLOP/s",
        _assumed_rate(device, config),
    )


def _assumed_rate(device: Gpu, config: PlanConfig) -> Figure:
    return assumed(
        config.mfu,
        "",
        device.source,
        f"{device.name} reaches {100 * config.mfu:g} % of its data sheet in training",
    )


def _cpu_figures(config: PlanConfig, setup: Setup, found: Found | None) -> dict[str, Any]:
    """Times of a step, of contention and exchange without GPUs."""
    if found is not None:
        return {
            "step_s": _now(found.step_s, "s", "a step of one worker alone"),
            "contention": _now(found.contention, "", "a step while all train over a step alone"),
            "exchange_gb_s": _now(
                found.sent_bytes_per_s / 1e9, "GB/s", "messages of the model's size"
            ),
            "message_s": _now(found.message_s, "s", "an all-reduce of one number"),
            "ray_cores": bundled("ray_cores"),
        }
    step_s = (
        computed(
            setup.batch / config.rate,
            "s",
            f"{config.rate:,.4g} molecules/s, given",
            given(config.rate, "molecules/s", "rate"),
        )
        if config.rate is not None
        else _bundled_cpu_step_s(setup)
    )
    alone, independent = bundled("cpu_step_s"), bundled("cpu_independent_step_s")
    together, sent = bundled("cpu_ddp_together_s"), bundled("cpu_ddp_sent_mib")
    return {
        "step_s": step_s,
        "contention": computed(
            independent.value / alone.value, "", independent.source, independent, alone
        ),
        "exchange_gb_s": computed(
            sent.value * 2**20 / 1e9 / (together.value - independent.value),
            "GB/s",
            f"{sent.source} over what it added to a step",
            sent,
            together,
        ),
        "ray_cores": bundled("ray_cores"),
    }


def _bundled_cpu_step_s(setup: Setup) -> Figure:
    """From a measured step of the base preset: operations in proportion, what FSDP adds in proportion to parameters."""
    base, fsdp = bundled("cpu_step_s"), bundled("cpu_fsdp_step_s")
    flops_per_s = _BENCHMARK_BATCH * _BENCHMARK_GFLOP * 1e9 / base.value
    flops = flops_per_molecule(setup)
    efficiency = cpu_efficiency(flops / 1e9)
    seconds = setup.batch * flops / (flops_per_s * efficiency.value)
    if setup.strategy == "fsdp":
        added = (fsdp.value - base.value) / _BENCHMARK_PARAMETERS
        seconds += added * model_size(setup.model).parameters
    like = assumed(
        1.0,
        "",
        base.source,
        "cores like those of the benchmark",
    )
    return computed(
        seconds, "s", f"operations and parameters over those of {base.source}", base, fsdp, like
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
            micro_batch_size=StreamConfig().micro_batch_size,
            strategy=config.strategy,
            precision=_precision(config),
            workers=workers,
            threads=1,
            message_bytes=int(sent / max(1, traffic.messages)),
        )
    )


# --------------------------------------------------------------------------------------------------- showing


def show_plan(report: PlanReport, config: PlanConfig) -> RenderableType | str:
    """Tables for people, or one JSON document."""
    if config.format == "json":
        return json.dumps(_document(report, config), indent=1, ensure_ascii=False)
    plan = report.plan
    parts: list[RenderableType] = [
        _summary(plan),
        *(_stage(plan, stage.name) for stage in plan.stages),
    ]
    parts += [
        _resources(plan),
        _changes(plan),
        _scaling(plan),
        _command(plan, config),
        _foot(report),
    ]
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts[:-1]), parts[-1])


def _document(report: PlanReport, config: PlanConfig) -> dict[str, Any]:
    """The whole plan as JSON values; what is endless is null."""
    content = {"plan": to_dict(report.plan), "config": to_dict(config)}
    document: dict[str, Any] = json_values(content)
    return document


def _summary(plan: Plan) -> Table:
    table = _table(show_header=False)
    table.add_row("plan", f"[bold]{escape(plan.title)}[/]")
    table.add_row("rate", f"{_value(plan.rate)}, limited by [bold]{escape(plan.binding)}[/]")
    for row in plan.total:
        table.add_row(row.what, f"[bold]{_value(row.figure)}[/]  ({row.figure.source})")
    return table


def _stage(plan: Plan, name: str) -> Table:
    stage = next(stage for stage in plan.stages if stage.name == name)
    table = _table(title=name)
    for column in ("", "value", "basis", "how"):
        table.add_column(
            column, overflow="fold", header_style="bold", no_wrap=column in ("", "value")
        )
    rows: list[tuple[str, Figure, str]] = [("hours", stage.hours, "")]
    rows += [("cost", stage.cost, "")] if stage.cost is not None else []
    rows += [(row.what, row.figure, row.remark) for row in stage.rows]
    for what, figure, remark in rows:
        how = "; ".join(filter(None, (figure.source, remark)))
        table.add_row(what, _value(figure), _basis(figure), escape(how))
    return table


def _resources(plan: Plan) -> Table:
    table = _table(title="what could limit pretraining")
    table.add_column("resource", header_style="bold", no_wrap=True)
    table.add_column("carries", header_style="bold", justify="right", no_wrap=True)
    table.add_column("in use", header_style="bold", justify="right", no_wrap=True)
    table.add_column("basis", header_style="bold", no_wrap=True)
    table.add_column("", overflow="fold")
    for resource in plan.resources:
        table.add_row(
            resource.name,
            _value(resource.capacity),
            f"{100 * resource.use:.0f} %",
            _basis(resource.capacity),
            escape(resource.detail),
        )
    return table


def _changes(plan: Plan) -> Table:
    table = _table(title="what doubling one thing brings (the rest as above)")
    for column in ("twice the", "rate", "hours", "cost"):
        table.add_column(
            column, header_style="bold", justify="left" if column == "twice the" else "right"
        )
    for change in plan.changes:
        cost = "" if change.cost is None else f"x {change.cost:.2f}"
        table.add_row(change.what, f"x {change.rate:.2f}", f"x {change.hours:.2f}", cost)
    return table


def _scaling(plan: Plan) -> Table:
    table = _table(title="other numbers of trainers, CPU nodes in step")
    columns = ("trainers", "CPU nodes", "molecules/s", "hours", "cost", "goodput", "limited by")
    for column in columns:
        table.add_column(
            column, header_style="bold", justify="left" if column == "limited by" else "right"
        )
    for point in plan.scaling:
        table.add_row(
            f"{point.workers:,}",
            f"{point.cpu_nodes:,}",
            _number(point.molecules_per_s),
            _number(point.hours),
            "" if point.cost is None else _number(point.cost),
            f"{100 * point.goodput:.1f} %",
            point.binding,
        )
    return table


def _command(plan: Plan, config: PlanConfig) -> Text:
    settings = " ".join(f"{name}={value}" for name, value in plan.settings.items())
    data = str(redact(config.data)) if config.data else "DATA"
    return Text.assemble(
        ("settings that the plan supposes\n", "bold"),
        f"moleblend pretrain data={data} out=RUN {_model_words(config.model)} {settings}",
    )


def _model_words(model: ModelConfig) -> str:
    """The model on a command line: the preset that has most of its settings, and what differs."""
    wanted = to_dict(model)
    presets = {
        name: compose("plan", [f"model={name}"]).get("model", {}) for name in group_choices("model")
    }
    full = {name: to_dict(build(ModelConfig, values)) for name, values in presets.items()}
    changes = {
        name: {key: value for key, value in wanted.items() if preset[key] != value}
        for name, preset in full.items()
    }
    nearest = min(changes, key=lambda name: len(changes[name]))
    words = [f"model.{key}={str(value).lower()}" for key, value in changes[nearest].items()]
    return " ".join([f"model={nearest}", *words])


def _foot(report: PlanReport) -> Text:
    plan = report.plan
    text = Text()
    if plan.assumptions:
        text.append("assumed, not measured: ", style="bold yellow")
        text.append("; ".join(plan.assumptions) + ".\n", style="yellow")
        text.append("Measure one trainer (molecules_per_s of a short run) and give it as rate=.\n")
    for line in plan.hints:
        text.append(f"hint: {line}\n", style="cyan")
    for line in plan.warnings:
        text.append(f"warning: {line}\n", style="bold red")
    text.append(
        "given: set by you. measured: by a benchmark of this project, or here just now. computed: by formula; computed* rests "
        "on an assumption.",
        style="dim",
    )
    for uri in report.written:
        text.append(f"\nwritten: {redact(uri)}")
    return text


def _basis(figure: Figure) -> str:
    star = "*" if figure.basis is Basis.COMPUTED and figure.rests_on else ""
    colour = "yellow" if star else _COLOURS[figure.basis]
    return f"[{colour}]{figure.basis.value}{star}[/]"


def _value(figure: Figure) -> str:
    if figure.unit in ("B", "B/s"):
        return _bytes(figure.value) + figure.unit[1:]
    if figure.unit == "s":
        return _seconds(figure.value)
    return f"{_number(figure.value)} {figure.unit}".rstrip()


def _seconds(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "never"
    if seconds >= 120:
        return f"{seconds / 60:.3g} min"
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.1 else f"{seconds:.3g} s"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "no limit"
    if value >= 1e6:
        return f"{value / 1e6:.3g} million" if value < 1e9 else f"{value / 1e9:.3g} billion"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def _table(title: str = "", *, show_header: bool = True) -> Table:
    table = Table(
        show_edge=False,
        pad_edge=False,
        box=None,
        show_header=show_header,
        title=title or None,
        title_justify="left",
        title_style="bold",
    )
    if not show_header:
        table.add_column(no_wrap=True, style="dim")
        table.add_column(overflow="fold")
    return table
