"""How many molecules a second a cluster trains on, and which resource binds.

Each resource (computing and its exchange of gradients, the thread that feeds a trainer, data actors, Ray's executor,
storage, networks) could carry so many molecules a second; the run does what the weakest one allows. Computing and exchange
follow one another in a step, so they are one resource with two parts. On a machine without GPUs everything shares
the same cores, and the work of the data side lengthens the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from moleblend_ray.data.batch import mean_molecule_bytes
from moleblend_ray.data.order import OrderConfig
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.planning.figures import Figure, assumed, computed
from moleblend_ray.planning.rates import ATOM_SHARES
from moleblend_ray.planning.settings import NetworkSettings, StorageSettings
from moleblend_ray.planning.sizes import Exchange, exchange
from moleblend_ray.training.config import Precision, Strategy

GB: Final = 1e9
HEADROOM: Final = 1.25
"""By how much the data side is larger than what trainers take, so that it is not what limits them."""
MEASURED_BLOCK_MOLECULES: Final = 8192
"""In a block of the stream whose executor was measured."""
_LARGEST_BLOCK_BYTES: Final = 128 << 20
"""Larger ones were never tried; nor were those above 12 MiB, but nothing in them should change."""
_USUAL_BLOCK_BYTES: Final = 12 << 20
BLOCKS_PER_STREAM: Final = 6
_MOST_NODES: Final = 4096
WINDOWS_IN_WORK: Final = 2
_MOST_INTERRUPTED: Final = 0.9
"""Share of the time; a machine that is interrupted more often is none to train on."""
DECODED_BYTES: Final = 445 / 14.87
"""Of an atom in a decoded row group (`relations-2026-11-26.json`, limit_us.decoded_bytes)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataCosts:
    """CPU microseconds that a molecule costs beside training."""

    actor_us: Figure
    """In data actors, decoding included."""
    decode_us: Figure
    """Of that, what each machine that builds blocks of a shuffle window repeats."""
    executor_us: Figure
    """In Ray Data's executor, with blocks of MEASURED_BLOCK_MOLECULES."""
    trainer_host_us: Figure
    """In the thread of a trainer that takes and pads molecules."""
    other_us: Figure
    """In Ray's own processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """A pretraining run and its machines, but for the number of trainers and of CPU nodes."""

    model: ModelConfig
    atom_counts: Mapping[int, float] = field(default_factory=lambda: dict(ATOM_SHARES))
    """Atoms -> molecules (or shares of them)."""
    batch: int
    """Molecules of one trainer in a step."""
    step_s: Figure
    """Seconds that one trainer computes for a step, alone on its device (or core)."""
    costs: DataCosts
    network: NetworkSettings = field(default_factory=NetworkSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    strategy: Strategy = "fsdp"
    precision: Precision = "bf16"
    replicas: int = 1
    gpus_per_node: int = 8
    """0: trainers are processes on the cores of one machine."""
    node_cores: int = 32
    """Of a CPU node; of the one machine where there are no GPUs."""
    worker_threads: int = 1
    """Cores that a trainer without GPU computes on."""
    contention: Figure | None = None
    """Without GPUs: how much longer a trainer computes while all others do; None: not at all."""
    exchange_gb_s: Figure | None = None
    """Without GPUs: what all trainers together send to each other in a second; None: the network's."""
    message_s: Figure | None = None
    """Without GPUs: what a collective takes whatever it sends; None: the network's."""
    ray_cores: Figure | None = None
    """Without GPUs: cores that processes of Ray take whatever the run does; None: none."""
    shard_bytes: Figure
    """Of a molecule in storage."""
    steps_per_block: int | None = None
    """None: as the stream does by default, more where Ray's executor would bind."""
    order: OrderConfig = field(default_factory=OrderConfig)
    """Shuffle window and chunks; batch and streams follow from the plan."""

    @property
    def on_gpu(self) -> bool:
        """Whether trainers have GPUs."""
        return self.gpus_per_node > 0

    @property
    def molecule_bytes(self) -> float:
        """Of a molecule on its way to a trainer."""
        weights = {atoms: round(1e6 * count) for atoms, count in self.atom_counts.items()}
        return mean_molecule_bytes(weights)

    @property
    def mean_atoms(self) -> float:
        """Of a molecule."""
        total = sum(self.atom_counts.values())
        return sum(atoms * count for atoms, count in self.atom_counts.items()) / total


