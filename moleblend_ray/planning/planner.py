"""Hours, machines, bytes and cost of a collection, a model and a number of trainers: read :func:`make_plan` first."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from moleblend_ray.data.batch import BLOCK_BYTES, BLOCKS_PER_STREAM, StreamConfig
from moleblend_ray.errors import ConfigError
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.flops import TRAINING_FACTOR, ForwardFlops, pretraining_flops
from moleblend_ray.planning.capacity import (
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
from moleblend_ray.planning.settings import FailureSettings, NetworkSettings, PriceSettings
from moleblend_ray.planning.sizes import TRAINING_BYTES, checkpoint_bytes, model_size
from moleblend_ray.quantities import duration_text
from moleblend_ray.training.config import CheckpointConfig

_MOST_RECOVERY: Final = 10.0
"""Recoveries of more mean times between failures than this leave less than 1 / 20,000 of the time for training."""
_SEEDS: Final = 20
_MOST_FAILURES: Final = 2000
"""Failures that all simulated runs together have at most, about; a month of a thousand GPUs has a hundred."""
_ELASTIC_STREAMS: Final = 15
"""Streams per trainer: with so many, losing a node costs little (docs/scale.md)."""
_VECTOR_BYTES: Final = 4
_LARGEST_SCALE: Final = 4096
_FAILING: Final = assumed(
    1.0, "", "failure settings", "rate of failures, cost of saving and restarting"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The work to plan."""

    molecules: int
    """Molecules in the collection."""
    presentations: int
    """Molecules that training sees, repetitions counted."""
    prepare_per_core_s: Figure
    """Records that one core converts per second, including conformers if they are made."""
    embed_per_trainer_s: Figure
    """Vectors that the device of one trainer makes per second."""
    first_step_s: Figure
    """Seconds from the start of the command to its first step."""


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
    """In the currency of the prices; None if no price was given."""
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """The effect of doubling one thing."""

    what: str
    rate: float
    """Molecules/s, divided by those of the plan."""
    hours: float
    """Hours of pretraining, divided by those of the plan."""
    cost: float | None
    """Cost of pretraining, divided by that of the plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalePoint:
    """Pretraining with another number of trainers, with a data side of the right size; all else stays the same."""

    workers: int
    cpu_nodes: int
    molecules_per_s: float
    hours: float
    cost: float | None
    goodput: float
    binding: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a collection, a model and a cluster result in."""

    title: str
    rate: Figure
    """Molecules/s of pretraining, without interruptions."""
    binding: str
    stages: tuple[Stage, ...]
    total: tuple[Row, ...]
    resources: tuple[Resource, ...]
    changes: tuple[Change, ...]
    scaling: tuple[ScalePoint, ...]
    settings: Mapping[str, str]
    """Settings of `moleblend pretrain` that the plan assumes."""
    assumptions: tuple[str, ...]
    """What the hours rest on and was not measured."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pretraining:
    """What pretraining on a cluster takes. Its stage, other sizes and doubled parts are all shown from this."""

    found: Throughput
    reliability: _Reliability
    hours: Figure
    read: Figure
    """Bytes read from storage."""
    cost: Figure | None
    """None if no price was given."""


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
    """The plan for ``workers`` trainers; ``cpu_nodes`` None: as many as they need."""
    failures, prices = failures or FailureSettings(), prices or PriceSettings()
    found = throughput(setup, workers, cpu_nodes)
    run = _pretraining(job, setup, found, failures, prices)
    stages = (
        _prepare(job, setup, found, prices),
        _pretrain_stage(job, setup, run),
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
        settings=_settings(job, setup, found, run.reliability),
        assumptions=tuple(dict.fromkeys(name for stage in stages for name in stage.hours.rests_on)),
        hints=_hints(setup, found, cpu_nodes),
        warnings=_warnings(job, setup, found, cpu_nodes, gpu_memory_gb),
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


class HopelessClusterError(ConfigError):
    """The cluster fails faster than a run can start."""


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
    # A run that is shorter than the best interval is saved once, at its end.
    interval_s = min(young_interval_s(saving, mtbf_s), max(1.0, length_s))
    saving = dataclasses.replace(saving, interval_s=interval_s)
    recovery_s = recovery.detect_s + recovery.restart_s
    hopeless = HopelessClusterError(
        f"failures.per_node_day: {failures.per_node_day:g} failures per day on each of {found.nodes} nodes are one every "
        f"{mtbf_s:.0f} s, and each costs {recovery_s:.0f} s: such a run does not get on. Expected more reliable nodes, "
        "or fewer of them"
    )
    if recovery_s > _MOST_RECOVERY * mtbf_s:
        raise hopeless
    good_s = (
        good_intervals_s(saving, mtbf_s, recovery_s)
        if math.isfinite(mtbf_s)
        else (interval_s, math.inf)
    )
    goodput = expected_goodput(saving, mtbf_s, recovery_s)
    band, elastic = (goodput, goodput), goodput
    if simulated and math.isfinite(mtbf_s):
        goodput, band, elastic = _simulated(found, costs, saving, failures, length_s)
    if goodput <= 0.0:
        raise hopeless
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
    """Goodput of simulated runs of this length: mean and 5 to 95 % band of those that wait for a lost node, and the
    mean of elastic ones."""
    cluster = Cluster(
        num_nodes=found.nodes,
        gpus_per_node=costs.gpus_per_node,
        failures_per_node_day=failures.per_node_day,
        replacement_s=failures.replacement_min * MINUTE,
    )
    # A real run ends when its work is done, not at a time; with a goodput near 1 the difference is small.
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
    return computed(
        (training_s + job.first_step_s.value) / HOUR,
        "h",
        "presentations divided by rate and goodput, plus the start",
        found.rate,
        _FAILING,
        job.first_step_s,
    )


def _pretraining(
    job: Job,
    setup: Setup,
    found: Throughput,
    failures: FailureSettings,
    prices: PriceSettings,
    *,
    simulated: bool = True,
) -> _Pretraining:
    reliability = _reliability(job, setup, found, failures, simulated=simulated)
    hours = _pretrain_hours(job, found, reliability)
    read = computed(
        job.presentations * setup.shard_bytes.value * found.amplification,
        "B",
        f"{setup.shard_bytes.value:,.0f} bytes per molecule, each row group by {found.amplification:.1f} machines",
        setup.shard_bytes,
    )
    cost = _cost(
        prices,
        hours,
        gpu_hours=found.workers * hours.value if setup.on_gpu else 0.0,
        cpu_node_hours=max(found.cpu_nodes, 0 if setup.on_gpu else 1) * hours.value,
        stored_bytes=CheckpointConfig().keep_last * reliability.checkpoint_bytes,
        read_bytes=read.value,
    )
    return _Pretraining(found=found, reliability=reliability, hours=hours, read=read, cost=cost)


# --------------------------------------------------------------------------------------------------- stages


def _prepare(job: Job, setup: Setup, found: Throughput, prices: PriceSettings) -> Stage:
    nodes = max(1, found.cpu_nodes)
    cores = nodes * setup.node_cores
    many = assumed(
        1.0, "", "tried with two actors", "prepare is as fast per core on more than two cores"
    )
    rate = computed(
        cores * job.prepare_per_core_s.value,
        "molecules/s",
        f"{cores:,} cores, one actor on each",
        job.prepare_per_core_s,
        *((many,) if cores > 2 else ()),
    )
    written = computed(
        job.molecules * setup.shard_bytes.value,
        "B",
        f"{setup.shard_bytes.value:,.0f} bytes per molecule",
        setup.shard_bytes,
    )
    storage = _storage(setup, nodes)
    converting_s, writing_s = job.molecules / rate.value, written.value / storage.value
    hours = computed(
        max(converting_s, writing_s) / HOUR,
        "h",
        "converting; writing takes place meanwhile" if converting_s >= writing_s else "writing",
        rate,
        *((storage,) if writing_s > converting_s else ()),
    )
    rows = (
        Row(what="rate", figure=rate),
        Row(what="shards written", figure=written),
    )
    cost = _cost(prices, hours, cpu_node_hours=nodes * hours.value, stored_bytes=written.value)
    return Stage(name="prepare", hours=hours, cost=cost, rows=rows)


def _storage(setup: Setup, machines: int) -> Figure:
    """Bandwidth of storage for this number of machines together."""
    return assumed(
        min(setup.storage.total_gb_s, machines * setup.storage.node_gb_s) * GB,
        "B/s",
        "storage settings",
        "storage",
    )


def _pretrain_stage(job: Job, setup: Setup, run: _Pretraining) -> Stage:
    rows = (
        *_step_rows(job, setup, run.found),
        *_data_rows(job, setup, run),
        *_trainer_rows(setup, run.found),
        *_reliability_rows(run.reliability),
    )
    return Stage(name="pretrain", hours=run.hours, cost=run.cost, rows=rows)


def _num_steps(job: Job, setup: Setup, found: Throughput) -> int:
    return math.ceil(job.presentations / (found.workers * setup.batch))


def _step_rows(job: Job, setup: Setup, found: Throughput) -> tuple[Row, ...]:
    step_molecules = found.workers * setup.batch
    steps = computed(
        _num_steps(job, setup, found),
        "",
        f"{step_molecules:,} molecules and {1e3 * found.step_s:,.1f} ms per step",
    )
    times = f"each molecule {job.presentations / job.molecules:.3g} times"
    return (
        Row(what="rate", figure=found.rate, remark=f"limited by: {found.binding}"),
        Row(what="steps", figure=steps, remark=times),
    )


def _data_rows(job: Job, setup: Setup, run: _Pretraining) -> tuple[Row, ...]:
    found = run.found
    actors = computed(
        found.data_actors, "cores", "CPU time per molecule, with a quarter to spare", found.rate
    )
    nodes = (
        computed(found.cpu_nodes, "", f"of {setup.node_cores} cores", found.rate)
        if setup.on_gpu
        else given(0, "", "everything is on one machine")
    )
    read_per_s = run.read.value / job.presentations * found.rate.value
    bandwidth = computed(read_per_s, "B/s", "bytes per time", found.rate)
    blocks = f"{BLOCKS_PER_STREAM} blocks of {found.blocks.bytes / 2**20:.0f} MiB per stream"
    return (
        Row(what="data actors", figure=actors),
        Row(what="CPU nodes", figure=nodes),
        Row(what="read from storage", figure=run.read),
        Row(what="bandwidth of storage", figure=bandwidth),
        Row(
            what="object store",
            figure=_object_store(setup, found),
            remark=f"over the cluster; {blocks}",
        ),
    )


def _trainer_rows(setup: Setup, found: Throughput) -> tuple[Row, ...]:
    sent = computed(
        found.exchange.within_bytes + found.exchange.across_bytes,
        "B",
        f"{found.exchange.messages} collectives, {1e3 * found.exchange_s:.2f} ms before overlap",
    )
    state = computed(
        _state_bytes(setup, found),
        "B",
        "16 bytes per parameter, divided by shards; activations not included",
    )
    return (
        Row(what="sent by each trainer in a step", figure=sent),
        Row(what="state of the model in a trainer", figure=state),
    )


def _state_bytes(setup: Setup, found: Throughput) -> float:
    """Bytes of weights, gradients and moments per trainer."""
    parameters = model_size(setup.model).parameters
    return TRAINING_BYTES * parameters / _shards(setup, found.workers)


def _reliability_rows(reliability: _Reliability) -> tuple[Row, ...]:
    checkpoint = computed(
        reliability.checkpoint_bytes, "B", "12 bytes per parameter, plus the file format"
    )
    interval = computed(reliability.interval_s, "s", "by Young's formula", _FAILING)
    shortest, longest = (duration_text(seconds, "never") for seconds in reliability.good_s)
    mtbf = computed(reliability.mtbf_s / HOUR, "h", "failures per node, divided by nodes", _FAILING)
    how = f"mean of {_SEEDS} simulated runs that wait for lost nodes"
    goodput = computed(100 * reliability.goodput, "%", how, _FAILING)
    low, high, elastic = (100 * value for value in (*reliability.band, reliability.elastic))
    return (
        Row(what="checkpoint", figure=checkpoint),
        Row(
            what="checkpoint interval",
            figure=interval,
            remark=f"{shortest} to {longest} cost at most half a percentage point",
        ),
        Row(what="time between failures", figure=mtbf),
        Row(
            what="goodput",
            figure=goodput,
            remark=f"{low:.1f} to {high:.1f} % in nine of ten runs; {elastic:.1f} % if elastic",
        ),
    )


def _object_store(setup: Setup, found: Throughput) -> Figure:
    blocks = (BLOCKS_PER_STREAM + 1) * found.workers
    return computed(
        blocks * found.blocks.bytes,
        "B",
        f"{setup.molecule_bytes:,.0f} bytes per molecule, including the block of each stream that is in use",
    )


def _embed(job: Job, setup: Setup, found: Throughput, prices: PriceSettings) -> Stage:
    rate = computed(
        found.workers * job.embed_per_trainer_s.value,
        "molecules/s",
        "reading and computing, one after the other",
        job.embed_per_trainer_s,
    )
    written = computed(
        job.molecules * _VECTOR_BYTES * setup.model.dim,
        "B",
        f"{setup.model.dim} float32 per molecule, before compression",
    )
    storage = _storage(setup, found.nodes)
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
    """Pretraining with each power of two up to four times ``workers`` (without GPUs: twice), and with ``workers``."""
    most = 4 * workers if setup.on_gpu else 2 * workers
    sizes = {1 << power for power in range(most.bit_length()) if 1 << power <= most}
    sizes = {size for size in sizes if size <= _LARGEST_SCALE} | {workers}
    usable = [size for size in sorted(sizes) if _fits(setup, size)]
    found = []
    for size in usable:
        # Of larger clusters than the planned one some may fail faster than they start.
        with contextlib.suppress(HopelessClusterError):
            found.append(_scale_point(job, setup, size, None, failures, prices))
    return tuple(found)


def _fits(setup: Setup, workers: int) -> bool:
    """Whether all nodes are full and all copies of the model have as many trainers."""
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
    # By the closed form: a simulation for each size would take too long.
    run = _pretraining(job, setup, found, failures, prices, simulated=False)
    return ScalePoint(
        workers=workers,
        cpu_nodes=found.cpu_nodes,
        molecules_per_s=found.rate.value,
        hours=run.hours.value,
        cost=None if run.cost is None else run.cost.value,
        goodput=run.reliability.goodput,
        binding=found.binding,
    )


class _Doubled(NamedTuple):
    """The plan's run with one thing doubled."""

    what: str
    setup: Setup
    workers: int
    cpu_nodes: int | None


