"""Pretraining with other numbers of trainers, with one thing doubled, and with the model spread in another way."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Final, NamedTuple

from moleblend_ray.planning.capacity import LAUNCHING, Setup, Throughput, throughput
from moleblend_ray.planning.plan import Change, Premises, ScalePoint
from moleblend_ray.planning.reliability import HopelessClusterError
from moleblend_ray.planning.settings import NetworkSettings
from moleblend_ray.planning.stages import pretraining

_LARGEST_SCALE: Final = 4096
FEW_STEPS: Final = 1000
"""Steps of a run with fewer of which the model may learn little."""
_LARGER: Final = 4
"""Factor of the molecules of a step that is proposed where launching kernels limits: what was measured for `base`."""


def scaling(premises: Premises, workers: int) -> tuple[ScalePoint, ...]:
    """Pretraining with each power of two up to four times ``workers`` (without GPUs: twice), and with ``workers``."""
    setup = premises.setup
    most = 4 * workers if setup.on_gpu else 2 * workers
    sizes = {1 << power for power in range(most.bit_length()) if 1 << power <= most}
    sizes = {size for size in sizes if size <= _LARGEST_SCALE} | {workers}
    usable = [size for size in sorted(sizes) if _fits(setup, size)]
    found = []
    for size in usable:
        # Of larger clusters than the planned one some may fail faster than they start.
        with contextlib.suppress(HopelessClusterError):
            found.append(_scale_point(premises, size, None))
    return tuple(found)


def _fits(setup: Setup, workers: int) -> bool:
    """Whether all nodes are full and all copies of the model have as many trainers."""
    full = not setup.on_gpu or workers <= setup.gpus_per_node or workers % setup.gpus_per_node == 0
    return full and workers % setup.replicas == 0


def _scale_point(premises: Premises, workers: int, cpu_nodes: int | None) -> ScalePoint:
    found = throughput(premises.setup, workers, cpu_nodes)
    # By the closed form: a simulation for each size would take too long.
    run = pretraining(premises, found, simulated=False)
    return ScalePoint(
        workers=workers,
        cpu_nodes=found.cpu_nodes,
        molecules_per_s=found.rate.value,
        hours=run.hours.value,
        cost=None if run.cost is None else run.cost.value,
        goodput=run.reliability.goodput.mean,
        binding=found.binding,
    )


class _Doubled(NamedTuple):
    """The plan's run with one thing doubled."""

    what: str
    setup: Setup
    workers: int
    cpu_nodes: int | None


def changes(premises: Premises, found: Throughput, cpu_nodes: int | None) -> tuple[Change, ...]:
    """Each thing doubled alone. The data side stays as in the plan, which shows what limits next."""
    setup = premises.setup
    base = _scale_point(premises, found.workers, found.cpu_nodes or None)

    def change(doubled: _Doubled) -> Change:
        other = dataclasses.replace(premises, setup=doubled.setup)
        point = _scale_point(other, doubled.workers, doubled.cpu_nodes)
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
    made = []
    for one in doubled:
        with contextlib.suppress(HopelessClusterError):
            made.append(change(one))
    return tuple(made)


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


def hints(premises: Premises, found: Throughput, cpu_nodes: int | None) -> tuple[str, ...]:
    """What would be faster: larger steps where GPUs wait for their hosts, and another way to spread the model over trainers."""
    other = _other_spread(premises.setup, found, cpu_nodes)
    return (*_larger_steps(premises, found, cpu_nodes), *other)


def _larger_steps(premises: Premises, found: Throughput, cpu_nodes: int | None) -> tuple[str, ...]:
    """Larger steps, unless so few would be left that the model may learn little."""
    setup = premises.setup
    step_s, step_molecules = setup.step_s, _LARGER * found.workers * setup.batch
    if found.binding != LAUNCHING or premises.job.presentations < FEW_STEPS * step_molecules:
        return ()
    longer = dataclasses.replace(step_s, value=step_s.value * _LARGER)
    larger = dataclasses.replace(setup, step_s=longer, batch=_LARGER * setup.batch)
    rate = throughput(larger, found.workers, cpu_nodes).rate.value
    return (
        f"the GPUs wait for their hosts: batch={larger.batch} would train on {rate:,.0f} molecules/s, in steps of "
        f"{step_molecules:,} molecules",
    )


def _other_spread(setup: Setup, found: Throughput, cpu_nodes: int | None) -> tuple[str, ...]:
    """The best other way to spread the model over trainers, if it is at least 3 % faster."""
    ways = {
        "strategy=ddp": dataclasses.replace(setup, strategy="ddp", replicas=1, reshard=True),
    }
    if setup.strategy == "fsdp":
        ways["fsdp_reshard=false"] = dataclasses.replace(setup, reshard=False)
    if setup.on_gpu and found.nodes > 1 and setup.replicas != found.nodes:
        ways[f"fsdp_replicas={found.nodes} (strategy=fsdp)"] = dataclasses.replace(
            setup, strategy="fsdp", replicas=found.nodes
        )
    if found.workers == 1 or (not setup.on_gpu and setup.exchange_gb_s is None):
        return ()
    rates = {
        way: throughput(other, found.workers, cpu_nodes).rate.value
        for way, other in ways.items()
        if other != setup
    }
    best = max(rates, key=rates.__getitem__, default="")
    if not best or rates[best] < 1.03 * found.rate.value:
        return ()
    whom = "nodes" if found.nodes > 1 else "trainers"
    return (
        f"{best} would train on {rates[best]:,.0f} molecules/s, as less is sent between {whom}",
    )
