"""What failures cost a long run: a simulation of nodes that fail, ways to save, and ways to go on.

**Goodput** is the time that the steps of the run would have taken on all GPUs without failures, divided by the time
that they took. Nodes fail independently at a published rate (``RATES``), and sometimes several fail at once
(``correlated_share``). A failure ends the step. The run continues from the newest committed checkpoint, either on as
many workers as before (``fixed``: it waits for another node) or on the largest number that divides ``num_streams``
(``elastic``: it grows when the node is back). The time between two events is computed in one operation, so the cost of
simulating a month depends on the number of failures, not of steps. The limits of the model are in `docs/scale.md`. All
random numbers follow from the seed.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Final

MINUTE: Final = 60.0
HOUR: Final = 3600.0
DAY: Final = 86400.0

BYTES_A_PARAMETER: Final = 12
"""A checkpoint holds weights and two Adam moments in float32."""

RATES: Final = {
    # The Llama 3 Herd of Models (Meta, 2024): 419 unexpected interruptions in 54 days on 16,384 H100 GPUs.
    "llama3": 419 / (54 * 16_384 / 8),
    # Revisiting Reliability in Large-Scale Machine Learning Research Clusters (Kokolis et al., HPCA 2025): RSC-1's
    # 6.50 failures in 1,000 node-days.
    "rsc1_nodes": 6.50 / 1000,
    # OPT: Open Pre-trained Transformer Language Models (Zhang et al., 2022): at least 35 manual and an estimated 70
    # automatic restarts in two months on 992 A100 GPUs. Two months are taken as 60 days.
    "opt175b": (35 + 70) / (60 * 992 / 8),
    # Kokolis et al. again: a job of 1,024 GPUs ran 7.9 hours between failures, of whatever kind.
    "rsc1_jobs": 24 / 7.9 / (1024 / 8),
}
"""Failures per day of a node with eight GPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """The machines and how they fail."""

    num_nodes: int = 128
    gpus_per_node: int = 8
    failures_per_node_day: float = RATES["rsc1_jobs"]
    node_loss_share: float = 1.0
    """Share of the failures after which the node is gone; after the others the run starts again on the same node."""
    replacement_s: float = 10 * MINUTE
    """Seconds from a failure until another node takes its place."""
    correlated_share: float = 0.0
    """Share of the failures that hit ``correlated_nodes`` nodes at once (a switch, a power supply)."""
    correlated_nodes: int = 4

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes."""
        return self.num_nodes * self.gpus_per_node

    @property
    def mtbf_s(self) -> float:
        """Mean time between failures while all nodes are there."""
        if self.failures_per_node_day == 0:
            return math.inf
        return DAY / (self.failures_per_node_day * self.num_nodes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """One way to save checkpoints, one after every ``interval_s`` seconds of work by the whole cluster."""

    interval_s: float
    block_s: float
    """Seconds that the step after a checkpoint waits, for the whole save or for a copy in host memory."""
    flight_s: float = 0.0
    """Seconds after that until the checkpoint is committed, while training continues. The next save waits for this
    one."""
    slow_down: float = 0.0
    """Share of the speed that training loses during ``flight_s``."""

    @property
    def commit_s(self) -> float:
        """Seconds from the last step of a checkpoint until its commit marker is written."""
        return self.block_s + self.flight_s

    @property
    def cost_s(self) -> float:
        """Seconds of training that one save costs."""
        return self.block_s + self.slow_down * self.flight_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """The way from a failure to the first new step, once there are nodes."""

    detect_s: float
    restart_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """How many of the available GPUs may train."""

    num_streams: int
    """The number of workers must divide this number."""
    elastic: bool = False
    """Continue with fewer workers (`cluster.min_workers`)."""
    min_workers: int = 1

    def full(self, num_gpus: int) -> int:
        """Number of workers when no node is missing."""
        return largest_divisor(self.num_streams, num_gpus)

    def on(self, alive_gpus: int, num_gpus: int) -> int:
        """Workers on those GPUs; 0 if the run has to wait for more."""
        needed = self.min_workers if self.elastic else self.full(num_gpus)
        found = largest_divisor(self.num_streams, alive_gpus)
        return found if found >= needed else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """Everything that a simulated run depends on except its seed and its length."""

    cluster: Cluster
    saving: Saving
    recovery: Recovery
    workers: Workers

    def on_alive(self, nodes: int) -> int:
        """Workers on that many nodes; 0 if the run has to wait."""
        cluster = self.cluster
        return self.workers.on(nodes * cluster.gpus_per_node, cluster.num_gpus)


@dataclass(kw_only=True, slots=True)
class Shares:
    """What the time of all GPUs was spent on, in seconds. The parts add up to the length of the run."""

    useful: float = 0.0
    redone: float = 0.0
    """Work done after the newest checkpoint and lost at a failure."""
    saving: float = 0.0
    recovering: float = 0.0
    waiting: float = 0.0
    """Waiting for nodes."""
    fewer: float = 0.0
    """GPUs that were missing, or had no worker, while others trained."""
    failures: int = 0
    """Number of failures that ended a step or a start."""

    @property
    def total(self) -> float:
        """Length of the run."""
        return self.useful + self.redone + self.saving + self.recovering + self.waiting + self.fewer

    @property
    def goodput(self) -> float:
        """Share of the time that was spent on useful work."""
        return self.useful / self.total


class Event(Enum):
    """What ended a period of time."""

    DONE = auto()
    FAILURE = auto()
    NODE = auto()
    """A node came back."""
    END = auto()
    """The simulated time is over."""


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is at most ``limit``; 0 if there is none."""
    return next((value for value in range(min(number, limit), 0, -1) if number % value == 0), 0)


