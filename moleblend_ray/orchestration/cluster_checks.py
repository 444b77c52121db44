"""Refuses a cluster on which a command would wait forever or lose what it writes; knows whether the cluster may grow."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

import ray
import ray.experimental.internal_kv
from ray.autoscaler.v2.sdk import get_cluster_status

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.errors import ConfigError
from moleblend_ray.orchestration.placement import (
    Labels,
    cluster_resources,
    label_text,
    labels_seen,
    live_nodes,
)

logger = logging.getLogger(__name__)


def require_resources(need: Mapping[str, float], what: str, labels: Labels = None) -> None:
    """Refuse a cluster whose nodes (those with `labels`) have less than `need` (Ray resource -> amount) for `what`.

    Ray would wait forever. If an autoscaler may add nodes, a log line says that the command waits.
    """
    there = cluster_resources(labels)
    whose = f"its nodes with {label_text(labels)} have" if labels else "the cluster has"
    missing = [
        f"{amount:g} {name} ({whose} {there.get(name, 0.0):g})"
        for name, amount in need.items()
        if amount > there.get(name, 0.0)
    ]
    if not missing:
        return
    message = f"{what} need {', '.join(missing)} at the same time"
    if not may_grow():
        raise ConfigError(
            f"cluster: {message}: they would wait for ever. Add nodes to the cluster, or ask for less with "
            "cluster.num_workers, cluster.cpus_per_worker, cluster.use_gpu, stream.min_actors or stream.actor_cpus"
        )
    logger.warning("%s: waiting until the autoscaler has added nodes", message)


def require_labels(setting: str, labels: Labels) -> None:
    """Refuse a cluster without a node with `labels`, the value of `setting`, unless an autoscaler may add one."""
    if not labels or live_nodes(labels):
        return
    message = (
        f"cluster.{setting}: no node of the cluster has the label {label_text(labels)} "
        f"(labels of its nodes: {labels_seen()})"
    )
    if not may_grow():
        raise ConfigError(
            f"{message}. Label nodes (`labels` of a KubeRay worker group, `ray start --labels`), "
            f"or let the work run anywhere with cluster.{setting}=null"
        )
    logger.warning("%s: waiting until the autoscaler has added one", message)


def warn_of_unused_gpus(cluster: ClusterConfig) -> None:
    """Say that a cluster has GPUs which the job does not ask for: on its CPUs a model trains hundreds of times slower."""
    gpus = cluster_resources().get("GPU", 0.0)
    if gpus and not cluster.use_gpu:
        logger.warning(
            "the cluster has %g GPUs and this job uses none: add cluster=gpu (or cluster.use_gpu=true) to use them",
            gpus,
        )


def require_shared_paths(paths: Mapping[str, str]) -> None:
    """Refuse plain local paths (setting -> path or URI) on a cluster of several machines, each with its own disk."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    num_nodes = sum(bool(node["Alive"]) for node in nodes)
    local = [f"{key}={path}" for key, path in paths.items() if "://" not in path]
    if num_nodes > 1 and local:
        raise ConfigError(
            f"{', '.join(local)}: a local path, but the cluster has {num_nodes} nodes, and each would look on its own "
            "disk. Use storage that all nodes reach (s3://, gs://), or file:///PATH for a folder mounted on all"
        )


def may_grow() -> bool:
    """Whether the cluster has an autoscaler, as far as Ray reports."""
    import ray._private.state

    config = ray._private.state.state.get_cluster_config()
    groups = config.node_group_configs if config else ()
    if any(group.max_count == -1 or group.max_count > group.min_count for group in groups):
        return True
    # Autoscalers of version 1 that report no configuration report the types of their nodes. Without an autoscaler, Ray gives
    # each node a type of its own.
    status = ray.experimental.internal_kv._internal_kv_get("__autoscaling_status")
    report = (json.loads(status).get("autoscaler_report") or {}) if status else {}
    if any(not kind.startswith("node_") for kind in report.get("active_nodes") or {}):
        return True
    # Those of version 2 report nothing there. Their version counts what they did with nodes, beginning with the head node; without
    # one, or with a monitor that only looks, it is 0.
    found = get_cluster_status(ray.get_runtime_context().gcs_address)
    return int(found.stats.autoscaler_version or 0) > 0
