"""Checkpoints and failures of a run: how often it saves, and how much of its time is left for training."""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from typing import Final, NamedTuple

from moleblend_ray.errors import ConfigError
from moleblend_ray.planning.capacity import GB, Setup, Throughput
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
from moleblend_ray.planning.plan import Premises
from moleblend_ray.planning.settings import FailureSettings
from moleblend_ray.planning.sizes import checkpoint_bytes

_MOST_RECOVERY: Final = 10.0
"""Recoveries of more mean times between failures than this leave less than 1 / 20,000 of the time for training."""
NUM_SIMULATED: Final = 20
"""Simulated runs, each with its own seed."""
_MOST_FAILURES: Final = 2000
"""Failures that all simulated runs together have at most, about; a month of a thousand GPUs has a hundred."""
ELASTIC_STREAMS: Final = 15
"""Streams per trainer: with so many, losing a node costs little (docs/scale.md)."""


class Goodput(NamedTuple):
    """Share of the time that advances the training."""

    mean: float
    """Of runs that wait for a lost node."""
    band: tuple[float, float]
    """Their 5 to 95 % band; the mean twice if nothing was simulated."""
    elastic: float
    """Mean of runs that go on with fewer trainers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reliability:
    """Checkpoints and failures of a run."""

    checkpoint_bytes: int
    interval_s: float
    """Seconds between two checkpoints."""
    good_s: tuple[float, float]
    """Shortest and longest interval that cost at most half a percentage point of goodput."""
    goodput: Goodput
    mtbf_s: float
    """Mean time between failures anywhere in the cluster; infinite without failures."""


class HopelessClusterError(ConfigError):
    """The cluster fails faster than a run can start."""


def expected_reliability(
    premises: Premises, found: Throughput, *, simulated: bool = True
) -> Reliability:
    """Interval and goodput of a run with this throughput; ``simulated`` False: by the closed form, in no time.

    HopelessClusterError if failures leave next to nothing of the time.
    """
    setup, failures = premises.setup, premises.failures
    num_bytes = checkpoint_bytes(setup.model, shards=setup.shards(found.workers))
    costs = _costs(setup, found, num_bytes)
    recovery = costs.recovery()
    rate_s = failures.per_node_day * found.nodes / DAY
    mtbf_s = 1 / rate_s if rate_s else math.inf
    saving = costs.saving(1.0, asynchronous=True)
    length_s = premises.job.presentations / found.rate.value
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
    if simulated and math.isfinite(mtbf_s):
        goodput = _simulated(found, costs, saving, failures, length_s)
    else:
        expected = expected_goodput(saving, mtbf_s, recovery_s)
        goodput = Goodput(expected, (expected, expected), expected)
    if goodput.mean <= 0.0:
        raise hopeless
    return Reliability(
        checkpoint_bytes=num_bytes,
        interval_s=interval_s,
        good_s=good_s,
        goodput=goodput,
        mtbf_s=mtbf_s,
    )


def _costs(setup: Setup, found: Throughput, num_bytes: int) -> Costs:
    costs = Costs(
        checkpoint_bytes=num_bytes,
        num_nodes=found.nodes,
        gpus_per_node=max(1, found.workers // found.nodes),
        node_bytes_per_s=setup.storage.node_gb_s * GB,
        storage_bytes_per_s=setup.storage.total_gb_s * GB,
    )
    return costs if setup.on_gpu else dataclasses.replace(costs, compile_s=0.0)


def _simulated(
    found: Throughput, costs: Costs, saving: Saving, failures: FailureSettings, length_s: float
) -> Goodput:
    """Goodput of simulated runs of this length."""
    cluster = Cluster(
        num_nodes=found.nodes,
        gpus_per_node=costs.gpus_per_node,
        failures_per_node_day=failures.per_node_day,
        replacement_s=failures.replacement_min * MINUTE,
    )
    # A real run ends when its work is done, not at a time; with a goodput near 1 the difference is small.
    end_s = min(max(length_s, HOUR), _MOST_FAILURES / NUM_SIMULATED * cluster.mtbf_s)

    def goodputs(workers: Workers) -> list[float]:
        scenario = Scenario(
            cluster=cluster, saving=saving, recovery=costs.recovery(), workers=workers
        )
        return sorted(simulate(scenario, seed, end_s).goodput for seed in range(NUM_SIMULATED))

    fixed = goodputs(Workers(num_streams=found.workers))
    elastic = goodputs(Workers(num_streams=ELASTIC_STREAMS * found.workers, elastic=True))
    band = fixed[1], fixed[-2]
    return Goodput(statistics.fmean(fixed), band, statistics.fmean(elastic))
