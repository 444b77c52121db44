"""Nodes of a simulated cluster: which one has a worker, and telling one that it will be taken away."""

from __future__ import annotations

import time
from typing import Any


def has_worker(node: Any) -> bool:
    """Whether a training worker runs on the node (of ``ray.cluster_utils.Cluster``)."""
    import psutil  # Ray brings its own copy

    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return any("TrainWorker" in title(child) for child in raylet.children())


def title(process: Any) -> str:
    """The command line of a process, "" if it has ended."""
    import psutil  # Ray brings its own copy

    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def drain(address: str, node_id: str, seconds: float) -> None:
    """Tell Ray (its head at ``address``) that the node will be gone, as an autoscaler does after a spot instance's notice."""
    from ray._raylet import GcsClient

    deadline_ms = int((time.time() + seconds) * 1000)
    accepted, reason = GcsClient(address=address).drain_node(
        node_id, 2, "spot instance", deadline_ms
    )
    if not accepted:
        raise SystemExit(f"the node refuses to drain: {reason}")
