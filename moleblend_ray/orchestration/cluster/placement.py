"""Which work runs on which nodes: data work on nodes with `cluster.data_labels`, models on those with
`cluster.worker_labels`.

Ray's scheduler runs tasks, actors and placement groups on nodes with given labels, and tells its autoscaler which
labels are missing. Custom resources could do the same, but have amounts, which would have to be right for each kind of
node. A request for GPUs brings workers to nodes with GPUs, but does not keep data actors away from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import ray
import ray.data

_RAY_UNITS: Final = 10_000
"""Ray's units of a resource in one CPU or GPU."""

Labels = Mapping[str, str] | None
"""Labels that a node must have, all of them; None or empty: any node."""


def placed(labels: Labels) -> dict[str, Any]:
    """Options of ``ray.remote`` and ``map_batches`` with which work runs only on nodes with ``labels``."""
    return {"label_selector": dict(labels)} if labels else {}


def place_dataset(dataset: ray.data.Dataset, labels: Labels) -> None:
    """Run every task and actor of ``dataset`` only on nodes with ``labels``."""
    if labels:
        dataset.context.execution_options.label_selector = dict(labels)


def carries(node: Mapping[str, Any], labels: Labels) -> bool:
    """Whether a node, as ``ray.nodes`` describes it, has all of ``labels``."""
    return all(node.get("Labels", {}).get(key) == value for key, value in (labels or {}).items())


def live_nodes(labels: Labels = None) -> list[dict[str, Any]]:
    """Live nodes that have ``labels``, as ``ray.nodes`` describes them."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"] and carries(node, labels)]


def resources_of(nodes: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Resource -> amount that ``nodes`` have together, whether in use or not."""
    found: dict[str, float] = {}
    for node in nodes:
        for name, amount in node["Resources"].items():
            found[name] = found.get(name, 0.0) + amount
    return found


def cluster_resources(labels: Labels = None) -> dict[str, float]:
    """Resource -> amount of the whole cluster, or of its nodes with ``labels``."""
    if labels:
        return resources_of(live_nodes(labels))
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def how_many_fit(need: float, there: float) -> int:
    """How many times ``need`` of a resource, more than 0, is in ``there``. Ray counts ten-thousandths; of floats, 1 // 0.2 is 4."""
    return round(there * _RAY_UNITS) // max(1, round(need * _RAY_UNITS))


def label_text(labels: Labels) -> str:
    """``labels`` as text for people."""
    return ", ".join(f"{key}={value}" for key, value in (labels or {}).items())


def labels_seen() -> str:
    """The labels of the live nodes, for messages. Those that Ray sets itself are left out."""
    texts = {
        label_text({k: v for k, v in node.get("Labels", {}).items() if not k.startswith("ray.io/")})
        for node in live_nodes()
    }
    return "; ".join(sorted(texts - {""})) or "none"
