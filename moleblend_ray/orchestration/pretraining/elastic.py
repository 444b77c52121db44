"""Training with as many workers as the cluster has room for.

Ray Train's own elastic policy takes any number of workers between two bounds, may leave no CPU to the data actors, and
kills a healthy group in order to start a larger one. Here the number of workers must divide the number of streams, so
that the global batches stay the same. The data actors keep their CPUs, and before a larger group starts, the present
one is asked to commit its step and leave.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import ray
import ray._private.state
import ray.train.torch
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)

from moleblend_ray.orchestration.cluster.placement import Labels, carries, how_many_fit, live_nodes
from moleblend_ray.orchestration.pretraining.fixed_workers import InterruptibleTrainer
from moleblend_ray.orchestration.pretraining.stopping import StopFlag

logger = logging.getLogger(__name__)

_REMIND_S: Final = 60.0
_LOOKS_TO_ASK: Final = 2
_LOOKS_TO_FORCE: Final = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class _NamedRun:
    """The parts of a TrainRunContext that Ray's policy reads."""

    run_id: str


class GracefulElasticPolicy(ElasticScalingPolicy):
    """Starts the largest group of an allowed size that fits, and resizes it through the stop flag. Runs in the
    controller of Ray Train."""

    def __init__(
        self,
        scaling_config: Any,
        sizes: tuple[int, ...],
        data_actors: tuple[int, float],
        stop_flag: StopFlag,
        run_name: str,
        labels: tuple[Labels, Labels] = (None, None),
    ) -> None:
        super().__init__(scaling_config)
        self._run_name = run_name
        self._labels = labels
        self._sizes = sizes
        self._data_actors = data_actors
        self._stop_flag = stop_flag
        self._room = sizes[-1]
        self._wanted = 0
        self._looks = 0
        self._reminded_s = time.monotonic()

    def after_controller_start(self, train_run_context: Any) -> None:  # noqa: ARG002
        """Request resources under the name of our run. Ray keeps the request of a killed command for three minutes;
        with the same name it is replaced and does not stay in the way."""
        super().after_controller_start(_NamedRun(run_id=self._run_name))  # type: ignore[arg-type]

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        # Ray's count includes what other jobs hold; ours leaves room for the data actors.
        leaving = ray._private.state.state.get_draining_nodes()
        nodes = [node for node in live_nodes() if node["NodeID"] not in leaving]
        for_workers, for_actors = self._labels
        room = count_workers(
            [node["Resources"] for node in nodes if carries(node, for_workers)],
            self.scaling_config._resources_per_worker_not_none,
            self._sizes,
            *self._data_actors,
            actors_only_cpus=sum(
                node["Resources"].get("CPU", 0.0)
                for node in nodes
                if carries(node, for_actors) and not carries(node, for_workers)
            ),
        )
        possible = min(room, super()._count_possible_workers(reserved_resources))
        self._room = max((size for size in self._sizes if size <= possible), default=0)
        return self._room

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start a group that fits, or wait and log it. SIGTERM ends the wait with a StoppedWhileWaitingError."""
        self._stop_flag.end_wait_if_terminated()
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, ResizeDecision):
            # What was asked of the former group no longer matters.
            self._looks = self._wanted = 0
            self._stop_flag.ask("")
            return decision
        self._remind("no workers run:")
        return decision

    def _remind(self, state: str) -> None:
        if time.monotonic() - self._reminded_s > _REMIND_S:
            self._reminded_s = time.monotonic()
            logger.warning(
                "%s waiting for room in the cluster for %d workers and %d data actors",
                state,
                self._sizes[0],
                self._data_actors[0],
            )

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Set the stop flag if two looks agree on another size. After six looks, a group without room is resized at
        once."""
        latest = self._latest_monitor_time
        decision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        if not isinstance(decision, ResizeDecision):
            if self._latest_monitor_time != latest:  # It looked, and nothing can be done.
                self._looks = 0
                if self._room < self._sizes[0]:
                    self._remind("the data actors may have no room:")
            return decision
        self._looks = self._looks + 1 if decision.num_workers == self._wanted else 1
        self._wanted = decision.num_workers
        # A node that is there only briefly is not worth a restart.
        if self._looks >= _LOOKS_TO_ASK:
            self._stop_flag.ask("resize")
        # Workers that took the place of the data actors wait for data and never reach the end of a step.
        is_starving = self._wanted < worker_group_state.num_workers
        if is_starving and self._looks >= _LOOKS_TO_FORCE:
            self._looks = 0
            self._stop_flag.ask("")
            logger.warning(
                "no room for %d workers beside the data actors: starting anew with %d",
                worker_group_state.num_workers,
                self._wanted,
            )
            return decision
        return NoopDecision()


def count_workers(
    nodes: Sequence[Mapping[str, float]],
    worker: Mapping[str, float],
    sizes: Sequence[int],
    num_actors: int,
    actor_cpus: float,
    *,
    actors_only_cpus: float = 0.0,
) -> int:
    """The largest of ``sizes`` (ascending) for which ``nodes`` (resource -> amount) have room besides the data actors,
    or 0.

    A worker must fit on one node. For the actors only the sum of CPUs counts, of which ``actors_only_cpus`` are on
    nodes where no worker may run.
    """
    slots = sum(
        min(
            how_many_fit(amount, node.get(name, 0.0))
            for name, amount in worker.items()
            if amount > 0
        )
        for node in nodes
    )
    actors_cpus = max(0.0, num_actors * actor_cpus - actors_only_cpus)
    cpus = sum(node.get("CPU", 0.0) for node in nodes) - actors_cpus
    by_cpus = how_many_fit(worker["CPU"], cpus)
    return max((size for size in sizes if size <= min(slots, by_cpus)), default=0)


class ElasticTrainer(InterruptibleTrainer):
    """TorchTrainer under a :class:`GracefulElasticPolicy`."""

    def __init__(
        self,
        *,
        sizes: tuple[int, ...],
        data_actors: tuple[int, float],
        stop_flag: StopFlag,
        run_name: str,
        labels: tuple[Labels, Labels] = (None, None),
        **options: Any,
    ) -> None:
        """``sizes``: allowed numbers of workers, ascending; ``data_actors``: their least number and the CPUs of each;
        ``run_name``: the same in every command for the run; ``labels``: of the nodes for workers, and of those for data
        actors."""
        super().__init__(**options)
        self._policy_arguments = (sizes, data_actors, stop_flag, run_name, labels)

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        options["scaling_policy"] = GracefulElasticPolicy(
            self.scaling_config, *self._policy_arguments
        )
        return super()._initialize_and_run_controller(**options)