@dataclass(frozen=True, kw_only=True, slots=True)
class Resource:
    """Something that limits the run."""

    name: str
    capacity: Figure
    """Molecules/s that it would carry if nothing else limited."""
    use: float
    """Share of it that the run takes."""
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """How molecules travel to trainers."""

    steps: int
    """`stream.steps_per_block`."""
    molecules: int
    """In a block."""
    bytes: float
    is_default: bool
    """Whether the stream would choose so by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """What a cluster of a size does."""

    workers: int
    nodes: int
    """With trainers."""
    cpu_nodes: int
    data_actors: int
    rate: Figure
    """Molecules/s."""
    binding: str
    """Name of the resource that limits."""
    step_s: float
    exchange: Exchange
    exchange_s: float
    """Of a step, before overlap."""
    amplification: float
    """Machines that fetch and decode each row group."""
    blocks: Blocks
    resources: tuple[Resource, ...]
    """The one that binds first."""


def throughput(setup: Setup, workers: int, cpu_nodes: int | None = None) -> Throughput:
    """Of ``workers`` trainers; ``cpu_nodes`` None: as many as keep them fed."""
    return _on_gpus(setup, workers, cpu_nodes) if setup.on_gpu else _on_cores(setup, workers)


# ------------------------------------------------------------------------------------------------- with GPUs


def _on_gpus(setup: Setup, workers: int, cpu_nodes: int | None) -> Throughput:
    traffic, exchange_s = _exchange(setup, workers)
    exposed_s = (1 - setup.network.overlap) * exchange_s.value
    molecules = workers * setup.batch
    step_s = setup.step_s.value + exposed_s
    network = _network(setup)
    trainers = computed(
        molecules / step_s,
        "molecules/s",
        "molecules of a step over computing and the exchange that is not hidden",
        setup.step_s,
        *((exchange_s,) if exposed_s else ()),
    )
    feeding = computed(
        workers * 1e6 / setup.costs.trainer_host_us.value,
        "molecules/s",
        "one thread in each trainer",
        setup.costs.trainer_host_us,
    )
    nodes = math.ceil(workers / setup.gpus_per_node)
    inward = computed(
        nodes * network.value / setup.molecule_bytes,
        "molecules/s",
        f"{setup.molecule_bytes:,.0f} bytes a molecule into the nodes of trainers",
        network,
    )
    wanted = min(trainers.value, feeding.value, inward.value)
    blocks = choose_blocks(setup, wanted)
    executor = _executor(setup, blocks)
    wanted = min(wanted, executor.value)
    num_cpu_nodes = cpu_nodes or _enough_nodes(setup, workers, blocks, wanted)
    data = _data_resources(setup, workers, blocks, num_cpu_nodes)
    computing = "computing" if setup.step_s.value >= exposed_s else "exchange between trainers"
    capacities = {
        computing: (trainers, f"{workers} trainers, {1e3 * step_s:,.1f} ms a step"),
        "feeding threads": (feeding, "taking and padding molecules beside each trainer"),
        "network into trainers": (
            inward,
            f"{nodes} nodes with {setup.network.node_gb_s:g} GB/s each",
        ),
        "Ray Data's executor": (
            executor,
            f"one process for all blocks, of {blocks.molecules:,} molecules",
        ),
        **data,
    }
    return _weakest(setup, workers, nodes, num_cpu_nodes, capacities, traffic, exchange_s, blocks)


def _exchange(setup: Setup, workers: int) -> tuple[Exchange, Figure]:
    """Traffic of each trainer, and the seconds it takes."""
    traffic = exchange(
        setup.model,
        workers,
        strategy=setup.strategy,
        precision=setup.precision,
        replicas=setup.replicas,
        on_gpu=setup.on_gpu,
    )
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
    return traffic, computed(seconds, "s", "bytes over bandwidth, and latencies", network)


def choose_blocks(setup: Setup, rate: float) -> Blocks:
    """Blocks of the stream's own size, or larger ones where its executor would otherwise limit ``rate``."""
    step_bytes = setup.batch * setup.molecule_bytes
    usual = _power_of_two(_USUAL_BLOCK_BYTES / step_bytes)
    steps = setup.steps_per_block or usual
    if setup.steps_per_block is None:
        largest = _power_of_two(_LARGEST_BLOCK_BYTES / step_bytes)
        while steps < largest and _block_rate(setup, steps) < HEADROOM * rate:
            steps *= 2
    return Blocks(
        steps=steps,
        molecules=steps * setup.batch,
        bytes=steps * step_bytes,
        is_default=steps == usual,
    )


