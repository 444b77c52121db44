"""How many molecules per second a cluster trains on, and which resource limits it.

Each resource (computing with its exchange of gradients, the thread that feeds a trainer, data actors, Ray's executor,
storage, networks) can handle a certain number of molecules per second; the run is as fast as the slowest of them.
Computing and exchange follow one another in a step, so they are one resource with two parts. On a machine without GPUs
everything shares the same cores, and the work of the data side makes the step longer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from moleblend_ray.data.batches.batch import mean_molecule_bytes
from moleblend_ray.data.config import (
    BLOCK_BYTES,
    BLOCKS_PER_STREAM,
    MAX_BLOCK_STEPS,
    OrderConfig,
    StreamConfig,
)
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.planning.figures import Figure, assumed, computed
from moleblend_ray.planning.rates import ATOM_SHARES, ATOMS_PER_MOLECULE
from moleblend_ray.planning.settings import NetworkSettings, StorageSettings
from moleblend_ray.planning.sizes import Exchange, exchange
from moleblend_ray.training.config import Precision, Strategy
from moleblend_ray.vocabulary import NUM_DESCRIPTORS

GB: Final = 1e9
HEADROOM: Final = 1.25
"""Capacity of the data side over what the trainers take, so that it does not limit them."""
MEASURED_BLOCK_MOLECULES: Final = 8192
"""Molecules per block in the stream whose executor was measured."""
_LARGEST_BLOCK_BYTES: Final = 128 << 20
"""The largest block that a plan proposes. Nothing above 12 MiB was tried, but no difference is expected."""
_MOST_NODES: Final = 4096
_NEARLY: Final = 0.95
"""Share of the best that is taken where the rest would need many more CPU nodes."""
WINDOWS_IN_WORK: Final = 2
"""Shuffle windows of which blocks are being built at the same time."""
_MOST_INTERRUPTED: Final = 0.9
"""Largest share of the time that Ray's processes are assumed to interrupt trainers."""
LAUNCHING: Final = "launching kernels"
"""The resource of hosts whose GPUs have little to do in a step."""
DECODED_BYTES: Final = 445 / ATOMS_PER_MOLECULE
"""Bytes per atom in a decoded row group (`relations-2026-11-26.json`, limit_us.decoded_bytes)."""
DECODED_DESCRIPTOR_BYTES: Final = 4 * NUM_DESCRIPTORS
"""Bytes per molecule with descriptors, besides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataCosts:
    """CPU time per molecule besides training, in microseconds."""

    actor_us: Figure
    """In data actors, decoding included."""
    decode_us: Figure
    """The part of it that every machine repeats that builds blocks of the same shuffle window."""
    executor_us: Figure
    """In Ray Data's executor, with blocks of MEASURED_BLOCK_MOLECULES."""
    trainer_host_us: Figure
    """In the thread of a trainer that receives and pads molecules."""
    other_us: Figure
    """In Ray's own processes."""

    def actor_us_of(self, decodings: float) -> float:
        """CPU time in data actors if ``decodings`` rows are decoded for each that is used."""
        return self.actor_us.value + self.decode_us.value * (decodings - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """A pretraining run and its machines, except the numbers of trainers and of CPU nodes."""

    model: ModelConfig
    atom_counts: Mapping[int, float] = field(default_factory=lambda: dict(ATOM_SHARES))
    """Number of atoms -> number (or share) of molecules."""
    batch: int
    """Molecules per trainer and step."""
    step_s: Figure
    """Seconds that one trainer needs to compute a step, alone on its device (or core)."""
    launch_s: Figure | None = None
    """With GPUs: seconds in which the host of a trainer launches the kernels of a step, whatever its molecules; None: ``step_s``
    includes it."""
    costs: DataCosts
    network: NetworkSettings = field(default_factory=NetworkSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    strategy: Strategy = "fsdp"
    precision: Precision = "bf16"
    replicas: int = 1
    reshard: bool = True
    gpus_per_node: int = 8
    """0: the trainers are processes on the cores of one machine."""
    node_cores: int = 32
    """Cores per CPU node; without GPUs, cores of the one machine."""
    worker_threads: int = 1
    """Cores per trainer without a GPU."""
    contention: Figure | None = None
    """Without GPUs: factor by which computing takes longer while all trainers compute; None: 1."""
    exchange_gb_s: Figure | None = None
    """Without GPUs: GB/s that all trainers together send to each other; None: as ``network`` says."""
    message_s: Figure | None = None
    """Without GPUs: time per collective, whatever its size; None: as ``network`` says."""
    ray_cores: Figure | None = None
    """Without GPUs: cores that Ray's own processes use all the time; None: 0."""
    shard_bytes: Figure
    """Bytes per molecule in storage."""
    row_group_rows: int | None = None
    """Molecules of a row group, which is read as a whole; None: as many as a chunk of the order."""
    described: bool = False
    """Whether molecules come with descriptors."""
    steps_per_block: int | None = None
    """None: as many as the stream takes by default, more where Ray's executor would be the limit."""
    order: OrderConfig = field(default_factory=OrderConfig)
    """Shuffle window and chunks. Batch and streams are not taken from it: they follow from the plan."""

    @property
    def on_gpu(self) -> bool:
        """Whether trainers have GPUs."""
        return self.gpus_per_node > 0

    def shards(self, workers: int) -> int:
        """Parts that the state of the model is divided into among ``workers`` trainers."""
        return workers // self.replicas if self.strategy == "fsdp" else 1

    @property
    def rows_read(self) -> float:
        """Rows of row groups for each molecule of a shuffle window.

        A chunk of the order begins anywhere in a row group, as splits leave shards that are no multiple of either. The
        bundled costs were measured on shards that are: one row for each molecule.
        """
        chunk_rows = self.order.chunk_rows
        return 1 + (self.row_group_rows or chunk_rows) / chunk_rows

    @property
    def molecule_bytes(self) -> float:
        """Bytes per molecule on the way to a trainer."""
        weights = {atoms: round(1e6 * count) for atoms, count in self.atom_counts.items()}
        return mean_molecule_bytes(weights, described=self.described)

    @property
    def decoded_bytes(self) -> float:
        """Bytes per molecule of decoded row groups."""
        return DECODED_BYTES * self.mean_atoms + self.described * DECODED_DESCRIPTOR_BYTES

    @property
    def mean_atoms(self) -> float:
        """Mean number of atoms per molecule."""
        return mean_atoms(self.atom_counts)


def mean_atoms(atom_counts: Mapping[int, float]) -> float:
    """Mean number of atoms per molecule, from number of atoms -> number of molecules."""
    total = sum(atom_counts.values())
    return sum(atoms * count for atoms, count in atom_counts.items()) / total


@dataclass(frozen=True, kw_only=True, slots=True)
class Resource:
    """Something that may limit the run."""

    name: str
    capacity: Figure
    """Molecules/s that it would allow if nothing else limited the run."""
    use: float
    """Share of the capacity that the run uses."""
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """How molecules travel to trainers."""

    steps: int
    """`stream.steps_per_block`."""
    molecules: int
    """Molecules per block."""
    bytes: float
    is_default: bool
    """Whether the stream would choose this by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """What a cluster of some size achieves."""

    workers: int
    nodes: int
    """Machines with trainers."""
    cpu_nodes: int
    data_actors: int
    rate: Figure
    """Molecules/s."""
    binding: str
    """Name of the resource that limits."""
    step_s: float
    exchange: Exchange
    exchange_s: float
    """Seconds per step, before overlap with computing."""
    amplification: float
    """Machines that fetch and decode each row group."""
    blocks: Blocks
    resources: tuple[Resource, ...]
    """The one that limits first."""


def throughput(setup: Setup, workers: int, cpu_nodes: int | None = None) -> Throughput:
    """The throughput of ``workers`` trainers; ``cpu_nodes`` None: as many as they need."""
    return _on_gpus(setup, workers, cpu_nodes) if setup.on_gpu else _on_cores(setup, workers)


# ------------------------------------------------------------------------------------------------- with GPUs


class _Capacity(NamedTuple):
    """What a part of the cluster could handle if nothing else limited the run."""

    figure: Figure
    """Molecules/s."""
    detail: str


def _on_gpus(setup: Setup, workers: int, cpu_nodes: int | None) -> Throughput:
    nodes = math.ceil(workers / setup.gpus_per_node)
    traffic, exchange_s = _exchange(setup, workers)
    training = _training_capacities(setup, workers, nodes, exchange_s)
    wanted = min(capacity.figure.value for capacity in training.values())
    blocks = choose_blocks(setup, wanted)
    executor = _executor(setup, blocks)
    wanted = min(wanted, executor.figure.value)
    num_cpu_nodes = cpu_nodes or _enough_nodes(setup, workers, blocks, wanted)
    data = _data_capacities(setup, workers, blocks, num_cpu_nodes)
    capacities = {**training, "Ray Data's executor": executor, **data}
    binding = min(capacities, key=lambda name: capacities[name].figure.value)
    # The rate rests on what was assumed about the weakest resource, not about those with room to spare.
    limit = capacities[binding].figure
    rate = computed(
        limit.value, "molecules/s", f"capacity of the weakest resource: {binding}", limit
    )
    times = amplification(setup, workers, blocks.steps, num_cpu_nodes)
    actor_us = setup.costs.actor_us_of(times * setup.rows_read)
    return Throughput(
        workers=workers,
        nodes=nodes,
        cpu_nodes=num_cpu_nodes,
        data_actors=max(1, math.ceil(HEADROOM * rate.value * actor_us / 1e6)),
        rate=rate,
        binding=binding,
        step_s=workers * setup.batch / rate.value,
        exchange=traffic,
        exchange_s=exchange_s.value,
        amplification=times,
        blocks=blocks,
        resources=_by_use(capacities, rate),
    )


def _by_use(capacities: Mapping[str, _Capacity], rate: Figure) -> tuple[Resource, ...]:
    resources = [
        Resource(name=name, capacity=figure, use=rate.value / figure.value, detail=detail)
        for name, (figure, detail) in capacities.items()
    ]
    return tuple(sorted(resources, key=lambda resource: -resource.use))


def _training_capacities(
    setup: Setup, workers: int, nodes: int, exchange_s: Figure
) -> dict[str, _Capacity]:
    """The capacity of each part of ``nodes`` machines with trainers."""
    exposed_s = (1 - setup.network.overlap) * exchange_s.value
    step_s = setup.step_s.value + exposed_s
    network = _network(setup)
    trainers = computed(
        workers * setup.batch / step_s,
        "molecules/s",
        "molecules per step, divided by the time of computing and of the exchange that is not hidden",
        setup.step_s,
        *((exchange_s,) if exposed_s else ()),
    )
    feeding = computed(
        workers * 1e6 / setup.costs.trainer_host_us.value,
        "molecules/s",
        "one thread in each trainer",
        setup.costs.trainer_host_us,
    )
    inward = computed(
        nodes * network.value / setup.molecule_bytes,
        "molecules/s",
        f"{setup.molecule_bytes:,.0f} bytes per molecule into the nodes of trainers",
        network,
    )
    computing = "computing" if setup.step_s.value >= exposed_s else "exchange between trainers"
    return {
        computing: _Capacity(trainers, f"{workers} trainers, {1e3 * step_s:,.1f} ms per step"),
        **_launching(setup, workers),
        "feeding threads": _Capacity(feeding, "receive and pad molecules, one in each trainer"),
        "network into trainers": _Capacity(
            inward, f"{nodes} nodes with {setup.network.node_gb_s:g} GB/s each"
        ),
    }


def _launching(setup: Setup, workers: int) -> dict[str, _Capacity]:
    """What the hosts of the trainers can launch while their GPUs compute; empty if that is part of ``setup.step_s``."""
    if setup.launch_s is None:
        return {}
    figure = computed(
        workers * setup.batch / setup.launch_s.value,
        "molecules/s",
        "molecules per step, divided by the time in which a host launches its kernels",
        setup.launch_s,
    )
    per_step = f"{1e3 * setup.launch_s.value:,.1f} ms per step, whatever its molecules"
    return {LAUNCHING: _Capacity(figure, per_step)}


def _exchange(setup: Setup, workers: int) -> tuple[Exchange, Figure]:
    """Traffic of each trainer, and the seconds it takes."""
    traffic = _traffic(setup, workers)
    settings = setup.network
    in_node = workers // setup.replicas <= setup.gpus_per_node
    one_node = workers <= setup.gpus_per_node
    within = settings.within_node_gb_s if in_node else settings.between_nodes_gb_s
    across = settings.within_node_gb_s if one_node else settings.between_nodes_gb_s
    seconds = (
        traffic.within_bytes / (within * GB)
        + traffic.across_bytes / (across * GB)
        + traffic.messages * settings.message_us / 1e6
    )
    network = assumed(within, "GB/s", "network settings", "network between trainers")
    return traffic, computed(seconds, "s", "bytes divided by bandwidth, plus latencies", network)


def _traffic(setup: Setup, workers: int) -> Exchange:
    return exchange(
        setup.model,
        workers,
        strategy=setup.strategy,
        precision=setup.precision,
        replicas=setup.replicas,
        reshard=setup.reshard,
        on_gpu=setup.on_gpu,
    )


def choose_blocks(setup: Setup, rate: float) -> Blocks:
    """Blocks of the stream's own size, or larger ones where its executor would otherwise limit ``rate``."""
    step_bytes = setup.batch * setup.molecule_bytes
    # With an object store that does not limit the size of blocks.
    usual = StreamConfig().block_steps(1, step_bytes, BLOCKS_PER_STREAM * BLOCK_BYTES)
    steps = setup.steps_per_block or usual
    if setup.steps_per_block is None:
        most = min(MAX_BLOCK_STEPS, _LARGEST_BLOCK_BYTES / step_bytes)
        while 2 * steps <= most and _block_rate(setup, steps) < HEADROOM * rate:
            steps *= 2
    return Blocks(
        steps=steps,
        molecules=steps * setup.batch,
        bytes=steps * step_bytes,
        is_default=steps == usual,
    )


def _block_rate(setup: Setup, steps: int) -> float:
    # The executor's time per block does not depend on the size of the block.
    block_s = setup.costs.executor_us.value * MEASURED_BLOCK_MOLECULES / 1e6
    return steps * setup.batch / block_s


def _executor(setup: Setup, blocks: Blocks) -> _Capacity:
    constant = assumed(
        1.0, "", "time per block taken as constant", "Ray's executor beyond 38,000 molecules/s"
    )
    figure = computed(
        _block_rate(setup, blocks.steps),
        "molecules/s",
        "molecules per block, divided by the executor's CPU time per block",
        setup.costs.executor_us,
        constant,
    )
    return _Capacity(
        figure, f"one process for all blocks, {blocks.molecules:,} molecules per block"
    )


def amplification(setup: Setup, workers: int, steps_per_block: int, nodes: int) -> float:
    """Mean number of machines that fetch and decode the same row group: those that build blocks of its shuffle window.

    The blocks of a window are built on random machines: b blocks reach M (1 - (1 - 1/M)^b) of M machines on average.
    """
    window, batch = setup.order.shuffle_window, workers * setup.batch
    streams_of_window = max(1.0, workers * min(1.0, window / batch))
    groups_of_window = max(1.0, window / (batch * steps_per_block))
    blocks = streams_of_window * groups_of_window
    met: float = nodes * (1 - (1 - 1 / nodes) ** blocks)
    return met


def _data_capacities(
    setup: Setup, workers: int, blocks: Blocks, nodes: int
) -> dict[str, _Capacity]:
    """The capacity of each part of ``nodes`` CPU nodes."""
    costs, times = setup.costs, amplification(setup, workers, blocks.steps, nodes)
    actor_us = costs.actor_us_of(times * setup.rows_read)
    read_bytes = setup.shard_bytes.value * setup.rows_read * times
    cores = nodes * setup.node_cores
    network = _network(setup)
    storage = assumed(setup.storage.total_gb_s, "GB/s", "storage settings", "storage")
    actors = computed(
        cores * 1e6 / actor_us,
        "molecules/s",
        f"{actor_us:.1f} us per molecule on {cores:,} cores",
        costs.actor_us,
        costs.decode_us,
    )
    reading = computed(
        min(setup.storage.total_gb_s, nodes * setup.storage.node_gb_s) * GB / read_bytes,
        "molecules/s",
        f"{read_bytes:,.0f} bytes per molecule, each row group fetched by {times:.1f} machines, "
        f"{setup.rows_read:.1f} rows for each molecule",
        storage,
        setup.shard_bytes,
    )
    outward = computed(
        nodes * network.value / setup.molecule_bytes,
        "molecules/s",
        f"{setup.molecule_bytes:,.0f} bytes per molecule",
        network,
    )
    return {
        "data actors": _Capacity(actors, f"{nodes} nodes of {setup.node_cores} cores"),
        "storage": _Capacity(
            reading,
            f"{setup.storage.total_gb_s:g} GB/s in total, {setup.storage.node_gb_s:g} GB/s per machine",
        ),
        "network out of CPU nodes": _Capacity(
            outward, f"{nodes} nodes with {setup.network.node_gb_s:g} GB/s each"
        ),
    }


def _enough_nodes(setup: Setup, workers: int, blocks: Blocks, rate: float) -> int:
    """The fewest CPU nodes for ``rate`` with headroom; if no number is enough, the fewest that carry ``rate``, or nearly what the
    best number carries.

    Machines that share a shuffle window all read it, so where storage limits, many more of them bring next to nothing.
    """
    carried: dict[int, float] = {}
    nodes = 1
    while nodes <= _MOST_NODES:
        data = _data_capacities(setup, workers, blocks, nodes)
        carried[nodes] = min(capacity.figure.value for capacity in data.values())
        if carried[nodes] >= HEADROOM * rate:
            return nodes
        nodes += max(1, nodes // 16)
    good = min(rate, _NEARLY * max(carried.values()))
    return next(nodes for nodes, capacity in carried.items() if capacity >= good)


def _network(setup: Setup) -> Figure:
    return assumed(setup.network.node_gb_s * GB, "B/s", "network settings", "network of nodes")


# ---------------------------------------------------------------------------------------- one machine, no GPU


class _CoreStep(NamedTuple):
    """What the seconds of a step on shared cores are spent on."""

    computing_s: float
    exchange_s: float
    crowded_s: float
    """CPU time of the data side for which no core is free, spread over the cores."""
    interrupted_s: float
    """While Ray's own processes interrupt a trainer, for which all others wait."""

    @property
    def total_s(self) -> float:
        return sum(self)


def _on_cores(setup: Setup, workers: int) -> Throughput:
    """The throughput of trainers, data actors and Ray on the cores of one machine.

    A step takes the time of computing, while all trainers compute, and of the exchange. CPU time of the data side for
    which no core is free is added, spread over the cores. Ray's own processes run all the time, for short moments: if
    no core is free, they interrupt a trainer, and since all trainers wait for that one, each interruption delays all.
    """
    traffic = _traffic(setup, workers)
    exchange_s = _loopback_s(setup, workers, traffic)
    step = _core_step(setup, workers, exchange_s.value)
    inputs = [setup.step_s, setup.costs.actor_us, exchange_s]
    inputs += [figure for figure in (setup.contention, setup.ray_cores) if figure is not None]
    rate = computed(
        workers * setup.batch / step.total_s,
        "molecules/s",
        "molecules per step, divided by the sum of its parts",
        *inputs,
    )
    resources = _core_resources(setup, workers, step, inputs)
    return Throughput(
        workers=workers,
        nodes=1,
        cpu_nodes=0,
        data_actors=max(1, math.ceil(rate.value * setup.costs.actor_us.value / 1e6)),
        rate=rate,
        binding=resources[0].name,
        step_s=step.total_s,
        exchange=traffic,
        exchange_s=exchange_s.value,
        amplification=1.0,
        blocks=choose_blocks(setup, rate.value),
        resources=resources,
    )


def _core_step(setup: Setup, workers: int, exchange_s: float) -> _CoreStep:
    cores, busy = setup.node_cores, workers * setup.worker_threads
    slower = setup.contention.value if setup.contention is not None and workers > 1 else 1.0
    # If there are more trainers than cores, they wait for each other.
    computing_s = setup.step_s.value * slower * max(1.0, busy / cores)
    data_s = workers * setup.batch * _data_us(setup.costs) / 1e6
    free_s = max(0.0, cores - busy) * (computing_s + exchange_s)
    standing = 0.0 if setup.ray_cores is None else setup.ray_cores.value
    interrupted = min(_MOST_INTERRUPTED, max(0.0, standing - max(0, cores - busy)))
    return _CoreStep(
        computing_s=computing_s,
        exchange_s=exchange_s,
        crowded_s=max(0.0, data_s - free_s) / cores,
        interrupted_s=computing_s * interrupted / (1.0 - interrupted),
    )


def _data_us(costs: DataCosts) -> float:
    figures = (costs.actor_us, costs.executor_us, costs.trainer_host_us, costs.other_us)
    return sum(figure.value for figure in figures)


def _core_resources(
    setup: Setup, workers: int, step: _CoreStep, inputs: Sequence[Figure]
) -> tuple[Resource, ...]:
    standing = 0.0 if setup.ray_cores is None else setup.ray_cores.value
    parts = {
        "computing": (
            step.computing_s,
            f"{workers} trainers with {setup.worker_threads} core(s) each",
        ),
        "exchange between trainers": (step.exchange_s, "over the machine's own network"),
        "data actors and Ray": (
            step.crowded_s,
            f"{_data_us(setup.costs):.0f} us per molecule on cores that trainers use",
        ),
        "interruptions by Ray": (
            step.interrupted_s,
            f"its own processes take {standing:.2f} cores, on cores that trainers use",
        ),
    }
    molecules = workers * setup.batch
    return tuple(
        Resource(
            name=name,
            capacity=computed(
                molecules / seconds if seconds else math.inf, "molecules/s", detail, *inputs
            ),
            use=seconds / step.total_s,
            detail=f"{1e3 * seconds:,.1f} ms of a step: {detail}",
        )
        for name, (seconds, detail) in sorted(parts.items(), key=lambda item: -item[1][0])
    )


def _loopback_s(setup: Setup, workers: int, traffic: Exchange) -> Figure:
    if workers == 1:
        return computed(0.0, "s", "one trainer sends nothing")
    network = setup.exchange_gb_s or assumed(
        setup.network.node_gb_s, "GB/s", "network settings", "network between trainers"
    )
    message = setup.message_s or assumed(
        setup.network.message_us / 1e6, "s", "network settings", "network between trainers"
    )
    sent = workers * (traffic.within_bytes + traffic.across_bytes)
    seconds = sent / (network.value * GB) + traffic.messages * message.value
    return computed(
        seconds, "s", "bytes of all trainers, divided by their common bandwidth", network, message
    )