def progress(saving: Saving, speed: float, elapsed: float) -> tuple[float, float]:
    """Work done and work committed since the run started from a checkpoint ``elapsed`` seconds ago.

    ``speed`` is the speed of its workers, 1 for the whole cluster. The first save follows the first interval.
    """
    first = saving.interval_s / speed
    if elapsed < first:
        return speed * elapsed, 0.0
    in_flight = speed * (1 - saving.slow_down) * saving.flight_s
    cycle = saving.commit_s + max(0.0, saving.interval_s - in_flight) / speed
    number = math.floor((elapsed - first) / cycle)
    phase = elapsed - first - number * cycle
    flying = min(max(0.0, phase - saving.block_s), saving.flight_s)
    after = max(0.0, phase - saving.commit_s)
    since = speed * ((1 - saving.slow_down) * flying + after)
    done = (number + 1) * saving.interval_s
    committed = done if phase >= saving.commit_s else done - saving.interval_s
    return done + min(since, saving.interval_s), committed


@dataclass(slots=True)
class Machines:
    """The nodes and the clock, which advances until something happens to a node.

    The random numbers for the n-th failure depend on the seed alone, so that all scenarios meet the same failures.
    """

    cluster: Cluster
    end_s: float
    seed: int
    now: float = 0.0
    alive: int = field(init=False)
    _random: random.Random = field(init=False)
    _node_days_left: float = field(init=False)
    _returns: list[float] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.alive = self.cluster.num_nodes
        self._random = random.Random(self.seed)
        self._node_days_left = self._random.expovariate(1.0)

    def pass_time(self, seconds: float, used_nodes: int) -> tuple[float, Event]:
        """Advance to the end, or until a node that the run uses (``used_nodes`` of those alive) fails or a node
        returns."""
        begin = self.now
        while True:
            rate = self.cluster.failures_per_node_day * self.alive / DAY
            failure = self.now + self._node_days_left / rate if rate else math.inf
            node = self._returns[0] if self._returns else math.inf
            until = min(begin + seconds, self.end_s, failure, node)
            self._node_days_left -= (until - self.now) * rate
            self.now = until
            if until == node:
                heapq.heappop(self._returns)
                self.alive += 1
                return self.now - begin, Event.NODE
            if until == failure:
                if self._fail(used_nodes):
                    return self.now - begin, Event.FAILURE
                continue
            return self.now - begin, Event.END if until == self.end_s else Event.DONE

    def _fail(self, used_nodes: int) -> bool:
        """Remove the failing nodes; returns whether the run used one of them."""
        where, loss, group = (self._random.random() for _ in range(3))
        self._node_days_left = self._random.expovariate(1.0)
        hit = where * self.alive < used_nodes
        if loss < self.cluster.node_loss_share:
            together = group < self.cluster.correlated_share
            lost = min(self.alive, self.cluster.correlated_nodes if together else 1)
            self.alive -= lost
            for _ in range(lost):
                heapq.heappush(self._returns, self.now + self.cluster.replacement_s)
            hit = hit or self.alive < used_nodes
        return hit


