"""Where the work runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from moleblend_ray.checks import above, at_least, check_all
from moleblend_ray.settings import typed

_LABEL_PART: Final = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL_KEY: Final = re.compile(rf"(?:[A-Za-z0-9.-]{{1,253}}/)?{_LABEL_PART}")
_LABEL_VALUE: Final = re.compile(_LABEL_PART)


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """The Ray cluster to use, and how much of it."""

    address: str | None = None
    """Ray address to attach to ("auto", "host:6379"), or "local" for a private cluster that
    ends with the command; null attaches to RAY_ADDRESS where set (inside a submitted job), else "local"."""
    num_workers: int = 2
    """Training workers of one pretraining run: one process each, with `use_gpu` one GPU each. A sweep starts as
    many trials as fit into the cluster."""
    min_workers: int | None = None
    """Elastic pretraining: when nodes are lost, go on with the workers that still fit, down to this number, and with more,
    up to `num_workers`, once there is room again. Only numbers that divide `order.num_streams` are used, so the global
    batches stay the same. null: always `num_workers`."""
    resize_interval_s: float = 60.0
    """Seconds between looks at the room for workers; an elastic group changes its size after two that agree."""
    use_gpu: bool = False
    """Give each training worker a GPU (NCCL); otherwise CPU (gloo)."""
    cpus_per_worker: float = 1.0
    """Logical CPUs each training worker reserves."""
    num_data_actors: int = 1
    """Actors of `prepare`, on one CPU each, and of `embed` and `predict`: each of these holds a model of its own, with
    `cpus_per_worker` CPUs and, with `use_gpu`, a GPU. The actors of `pretrain` are those of `stream`."""
    data_labels: dict[str, str] | None = None
    """Labels that a node must carry to run work on data: readers and actors of `prepare`, the actors of `stream`, baselines.
    null: any node. With them, nodes with GPUs are left to those who need one."""
    worker_labels: dict[str, str] | None = None
    """Labels that a node must carry to run a model: training workers, trials, the actors of `embed` and `predict`. null:
    any node with the resources."""
    local_cpus: int | None = None
    """Logical CPUs of a cluster started here; null: the machine's, but never fewer than the job reserves."""
    object_store_gib: float | None = None
    """Object store of a cluster started here, in GiB; null: a tenth of the memory, at most 8 GiB."""

    @property
    def threads_per_worker(self) -> int:
        """Threads that a training worker computes with: one per CPU that it reserves, at least one."""
        return max(1, int(self.cpus_per_worker))

    def __post_init__(self) -> None:
        check_all(
            *_label_checks("data_labels", self.data_labels),
            *_label_checks("worker_labels", self.worker_labels),
            *at_least(self, 1, "num_workers", "num_data_actors"),
            *at_least(self, 0.1, "object_store_gib"),
            *above(self, 0, "resize_interval_s", "cpus_per_worker"),
            (
                self.min_workers is None or 1 <= self.min_workers <= self.num_workers,
                f"min_workers: expected null or 1 to num_workers ({self.num_workers}), found {self.min_workers}",
            ),
            (
                self.local_cpus is None or self.local_cpus >= max(1, self.cpus_per_worker),
                f"local_cpus: expected null or at least 1 and cpus_per_worker ({self.cpus_per_worker:g}), "
                f"found {self.local_cpus}: no worker would ever start",
            ),
        )


def _label_checks(name: str, labels: Mapping[str, str] | None) -> Iterator[tuple[bool, str]]:
    """What Ray and Kubernetes ask of labels. Ray's operators ("!x", "in(x, y)") are not among the values: what they mean for the
    room in a cluster would have to be known here as well."""
    for key, value in (labels or {}).items():
        yield (
            _LABEL_KEY.fullmatch(key) is not None and _LABEL_VALUE.fullmatch(value) is not None,
            f"{name}: expected a label (letters, digits, -, _ and ., at most 63; the key perhaps after PREFIX/), "
            f"found {key}={value}",
        )
