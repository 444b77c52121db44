"""Rules for the nodes that pods ask for: GPUs go where they are used, spot nodes to what may be lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from infra.checks.model import (
    Bundle,
    Pods,
    Problem,
    cluster_of,
    entries,
    pods_of,
    section,
    worker_groups,
)
from infra.checks.quantity import amount
from infra.checks.render import Manifest

_SPOT_TAINTS: Final = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority")
_SPOT_LABELS: Final = (
    *_SPOT_TAINTS,
    "eks.amazonaws.com/capacityType",
    "karpenter.sh/capacity-type",
)
_REQUIRED: Final = ("affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution")


def problems(bundle: Bundle) -> Iterator[Problem]:
    """All violations of these rules."""
    for manifest in bundle.of_kind("RayJob", "RayCluster"):
        for pods in pods_of(manifest):
            yield from _gpus(pods)
            if pods.role in ("head", "submitter"):
                yield from _stays(manifest, pods)


def _gpus(pods: Pods) -> Iterator[Problem]:
    """GPUs of pods that do not use them, or whose image cannot."""
    for where, container in pods.containers:
        limits = section(container, "resources", "limits")
        if not any(amount(count) for name, count in limits.items() if name.endswith("/gpu")):
            continue
        is_for_data = section(pods.group, "labels").get("moleblend-role") == "data"
        if pods.role != "worker" or is_for_data:
            yield Problem(
                f"{where}.resources",
                "expected no GPU: only the train group computes on GPUs, and this one would be paid for and idle",
            )
        image = str(container.get("image", ""))
        if image.partition("@")[0].endswith("-cpu"):
            yield Problem(
                f"{where}.image",
                f"expected the image with CUDA for a pod with a GPU, found {image!r}",
            )


def _stays(manifest: Manifest, pods: Pods) -> Iterator[Problem]:
    """A head or submitter that may get a spot node: its loss ends the run, or one of its few tries."""
    found = cluster_of(manifest)
    if found is None:
        return
    place = f"{pods.where}.spec"
    taints = [entry.get("key") for entry in entries(pods.spec, "tolerations")]
    if set(taints) & set(_SPOT_TAINTS):
        yield Problem(
            f"{place}.tolerations",
            f"expected no spot node for the {pods.role}: its loss ends the run",
        )
    wanted = {
        label
        for group in worker_groups(found[1])
        for label in _spot_labels(section(group, "template", "spec"), "In")
    }
    # Not all clouds taint their spot nodes, so only an affinity keeps other pods away from them everywhere.
    if open_to_it := wanted - _spot_labels(pods.spec, "NotIn"):
        yield Problem(
            f"{place}.affinity",
            f"expected operator NotIn for {sorted(open_to_it)}, by which the workers ask for spot nodes: the loss of the "
            f"{pods.role} ends the run",
        )


def _spot_labels(pod: Mapping[str, Any], operator: str) -> set[str]:
    """Labels of spot nodes that the required affinity of the pod names with this operator."""
    return {
        expression["key"]
        for term in entries(section(pod, *_REQUIRED), "nodeSelectorTerms")
        for expression in entries(term, "matchExpressions")
        if expression.get("operator") == operator and expression.get("key") in _SPOT_LABELS
    }