def simulate(scenario: Scenario, seed: int, end_s: float) -> Shares:
    """Simulate a run of ``end_s`` seconds. At its start all nodes are there and the workers are ready to train."""
    shares = Shares()
    machines = Machines(scenario.cluster, end_s, seed)
    recovery = scenario.recovery
    workers = scenario.workers.full(scenario.cluster.num_gpus)
    while machines.now < end_s:
        event = _train(scenario, machines, workers, shares)
        if event is Event.END:
            break
        is_failure = event is Event.FAILURE
        shares.failures += is_failure
        workers = _recover(scenario, machines, shares, recovery.detect_s if is_failure else 0.0)
    return shares


def _train(scenario: Scenario, machines: Machines, workers: int, shares: Shares) -> Event:
    """Train until a failure, the end, or until enough nodes are back to grow."""
    cluster, saving = scenario.cluster, scenario.saving
    speed = workers / cluster.num_gpus
    used = math.ceil(workers / cluster.gpus_per_node)
    elapsed, event = 0.0, Event.NODE  # A node may have come back while the workers started.
    while event is Event.NODE:
        if scenario.on_alive(machines.alive) > workers:
            save_s = saving.commit_s if elapsed else 0.0
            event = _idle(machines, save_s, used, shares, "saving")
            break
        passed, event = machines.pass_time(math.inf, used)
        elapsed += passed
    work, committed = progress(saving, speed, elapsed)
    kept = committed if event is Event.FAILURE else work
    shares.useful += kept
    shares.redone += work - kept
    shares.saving += elapsed - work / speed
    shares.fewer += work / speed - work
    return event


def _recover(scenario: Scenario, machines: Machines, shares: Shares, detect_s: float) -> int:
    """Detect the failure, wait for nodes and start the workers, again if another failure occurs meanwhile; their
    number."""
    cluster = scenario.cluster
    while machines.now < machines.end_s:
        event = _idle(machines, detect_s, machines.alive, shares, "recovering")
        workers = scenario.on_alive(machines.alive)
        if event is Event.DONE and workers == 0:
            # Nothing trains, so another failure only means more nodes to wait for.
            shares.waiting += machines.pass_time(math.inf, 0)[0]
            detect_s = 0.0
            continue
        if event is Event.DONE:
            used = math.ceil(workers / cluster.gpus_per_node)
            restart_s = scenario.recovery.restart_s
            event = _idle(machines, restart_s, used, shares, "recovering")
        if event is Event.DONE:
            return workers
        shares.failures += event is Event.FAILURE
        detect_s = scenario.recovery.detect_s
    return 0


def _idle(machines: Machines, seconds: float, used: int, shares: Shares, share: str) -> Event:
    """Advance without training; nodes that come back meanwhile are only counted."""
    begin, event = machines.now, Event.NODE
    while event is Event.NODE:
        _, event = machines.pass_time(begin + seconds - machines.now, used)
    setattr(shares, share, getattr(shares, share) + machines.now - begin)
    return event


