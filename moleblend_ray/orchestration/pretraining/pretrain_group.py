"""What the driver of a pretraining, Ray Train's controller and the workers tell each other, and the stream that the controller starts.

The controller loads this module at each start of a trainer, before any worker: it must not import what only workers need.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray.data import Dataset

from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.data.dataset.manifest import Manifest
from moleblend_ray.errors import MoleBlendError
from moleblend_ray.orchestration.pretraining.stopping import StopFlag, StopReason
from moleblend_ray.orchestration.progress import logs
from moleblend_ray.orchestration.progress.progress import Reporter
from moleblend_ray.orchestration.streaming.stream import stream_dataset
from moleblend_ray.orchestration.streaming.stream_metrics import publish_stream
from moleblend_ray.training.commits import latest_committed


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerOutcome:
    """What the first worker returns to the driver."""

    step: int
    world_size: int
    stopped_by: StopReason = ""
    """Why the workers stopped before the last step; "" if they did not."""
    error: MoleBlendError | None = None
    """An error that every new try would raise again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSettings:
    """What the driver tells every worker."""

    config: PretrainConfig
    manifest: Manifest
    start_step: int
    """Step at which this command started; a worker group that starts at a later step is a new try."""
    began: float
    """When this command began, seconds since 1970."""
    reporter: Reporter
    stop_flag: StopFlag
    """Through it a stop is asked for."""


def stream_from_newest(
    config: PretrainConfig, data_fingerprint: str, reporter: Reporter
) -> Dataset:
    """The stream of micro-batches from the newest committed step. Runs in the controller of Ray Train."""
    reporter.forward_logs()  # Warnings about a damaged checkpoint must appear on the driver.
    reporter.count("worker_groups")
    commit = latest_committed(config.out, verify_content=True)
    first_step = commit.step if commit else 0
    dataset = stream_dataset(
        config.data,
        config.order,
        config.stream,
        first_step,
        config.train.num_steps - first_step,
        fingerprint=data_fingerprint,
        reserved_cpus=config.reserved_cpus(0),
        labels=config.cluster.data_labels,
        reporter=reporter,
    )
    publish_stream(dataset, logs.run_name(config.out))
    return dataset
