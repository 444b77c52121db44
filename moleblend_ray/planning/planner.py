"""From a collection, a model and a number of trainers to hours, machines, bytes and cost: read :func:`make_plan` first."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from moleblend_ray.model.flops import TRAINING_FACTOR, ForwardFlops, pretraining_flops
from moleblend_ray.planning.capacity import (
    BLOCKS_PER_STREAM,
    DECODED_BYTES,
    GB,
    WINDOWS_IN_WORK,
    Resource,
    Setup,
    Throughput,
    throughput,
)
from moleblend_ray.planning.figures import Figure, assumed, computed, given
from moleblend_ray.planning.goodput import (
    DAY,
    HOUR,
    MINUTE,
    Cluster,
    Costs,
    Saving,
    Scenario,
    Workers,
    expected_goodput,
    good_intervals_s,
    simulate,
    young_interval_s,
)
from moleblend_ray.planning.settings import FailureSettings, PriceSettings
from moleblend_ray.planning.sizes import TRAINING_BYTES, checkpoint_bytes, model_size

_SEEDS: Final = 20
_MOST_FAILURES: Final = 2000
"""Of the simulated runs together, as far as it goes: a month of a thousand GPUs has a hundred."""
_ELASTIC_STREAMS: Final = 15
"""Streams for each trainer with which a lost node costs little (docs/scale.md)."""
_KEPT_CHECKPOINTS: Final = 3
_VECTOR_BYTES: Final = 4
_LARGEST_SCALE: Final = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is to be done."""

    molecules: int
    """Of the collection."""
    presentations: int
    """Molecules that training sees, each as often as it comes."""
    prepare_per_core_s: Figure
    """Records that a core converts in a second, conformers included if they are made."""
    embed_per_trainer_s: Figure
    """Vectors that one trainer's device makes in a second."""
    first_step_s: Figure
    """From the start of a command to its first step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of a plan."""

    what: str
    figure: Figure
    remark: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """prepare, pretrain or embed."""

    name: str
    hours: Figure
    cost: Figure | None
    """In the currency of the prices; None if none was given."""
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What doubling one thing brings."""

    what: str
    rate: float
    """Molecules/s over those of the plan."""
    hours: float
    """Of pretraining over those of the plan."""
    cost: float | None
    """Of pretraining over that of the plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalePoint:
    """Pretraining on another number of trainers, everything else alike and the data side sized anew."""

    workers: int
    cpu_nodes: int
    molecules_per_s: float
    hours: float
    cost: float | None
    goodput: float
    binding: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a collection, a model and a cluster lead to."""

    title: str
    rate: Figure
    """Molecules/s of pretraining while it trains."""
    binding: str
    stages: tuple[Stage, ...]
    total: tuple[Row, ...]
    resources: tuple[Resource, ...]
    changes: tuple[Change, ...]
    scaling: tuple[ScalePoint, ...]
    settings: Mapping[str, str]
    """Settings of `moleblend pretrain` that the plan supposes."""
    assumptions: tuple[str, ...]
    """What the hours rest on that nobody has measured."""
    hints: tuple[str, ...]
    """Other settings that would be faster."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reliability:
    """Checkpoints and failures of a run."""

    checkpoint_bytes: int
    interval_s: float
    good_s: tuple[float, float]
    goodput: float
    band: tuple[float, float]
    elastic: float
    mtbf_s: float