def expected_goodput(saving: Saving, mtbf_s: float, recovery_s: float) -> float:
    """Goodput, in closed form, of an endless run whose failures are random and always find a replacement node.

    M is the mean time between failures, R the time to recover. With a save that blocks this is Daly's formula: a
    segment of work t and save d takes M e^(R/M) (e^((t+d)/M) - 1) on average. In general a start lasts M on average,
    makes progress t for each commit that it reaches, and costs M e^(R/M) in total.
    """
    if math.isinf(mtbf_s):
        return saving.interval_s / _cycle_s(saving)
    commits = math.exp(-(saving.interval_s + saving.commit_s) / mtbf_s)
    commits /= -math.expm1(-_cycle_s(saving) / mtbf_s)
    return saving.interval_s * commits / (mtbf_s * math.exp(recovery_s / mtbf_s))


def _cycle_s(saving: Saving) -> float:
    in_flight = (1 - saving.slow_down) * saving.flight_s
    return saving.commit_s + max(0.0, saving.interval_s - in_flight)


def young_interval_s(saving: Saving, mtbf_s: float) -> float:
    """Young's optimum: the square root of 2 x (cost of a save) x (mean time between failures)."""
    return math.sqrt(2 * saving.cost_s * mtbf_s)


def good_intervals_s(saving: Saving, mtbf_s: float, recovery_s: float) -> tuple[float, float]:
    """Shortest and longest interval, in steps of 5 %, whose goodput is within half a percentage point of the best."""
    intervals = [1.05**power for power in range(1, 300)]
    values = {
        seconds: expected_goodput(replace(saving, interval_s=seconds), mtbf_s, recovery_s)
        for seconds in intervals
    }
    best = max(values.values())
    near = [seconds for seconds, value in values.items() if value >= best - 0.005]
    return min(near), max(near)


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Seconds that saving and starting take for a size of model and cluster: assumptions, except those called
    measured."""

    checkpoint_bytes: int
    num_nodes: int
    gpus_per_node: int = 8
    node_bytes_per_s: float = 1e9
    """Bytes per second between storage and one machine."""
    storage_bytes_per_s: float = 20e9
    """Bytes per second between storage and all machines together."""
    save_fixed_s: float = 5.0
    """Seconds to agree on who writes what, to open files, and to write metrics and the marker."""
    stage_fixed_s: float = 0.1
    stage_bytes_per_s: float = 5e9
    """Bytes per second from one GPU to host memory."""
    slow_down: float = 0.05
    """Share of the training speed that is lost while a save is written in the background."""
    detect_s: float = 45.0
    """Together with the next field: measured were 64 s from the loss of a node to steps on the others (defaults of Ray
    2.60, two nodes, a tiny model)."""
    start_s: float = 20.0
    """Seconds for new processes, imports, the process group and the first blocks of data."""
    compile_s: float = 30.0
    """Seconds for `train.compile` and the first launches of kernels."""

    @property
    def save_s(self) -> float:
        """Seconds from the copy in host memory until the marker is written."""
        rate = min(self.num_nodes * self.node_bytes_per_s, self.storage_bytes_per_s)
        return self.save_fixed_s + self.checkpoint_bytes / rate

    @property
    def stage_s(self) -> float:
        """Seconds to copy the state to host memory."""
        # Each rank copies its own shard.
        shard_bytes = self.checkpoint_bytes / (self.gpus_per_node * self.num_nodes)
        return self.stage_fixed_s + shard_bytes / self.stage_bytes_per_s

    @property
    def read_s(self) -> float:
        """Seconds to read a checkpoint: the controller checks all of it, then each machine fetches all of it."""
        alone = self.checkpoint_bytes / self.node_bytes_per_s
        together = self.num_nodes * self.checkpoint_bytes / self.storage_bytes_per_s
        return alone + max(alone, together)

    def saving(self, interval_s: float, *, asynchronous: bool) -> Saving:
        """Saving in this way every ``interval_s`` seconds of work."""
        if not asynchronous:
            return Saving(interval_s=interval_s, block_s=self.save_s)
        return Saving(
            interval_s=interval_s,
            block_s=self.stage_s,
            flight_s=self.save_s,
            slow_down=self.slow_down,
        )

    def recovery(self) -> Recovery:
        """The times from a failure to the first new step."""
        return Recovery(
            detect_s=self.detect_s, restart_s=self.start_s + self.compile_s + self.read_s
        )
