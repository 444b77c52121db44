"""One worker of pretraining: it builds and restores its rank, and trains on the stream that Ray delivers.

The worker restores the checkpoint of the step with which its stream begins, so data and state always belong to the
same step (:mod:`moleblend_ray.orchestration.pretraining.pretrain`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Final

import ray.train
import torch

from moleblend_ray.config.describe import redact
from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.data.batches.batch import StepBatch
from moleblend_ray.errors import DataError, StorageError
from moleblend_ray.orchestration.pretraining.pretrain_group import WorkerOutcome, WorkerSettings
from moleblend_ray.orchestration.pretraining.run_folder import config_fingerprint, run_identity
from moleblend_ray.orchestration.pretraining.stopping import StopPoll, StopReason
from moleblend_ray.orchestration.pretraining.train_metrics import TrainMetrics
from moleblend_ray.orchestration.progress import logs
from moleblend_ray.orchestration.progress.metrics import Publisher
from moleblend_ray.orchestration.streaming.stream import shard_step_batches
from moleblend_ray.settings import to_dict
from moleblend_ray.training.anomalies import Anomaly, NotFiniteError, write_anomaly
from moleblend_ray.training.checkpoint import restore_training_state
from moleblend_ray.training.commits import abandon_after
from moleblend_ray.training.learner import Learner, build_learner
from moleblend_ray.training.loop import FitResult, Hooks, fit, ignore
from moleblend_ray.training.metrics import Record, drop_records_from, last_record
from moleblend_ray.training.profile import trace_steps
from moleblend_ray.training.ranks import Ranks, current_ranks, gather_from_ranks
from moleblend_ray.training.saving import AnotherWriterError, CheckpointWriter
from moleblend_ray.training.tracking import NoTracker, Tracker, TrackerError, start_tracker
from moleblend_ray.training.validation import build_validation

logger = logging.getLogger(__name__)

_FINAL_ERRORS: Final = (NotFiniteError, AnotherWriterError, TrackerError)
"""Errors that all ranks raise together, and that every new try would raise again."""


def train_worker(arguments: dict[str, WorkerSettings]) -> WorkerOutcome:
    """Build, restore and train one rank. Only the return value of rank 0 is used."""
    settings = arguments["settings"]
    config = settings.config
    context = ray.train.get_context()
    torch.set_num_threads(config.cluster.threads_per_worker)
    ranks = current_ranks(use_gpu=config.cluster.use_gpu, local_rank=context.get_local_rank())
    settings.reporter.forward_logs(prefix=f"[rank {ranks.rank}] ")
    logs.set_context(rank=ranks.rank)
    should_stop = StopPoll(settings.stop_flag) if ranks.is_first else None
    try:
        result = _fit_rank(settings, ranks, should_stop)
    except _FINAL_ERRORS as error:
        return WorkerOutcome(step=0, world_size=ranks.world_size, error=error)
    reason: StopReason = should_stop.reason if should_stop is not None and result.stopped else ""
    return WorkerOutcome(step=result.step, world_size=ranks.world_size, stopped_by=reason)


def _fit_rank(settings: WorkerSettings, ranks: Ranks, should_stop: StopPoll | None) -> FitResult:
    """Build what one rank trains with, restore it at the step with which the stream begins, and train."""
    config = settings.config
    steps = shard_step_batches(
        ray.train.get_dataset_shard("train"),
        config.order,
        config.stream,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    coming = _in_background(steps)
    learner = _build_learner(config, ranks)
    first = _when_there(coming, ignore if should_stop is None else should_stop.end_wait)
    is_new_try = first.step > settings.start_step
    if ranks.is_first and is_new_try:
        # A warning, which the user sees: time was lost, and perhaps workers.
        logger.warning("continuing at step %d with %d workers", first.step, ranks.world_size)
    _restore(config, learner, first.step, ranks)
    publisher = Publisher(run=logs.run_name(config.out), rank=str(ranks.rank))
    metrics = _start_metrics(settings, publisher, first.step, ranks)
    checkpoints = _checkpoint_writer(settings, ranks, first.step, metrics)
    validate = build_validation(
        config.data, settings.manifest, learner, micro_batch_size=config.stream.num_at_once
    )
    tracker = _start_tracker(settings, ranks, is_new_try=is_new_try)
    try:
        with _tracing(config, first.step, ranks) as after_step, publisher:
            return fit(
                learner,
                chain([first], steps),
                start_step=first.step,
                skipped_before=_skipped_before(config, first.step, ranks),
                checkpoints=checkpoints,
                validate=validate,
                hooks=_hooks(settings, metrics, tracker, after_step, should_stop),
            )
    finally:
        tracker.finish()


def _hooks(
    settings: WorkerSettings,
    metrics: TrainMetrics,
    tracker: Tracker,
    after_step: Callable[[], None],
    should_stop: StopPoll | None,
) -> Hooks:
    """``should_stop`` is None on all ranks but the first, which alone reports and is asked to stop."""
    hooks = Hooks(after_step=after_step, on_step=partial(_tell_step, metrics))
    if should_stop is None:
        return hooks
    return replace(
        hooks,
        report=partial(_report, settings, tracker),
        on_anomaly=partial(_tell_anomaly, settings.config.out, metrics),
        should_stop=should_stop,
        while_waiting=should_stop.end_wait,
    )


def _in_background(steps: Iterator[StepBatch]) -> Future[StepBatch]:
    """Request the first step in a thread: the data actors take seconds to start."""
    executor = ThreadPoolExecutor(1)
    coming = executor.submit(next, steps)
    executor.shutdown(wait=False)
    return coming


def _build_learner(config: PretrainConfig, ranks: Ranks) -> Learner:
    return build_learner(
        config.model,
        train=config.train,
        optim=config.optim,
        blend=config.blend,
        loss=config.loss,
        seed=config.seed,
        ranks=ranks,
    )


def _restore(config: PretrainConfig, learner: Learner, step: int, ranks: Ranks) -> None:
    """Restore the checkpoint of ``step`` (0: none), and remove what the run's folder holds of later steps."""
    if step > 0:
        restore_training_state(learner.model, learner.optimizer, config.out, step, ranks)
    if ranks.is_first:
        abandon_after(config.out, step)
        drop_records_from(config.out, step)