def make_plan(
    title: str,
    job: Job,
    setup: Setup,
    workers: int,
    *,
    cpu_nodes: int | None = None,
    failures: FailureSettings | None = None,
    prices: PriceSettings | None = None,
    gpu_memory_gb: float | None = None,
) -> Plan:
    """The plan for ``workers`` trainers; ``cpu_nodes`` None: as many as keep them fed."""
    failures, prices = failures or FailureSettings(), prices or PriceSettings()
    found = throughput(setup, workers, cpu_nodes)
    reliability = _reliability(job, setup, found, failures)
    hours = _pretrain_hours(job, found, reliability)
    stages = (
        _prepare(job, setup, found, prices),
        _pretrain(job, setup, found, reliability, hours, prices),
        _embed(job, setup, found, prices),
    )
    return Plan(
        title=title,
        rate=found.rate,
        binding=found.binding,
        stages=stages,
        total=_total(stages, prices),
        resources=found.resources,
        changes=_changes(job, setup, found, cpu_nodes, failures, prices),
        scaling=scaling(job, setup, workers, failures, prices),
        settings=_settings(setup, found, reliability),
        assumptions=tuple(dict.fromkeys(name for stage in stages for name in stage.hours.rests_on)),
        hints=_hints(setup, found, cpu_nodes),
        warnings=_warnings(job, setup, found, cpu_nodes, gpu_memory_gb),
    )


def flops_per_molecule(setup: Setup) -> float:
    """Operations of a training step for the mean molecule, by the formula behind ``mfu``."""
    return TRAINING_FACTOR * _mean(pretraining_flops(setup.model), setup.atom_counts)


def _mean(forward: ForwardFlops, atom_counts: Mapping[int, float]) -> float:
    total = sum(atom_counts.values())
    moments = [
        sum(n**power * count for n, count in atom_counts.items()) / total for power in (1, 2)
    ]
    return forward.constant + forward.linear * moments[0] + forward.quadratic * moments[1]


# ------------------------------------------------------------------------------------------ failures and hours


