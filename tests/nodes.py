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
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    deadline_ms = int((time.time() + seconds) * 1000)
    accepted, reason = GcsClient(address=address).drain_node(
        node_id, 2, "spot instance", deadline_ms
    )
    if not accepted:
        raise SystemExit(f"the node refuses to drain: {reason}")


def pending_requests(address: str) -> list[dict[str, Any]]:
    """What the cluster (its head at ``address``) lacks, as its autoscaler is told: resources, labels and number of each kind of
    request, and whether all must come together (a placement group)."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    state = get_cluster_resource_state(GcsClient(address=address))
    found = [
        {**_request(pending.request), "count": pending.count, "together": False}
        for pending in state.pending_resource_requests
    ]
    for gang in state.pending_gang_resource_requests:
        # Several selectors are alternatives; Ray's autoscaler knows one so far.
        (bundles,) = gang.bundle_selectors
        found += [
            {**_request(request), "count": 1, "together": True}
            for request in bundles.resource_requests
        ]
    return found


def _request(request: Any) -> dict[str, Any]:
    labels = {
        constraint.label_key: constraint.label_values[0]
        for selector in request.label_selectors
        for constraint in selector.label_constraints
    }
    return {"resources": dict(request.resources_bundle), "labels": labels}


def actor_nodes() -> dict[str, list[str]]:
    """Class of each actor so far -> roles (label ``moleblend-role``; "head" without) of the nodes it ran on."""
    import ray
    import ray._private.state

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    roles = {node["NodeID"]: node["Labels"].get("moleblend-role", "head") for node in nodes}
    found: dict[str, set[str]] = {}
    for actor in ray._private.state.actors().values():
        role = roles.get(actor["Address"]["NodeID"])
        if role is not None:
            found.setdefault(actor["ActorClassName"], set()).add(role)
    return {name: sorted(places) for name, places in found.items()}