def _changes(
    job: Job,
    setup: Setup,
    found: Throughput,
    cpu_nodes: int | None,
    failures: FailureSettings,
    prices: PriceSettings,
) -> tuple[Change, ...]:
    """Each thing doubled alone. The data side stays as in the plan, which shows what limits next."""
    fixed_nodes = found.cpu_nodes or None
    base = _scale_point(job, setup, found.workers, fixed_nodes, failures, prices)

    def change(doubled: _Doubled) -> Change:
        point = _scale_point(
            job, doubled.setup, doubled.workers, doubled.cpu_nodes, failures, prices
        )
        return Change(
            what=doubled.what,
            rate=point.molecules_per_s / base.molecules_per_s,
            hours=point.hours / base.hours,
            cost=None if point.cost is None or not base.cost else point.cost / base.cost,
        )

    doubled = [
        *_doubled_trainers(setup, found, cpu_nodes),
        *(_doubled_cluster(setup, found) if setup.on_gpu else _doubled_machine(setup, found)),
    ]
    changes = []
    for one in doubled:
        with contextlib.suppress(HopelessClusterError):
            changes.append(change(one))
    return tuple(changes)


def _doubled_trainers(setup: Setup, found: Throughput, cpu_nodes: int | None) -> list[_Doubled]:
    kind = "GPU" if setup.on_gpu else "trainer"
    step_s, workers, nodes = setup.step_s, found.workers, found.cpu_nodes or None
    half, twice = (dataclasses.replace(step_s, value=step_s.value * by) for by in (0.5, 2.0))
    faster = dataclasses.replace(setup, step_s=half)
    larger = dataclasses.replace(setup, step_s=twice, batch=2 * setup.batch)
    return [
        _Doubled(f"{kind}s, CPU nodes in step", setup, 2 * workers, cpu_nodes),
        _Doubled(f"speed of each {kind}", faster, workers, nodes),
        _Doubled(f"molecules of each {kind} in a step", larger, workers, nodes),
    ]