def _costs(setup: Setup, found: Throughput, num_bytes: int) -> Costs:
    return Costs(
        checkpoint_bytes=num_bytes,
        num_nodes=found.nodes,
        gpus_per_node=max(1, found.workers // found.nodes),
        node_bytes_per_s=setup.storage.node_gb_s * GB,
        storage_bytes_per_s=setup.storage.total_gb_s * GB,
        compile_s=Costs(checkpoint_bytes=0, num_nodes=1).compile_s if setup.on_gpu else 0.0,
    )


def _shards(setup: Setup, workers: int) -> int:
    return workers // setup.replicas if setup.strategy == "fsdp" else 1


def _reliability(
    job: Job, setup: Setup, found: Throughput, failures: FailureSettings, *, simulated: bool = True
) -> _Reliability:
    num_bytes = checkpoint_bytes(setup.model, shards=_shards(setup, found.workers))
    costs = _costs(setup, found, num_bytes)
    recovery = costs.recovery()
    rate_s = failures.per_node_day * found.nodes / DAY
    mtbf_s = 1 / rate_s if rate_s else math.inf
    saving = costs.saving(1.0, asynchronous=True)
    length_s = job.presentations / found.rate.value
    # A run shorter than the best interval is saved once, at its end, whatever the interval.
    interval_s = min(young_interval_s(saving, mtbf_s), max(1.0, length_s))
    saving = dataclasses.replace(saving, interval_s=interval_s)
    recovery_s = recovery.detect_s + recovery.restart_s
    good_s = (
        good_intervals_s(saving, mtbf_s, recovery_s)
        if math.isfinite(mtbf_s)
        else (interval_s, math.inf)
    )
    goodput = expected_goodput(saving, mtbf_s, recovery_s)
    band, elastic = (goodput, goodput), goodput
    if simulated and math.isfinite(mtbf_s):
        goodput, band, elastic = _simulated(found, costs, saving, failures, length_s)
    return _Reliability(
        checkpoint_bytes=num_bytes,
        interval_s=interval_s,
        good_s=good_s,
        goodput=goodput,
        band=band,
        elastic=elastic,
        mtbf_s=mtbf_s,
    )


def _simulated(
    found: Throughput, costs: Costs, saving: Saving, failures: FailureSettings, length_s: float
) -> tuple[float, tuple[float, float], float]:
    """Goodput of runs of this length that wait for a lost node: mean and 5 to 95 % band; mean of elastic ones."""
    cluster = Cluster(
        num_nodes=found.nodes,
        gpus_per_node=costs.gpus_per_node,
        failures_per_node_day=failures.per_node_day,
        replacement_s=failures.replacement_min * MINUTE,
    )
    # A run ends after its work, not after a time; with the goodput near 1 the difference is small.
    end_s = min(max(length_s, HOUR), _MOST_FAILURES / _SEEDS * cluster.mtbf_s)

    def goodputs(workers: Workers) -> list[float]:
        scenario = Scenario(
            cluster=cluster, saving=saving, recovery=costs.recovery(), workers=workers
        )
        return sorted(simulate(scenario, seed, end_s).goodput for seed in range(_SEEDS))

    fixed = goodputs(Workers(num_streams=found.workers))
    elastic = goodputs(Workers(num_streams=_ELASTIC_STREAMS * found.workers, elastic=True))
    band = fixed[1], fixed[-2]
    return statistics.fmean(fixed), band, statistics.fmean(elastic)


def _pretrain_hours(job: Job, found: Throughput, reliability: _Reliability) -> Figure:
    training_s = job.presentations / found.rate.value / reliability.goodput
    failing = assumed(
        1.0, "", "failure settings", "rate of failures, cost of saving and restarting"
    )
    return computed(
        (training_s + job.first_step_s.value) / HOUR,
        "h",
        "presentations over rate and goodput, and the start",
        found.rate,
        failing,
        job.first_step_s,
    )


# --------------------------------------------------------------------------------------------------- stages


def _prepare(job: Job, setup: Setup, found: Throughput, prices: PriceSettings) -> Stage:
    nodes = max(1, found.cpu_nodes)
    cores = nodes * setup.node_cores
    many = assumed(
        1.0, "", "tried with two actors", "prepare on more than two cores is as fast on each"
    )
    rate = computed(
        cores * job.prepare_per_core_s.value,
        "molecules/s",
        f"{cores:,} cores, an actor each",
        job.prepare_per_core_s,
        *((many,) if cores > 2 else ()),
    )
    written = computed(
        job.molecules * setup.shard_bytes.value,
        "B",
        f"{setup.shard_bytes.value:,.0f} bytes a molecule",
        setup.shard_bytes,
    )
    storage = assumed(
        min(setup.storage.total_gb_s, nodes * setup.storage.node_gb_s) * GB,
        "B/s",
        "storage settings",
        "storage",
    )
    converting_s, writing_s = job.molecules / rate.value, written.value / storage.value
    hours = computed(
        max(converting_s, writing_s) / HOUR,
        "h",
        "converting, with writing behind it" if converting_s >= writing_s else "writing",
        rate,
        *((storage,) if writing_s > converting_s else ()),
    )
    rows = (
        Row(what="rate", figure=rate),
        Row(what="shards written", figure=written),
    )
    cost = _cost(prices, hours, cpu_node_hours=nodes * hours.value, stored_bytes=written.value)
    return Stage(name="prepare", hours=hours, cost=cost, rows=rows)


def _pretrain(
    job: Job,
    setup: Setup,
    found: Throughput,
    reliability: _Reliability,
    hours: Figure,
    prices: PriceSettings,
) -> Stage:
    step_molecules = found.workers * setup.batch
    read = computed(
        job.presentations * setup.shard_bytes.value * found.amplification,
        "B",
        f"{setup.shard_bytes.value:,.0f} bytes a molecule, each row group by {found.amplification:.1f} machines",
        setup.shard_bytes,
    )
    bandwidth = computed(
        read.value / job.presentations * found.rate.value, "B/s", "bytes over time", found.rate
    )
    failing = assumed(
        1.0, "", "failure settings", "rate of failures, cost of saving and restarting"
    )
    store = _object_store(setup, found)
    low, high = reliability.band
    rows = [
        Row(what="rate", figure=found.rate, remark=f"limited by: {found.binding}"),
        Row(
            what="steps",
            figure=computed(
                math.ceil(job.presentations / step_molecules),
                "",
                f"{step_molecules:,} molecules each, {1e3 * found.step_s:,.1f} ms",
            ),
            remark=f"{job.presentations / job.molecules:.3g} times each molecule",
        ),
        Row(
            what="data actors",
            figure=computed(
                found.data_actors,
                "cores",
                "CPU time a molecule, with a quarter to spare",
                found.rate,
            ),
        ),
        Row(
            what="CPU nodes",
            figure=computed(found.cpu_nodes, "", f"of {setup.node_cores} cores", found.rate)
            if setup.on_gpu
            else given(0, "", "everything is on one machine"),
        ),
        Row(what="read from storage", figure=read),
        Row(what="bandwidth of storage", figure=bandwidth),
        Row(
            what="object store",
            figure=store,
            remark=f"over the cluster; {BLOCKS_PER_STREAM} blocks of {found.blocks.bytes / 2**20:.0f} MiB a stream",
        ),
        Row(
            what="sent by each trainer in a step",
            figure=computed(
                found.exchange.within_bytes + found.exchange.across_bytes,
                "B",
                f"{found.exchange.messages} collectives, {1e3 * found.exchange_s:.2f} ms before overlap",
            ),
        ),
        Row(
            what="state of the model in a trainer",
            figure=computed(
                TRAINING_BYTES * model_size(setup.model).parameters / _shards(setup, found.workers),
                "B",
                "16 bytes a parameter over shards; activations come on top",
            ),
        ),
        Row(
            what="checkpoint",
            figure=computed(
                reliability.checkpoint_bytes, "B", "12 bytes a parameter and the format's own"
            ),
        ),
        Row(
            what="checkpoint interval",
            figure=computed(reliability.interval_s, "s", "Young", failing),
            remark=f"{_duration(reliability.good_s[0])} to {_duration(reliability.good_s[1])} are within half a point",
        ),
        Row(
            what="time between failures",
            figure=computed(reliability.mtbf_s / HOUR, "h", "failures a node over nodes", failing),
        ),
        Row(
            what="goodput",
            figure=computed(
                100 * reliability.goodput,
                "%",
                f"simulated, {_SEEDS} runs that wait for nodes",
                failing,
            ),
            remark=f"{100 * low:.1f} to {100 * high:.1f} % in nine of ten; elastic {100 * reliability.elastic:.1f} %",
        ),
    ]
    cost = _cost(
        prices,
        hours,
        gpu_hours=found.workers * hours.value if setup.on_gpu else 0.0,
        cpu_node_hours=max(found.cpu_nodes, 0 if setup.on_gpu else 1) * hours.value,
        stored_bytes=_KEPT_CHECKPOINTS * reliability.checkpoint_bytes,
        read_bytes=read.value,
    )
    return Stage(name="pretrain", hours=hours, cost=cost, rows=tuple(rows))


def _object_store(setup: Setup, found: Throughput) -> Figure:
    blocks = (BLOCKS_PER_STREAM + 1) * found.workers
    return computed(
        blocks * found.blocks.bytes,
        "B",
        f"{setup.molecule_bytes:,.0f} bytes a molecule, and the block of each stream that is trained on",
    )


def _embed(job: Job, setup: Setup, found: Throughput, prices: PriceSettings) -> Stage:
    rate = computed(
        found.workers * job.embed_per_trainer_s.value,
        "molecules/s",
        "a device's vectors, and the reading before them, one after the other",
        job.embed_per_trainer_s,
    )
    written = computed(
        job.molecules * _VECTOR_BYTES * setup.model.dim,
        "B",
        f"{setup.model.dim} float32 a molecule, before compression",
    )
    storage = assumed(
        min(setup.storage.total_gb_s, found.nodes * setup.storage.node_gb_s) * GB,
        "B/s",
        "storage settings",
        "storage",
    )
    making_s, writing_s = job.molecules / rate.value, written.value / storage.value
    is_making = making_s >= writing_s
    hours = computed(
        max(making_s, writing_s) / HOUR,
        "h",
        "computing" if is_making else "writing the vectors",
        *((rate,) if is_making else (storage,)),
    )
    cost = _cost(
        prices,
        hours,
        gpu_hours=found.workers * hours.value if setup.on_gpu else 0.0,
        cpu_node_hours=0.0 if setup.on_gpu else hours.value,
        stored_bytes=written.value,
        read_bytes=job.molecules * setup.shard_bytes.value,
    )
    rows = (Row(what="rate", figure=rate), Row(what="vectors written", figure=written))
    return Stage(name="embed", hours=hours, cost=cost, rows=rows)


def _cost(
    prices: PriceSettings,
    hours: Figure,
    *,
    gpu_hours: float = 0.0,
    cpu_node_hours: float = 0.0,
    stored_bytes: float = 0.0,
    read_bytes: float = 0.0,
) -> Figure | None:
    if not prices.any_given:
        return None
    parts = {
        "GPUs": (prices.gpu_hour, gpu_hours),
        "CPU nodes": (prices.cpu_node_hour, cpu_node_hours),
        "storage": (prices.storage_gb_month, stored_bytes / GB * prices.storage_months),
        "egress": (prices.egress_gb, read_bytes / GB),
    }
    costs = {
        name: price * amount
        for name, (price, amount) in parts.items()
        if price is not None and amount
    }
    unpriced = [name for name, (price, amount) in parts.items() if price is None and amount]
    source = ", ".join(f"{name} {value:,.2f}" for name, value in costs.items()) or "nothing to pay"
    if unpriced:
        source += f"; without a price: {', '.join(unpriced)}"
    return computed(sum(costs.values()), "", source, hours)


def _total(stages: Sequence[Stage], prices: PriceSettings) -> tuple[Row, ...]:
    hours = computed(
        sum(stage.hours.value for stage in stages),
        "h",
        "the stages, one after the other",
        *(stage.hours for stage in stages),
    )
    rows = [Row(what="hours", figure=hours)]
    if prices.any_given:
        costs = [stage.cost for stage in stages if stage.cost is not None]
        total = computed(sum(cost.value for cost in costs), "", "the stages", hours)
        rows.append(Row(what="cost", figure=total))
    return tuple(rows)


# ------------------------------------------------------------------------------------- other sizes, what binds


def scaling(
    job: Job, setup: Setup, workers: int, failures: FailureSettings, prices: PriceSettings
) -> tuple[ScalePoint, ...]:
    """Powers of two up to four times ``workers`` (without GPUs: up to twice), and ``workers`` itself."""
    most = 4 * workers if setup.on_gpu else 2 * workers
    sizes = {1 << power for power in range(most.bit_length()) if 1 << power <= most}
    sizes = {size for size in sizes if size <= _LARGEST_SCALE} | {workers}
    usable = [size for size in sorted(sizes) if _fits(setup, size)]
    return tuple(_scale_point(job, setup, size, None, failures, prices) for size in usable)


def _fits(setup: Setup, workers: int) -> bool:
    """Whether nodes are full and the copies of the model equal."""
    full = not setup.on_gpu or workers <= setup.gpus_per_node or workers % setup.gpus_per_node == 0
    return full and workers % setup.replicas == 0


def _scale_point(
    job: Job,
    setup: Setup,
    workers: int,
    cpu_nodes: int | None,
    failures: FailureSettings,
    prices: PriceSettings,
) -> ScalePoint:
    found = throughput(setup, workers, cpu_nodes)
    # The closed form: a figure for each size must not take a simulation each.
    reliability = _reliability(job, setup, found, failures, simulated=False)
    hours = _pretrain_hours(job, found, reliability)
    stage = _pretrain(job, setup, found, reliability, hours, prices)
    return ScalePoint(
        workers=workers,
        cpu_nodes=found.cpu_nodes,
        molecules_per_s=found.rate.value,
        hours=hours.value,
        cost=None if stage.cost is None else stage.cost.value,
        goodput=reliability.goodput,
        binding=found.binding,
    )


def _changes(
    job: Job,
    setup: Setup,
    found: Throughput,
    cpu_nodes: int | None,
    failures: FailureSettings,
    prices: PriceSettings,
) -> tuple[Change, ...]:
    """Each thing doubled by itself; the data side stays as it is in the plan, so that what binds next shows."""
    fixed_nodes = found.cpu_nodes or None
    base = _scale_point(job, setup, found.workers, fixed_nodes, failures, prices)

    def change(what: str, other: Setup, workers: int, nodes: int | None) -> Change:
        point = _scale_point(job, other, workers, nodes, failures, prices)
        return Change(
            what=what,
            rate=point.molecules_per_s / base.molecules_per_s,
            hours=point.hours / base.hours,
            cost=None if point.cost is None or not base.cost else point.cost / base.cost,
        )

    faster = dataclasses.replace(
        setup, step_s=dataclasses.replace(setup.step_s, value=setup.step_s.value / 2)
    )
    kind = "GPUs" if setup.on_gpu else "trainers"
    found_changes = [
        change(f"{kind}, CPU nodes in step", setup, 2 * found.workers, cpu_nodes),
        change(f"speed of each {kind[:-1]}", faster, found.workers, fixed_nodes),
        change(
            f"molecules of each {kind[:-1]} in a step",
            dataclasses.replace(
                setup,
                batch=2 * setup.batch,
                step_s=dataclasses.replace(setup.step_s, value=2 * setup.step_s.value),
            ),
            found.workers,
            fixed_nodes,
        ),
    ]
    if not setup.on_gpu:
        more = dataclasses.replace(setup, node_cores=2 * setup.node_cores)
        return (*found_changes, change("cores", more, found.workers, None))
    network = setup.network
    faster_network = dataclasses.replace(
        network,
        within_node_gb_s=2 * network.within_node_gb_s,
        between_nodes_gb_s=2 * network.between_nodes_gb_s,
    )
    wider = dataclasses.replace(network, node_gb_s=2 * network.node_gb_s)
    storage = dataclasses.replace(
        setup.storage,
        total_gb_s=2 * setup.storage.total_gb_s,
        node_gb_s=2 * setup.storage.node_gb_s,
    )
    others: dict[str, Callable[[], Change]] = {
        "network between trainers": lambda: change(
            "network between trainers",
            dataclasses.replace(setup, network=faster_network),
            found.workers,
            fixed_nodes,
        ),
        "network of nodes": lambda: change(
            "network of nodes",
            dataclasses.replace(setup, network=wider),
            found.workers,
            fixed_nodes,
        ),
        "storage": lambda: change(
            "bandwidth of storage",
            dataclasses.replace(setup, storage=storage),
            found.workers,
            fixed_nodes,
        ),
        "nodes": lambda: change("CPU nodes alone", setup, found.workers, 2 * (fixed_nodes or 1)),
        "blocks": lambda: change(
            "molecules of a block (stream.steps_per_block)",
            dataclasses.replace(setup, steps_per_block=2 * found.blocks.steps),
            found.workers,
            fixed_nodes,
        ),
    }
    return (*found_changes, *(make() for make in others.values()))


def _settings(setup: Setup, found: Throughput, reliability: _Reliability) -> dict[str, str]:
    """Overrides of `moleblend pretrain`."""
    every = max(1, round(reliability.interval_s / found.step_s))
    settings = {
        "cluster.num_workers": str(found.workers),
        "cluster.use_gpu": "true" if setup.on_gpu else "",
        "order.global_batch_size": str(found.workers * setup.batch),
        "order.num_streams": str(found.workers),
        "train.strategy": setup.strategy if setup.strategy != "fsdp" else "",
        "train.fsdp_replicas": str(setup.replicas) if setup.replicas > 1 else "",
        "train.precision": setup.precision if setup.precision != "fp32" else "",
        "checkpoint.every_steps": str(_two_digits(every)),
        "stream.max_actors": str(found.data_actors),
        "stream.steps_per_block": "" if found.blocks.is_default else str(found.blocks.steps),
    }
    window = setup.order.shuffle_window
    # Row groups of the windows that blocks in work touch, of which a machine keeps each once.
    rows = WINDOWS_IN_WORK * max(window, found.workers * setup.batch * found.blocks.steps)
    cache = rows * DECODED_BYTES * setup.mean_atoms
    if setup.on_gpu and cache > 512 * 2**20:
        settings["stream.cache_bytes"] = str(math.ceil(cache / 2**28) * 2**28)
    if setup.on_gpu:
        store = _object_store(setup, found).value
        settings["stream.object_store_gib"] = f"{max(1.0, store / 2**30):.0f}"
    return {name: value for name, value in settings.items() if value}


def _hints(setup: Setup, found: Throughput, cpu_nodes: int | None) -> tuple[str, ...]:
    """Ways to spread the model that the plan finds at least 3 % faster, the best of them."""
    ways = {"strategy=ddp": dataclasses.replace(setup, strategy="ddp", replicas=1)}
    if setup.on_gpu and found.nodes > 1 and setup.replicas != found.nodes:
        ways[f"fsdp_replicas={found.nodes} (strategy=fsdp)"] = dataclasses.replace(
            setup, strategy="fsdp", replicas=found.nodes
        )
    if found.workers == 1 or (not setup.on_gpu and setup.exchange_gb_s is None):
        return ()
    rates = {
        way: throughput(other, found.workers, cpu_nodes).rate.value
        for way, other in ways.items()
        if other.strategy != setup.strategy or other.replicas != setup.replicas
    }
    best = max(rates, key=rates.__getitem__, default="")
    if not best or rates[best] < 1.03 * found.rate.value:
        return ()
    return (f"{best} would train on {rates[best]:,.0f} molecules/s: less is sent between nodes",)


def _two_digits(number: int) -> int:
    digits = max(0, len(str(number)) - 2)
    return max(1, round(number, -digits)) if digits else number


def _warnings(
    job: Job,
    setup: Setup,
    found: Throughput,
    cpu_nodes: int | None,
    gpu_memory_gb: float | None,
) -> tuple[str, ...]:
    lines = []
    state = TRAINING_BYTES * model_size(setup.model).parameters / _shards(setup, found.workers)
    if gpu_memory_gb is not None and state > 0.7 * gpu_memory_gb * GB:
        lines.append(
            f"the state of the model takes {state / GB:.0f} GB of a GPU's {gpu_memory_gb:g}, activations not counted: "
            "use strategy=fsdp, more GPUs or fewer replicas"
        )
    step_molecules = found.workers * setup.batch
    if step_molecules > job.molecules:
        lines.append(
            f"a step of {step_molecules:,} molecules is more than the collection has ({job.molecules:,}): lower batch"
        )
    steps = job.presentations / step_molecules
    if steps < 1000:
        lines.append(
            f"only {math.ceil(steps):,} steps of {step_molecules:,} molecules: so few updates may train badly, whatever "
            "the rate; lower batch or use fewer trainers"
        )
    if cpu_nodes is not None and found.binding in ("data actors", "network out of CPU nodes"):
        lines.append(
            f"cpu_nodes={cpu_nodes} starve the trainers: leave it out to see how many they need"
        )
    if found.amplification > 4:
        lines.append(
            f"each row group is fetched and decoded by {found.amplification:.0f} machines, as all of them build blocks of "
            "the same shuffle window: fewer CPU nodes with more cores (cpu_node_cores) read less"
        )
    if not found.blocks.is_default:
        lines.append(
            f"blocks of {found.blocks.bytes / 2**20:.0f} MiB instead of 12 keep Ray Data's executor from limiting; such blocks "
            "were never tried"
        )
    return tuple(lines)


def _duration(seconds: float) -> str:
    if math.isinf(seconds):
        return "never"
    for unit, length in (("d", DAY), ("h", HOUR), ("min", MINUTE)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
