"""A search on a cluster that begins without a node for it; a process of its own, because the cluster is.

    python growing_run.py OUT

The head does no work. What the search asks the autoscaler for is read as an autoscaler would, and nodes are brought in its
place: of one CPU, then of two. Trials wait until all of this is done. Prints one JSON line: [trials that run, requests for a
node] at each stage, and the number of trials at the end.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from nodes import pending_requests
from placement_run import TRAIN, seen
from ray import tune
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import AutoscalingState  # type: ignore[attr-defined]

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.downstream import SweepConfig, TaskConfig
from moleblend_ray.orchestration.cluster.session import quick_start
from moleblend_ray.orchestration.downstream import sweep
from moleblend_ray.orchestration.downstream.searchers import METRIC

NUM_TRIALS = 6


def trial_until(over: Path) -> Any:
    """A trial that runs until this file exists, in place of one that trains a model; its own file beside it says that it runs."""

    def run_trial(drawn: dict[str, Any], **_: Any) -> None:
        over.with_name(f"trial-{drawn['learning_rate']}").touch()
        while not over.exists():
            time.sleep(0.1)
        tune.report({METRIC: 0.5, "epoch": 1, "over": True})

    return run_trial


def main(out: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    head = {"num_cpus": 0, "include_dashboard": False}
    with quick_start():
        cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
    # What an autoscaler of version 2 reports; the nodes are added below.
    state = AutoscalingState(autoscaler_state_version=1)
    GcsClient(address=cluster.address).report_autoscaling_state(state.SerializeToString())
    config = SweepConfig(
        task=TaskConfig(name="esol", source="unused"),
        out=out,
        num_trials=NUM_TRIALS,
        cluster=ClusterConfig(address=cluster.address, worker_labels=TRAIN),
    )
    over = Path(out, "over")
    experiment = SimpleNamespace(task=config.task.resolve())
    bench = SimpleNamespace(experiment=experiment)
    sweep.TrialData = SimpleNamespace(of=lambda _: None)  # type: ignore[assignment, attr-defined]
    sweep.run_trial = trial_until(over)  # type: ignore[attr-defined]
    trials: list[Any] = []
    # Nodes must be started in the main thread (it sets signal handlers), so the search is in another.
    run = threading.Thread(
        target=lambda: trials.extend(sweep.run_trials(config, bench)),  # type: ignore[arg-type]
        daemon=True,
    )
    run.start()
    stages = [stage(cluster.address, out, running=0)]
    for cpus, running in ((1, 1), (2, 3)):
        cluster.add_node(num_cpus=cpus, labels=TRAIN)
        stages.append(stage(cluster.address, out, running=running))
    over.touch()
    run.join(120.0)
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]
    print(json.dumps({"stages": stages, "trials": len(trials)}))


def stage(address: str, out: str, running: int) -> tuple[int, int]:
    """(Trials that run, requests for a node), once so many trials run and another is wanted."""

    def requests() -> list[dict[str, Any]]:
        is_reached = len(list(Path(out).glob("trial-*"))) >= running
        return pending_requests(address) if is_reached else []

    seen(requests, f"{running} trials, and a request for another")
    time.sleep(3.0)  # for more, if there are more
    found = requests()
    assert all(request["labels"] == TRAIN for request in found)
    return len(list(Path(out).glob("trial-*"))), sum(request["count"] for request in found)


if __name__ == "__main__":
    main(*sys.argv[1:])