def _power_of_two(steps: float) -> int:
    """As ``StreamConfig.block_steps``: at least 1, at most 64."""
    return 1 << min(max(1, int(steps)), 64).bit_length() - 1


def _block_rate(setup: Setup, steps: int) -> float:
    # What a block costs the executor does not depend on its size.
    block_s = setup.costs.executor_us.value * MEASURED_BLOCK_MOLECULES / 1e6
    return steps * setup.batch / block_s


def _executor(setup: Setup, blocks: Blocks) -> Figure:
    inputs = [setup.costs.executor_us]
    if _block_rate(setup, blocks.steps) > 0:
        name = "Ray's executor beyond 38,000 molecules/s"
        inputs.append(assumed(1.0, "", "cost a block taken as constant", name))
    return computed(
        _block_rate(setup, blocks.steps),
        "molecules/s",
        "molecules of a block over the executor's CPU time for one",
        *inputs,
    )


def amplification(setup: Setup, workers: int, steps_per_block: int, nodes: int) -> float:
    """Machines, on average, that fetch and decode the same row group: those that build blocks of its shuffle window.

    Blocks of one window lie on random machines: of M machines, b blocks meet M (1 - (1 - 1/M)^b) on average.
    """
    window, batch = setup.order.shuffle_window, workers * setup.batch
    streams_of_window = max(1.0, workers * min(1.0, window / batch))
    groups_of_window = max(1.0, window / (batch * steps_per_block))
    blocks = streams_of_window * groups_of_window
    met: float = nodes * (1 - (1 - 1 / nodes) ** blocks)
    return met


def _data_resources(
    setup: Setup, workers: int, blocks: Blocks, nodes: int
) -> dict[str, tuple[Figure, str]]:
    """What ``nodes`` CPU nodes carry, as far as each of their parts goes."""
    costs, times = setup.costs, amplification(setup, workers, blocks.steps, nodes)
    actor_us = costs.actor_us.value + costs.decode_us.value * (times - 1)
    read_bytes = setup.shard_bytes.value * times
    cores = nodes * setup.node_cores
    network = _network(setup)
    storage = assumed(setup.storage.total_gb_s, "GB/s", "storage settings", "storage")
    actors = computed(
        cores * 1e6 / actor_us,
        "molecules/s",
        f"{actor_us:.1f} us a molecule on {cores:,} cores",
        costs.actor_us,
        costs.decode_us,
    )
    from_storage = min(setup.storage.total_gb_s, nodes * setup.storage.node_gb_s) * GB
    return {
        "data actors": (actors, f"{nodes} nodes of {setup.node_cores} cores"),
        "storage": (
            computed(
                from_storage / read_bytes,
                "molecules/s",
                f"{read_bytes:,.0f} bytes a molecule, each row group fetched by {times:.1f} machines",
                storage,
                setup.shard_bytes,
            ),
            f"{setup.storage.total_gb_s:g} GB/s in all, {setup.storage.node_gb_s:g} GB/s a machine",
        ),
        "network out of CPU nodes": (
            computed(
                nodes * network.value / setup.molecule_bytes,
                "molecules/s",
                f"{setup.molecule_bytes:,.0f} bytes a molecule",
                network,
            ),
            f"{nodes} nodes with {setup.network.node_gb_s:g} GB/s each",
        ),
    }


