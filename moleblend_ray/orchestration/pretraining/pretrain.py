"""Pretraining on a Ray Train worker group: start, survive failures, stop on request, finish.

Ray starts, watches and restarts the workers and delivers the data. It keeps no state of the run: only what is committed
under the run's URI (:mod:`moleblend_ray.training.commits`) counts, both for a restarted worker group and for a new
driver. When a worker group starts, its stream begins at the newest committed step, and the workers restore the
checkpoint of the step with which the stream begins. So data and state always belong to the same step.

This module is the driver; :mod:`moleblend_ray.orchestration.pretraining.pretrain_worker` is what runs on the workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Final

import ray
import ray.exceptions
import ray.train
import ray.train.torch

from moleblend_ray.config.accept import accepted
from moleblend_ray.config.describe import redact
from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.data.dataset.manifest import Manifest, load_manifest
from moleblend_ray.data.dataset.node_cache import remove_unused
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.scratch import scratch_folder
from moleblend_ray.errors import StorageError, TrainingError, without_credentials
from moleblend_ray.orchestration.cluster.cluster_checks import (
    Need,
    require_room,
    require_shared_paths,
    warn_of_unused_gpus,
)
from moleblend_ray.orchestration.cluster.placement import placed
from moleblend_ray.orchestration.cluster.session import environment_defaults, ray_session
from moleblend_ray.orchestration.pretraining.elastic import ElasticTrainer
from moleblend_ray.orchestration.pretraining.fixed_workers import FixedTrainer
from moleblend_ray.orchestration.pretraining.pretrain_group import (
    WorkerOutcome,
    WorkerSettings,
    stream_from_newest,
)
from moleblend_ray.orchestration.pretraining.pretrain_worker import train_worker
from moleblend_ray.orchestration.pretraining.run_folder import (
    PretrainSummary,
    open_run,
    read_finished,
    run_identity,
)
from moleblend_ray.orchestration.pretraining.stopping import (
    StoppedWhileWaitingError,
    stop_on_sigterm,
)
from moleblend_ray.orchestration.progress.progress import Progress
from moleblend_ray.orchestration.streaming.stream import stream_data_config
from moleblend_ray.training.commits import FINISHED_NAME, latest_committed
from moleblend_ray.training.export import export_run
from moleblend_ray.training.metrics import METRICS_DIR, iter_records, sum_up

logger = logging.getLogger(__name__)

_TRAIN_SETTINGS: Final = {
    # A lost worker is noticed after one interval. The default of 2 s is long for short runs; 0.2 s loads small
    # machines.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Nodes that announce their end (spot instances) often have 30 s left.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
_ELASTIC_SETTINGS: Final = {
    # After this time a smaller group starts, if the resources were on a node whose loss was not yet known.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
}

_QUIET_INTERVALS: Final = 10
"""Intervals without a resize after which the room in the cluster counts as steady again."""
_LONGEST_INTERVAL: Final = 16
"""Longest interval between looks, as a multiple of the configured interval."""


class WorkersLostError(TrainingError):
    """Workers failed more often than ``train.max_failures`` allows."""


class OutOfReachError(TrainingError):
    """Workers could not be started or fed, as the storage did not answer."""


def pretrain(config: PretrainConfig) -> PretrainSummary:
    """Pretrain on a prepared dataset, from the newest committed checkpoint of ``config.out`` if there is one.

    A finished run is only reported. On SIGTERM the workers commit their current step, and this function returns.
    """
    began_s = time.monotonic()
    config = accepted(config, PretrainConfig)  # Workers have another working directory.
    # Here, where it is known what trains: data actors, which cut the micro-batches, may have no GPU.
    config = replace(config, stream=config.stream.for_device(is_gpu=config.cluster.use_gpu))
    manifest = load_manifest(config.data)
    finished = read_finished(config, manifest)
    if finished is not None and finished.steps >= config.train.num_steps:
        logger.info("%s is finished (%d steps): nothing to do", config.out, finished.steps)
        return finished
    commit = open_run(config, manifest, finished)
    resumed_from = commit.step if commit else 0
    if finished is not None:
        storage.delete(storage.join(config.out, FINISHED_NAME))
    if resumed_from:
        logger.info("continuing %s at step %d", config.out, resumed_from)
    result = WorkerOutcome(step=resumed_from, world_size=config.cluster.num_workers)
    if resumed_from < config.train.num_steps:
        result = _train_on_workers(config, manifest, resumed_from)
    summary = _summarize(config, manifest, result, resumed_from, time.monotonic() - began_s)
    if summary.finished:
        document = {**asdict(summary), "identity": run_identity(config, manifest)}
        storage.write_json(storage.join(config.out, FINISHED_NAME), redact(document))
    return summary


def _summarize(
    config: PretrainConfig,
    manifest: Manifest,
    outcome: WorkerOutcome,
    resumed_from: int,
    seconds: float,
) -> PretrainSummary:
    totals = sum_up(iter_records(config.out))
    if totals.steps < outcome.step:
        logger.warning(
            "%s holds the numbers of %d of the %d steps: losses and rate of the summary are of these alone",
            without_credentials(storage.join(config.out, METRICS_DIR)),
            totals.steps,
            outcome.step,
        )
    return PretrainSummary(
        out=config.out,
        finished=not outcome.stopped_by,
        steps=outcome.step,
        resumed_from=resumed_from,
        world_size=outcome.world_size,
        molecules=outcome.step * config.order.global_batch_size,
        loss_first=totals.loss_first,
        loss_last=totals.loss_last,
        molecules_per_s=totals.molecules / totals.seconds if totals.seconds else 0.0,
        seconds=seconds,
        data_fingerprint=manifest.fingerprint,
        export=None if outcome.stopped_by else export_run(config.out),
    )


def _train_on_workers(config: PretrainConfig, manifest: Manifest, start_step: int) -> WorkerOutcome:
    began = time.time()
    stream = config.stream
    data_cpus = (stream.max_actors or stream.min_actors) * stream.actor_cpus
    with (
        contextlib.ExitStack() as last,
        ray_session(config.cluster, data_cpus=data_cpus),
        stop_on_sigterm() as stop_flag,
        Progress("pretrain", unit="step", total=config.train.num_steps, out=config.out) as progress,
        # Ray needs a folder for its own notes; nothing of the run is in it.
        scratch_folder("ray-train") as ray_notes,
    ):
        last.callback(remove_unused)  # Actors that end with the cluster leave row groups behind.
        _require_fitting_cluster(config)
        settings = WorkerSettings(
            config=config,
            manifest=manifest,
            start_step=start_step,
            began=began,
            reporter=progress.reporter,
            stop_flag=stop_flag,
        )
        outcome = _train_until_done(settings, str(ray_notes))
    if outcome.error is not None:
        raise outcome.error
    return outcome


def _train_until_done(settings: WorkerSettings, ray_notes: str) -> WorkerOutcome:
    """Start new trainers as long as workers leave because nodes change, or fail after new checkpoints, and a few times while the
    storage is out of reach."""
    cluster, out = settings.config.cluster, settings.config.out
    environment = _TRAIN_SETTINGS | (_ELASTIC_SETTINGS if cluster.min_workers else {})
    interval_s = cluster.resize_interval_s
    begin_step, outages = _newest_step(out), 0
    while True:
        begin_s = time.monotonic()
        try:
            with environment_defaults(environment):
                outcome = _fit(_new_trainer(settings, ray_notes, interval_s))
        except TrainingError as error:
            if settings.stop_flag.is_terminated.is_set():
                logger.warning("stopped, as asked: %s", error)
                return WorkerOutcome(step=_newest_step(out), world_size=0, stopped_by="sigterm")
            if isinstance(error, OutOfReachError) and outages < settings.config.train.max_failures:
                logger.warning("%s: starting anew", error)
                outages += 1
                with contextlib.suppress(StorageError):  # It is still out of reach.
                    newest = _newest_step(out)
                    begin_step, outages = newest, 1 if newest > begin_step else outages
                continue
            # A long run on many machines loses machines many times; it goes on as long as there is progress.
            if not isinstance(error, WorkersLostError) or _newest_step(out) <= begin_step:
                raise
            logger.warning("%s Training got on since the first of them: starting anew", error)
            begin_step, outages = _newest_step(out), 0
            continue
        if outcome.stopped_by not in ("drain", "resize"):
            return outcome
        if settings.stop_flag.is_terminated.is_set():
            return replace(outcome, stopped_by="sigterm")
        why = (
            "a node is going" if outcome.stopped_by == "drain" else "there is room for more workers"
        )
        logger.info(
            "%s: %d workers committed step %d and start anew", why, outcome.world_size, outcome.step
        )
        settings.stop_flag.ask("")
        settings.reporter.count("planned_restarts")
        begin_step, outages = _newest_step(out), 0
        if outcome.stopped_by == "resize":
            # If others take the room again and again, the run must not restart each time.
            is_busy = time.monotonic() - begin_s < _QUIET_INTERVALS * interval_s
            longest_s = _LONGEST_INTERVAL * cluster.resize_interval_s
            interval_s = min(2 * interval_s, longest_s) if is_busy else cluster.resize_interval_s


def _newest_step(run_uri: str) -> int:
    commit = latest_committed(run_uri)
    return commit.step if commit else 0


def _new_trainer(
    settings: WorkerSettings, ray_notes: str, resize_interval_s: float
) -> ray.train.torch.TorchTrainer:
    config, data_fingerprint = settings.config, settings.manifest.fingerprint
    cluster, sizes = config.cluster, config.worker_counts
    is_elastic = cluster.min_workers is not None
    scaling: dict[str, Any] = {
        "num_workers": (sizes[0], sizes[-1]) if is_elastic else cluster.num_workers,
        "use_gpu": cluster.use_gpu,
        "resources_per_worker": {
            "CPU": cluster.cpus_per_worker,
            **({"GPU": 1} if cluster.use_gpu else {}),
        },
        "elastic_resize_monitor_interval_s": resize_interval_s,
        **placed(cluster.worker_labels),
    }
    options: dict[str, Any] = {
        "train_loop_per_worker": train_worker,
        "train_loop_config": {"settings": settings},
        "torch_config": ray.train.torch.TorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
        "scaling_config": ray.train.ScalingConfig(**scaling),
        # A callable is evaluated at each start of a worker group, so the stream begins at the newest checkpoint.
        "datasets": {
            "train": partial(stream_from_newest, config, data_fingerprint, settings.reporter)
        },
        "dataset_config": stream_data_config(config.stream, cluster.data_labels),
        "run_config": ray.train.RunConfig(
            # A new name each time, or Ray would restore its own state of an earlier run.
            name=f"pretrain-{uuid.uuid4().hex[:12]}",
            storage_path=ray_notes,
            failure_config=ray.train.FailureConfig(max_failures=config.train.max_failures),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
        ),
    }
    if is_elastic:
        actors = (config.stream.min_actors, config.stream.actor_cpus)
        return ElasticTrainer(
            sizes=sizes,
            data_actors=actors,
            labels=(cluster.worker_labels, cluster.data_labels),
            stop_flag=settings.stop_flag,
            run_name=f"moleblend-{hashlib.sha256(config.out.encode()).hexdigest()[:16]}",
            **options,
        )
    return FixedTrainer(stop_flag=settings.stop_flag, **options)


def _require_fitting_cluster(config: PretrainConfig) -> None:
    """Refuse a cluster on which the run would wait forever, or on which each machine would write to its own disk."""
    cluster, workers, actors = config.cluster, config.worker_counts[0], config.stream.min_actors
    gpus = {"GPU": float(workers)} if cluster.use_gpu else {}
    for_workers = {"CPU": workers * cluster.cpus_per_worker, **gpus}
    for_actors = {"CPU": actors * config.stream.actor_cpus}
    apart = (
        Need(f"{workers} workers", for_workers, cluster.worker_labels, "worker_labels"),
        Need(f"{actors} data actors", for_actors, cluster.data_labels, "data_labels"),
    )
    require_room(
        *(apart if cluster.worker_labels or cluster.data_labels else ()),
        together=Need(
            f"{workers} workers and {actors} data actors",
            {"CPU": config.reserved_cpus(actors, workers), **gpus},
        ),
    )
    require_shared_paths({"data": config.data, "out": config.out})
    warn_of_unused_gpus(cluster)


def _fit(trainer: ray.train.torch.TorchTrainer) -> WorkerOutcome:
    try:
        outcome = trainer.fit().return_value  # type: ignore[attr-defined]
    except ray.train.WorkerGroupError as error:
        failures = "; ".join(
            f"worker {rank}: {_root_cause(failure)}"
            for rank, failure in sorted(error.worker_failures.items())
        )
        raise WorkersLostError(
            f"the workers failed more often than train.max_failures allows. The last failure: {failures}. "
            "What is committed is kept: the same command continues from it."
        ) from error
    except ray.train.ControllerError as error:
        if isinstance(error.controller_failure, StoppedWhileWaitingError):
            raise error.controller_failure from None
        kind = OutOfReachError if _is_of_storage(error.controller_failure) else TrainingError
        raise kind(
            f"the workers could not be started or fed: {_root_cause(error.controller_failure)}"
        ) from error
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        raise TrainingError(
            "the process that leads the workers, on the node of this command, was lost or could not start, as when that node "
            f"shuts down or has no memory left ({_root_cause(error)}). What is committed is kept: the same command continues from "
            "it."
        ) from error
    assert isinstance(outcome, WorkerOutcome)
    return outcome


def _is_of_storage(error: BaseException) -> bool:
    """Whether an error began with storage that did not do what was asked; not so if it answered that nothing is there."""
    return any(
        isinstance(link, StorageError) and not isinstance(link, storage.NotFoundError)
        for link in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that caused it up to the first."""
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__


def _root_cause(error: BaseException) -> str:
    """The message of the first error of a chain, without the tracebacks that Ray adds."""
    *_, error = _chain(error)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    message = lines[-1] if "Traceback" in lines[0] else lines[0]
    return f"{type(error).__name__}: {message.rstrip('.')}"
