"""Refuses a cluster on which a command would wait forever or lose what it writes; knows whether the cluster may grow."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ray
import ray.experimental.internal_kv
from ray.autoscaler.v2.sdk import get_cluster_status

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.errors import ConfigError
from moleblend_ray.orchestration.cluster.placement import (
    Labels,
    cluster_resources,
    label_text,
    labels_seen,
    live_nodes,
)

logger = logging.getLogger(__name__)


class Need(NamedTuple):
    """What must be in the cluster at the same time."""

    what: str
    """Who needs it, for messages."""
    resources: Mapping[str, float]
    """Ray resource -> amount; without any, a node with the labels is enough."""
    labels: Labels = None
    """Labels that the nodes must have."""
    setting: str = ""
    """Setting of `cluster` that asks for these labels."""


def require_room(*needs: Need, together: Need | None = None) -> None:
    """Refuse a cluster that has less than one of ``needs``, or than all of them ``together``, as Ray would wait forever.

    If an autoscaler may add nodes, a single warning says what the command waits for, and what to do if nothing comes.
    """
    lacks = [lack for need in needs if (lack := _lack(need)) is not None]
    # It has no news for those who know what is lacking to each.
    if not lacks and together is not None and (lack := _lack(together)) is not None:
        lacks = [lack]
    if not lacks:
        return
    problems = "; ".join(lack.problem for lack in lacks)
    remedy = _remedy(lacks)
    if not may_grow():
        raise ConfigError(f"{problems}: the work would wait for ever. {remedy}")
    logger.warning(
        "waiting until the autoscaler has added nodes: %s. If none come (`ray status` tells why), end this command. %s",
        problems,
        remedy,
    )


class _Lack(NamedTuple):
    """What the cluster lacks."""

    problem: str
    labels_setting: str | None
    """Setting with labels that no node has; None: nodes have too little."""


def _remedy(lacks: Sequence[_Lack]) -> str:
    settings = [f"cluster.{lack.labels_setting}=null" for lack in lacks if lack.labels_setting]
    remedies = []
    if settings:
        remedies.append(
            "Label nodes (`labels` of a KubeRay worker group, `ray start --labels`), or let the work run anywhere with "
            f"{' '.join(settings)}"
        )
    if len(settings) < len(lacks):
        remedies.append(
            "Add nodes to the cluster, or ask for less with cluster.num_workers, cluster.cpus_per_worker, "
            "cluster.use_gpu, stream.min_actors or stream.actor_cpus"
        )
    return ". ".join(remedies)


def _lack(need: Need) -> _Lack | None:
    """What the cluster lacks of a need; None if it has everything."""
    if need.labels and not live_nodes(need.labels):
        amounts = _amounts_text(need.resources)
        wanted = f", where {need.what} need {amounts}" if amounts else ""
        return _Lack(
            f"cluster.{need.setting}: no node of the cluster has the label {label_text(need.labels)}{wanted} "
            f"(labels of its nodes: {labels_seen()})",
            need.setting,
        )
    there = cluster_resources(need.labels)
    missing = {
        name: amount for name, amount in need.resources.items() if amount > there.get(name, 0.0)
    }
    if not missing:
        return None
    whose = f"its nodes with {label_text(need.labels)} have" if need.labels else "the cluster has"
    has = _amounts_text({name: there.get(name, 0.0) for name in missing})
    return _Lack(
        f"cluster: {need.what} need {_amounts_text(missing)} at the same time ({whose} {has})",
        None,
    )


def _amounts_text(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


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