def _enough_nodes(setup: Setup, workers: int, blocks: Blocks, rate: float) -> int:
    """Fewest CPU nodes that carry ``rate`` with headroom; where none do, the most that still bring something."""
    best, best_rate = 1, 0.0
    nodes = 1
    while nodes <= _MOST_NODES:
        data = _data_resources(setup, workers, blocks, nodes)
        carried = min(figure.value for figure, _ in data.values())
        if carried >= HEADROOM * rate:
            return nodes
        if carried > 1.02 * best_rate:
            best, best_rate = nodes, carried
        nodes += max(1, nodes // 16)
    return best


def _network(setup: Setup) -> Figure:
    return assumed(setup.network.node_gb_s * GB, "B/s", "network settings", "network of nodes")


def _weakest(
    setup: Setup,
    workers: int,
    nodes: int,
    cpu_nodes: int,
    capacities: Mapping[str, tuple[Figure, str]],
    traffic: Exchange,
    exchange_s: Figure,
    blocks: Blocks,
) -> Throughput:
    binding = min(capacities, key=lambda name: capacities[name][0].value)
    # Where the weakest one stands depends on what was assumed of it, not of those with room to spare.
    limit = capacities[binding][0]
    rate = computed(
        limit.value, "molecules/s", f"what the weakest resource carries: {binding}", limit
    )
    resources = [
        Resource(name=name, capacity=figure, use=rate.value / figure.value, detail=detail)
        for name, (figure, detail) in capacities.items()
    ]
    times = amplification(setup, workers, blocks.steps, cpu_nodes)
    costs = setup.costs
    actor_us = costs.actor_us.value + costs.decode_us.value * (times - 1)
    return Throughput(
        workers=workers,
        nodes=nodes,
        cpu_nodes=cpu_nodes,
        data_actors=max(1, math.ceil(HEADROOM * rate.value * actor_us / 1e6)),
        rate=rate,
        binding=binding,
        step_s=workers * setup.batch / rate.value,
        exchange=traffic,
        exchange_s=exchange_s.value,
        amplification=times,
        blocks=blocks,
        resources=tuple(sorted(resources, key=lambda resource: -resource.use)),
    )


# ---------------------------------------------------------------------------------------- one machine, no GPU


def _on_cores(setup: Setup, workers: int) -> Throughput:
    """Trainers, data actors and Ray share the cores of one machine.

    A step takes what a trainer computes while the others do, and their exchange; what the data side needs and finds no
    free core for comes on top, spread over the cores. Ray's standing processes run all the time, in short pieces: where
    they find no free core they interrupt trainers, and since all wait for the one interrupted, each piece delays all.
    """
    costs = setup.costs
    traffic = exchange(
        setup.model,
        workers,
        strategy=setup.strategy,
        precision=setup.precision,
        replicas=setup.replicas,
        on_gpu=False,
    )
    busy = workers * setup.worker_threads
    alone = workers == 1 or setup.contention is None
    slower = 1.0 if alone or setup.contention is None else setup.contention.value
    # More trainers than cores wait for each other.
    compute_s = setup.step_s.value * slower * max(1.0, busy / setup.node_cores)
    exchange_s = _loopback_s(setup, workers, traffic)
    molecules = workers * setup.batch
    data_us = sum(
        figure.value
        for figure in (costs.actor_us, costs.executor_us, costs.trainer_host_us, costs.other_us)
    )
    free_s = max(0.0, setup.node_cores - busy) * (compute_s + exchange_s.value)
    crowded_s = max(0.0, molecules * data_us / 1e6 - free_s) / setup.node_cores
    standing = 0.0 if setup.ray_cores is None else setup.ray_cores.value
    interrupted = min(_MOST_INTERRUPTED, max(0.0, standing - max(0, setup.node_cores - busy)))
    interrupted_s = compute_s * interrupted / (1.0 - interrupted)
    step_s = compute_s + exchange_s.value + crowded_s + interrupted_s
    inputs = [setup.step_s, costs.actor_us, exchange_s]
    inputs += [figure for figure in (setup.contention, setup.ray_cores) if figure is not None]
    blocks = choose_blocks(setup, molecules / step_s)
    parts = {
        "computing": (compute_s, f"{workers} trainers with {setup.worker_threads} core(s) each"),
        "exchange between trainers": (exchange_s.value, "over the machine's own network"),
        "data actors and Ray": (
            crowded_s,
            f"{data_us:.0f} us a molecule on cores that trainers use",
        ),
        "interruptions by Ray": (
            interrupted_s,
            f"standing processes that take {standing:.2f} cores, on cores that trainers use",
        ),
    }
    rate = computed(
        molecules / step_s, "molecules/s", "molecules of a step over its parts", *inputs
    )
    resources = tuple(
        Resource(
            name=name,
            capacity=computed(
                molecules / seconds if seconds else math.inf, "molecules/s", detail, *inputs
            ),
            use=seconds / step_s,
            detail=f"{1e3 * seconds:,.1f} ms of a step: {detail}",
        )
        for name, (seconds, detail) in sorted(parts.items(), key=lambda item: -item[1][0])
    )
    return Throughput(
        workers=workers,
        nodes=1,
        cpu_nodes=0,
        data_actors=max(1, math.ceil(rate.value * costs.actor_us.value / 1e6)),
        rate=rate,
        binding=resources[0].name,
        step_s=step_s,
        exchange=traffic,
        exchange_s=exchange_s.value,
        amplification=1.0,
        blocks=blocks,
        resources=resources,
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
        seconds, "s", "bytes of all trainers over what they reach together", network, message
    )
