"""A pretraining run on a cluster that has no node for it yet; a process of its own, because the cluster is.

    python placement_run.py DATA OUT

The head does no work. What the run asks the autoscaler for is read as an autoscaler would, and nodes are brought in its place:
first one for workers, then one for data. Prints one JSON line: what was asked for, and on which kind of node each actor ran.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import elastic_run
import ray
import ray._private.state
from nodes import actor_nodes, pending_requests
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import AutoscalingState  # type: ignore[attr-defined]

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.data.config import StreamConfig
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.orchestration.cluster.session import quick_start
from moleblend_ray.orchestration.pretraining.pretrain import pretrain
from moleblend_ray.training.config import CheckpointConfig, TrainConfig

NUM_STEPS = 8
DATA, TRAIN = {"moleblend-role": "data"}, {"moleblend-role": "train"}
LIMIT_S = 120.0


def settings(data: str, out: str) -> PretrainConfig:
    """Two workers, one data actor; any node has room for all of them, but for the labels."""
    return replace(
        elastic_run.settings(data, out),
        model=ModelConfig(
            num_layers=1, dim=32, ffn_dim=64, num_heads=4, num_kernels=16, pair_dim=8
        ),
        stream=StreamConfig(micro_batch_size=16, steps_per_block=2, min_actors=2, max_actors=2),
        train=TrainConfig(num_steps=NUM_STEPS, validate_every=0),
        checkpoint=CheckpointConfig(every_steps=NUM_STEPS),
        cluster=ClusterConfig(num_workers=2, data_labels=DATA, worker_labels=TRAIN),
    )


def seen(look: Callable[[], list[dict[str, Any]]], what: str) -> list[dict[str, Any]]:
    """What ``look`` finds, once it finds something."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := look()):
        if time.monotonic() > deadline:
            raise SystemExit(f"not in time: {what}")
        time.sleep(0.2)
    return found


def main(data: str, out: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    head = {"num_cpus": 0, "include_dashboard": False}
    with quick_start():
        cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
    # Without an autoscaler, such a cluster is refused at once. This is what one of version 2 reports; the nodes are added below.
    state = AutoscalingState(autoscaler_state_version=1)
    GcsClient(address=cluster.address).report_autoscaling_state(state.SerializeToString())
    summaries: list[Any] = []
    # Nodes must be started in the main thread (it sets signal handlers), so the run is in another.
    run = threading.Thread(
        target=lambda: summaries.append(pretrain(settings(data, out))), daemon=True
    )
    run.start()
    for_workers = seen(
        lambda: [r for r in pending_requests(cluster.address) if r["together"]],
        "a request for nodes of workers",
    )
    cluster.add_node(num_cpus=8, labels=TRAIN)
    for_data = seen(
        lambda: [
            r
            for r in pending_requests(cluster.address)
            if r["labels"] == DATA and not r["together"]
        ],
        "a request for nodes of data actors",
    )
    cluster.add_node(num_cpus=8, labels=DATA)
    run.join(LIMIT_S)
    (summary,) = summaries
    found = {
        "summary": asdict(summary),
        "for_workers": for_workers,
        "for_data": for_data,
        "actors": actor_nodes(),
    }
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]
    # Ray prints what it has to say until its end.
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
