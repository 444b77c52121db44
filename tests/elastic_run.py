"""A run on a cluster that loses nodes and gets new ones; a process of its own, because the cluster is.

    python elastic_run.py DATA OUT [fixed|starved]

The nodes of a worker: one is told to drain, a new one comes, then one dies. Until then the workers pause after each step, so
that the cores are free for what starts meanwhile. Prints one JSON line: the summary, and the world size that wrote each
checkpoint. With `fixed` the number of workers is fixed: a node dies, and while the run waits for another, SIGTERM comes. With `starved`
they start again on the CPU that the data actor had, and it comes while they wait for data.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from nodes import drain, has_worker
from ray.cluster_utils import Cluster

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.data.config import OrderConfig, StreamConfig
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.orchestration.cluster.session import quick_start
from moleblend_ray.orchestration.pretraining import pretrain as driver
from moleblend_ray.orchestration.pretraining import pretrain_worker
from moleblend_ray.orchestration.pretraining.pretrain import pretrain
from moleblend_ray.training.commits import committed_steps, read_commit
from moleblend_ray.training.config import (
    CheckpointConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
)
from moleblend_ray.training.loop import Hooks, fit
from moleblend_ray.training.metrics import Record

NUM_STEPS = 70
EVERY = 5
PAUSE_S = 0.5
"""After each step: 35 seconds in all for nodes to come and go, besides the starts of workers. About 12 were seen to be used."""
LIMIT_S = 120.0
QUICK_TO_SEE_A_LOST_NODE = {
    "health_check_initial_delay_ms": 1000,
    # Twelve seconds for a node that does not answer, one for a node that refuses connections.
    "health_check_period_ms": 250,
    "health_check_timeout_ms": 2750,
    "health_check_failure_threshold": 4,
}


def settings(data: str, out: str) -> PretrainConfig:
    return PretrainConfig(
        data=data,
        out=out,
        seed=5,
        order=OrderConfig(global_batch_size=64, num_streams=2, shuffle_window=64, chunk_rows=32),
        stream=StreamConfig(
            micro_batch_size=32, steps_per_block=4, min_actors=1, max_actors=1, actor_cpus=1
        ),
        model=ModelConfig(
            num_layers=2,
            dim=64,
            ffn_dim=64,
            num_heads=4,
            num_kernels=16,
            pair_dim=8,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            drop_path=0.0,
        ),
        optim=OptimConfig(learning_rate=1e-4, warmup_steps=20),
        train=TrainConfig(num_steps=NUM_STEPS, validate_every=0, max_failures=3),
        checkpoint=CheckpointConfig(every_steps=EVERY, keep_last=1000),
        tracking=TrackingConfig(mode="disabled"),
        cluster=ClusterConfig(num_workers=2, min_workers=1, resize_interval_s=1.0),
    )


def train_with_pauses(arguments: dict[str, Any]) -> Any:
    """In place of the workers' function; Ray sends them what `__main__` defines."""
    over = hurry_file(arguments["settings"].config.out)

    def slowly(*arguments: Any, hooks: Hooks, **settings: Any) -> Any:
        def then(record: Record) -> None:
            hooks.on_step(record)
            if not over.exists():
                time.sleep(PAUSE_S)

        return fit(*arguments, hooks=replace(hooks, on_step=then), **settings)

    with mock.patch.object(pretrain_worker, "fit", slowly):
        return pretrain_worker.train_worker(arguments)


def hurry_file(out: str) -> Path:
    """Whose existence ends the pauses."""
    return Path(f"{out.removeprefix('file://')}.hurry")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"not in time: {what}")
        time.sleep(0.1)


def world_sizes(out: str) -> dict[int, int]:
    """Step of each checkpoint -> ranks that wrote it."""
    return {step: read_commit(out, step).world_size for step in sorted(committed_steps(out))}


def writers(out: str) -> list[int]:
    """World sizes of the checkpoints so far, in order, each change once."""
    return [size for size, _ in groupby(world_sizes(out).values())]


def start_cluster(labels: dict[str, str] | None = None) -> tuple[Cluster, list[Any]]:
    """A head and two nodes with ``labels``, of one CPU each."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    driver.train_worker = train_with_pauses  # type: ignore[attr-defined]
    head = {
        "num_cpus": 1,
        "include_dashboard": False,
        "_system_config": QUICK_TO_SEE_A_LOST_NODE,
    }
    with quick_start():
        cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1, labels=labels or {}) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
    return cluster, nodes


def main(data: str, out: str) -> None:
    cluster, nodes = start_cluster()
    summaries: list[Any] = []
    # Nodes must be started in the main thread (it sets signal handlers), so the run is in another.
    run = threading.Thread(
        target=lambda: summaries.append(pretrain(settings(data, out))), daemon=True
    )
    run.start()
    wait_until(lambda: writers(out) == [2], "a checkpoint of two workers")
    # Head and nodes have one CPU each, for two workers and the data actor: one node at least has a worker.
    draining = next(node for node in nodes if has_worker(node))
    drain(cluster.address, draining.node_id, seconds=600.0)
    wait_until(lambda: writers(out) == [2, 1], "a checkpoint of one worker")
    nodes.append(cluster.add_node(num_cpus=1))
    wait_until(lambda: writers(out) == [2, 1, 2], "a checkpoint of two workers again")
    nodes.remove(draining)
    cluster.remove_node(next(node for node in nodes if has_worker(node)), allow_graceful=False)
    hurry_file(out).touch()
    run.join(LIMIT_S)
    (summary,) = summaries
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]
    # Ray prints what it has to say about lost nodes until its end.
    print(json.dumps({"summary": asdict(summary), "world_sizes": world_sizes(out)}))


def wait_in_vain(data: str, out: str, labels: dict[str, str] | None) -> None:
    """Two workers, no more and no fewer, of which one is lost for good; with ``labels`` none may run on the head, so its CPU
    stays with the data actor."""
    cluster, nodes = start_cluster(labels)
    config = settings(data, out)
    fixed = replace(config.cluster, min_workers=None, worker_labels=labels or {})
    config = replace(config, cluster=fixed)

    def disturb() -> None:
        wait_until(lambda: writers(out) == [2], "a checkpoint of two workers")
        lost = next(node for node in nodes if has_worker(node))
        cluster.remove_node(lost, allow_graceful=False)
        left = [node for node in (cluster.head_node, *nodes) if node is not lost]
        wait_until(lambda: not any(map(has_worker, left)), "the end of the other worker")
        if not labels:
            wait_until(lambda: all(map(has_worker, left)), "new workers on every CPU")
        asked_s.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    asked_s: list[float] = []
    # The other way round than above: signals reach the main thread.
    threading.Thread(target=disturb, daemon=True).start()
    summary = pretrain(config)
    waited_s = time.monotonic() - asked_s[0]
    newest = max(committed_steps(out))
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]
    print(json.dumps({"summary": asdict(summary), "newest": newest, "waited_s": waited_s}))


if __name__ == "__main__":
    data, out, *mode = sys.argv[1:]
    if mode == ["fixed"]:
        wait_in_vain(data, out, {"role": "worker"})
    elif mode == ["starved"]:
        wait_in_vain(data, out, None)
    else:
        main(data, out)
