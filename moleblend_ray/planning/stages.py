"""The stages of a plan (prepare, pretrain, embed): their hours, what they read and write, and their cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from moleblend_ray.data.config import BLOCKS_PER_STREAM
from moleblend_ray.planning.capacity import GB, Setup, Throughput
from moleblend_ray.planning.figures import Figure, assumed, computed, given
from moleblend_ray.planning.goodput import HOUR
from moleblend_ray.planning.plan import Job, Premises, Row, Stage
from moleblend_ray.planning.reliability import (
    ELASTIC_STREAMS,
    NUM_SIMULATED,
    Reliability,
    expected_reliability,
)
from moleblend_ray.planning.settings import PriceSettings
from moleblend_ray.planning.sizes import TRAINING_BYTES, gathered_bytes, model_size
from moleblend_ray.quantities import duration_text, number_text
from moleblend_ray.training.config import CheckpointConfig

_VECTOR_BYTES: Final = 4
_FAILING: Final = assumed(
    1.0, "", "failure settings", "rate of failures, cost of saving and restarting"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretraining:
    """What pretraining on a cluster takes. Its stage, other sizes and doubled parts are all shown from this."""

    found: Throughput
    reliability: Reliability
    hours: Figure
    read: Figure
    """Bytes read from storage."""
    cost: Figure | None
    """None if no price was given."""


def pretraining(premises: Premises, found: Throughput, *, simulated: bool = True) -> Pretraining:
    """Pretraining with this throughput; ``simulated`` as in :func:`expected_reliability`."""
    job, setup = premises.job, premises.setup
    reliability = expected_reliability(premises, found, simulated=simulated)
    hours = _pretrain_hours(job, found, reliability)
    read = computed(
        job.presentations * setup.shard_bytes.value * setup.rows_read * found.amplification,
        "B",
        f"{setup.shard_bytes.value:,.0f} bytes per molecule, each row group by {found.amplification:.1f} machines, "
        f"{setup.rows_read:.1f} rows for each molecule",
        setup.shard_bytes,
    )
    cost = _cost(
        premises.prices,
        hours,
        gpu_hours=found.workers * hours.value if setup.on_gpu else 0.0,
        cpu_node_hours=max(found.cpu_nodes, 0 if setup.on_gpu else 1) * hours.value,
        stored_bytes=CheckpointConfig().keep_last * reliability.checkpoint_bytes,
        read_bytes=read.value,
    )
    return Pretraining(found=found, reliability=reliability, hours=hours, read=read, cost=cost)


def _pretrain_hours(job: Job, found: Throughput, reliability: Reliability) -> Figure:
    training_s = job.presentations / found.rate.value / reliability.goodput.mean
    return computed(
        (training_s + job.first_step_s.value) / HOUR,
        "h",
        "presentations divided by rate and goodput, plus the start",
        found.rate,
        _FAILING,
        job.first_step_s,
    )


def prepare_stage(premises: Premises, found: Throughput) -> Stage:
    """Converting the collection, on the cores that feed the trainers later."""
    job, setup = premises.job, premises.setup
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
    cost = _cost(
        premises.prices,
        hours,
        cpu_node_hours=nodes * hours.value,
        stored_bytes=written.value,
    )
    return Stage(name="prepare", hours=hours, cost=cost, rows=rows)


def _storage(setup: Setup, machines: int) -> Figure:
    """Bandwidth of storage for this number of machines together."""
    return assumed(
        min(setup.storage.total_gb_s, machines * setup.storage.node_gb_s) * GB,
        "B/s",
        "storage settings",
        "storage",
    )


def pretrain_stage(premises: Premises, run: Pretraining) -> Stage:
    """Pretraining, with what limits it, what it moves and how it saves."""
    setup = premises.setup
    rows = (
        *_step_rows(premises, run.found),
        *_data_rows(premises, run),
        *_trainer_rows(setup, run.found),
        *_reliability_rows(run.reliability),
    )
    return Stage(name="pretrain", hours=run.hours, cost=run.cost, rows=rows)


def num_steps(premises: Premises, found: Throughput) -> int:
    """Optimizer steps of the whole run."""
    return math.ceil(premises.job.presentations / (found.workers * premises.setup.batch))


def _step_rows(premises: Premises, found: Throughput) -> tuple[Row, ...]:
    job, step_molecules = premises.job, found.workers * premises.setup.batch
    steps = computed(
        num_steps(premises, found),
        "",
        f"{step_molecules:,} molecules and {1e3 * found.step_s:,.1f} ms per step",
    )
    times = number_text(job.presentations / job.molecules)
    seen = "each molecule once" if times == "1" else f"each molecule {times} times"
    return (
        Row(what="rate", figure=found.rate, remark=f"limited by: {found.binding}"),
        Row(what="steps", figure=steps, remark=seen),
    )


def _data_rows(premises: Premises, run: Pretraining) -> tuple[Row, ...]:
    setup, found = premises.setup, run.found
    actors = computed(
        found.data_actors, "cores", "CPU time per molecule, with a quarter to spare", found.rate
    )
    nodes = (
        computed(found.cpu_nodes, "", f"of {setup.node_cores} cores", found.rate)
        if setup.on_gpu
        else given(0, "", "everything is on one machine")
    )
    read_per_s = run.read.value / premises.job.presentations * found.rate.value
    bandwidth = computed(read_per_s, "B/s", "bytes per time", found.rate)
    blocks = f"{BLOCKS_PER_STREAM} blocks of {found.blocks.bytes / 2**20:.0f} MiB per stream"
    return (
        Row(what="data actors", figure=actors),
        Row(what="CPU nodes", figure=nodes),
        Row(what="read from storage", figure=run.read),
        Row(what="bandwidth of storage", figure=bandwidth),
        Row(
            what="object store",
            figure=object_store(setup, found),
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
        state_bytes(setup, found),
        "B",
        "16 bytes per parameter, divided by shards"
        + ("" if setup.reshard else ", and its gathered weights")
        + "; activations not included",
    )
    return (
        Row(what="sent by each trainer in a step", figure=sent),
        Row(what="state of the model in a trainer", figure=state),
    )


def state_bytes(setup: Setup, found: Throughput) -> float:
    """Bytes of weights, gradients and moments per trainer, and of gathered weights that stay during a step."""
    parameters = model_size(setup.model).parameters
    shards = setup.shards(found.workers)
    kept = 0
    if shards > 1 and not setup.reshard:
        kept = sum(gathered_bytes(setup.model, precision=setup.precision, on_gpu=setup.on_gpu))
    return TRAINING_BYTES * parameters / shards + kept


def _reliability_rows(reliability: Reliability) -> tuple[Row, ...]:
    checkpoint = computed(
        reliability.checkpoint_bytes, "B", "12 bytes per parameter, plus the file format"
    )
    interval = computed(reliability.interval_s, "s", "by Young's formula", _FAILING)
    shortest, longest = (duration_text(seconds, "never") for seconds in reliability.good_s)
    mtbf = computed(reliability.mtbf_s / HOUR, "h", "failures per node, divided by nodes", _FAILING)
    how = f"mean of {NUM_SIMULATED} simulated runs that wait for lost nodes"
    goodput = computed(100 * reliability.goodput.mean, "%", how, _FAILING)
    low, high, elastic = (
        100 * share for share in (*reliability.goodput.band, reliability.goodput.elastic)
    )
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
            remark=f"{low:.1f} to {high:.1f} % in nine of ten runs; {elastic:.1f} % if elastic, with {ELASTIC_STREAMS} "
            "streams for each trainer",
        ),
    )


def object_store(setup: Setup, found: Throughput) -> Figure:
    """Bytes of Ray's object store that the stream's blocks take, over the cluster."""
    blocks = (BLOCKS_PER_STREAM + 1) * found.workers
    return computed(
        blocks * found.blocks.bytes,
        "B",
        f"{setup.molecule_bytes:,.0f} bytes per molecule, including the block of each stream that is in use",
    )


def embed_stage(premises: Premises, found: Throughput) -> Stage:
    """One vector for each molecule of the collection, on the devices of the trainers."""
    job, setup = premises.job, premises.setup
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
        premises.prices,
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


def total(stages: Sequence[Stage], prices: PriceSettings) -> tuple[Row, ...]:
    """Hours and, with prices, cost of all stages together."""
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
