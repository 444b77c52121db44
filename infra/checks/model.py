"""The manifests as the rules see them: clusters, groups of pods, pod templates, and their places in the manifests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from infra.checks.render import Manifest, identity

REPOSITORY = Path(__file__).resolve().parents[2]


class Problem(NamedTuple):
    """One problem of a manifest."""

    where: str
    """Object and field."""
    what: str
    """What was found, what is expected."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Pods(NamedTuple):
    """A pod template."""

    owner: Manifest
    where: str
    """Object and field."""
    role: str
    """head, worker, submitter or job."""
    template: Mapping[str, Any]
    group: Mapping[str, Any]
    """The worker or head group that it belongs to; empty for the others."""

    @property
    def spec(self) -> Mapping[str, Any]:
        """The pod's specification."""
        return section(self.template, "spec")

    @property
    def labels(self) -> Mapping[str, str]:
        """Labels of the pod."""
        return section(self.template, "metadata", "labels")

    @property
    def containers(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Each container that runs all the time, Ray's first, and its place."""
        return self._listed("containers")

    @property
    def init_containers(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Each container that runs before these, and its place."""
        return self._listed("initContainers")

    def _listed(self, key: str) -> list[tuple[str, Mapping[str, Any]]]:
        return [
            (f"{self.where}.spec.{key}[{index}]", container)
            for index, container in enumerate(entries(self.spec, key))
        ]


@dataclass(frozen=True, slots=True)
class Bundle:
    """All objects of one overlay, and what the rules compare them with."""

    name: str
    objects: Sequence[Manifest]
    is_ready: bool = False
    """Whether the manifests are about to be applied. If so, they must not contain a placeholder."""
    documented_secrets: frozenset[str] = field(default=frozenset({"moleblend-object-store"}))
    """Secrets that users make by hand, as infra/README.md says."""

    def of_kind(self, *kinds: str) -> list[Manifest]:
        """The objects of these kinds."""
        return [found for found in self.objects if found.get("kind") in kinds]

    def names(self, kind: str) -> set[str]:
        """Their names."""
        return {found["metadata"]["name"] for found in self.of_kind(kind)}

    def pods(self) -> Iterator[Pods]:
        """Every pod template of every object."""
        for found in self.objects:
            yield from pods_of(found)


def section(node: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The mapping at a path of keys; an empty one if a part of the path is missing or null."""
    for key in keys:
        node = node.get(key) or {}
    return node


def entries(node: Mapping[str, Any], *keys: str) -> list[Any]:
    """The list at a path of keys; an empty one if a part of the path is missing or null."""
    return list(section(node, *keys[:-1]).get(keys[-1]) or [])


def whole(node: Mapping[str, Any], key: str, default: int = 0) -> int:
    """A whole number of a manifest; ``default`` if it is missing or no number, which another rule reports."""
    value = node.get(key, default)
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def cluster_of(manifest: Manifest) -> tuple[str, Mapping[str, Any]] | None:
    """The specification of the cluster in a RayJob or RayCluster, and its place."""
    spec = section(manifest, "spec")
    if manifest.get("kind") == "RayCluster":
        return f"{identity(manifest)} spec", spec
    if manifest.get("kind") == "RayJob" and spec.get("rayClusterSpec"):
        return f"{identity(manifest)} spec.rayClusterSpec", spec["rayClusterSpec"]
    return None


def worker_groups(cluster: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The worker groups of a cluster."""
    return entries(cluster, "workerGroupSpecs")


def pods_of(manifest: Manifest) -> Iterator[Pods]:
    """The pod templates of one object."""
    found = cluster_of(manifest)
    if found is not None:
        where, cluster = found
        head = section(cluster, "headGroupSpec")
        yield Pods(
            manifest, f"{where}.headGroupSpec.template", "head", section(head, "template"), head
        )
        for index, group in enumerate(worker_groups(cluster)):
            place = f"{where}.workerGroupSpecs[{index}].template"
            yield Pods(manifest, place, "worker", section(group, "template"), group)
    spec = section(manifest, "spec")
    if manifest.get("kind") == "RayJob" and "submitterPodTemplate" in spec:
        where = f"{identity(manifest)} spec.submitterPodTemplate"
        yield Pods(manifest, where, "submitter", spec["submitterPodTemplate"], {})
    if manifest.get("kind") in ("Job", "Deployment", "StatefulSet", "DaemonSet"):
        yield Pods(
            manifest, f"{identity(manifest)} spec.template", "job", section(spec, "template"), {}
        )