def _doubled_machine(setup: Setup, found: Throughput) -> list[_Doubled]:
    more = dataclasses.replace(setup, node_cores=2 * setup.node_cores)
    return [_Doubled("cores", more, found.workers, None)]


def _doubled_cluster(setup: Setup, found: Throughput) -> list[_Doubled]:
    network, storage = setup.network, setup.storage
    between_trainers = dataclasses.replace(
        network,
        within_node_gb_s=2 * network.within_node_gb_s,
        between_nodes_gb_s=2 * network.between_nodes_gb_s,
    )
    of_nodes = dataclasses.replace(network, node_gb_s=2 * network.node_gb_s)
    faster_storage = dataclasses.replace(
        storage, total_gb_s=2 * storage.total_gb_s, node_gb_s=2 * storage.node_gb_s
    )
    longer_blocks = dataclasses.replace(setup, steps_per_block=2 * found.blocks.steps)
    workers, nodes = found.workers, found.cpu_nodes or None

    def with_network(changed: NetworkSettings) -> Setup:
        return dataclasses.replace(setup, network=changed)

    return [
        _Doubled("network between trainers", with_network(between_trainers), workers, nodes),
        _Doubled("network of nodes", with_network(of_nodes), workers, nodes),
        _Doubled(
            "bandwidth of storage",
            dataclasses.replace(setup, storage=faster_storage),
            workers,
            nodes,
        ),
        _Doubled("CPU nodes alone", setup, workers, 2 * (nodes or 1)),
        _Doubled("molecules of a block (stream.steps_per_block)", longer_blocks, workers, nodes),
    ]