def _start_metrics(
    settings: WorkerSettings, publisher: Publisher, step: int, ranks: Ranks
) -> TrainMetrics:
    config = settings.config
    metrics = TrainMetrics(publisher, is_first=ranks.is_first)
    metrics.start(
        config.out,
        step,
        began=settings.began,
        target_steps=config.train.num_steps,
        workers=ranks.world_size,
        interval_steps=config.checkpoint.every_steps,
    )
    return metrics


def _checkpoint_writer(
    settings: WorkerSettings, ranks: Ranks, step: int, metrics: TrainMetrics
) -> CheckpointWriter:
    config = settings.config
    return CheckpointWriter(
        config.checkpoint,
        config.out,
        ranks,
        identity=run_identity(config, settings.manifest),
        config_fingerprint=config_fingerprint(config),
        start_step=step,
        on_save=metrics.on_save,
    )


def _tracing(
    config: PretrainConfig, step: int, ranks: Ranks
) -> contextlib.AbstractContextManager[Callable[[], None]]:
    """Profile the body if ``train.profile`` asks for it; gives what to call after each step."""
    if config.train.profile and ranks.is_first:
        return trace_steps(config.out, step, ranks.device)
    return contextlib.nullcontext(ignore)


def _when_there(coming: Future[StepBatch], while_waiting: Callable[[float], None]) -> StepBatch:
    """The first step. Each second until it is there ``while_waiting`` gets the seconds waited so far, and may raise."""
    began_s = time.monotonic()
    while True:
        done, _ = wait([coming], timeout=1.0)
        if done:
            return coming.result()
        while_waiting(time.monotonic() - began_s)


def _skipped_before(config: PretrainConfig, step: int, ranks: Ranks) -> int:
    """Number of steps that the run skipped up to ``step``, from its own records."""
    count = 0
    if ranks.is_first and step > 0:
        try:
            count = int(last_record(config.out, step).get("skipped_steps", 0))
        except (StorageError, DataError) as error:
            logger.warning("skipped steps are counted from 0 again: %s", redact(str(error)))
    return gather_from_ranks(count)[0]


def _tell_step(metrics: TrainMetrics, record: Record) -> None:
    """Publish the metrics of a step, and its number in later log lines."""
    logs.set_context(step=int(record["step"]) + 1)  # Steps done: checkpoints count in the same way.
    metrics.on_step(record)


def _tell_anomaly(run_uri: str, metrics: TrainMetrics, anomaly: Anomaly) -> None:
    """Count an anomaly and write it to the run's folder. The run must not end because the storage fails here."""
    metrics.on_anomaly(anomaly)
    try:
        logger.warning("its molecules are in %s", redact(write_anomaly(run_uri, anomaly)))
    except StorageError as error:
        logger.warning("its molecules could not be written down: %s", error)


def _start_tracker(settings: WorkerSettings, ranks: Ranks, *, is_new_try: bool) -> Tracker:
    """The tracker, on rank 0 only. If it does not start, all ranks raise; in a new try rank 0 only logs a warning."""
    config = settings.config
    tracker: Tracker = NoTracker()
    problem = ""
    if ranks.is_first:
        try:
            tracker = start_tracker(config.tracking, redact(config.out), redact(to_dict(config)))
        except TrackerError as error:
            problem = str(error)
    problem = gather_from_ranks(problem)[0]
    if problem and not is_new_try:
        raise TrackerError(problem)
    if problem and ranks.is_first:
        logger.warning("%s. Training goes on without", problem)
    return tracker


def _report(settings: WorkerSettings, tracker: Tracker, record: Record) -> None:
    """Send a record to the tracker and to the display of the driver."""
    tracker.log(record, step=int(record["step"]))
    shown = ("loss", "valid_loss", "learning_rate", "molecules_per_s")
    settings.reporter(
        {
            "done": int(record["step"]) + 1,
            "total": settings.config.train.num_steps,
            **{name: record[name] for name in shown if name in record},
        }
    )
