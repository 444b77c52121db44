"""The entrypoint of a RayJob: the script exists, its arguments compose, and the cluster holds what they request."""

from __future__ import annotations

import functools
import posixpath
import re
import shlex
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any, Final, NamedTuple

from infra.checks.house import COMPONENT
from infra.checks.model import (
    REPOSITORY,
    Bundle,
    Pods,
    Problem,
    cluster_of,
    entries,
    pods_of,
    section,
    whole,
    worker_groups,
)
from infra.checks.quantity import amount
from infra.checks.render import Manifest, identity
from moleblend_ray.cli import JOBS, load_reference
from moleblend_ray.config.compose import load_config
from moleblend_ray.config.paths import path_settings
from moleblend_ray.errors import ConfigError

HOME: Final = "/home/ray/moleblend-ray"
"""Where infra/docker/Dockerfile puts jobs/."""
_SHELL: Final = re.compile(r"[$`'\"\\;&|<>(){}*?~#!]")
"""Characters with a meaning in a shell. Ray passes the entrypoint to one on the head node, and Kubernetes replaces `$(NAME)` in the
arguments of the submitter."""

_SHARED_VOLUMES: Final = frozenset({"persistentVolumeClaim", "nfs", "csi"})
"""Kinds of volumes that several pods may have in common."""