def _settings(
    job: Job, setup: Setup, found: Throughput, reliability: _Reliability
) -> dict[str, str]:
    """Overrides for `moleblend pretrain`."""
    every = max(1, round(reliability.interval_s / found.step_s))
    settings = {
        "cluster.num_workers": str(found.workers),
        "cluster.use_gpu": "true" if setup.on_gpu else "",
        "order.global_batch_size": str(found.workers * setup.batch),
        "order.num_streams": str(found.workers),
        "train.num_steps": str(_num_steps(job, setup, found)),
        "train.strategy": setup.strategy if setup.strategy != "fsdp" else "",
        "train.fsdp_replicas": str(setup.replicas) if setup.replicas > 1 else "",
        "train.precision": setup.precision if setup.precision != "fp32" else "",
        "checkpoint.every_steps": str(_two_digits(every)),
        "stream.max_actors": str(found.data_actors),
        "stream.steps_per_block": "" if found.blocks.is_default else str(found.blocks.steps),
    }
    window = setup.order.shuffle_window
    # A machine keeps one copy of each row group of the windows that the blocks in work belong to.
    rows = WINDOWS_IN_WORK * max(window, found.workers * setup.batch * found.blocks.steps)
    cache = rows * DECODED_BYTES * setup.mean_atoms
    if setup.on_gpu and cache > StreamConfig().cache_bytes:
        settings["stream.cache_bytes"] = str(math.ceil(cache / 2**28) * 2**28)
    if setup.on_gpu:
        store = _object_store(setup, found).value
        settings["stream.object_store_gib"] = f"{max(1.0, store / 2**30):.0f}"
    return {name: value for name, value in settings.items() if value}


def _hints(setup: Setup, found: Throughput, cpu_nodes: int | None) -> tuple[str, ...]:
    """The best other way to spread the model over trainers, if it is at least 3 % faster."""
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
    return (f"{best} would train on {rates[best]:,.0f} molecules/s, as less is sent between nodes",)


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
    state = _state_bytes(setup, found)
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
    if steps < 1000:
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