class Room(NamedTuple):
    """The resources of the nodes with some labels, after the autoscaler has added all nodes that it may add."""

    pods: int
    cpus: Decimal
    """Of each pod."""
    gpus: Decimal
    """Of each pod."""
    fixed: bool
    """There are never fewer pods than this."""

    def slots(self, cpus: float, gpus: float) -> int:
        """How many workers fit at once."""
        fits = [int(self.cpus // Decimal(str(cpus)))]
        if gpus:
            fits.append(int(self.gpus / Decimal(str(gpus))))
        return self.pods * min(fits)


def problems(bundle: Bundle) -> Iterator[Problem]:
    """Everything that is wrong with the jobs of these manifests."""
    for manifest in bundle.of_kind("RayJob"):
        yield from _job(manifest)


def _job(manifest: Manifest) -> Iterator[Problem]:
    where = f"{identity(manifest)} spec.entrypoint"
    entrypoint = str(manifest["spec"].get("entrypoint", ""))
    if odd := _SHELL.search(entrypoint):
        yield Problem(
            where,
            f"{odd[0]!r} means something to the shell that reads it: use arguments without it",
        )
        return
    python, script, *overrides = [*shlex.split(entrypoint), "", ""]
    overrides = overrides[:-2]
    name = script.removeprefix(f"{HOME}/jobs/").removesuffix(".py")
    if python != "python" or script != f"{HOME}/jobs/{name}.py":
        yield Problem(where, f"expected python {HOME}/jobs/JOB.py, found {python} {script}")
        return
    if name not in JOBS or not (REPOSITORY / "jobs" / f"{name}.py").is_file():
        yield Problem(where, f"no job {name!r}: jobs/ has no such script")
        return
    component = section(manifest["metadata"], "labels").get(COMPONENT)
    if component != name:
        yield Problem(
            f"{identity(manifest)} metadata.labels",
            f"{COMPONENT}: expected {name!r}, the job, found {component!r}",
        )
    try:
        config = _config(name, tuple(overrides))
    except ConfigError as error:
        yield Problem(where, f"its arguments are refused: {' '.join(str(error).split())}")
        return
    yield from _paths(manifest, name, config)
    yield from _fits(manifest, name, config)


@functools.cache
def _config(name: str, overrides: tuple[str, ...]) -> Any:
    """What the arguments of a job say. Composing them is most of the time of a check, and overlays have them in common."""
    return load_config(load_reference(JOBS[name].config), name, overrides)


def _paths(manifest: Manifest, name: str, config: Any) -> Iterator[Problem]:
    where = f"{identity(manifest)} spec.entrypoint"
    for key, path in path_settings(config).items():
        if key == "tracking.dir":
            continue
        if "://" not in path:
            yield Problem(
                where, f"{key}={path}: expected a URI: each pod would look on a disk of its own"
            )
        elif path.startswith("file://"):
            for pods in pods_of(manifest):
                if pods.role in ("head", "worker") and not _shares(pods, path):
                    yield Problem(
                        f"{pods.where}.spec.containers[0].volumeMounts",
                        f"{key}={path}: expected a shared volume there: each pod would use a disk of its own, which is deleted with it",
                    )
    run = manifest["metadata"]["name"].removeprefix(f"moleblend-{name}-")
    # A retry on a new cluster finds its work only by `out`; two runs with the same `out` would be one run.
    if name != "prepare" and run not in str(config.out).split("/"):
        yield Problem(
            where, f"out={config.out}: expected the run's name, {run}, as a part of the path"
        )


def _shares(pods: Pods, uri: str) -> bool:
    """Whether Ray's container has a volume that other pods can have as well at this ``file://`` URI."""
    volumes = {volume.get("name"): volume for volume in entries(pods.spec, "volumes")}
    mounts = [mount for _, found in pods.containers[:1] for mount in entries(found, "volumeMounts")]
    path = PurePosixPath(posixpath.normpath(uri.removeprefix("file://")))
    around = [mount for mount in mounts if path.is_relative_to(str(mount.get("mountPath")))]
    if not around:
        return False
    innermost = max(around, key=lambda mount: len(str(mount["mountPath"])))
    return bool(set(volumes.get(innermost.get("name"), {})) & _SHARED_VOLUMES)


def _fits(manifest: Manifest, name: str, config: Any) -> Iterator[Problem]:
    found = cluster_of(manifest)
    if found is None:
        return
    where, cluster = found
    data = _room(cluster, config.cluster.data_labels)
    train = _room(cluster, config.cluster.worker_labels)
    if data is None:
        yield Problem(
            f"{where}.workerGroupSpecs",
            f"no group has the labels {config.cluster.data_labels} (cluster.data_labels)",
        )
        return
    if name == "prepare":
        yield from _data_fits(
            where, data, config.cluster.num_data_actors, 1.0, "cluster.num_data_actors"
        )
        return
    if train is None:
        yield Problem(
            f"{where}.workerGroupSpecs",
            f"no group has the labels {config.cluster.worker_labels} (cluster.worker_labels)",
        )
        return
    if bool(train.gpus) != config.cluster.use_gpu:
        yield Problem(
            f"{where}.workerGroupSpecs",
            f"{int(train.gpus)} GPUs a pod of the train group, and cluster.use_gpu={str(config.cluster.use_gpu).lower()}",
        )
        return
    yield from _models_fit(where, name, config, train)
    if name == "pretrain":
        most = config.stream.max_actors
        if most is None:
            yield Problem(
                f"{where}",
                "stream.max_actors: expected a number: with the autoscaler the cluster's size is no bound",
            )
        else:
            yield from _data_fits(where, data, most, config.stream.actor_cpus, "stream.max_actors")
        yield from _cache_fits(where, cluster, config)


def _data_fits(where: str, data: Room, actors: int, cpus: float, setting: str) -> Iterator[Problem]:
    if actors > data.slots(cpus, 0):
        yield Problem(
            f"{where}.workerGroupSpecs",
            f"{setting}={actors}: the data group has room for {data.slots(cpus, 0)} at most",
        )


def _models_fit(where: str, name: str, config: Any, train: Room) -> Iterator[Problem]:
    gpus = 0.0
    if config.cluster.use_gpu:
        gpus = config.gpus_per_worker if name in ("sweep", "finetune") else 1.0
    slots = train.slots(config.cluster.cpus_per_worker, gpus)
    setting, wanted = {
        "pretrain": ("cluster.num_workers", config.cluster.num_workers),
        "embed": ("cluster.num_data_actors", config.cluster.num_data_actors),
        "predict": ("cluster.num_data_actors", config.cluster.num_data_actors),
    }.get(name, ("one training at a time", 1))
    if wanted > slots:
        yield Problem(
            f"{where}.workerGroupSpecs",
            f"{setting}={wanted} with {config.cluster.cpus_per_worker:g} CPUs each: the train group has room for {slots} at most",
        )
    if name == "pretrain" and config.cluster.min_workers is None and not train.fixed:
        yield Problem(
            f"{where}.workerGroupSpecs",
            "expected minReplicas = maxReplicas for training that is not elastic: it needs all pods at once",
        )


def _cache_fits(where: str, cluster: Mapping[str, Any], config: Any) -> Iterator[Problem]:
    """The row groups that the actors of a pod share lie in /dev/shm, beside the object store."""
    for index, group in enumerate(worker_groups(cluster)):
        if not _carries(group, config.cluster.data_labels):
            continue
        volumes = entries(group, "template", "spec", "volumes")
        shared: Mapping[str, Any] = next(
            (v["emptyDir"] for v in volumes if section(v, "emptyDir").get("medium") == "Memory"),
            {},
        )
        size = amount(shared.get("sizeLimit"))
        store = amount(section(group, "rayStartParams").get("object-store-memory"))
        if size is not None and store is not None and store + config.stream.cache_bytes > size:
            yield Problem(
                f"{where}.workerGroupSpecs[{index}]",
                f"/dev/shm of {shared['sizeLimit']} holds object store and stream.cache_bytes together: {(store + config.stream.cache_bytes) / 2**30:.2f} GiB",
            )


def _carries(group: Mapping[str, Any], labels: Mapping[str, str] | None) -> bool:
    return dict(labels or {}).items() <= section(group, "labels").items()


def _room(cluster: Mapping[str, Any], labels: Mapping[str, str] | None) -> Room | None:
    """The one group with ``labels``; None if there is none."""
    for group in worker_groups(cluster):
        if not _carries(group, labels):
            continue
        cpus, gpus = _of_each_pod(group)
        is_fixed = not cluster.get("enableInTreeAutoscaling")
        most = whole(group, "replicas" if is_fixed else "maxReplicas")
        fixed = is_fixed or whole(group, "minReplicas") == most
        return Room(most, cpus, gpus, fixed)
    return None


def _of_each_pod(group: Mapping[str, Any]) -> tuple[Decimal, Decimal]:
    """CPUs and GPUs of a pod of the group for Ray: what its parameters or resources say, else the limits of its container."""
    containers = entries(group, "template", "spec", "containers") or [{}]
    limits = section(containers[0], "resources", "limits")
    gpus = sum(
        (amount(value) or Decimal(0) for key, value in limits.items() if key.endswith("/gpu")),
        Decimal(0),
    )
    parameters, resources = section(group, "rayStartParams"), section(group, "resources")
    told_cpus = parameters.get("num-cpus", resources.get("CPU", limits.get("cpu")))
    told_gpus = parameters.get("num-gpus", resources.get("GPU", gpus))
    return amount(told_cpus) or Decimal(0), amount(told_gpus) or Decimal(0)
