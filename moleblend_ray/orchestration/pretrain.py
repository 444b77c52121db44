"""Pretraining on a Ray Train worker group: start, survive failures, stop on request, finish.

Ray starts, watches and restarts the workers and delivers the data. It keeps no state of the run: only what is committed
under the run's URI (:mod:`moleblend_ray.training.commits`) counts, both for a restarted worker group and for a new
driver. When a worker group starts, its stream begins at the newest committed step, and the workers restore the
checkpoint of the step with which the stream begins. So data and state always belong to the same step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Final

import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
from ray.data import Dataset

from moleblend_ray.config.builder import to_dict
from moleblend_ray.config.describe import redact
from moleblend_ray.config.paths import with_absolute_paths
from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.data import storage
from moleblend_ray.data.batch import StepBatch
from moleblend_ray.data.node_cache import remove_unused
from moleblend_ray.data.shards import Manifest, load_manifest
from moleblend_ray.errors import (
    CheckpointError,
    DataError,
    MoleBlendError,
    StorageError,
    TrainingError,
    without_credentials,
)
from moleblend_ray.model.config import BlendConfig, ModelConfig
from moleblend_ray.orchestration import logs
from moleblend_ray.orchestration.elastic import ElasticTrainer
from moleblend_ray.orchestration.fixed_workers import FixedTrainer
from moleblend_ray.orchestration.local import (
    environment_defaults,
    ray_session,
    require_labels,
    require_resources,
    require_shared_paths,
    warn_of_unused_gpus,
)
from moleblend_ray.orchestration.metrics import Publisher
from moleblend_ray.orchestration.placement import placed
from moleblend_ray.orchestration.progress import Progress, Reporter
from moleblend_ray.orchestration.stopping import StopFlag, StopPoll, StopReason, stop_on_sigterm
from moleblend_ray.orchestration.stream import (
    shard_step_batches,
    stream_data_config,
    stream_dataset,
)
from moleblend_ray.orchestration.stream_metrics import publish_stream
from moleblend_ray.orchestration.train_metrics import TrainMetrics
from moleblend_ray.training.anomalies import Anomaly, NotFiniteError, write_anomaly
from moleblend_ray.training.checkpoint import (
    library_versions,
    restore_training_state,
)
from moleblend_ray.training.commits import (
    FINISHED_NAME,
    Commit,
    abandon_after,
    committed_steps,
    latest_committed,
    read_commit,
    require_same_run,
)
from moleblend_ray.training.distributed import Ranks, current_ranks, gather_from_ranks
from moleblend_ray.training.export import export_run, export_uri
from moleblend_ray.training.loop import FitResult, Hooks, Learner, build_learner, fit, ignore
from moleblend_ray.training.metrics import (
    Record,
    drop_records_from,
    last_record,
    loss_ends,
    read_records,
)
from moleblend_ray.training.profile import trace_steps
from moleblend_ray.training.saving import AnotherWriterError, CheckpointWriter
from moleblend_ray.training.tracking import NoTracker, Tracker, TrackerError, start_tracker
from moleblend_ray.training.validation import build_validation

logger = logging.getLogger(__name__)

CONFIG_NAME: Final = "config.json"

_TRAIN_SETTINGS: Final = {
    # A lost worker is noticed after one interval. The default of 2 s is long for short runs; 0.2 s loads small
    # machines.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Nodes that announce their end (spot instances) often have 30 s left.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # How long a group waits for resources before the stop flag is read; then it waits again.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
}
_ELASTIC_SETTINGS: Final = {
    # After this time a smaller group starts, if the resources were on a node whose loss was not yet known.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
}

_FEW_PLACED: Final = 0.5
"""Share of molecules with coordinates below which a run says that it has few."""

_QUIET_INTERVALS: Final = 10
"""Intervals without a resize after which the room in the cluster counts as steady again."""
_LONGEST_INTERVAL: Final = 16
"""Longest interval between looks, as a multiple of the configured interval."""

_FINAL_ERRORS: Final = (NotFiniteError, AnotherWriterError, TrackerError)
"""Errors that all ranks raise together, and that every new try would raise again."""


class WorkersLostError(TrainingError):
    """Workers failed more often than ``train.max_failures`` allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainSummary:
    """What a call of :func:`pretrain` did or found."""

    out: str
    """URI of the run."""
    finished: bool
    """False if a stop was asked for before the last step; the same command continues."""
    steps: int
    """Steps committed since the start of the run."""
    resumed_from: int
    """Committed step at which this call started; 0 for a new run."""
    world_size: int
    """Number of workers at the end of this call."""
    molecules: int
    """Molecules seen in all steps, repetitions counted."""
    loss_first: dict[str, float]
    """Mean losses of the first tenth of the steps (at most 50): "loss" is the optimised loss, "loss_<head>" that of a
    head."""
    loss_last: dict[str, float]
    """The same for the last tenth."""
    molecules_per_s: float
    """Molecules seen per second of step time, over all steps."""
    seconds: float
    """Wall time of this call."""
    data_fingerprint: str
    """Fingerprint of the prepared dataset."""
    export: str | None
    """Folder with model.safetensors and config.json; None while unfinished."""


def pretrain(config: PretrainConfig) -> PretrainSummary:
    """Pretrain on a prepared dataset, from the newest committed checkpoint of ``config.out`` if there is one.

    A finished run is only reported. On SIGTERM the workers commit their current step, and this function returns.
    """
    began_s = time.monotonic()
    config = with_absolute_paths(config)  # Workers have another working directory.
    manifest = load_manifest(config.data)
    finished = _read_finished(config, manifest)
    if finished is not None and finished.steps >= config.train.num_steps:
        logger.info("%s is finished (%d steps): nothing to do", config.out, finished.steps)
        return finished
    commit = _open_run(config, manifest, finished)
    resumed_from = commit.step if commit else 0
    if finished is not None:
        storage.delete(storage.join(config.out, FINISHED_NAME))
    if resumed_from:
        logger.info("continuing %s at step %d", config.out, resumed_from)
    result = _Outcome(step=resumed_from, world_size=config.cluster.num_workers)
    if resumed_from < config.train.num_steps:
        result = _train_on_workers(config, manifest, resumed_from)
    summary = _summarize(config, manifest, result, resumed_from, time.monotonic() - began_s)
    if summary.finished:
        document = {**asdict(summary), "identity": run_identity(config, manifest)}
        storage.write_json(storage.join(config.out, FINISHED_NAME), redact(document))
    return summary


# --------------------------------------------------------------------------------------------- the run's folder


def run_identity(config: PretrainConfig, manifest: Manifest) -> dict[str, Any]:
    """The settings of a run that must not change between its checkpoints."""
    settings = to_dict(config)
    # Runs of earlier versions do not have these settings.
    if config.blend.view_probabilities == BlendConfig().view_probabilities:
        del settings["blend"]["view_probabilities"]
    if not config.model.environment_head:
        del settings["model"]["environment_bins"]
    return {
        "data_fingerprint": manifest.fingerprint,
        # Part of the fingerprint; named here as well, to show why data that were prepared again are different.
        "featurizer_version": manifest.featurizer_version,
        "seed": config.seed,
        "random_rotation": config.stream.random_rotation,
        **{name: settings[name] for name in ("order", "model", "blend")},
    }


def _open_run(
    config: PretrainConfig, manifest: Manifest, finished: PretrainSummary | None = None
) -> Commit | None:
    """Check that the configuration may continue the run in ``out``, store it there, and return the newest commit.

    ``finished``: the summary of a run that is to be longer now.
    """
    if manifest.num_molecules("train") == 0:
        raise DataError(f"{config.data} has no molecules to train on: its train split is empty")
    _require_coordinates(config, manifest)
    identity = run_identity(config, manifest)
    commit = latest_committed(config.out, verify_content=True)
    if commit is not None:
        _require_same_run(commit.identity, identity, config.out)
    elif finished is not None:
        # From step 0 it would replace the metrics and the exported model of the run.
        raise CheckpointError(
            f"{config.out} is finished ({finished.steps} steps) and has no checkpoints any more: it cannot go on to "
            f"{config.train.num_steps} steps. Put its newest checkpoint back, or start a new run under another `out`."
        )
    elif storage.exists(storage.join(config.out, CONFIG_NAME)):
        logger.info("%s was started before but committed nothing: starting anew", config.out)
    document = {
        "config": redact(to_dict(config)),
        "data_fingerprint": manifest.fingerprint,
        "versions": library_versions(),
    }
    storage.write_json(storage.join(config.out, CONFIG_NAME), document)
    return commit


def _require_coordinates(config: PretrainConfig, manifest: Manifest) -> None:
    """Refuse 3D losses on molecules that all lack coordinates; say so if many do."""
    total, placed = manifest.counts.rows_out, manifest.counts.with_coordinates
    losses = [name for name in ("denoise", "direction", "distance") if config.loss.weight(name) > 0]
    remedy = "prepare them with featurize.conformers.generate=true"
    if not placed and losses:
        zero = " ".join(f"loss.{name}_weight=0" for name in losses)
        raise DataError(
            f"none of the {total} molecules of {config.data} has coordinates: nothing would teach the encoder 3D relations. "
            f"Use sources with coordinates or {remedy}. To pretrain on 2D relations alone, say so: {zero}"
        )
    if placed < _FEW_PLACED * total:
        logger.warning(
            "%d of %d molecules of %s have no coordinates and teach 2D relations only; %s",
            total - placed,
            total,
            without_credentials(config.data),
            remedy,
        )


def _config_fingerprint(config: PretrainConfig) -> str:
    # Without credentials: a URI with a new signature is the same configuration.
    text = json.dumps(redact(to_dict(config)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_finished(config: PretrainConfig, manifest: Manifest) -> PretrainSummary | None:
    """The stored summary of a finished run, if ``config`` describes that run."""
    uri = storage.join(config.out, FINISHED_NAME)
    if not storage.exists(uri):
        return None
    try:
        stored = dict(storage.read_json(uri))
        identity = stored.pop("identity", None)
        summary = PretrainSummary(**stored)
    except (TypeError, ValueError) as error:
        raise DataError(f"{uri} is not the summary of a run: {error}") from error
    if identity is None:  # an earlier version wrote it
        identity = _committed_identity(config.out)
    if identity is None:  # and the checkpoints were deleted
        identity = {"data_fingerprint": summary.data_fingerprint}
    _require_same_run(identity, run_identity(config, manifest), config.out)
    # The stored URIs have no credentials, and the folder may have been moved.
    return replace(summary, out=config.out, export=export_uri(config.out))


def _committed_identity(run_uri: str) -> Mapping[str, Any] | None:
    """The settings that the newest readable marker holds; None without one."""
    for step in committed_steps(run_uri):
        with contextlib.suppress(CheckpointError):
            return read_commit(run_uri, step).identity
    return None


def _require_same_run(stored: Mapping[str, Any], wanted: Mapping[str, Any], run_uri: str) -> None:
    """As :func:`require_same_run`; both with the settings that :func:`run_identity` leaves out."""
    require_same_run(_with_later_settings(stored), _with_later_settings(wanted), run_uri)


def _with_later_settings(identity: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {
        "blend": {"view_probabilities": to_dict(BlendConfig())["view_probabilities"]},
        "model": {"environment_bins": ModelConfig().environment_bins},
    }
    complete = {
        name: {**values, **identity[name]} for name, values in defaults.items() if name in identity
    }
    return {**identity, **complete}


def _summarize(
    config: PretrainConfig,
    manifest: Manifest,
    outcome: _Outcome,
    resumed_from: int,
    seconds: float,
) -> PretrainSummary:
    records = read_records(config.out)
    loss_first, loss_last = loss_ends(records)
    molecules = sum(int(record["molecules"]) for record in records)
    step_seconds = sum(record["step_s"] for record in records)
    return PretrainSummary(
        out=config.out,
        finished=not outcome.stopped_by,
        steps=outcome.step,
        resumed_from=resumed_from,
        world_size=outcome.world_size,
        molecules=molecules,
        loss_first=loss_first,
        loss_last=loss_last,
        molecules_per_s=molecules / step_seconds if step_seconds else 0.0,
        seconds=seconds,
        data_fingerprint=manifest.fingerprint,
        export=None if outcome.stopped_by else export_run(config.out),
    )


# --------------------------------------------------------------------------------------------------- the driver


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """What the first worker returns."""

    step: int
    world_size: int
    stopped_by: StopReason = ""
    """Why the workers stopped before the last step; "" if they did not."""
    error: MoleBlendError | None = None
    """An error that every new try would raise again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _WorkerSettings:
    config: PretrainConfig
    manifest: Manifest
    start_step: int
    """Step at which this command started; a worker group that starts at a later step is a new try."""
    reporter: Reporter
    stop_flag: StopFlag
    """Through it a stop is asked for."""


def _train_on_workers(config: PretrainConfig, manifest: Manifest, start_step: int) -> _Outcome:
    stream = config.stream
    data_cpus = (stream.max_actors or stream.min_actors) * stream.actor_cpus
    with (
        contextlib.ExitStack() as last,
        ray_session(config.cluster, data_cpus=data_cpus),
        stop_on_sigterm() as stop_flag,
        Progress("pretrain", unit="step", total=config.train.num_steps, out=config.out) as progress,
        # Ray needs a folder for its own notes; nothing of the run is in it.
        tempfile.TemporaryDirectory(prefix="moleblend-ray-train-") as ray_notes,
    ):
        last.callback(remove_unused)  # Actors that end with the cluster leave row groups behind.
        _require_fitting_cluster(config)
        settings = _WorkerSettings(
            config=config,
            manifest=manifest,
            start_step=start_step,
            reporter=progress.reporter,
            stop_flag=stop_flag,
        )
        outcome = _train_until_done(settings, ray_notes)
    if outcome.error is not None:
        raise outcome.error
    return outcome


def _train_until_done(settings: _WorkerSettings, ray_notes: str) -> _Outcome:
    """Start new trainers as long as workers leave because nodes change, or fail after new checkpoints."""
    cluster, out = settings.config.cluster, settings.config.out
    environment = _TRAIN_SETTINGS | (_ELASTIC_SETTINGS if cluster.min_workers else {})
    interval_s = cluster.resize_interval_s
    while True:
        begin_step, begin_s = _newest_step(out), time.monotonic()
        try:
            with environment_defaults(environment):
                outcome = _fit(_new_trainer(settings, ray_notes, interval_s))
        except TrainingError as error:
            if settings.stop_flag.is_terminated.is_set():
                logger.warning("stopped, as asked, though: %s", error)
                return _Outcome(step=_newest_step(out), world_size=0, stopped_by="sigterm")
            # A long run on many machines loses machines many times; it goes on as long as there is progress.
            if not isinstance(error, WorkersLostError) or _newest_step(out) <= begin_step:
                raise
            logger.warning("%s Training got on since the first of them: starting anew", error)
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
        if outcome.stopped_by == "resize":
            # If others take the room again and again, the run must not restart each time.
            is_busy = time.monotonic() - begin_s < _QUIET_INTERVALS * interval_s
            longest_s = _LONGEST_INTERVAL * cluster.resize_interval_s
            interval_s = min(2 * interval_s, longest_s) if is_busy else cluster.resize_interval_s


def _newest_step(run_uri: str) -> int:
    commit = latest_committed(run_uri)
    return commit.step if commit else 0


def _new_trainer(
    settings: _WorkerSettings, ray_notes: str, resize_interval_s: float
) -> ray.train.torch.TorchTrainer:
    config = settings.config
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
        "train_loop_per_worker": _train_worker,
        "train_loop_config": {"settings": settings},
        "torch_config": ray.train.torch.TorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
        "scaling_config": ray.train.ScalingConfig(**scaling),
        # A callable is evaluated at each start of a worker group, so the stream begins at the newest checkpoint.
        "datasets": {"train": partial(_stream_from_newest, config, settings.reporter)},
        "dataset_config": stream_data_config(config.stream),
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
    require_labels("worker_labels", cluster.worker_labels)
    require_labels("data_labels", cluster.data_labels)
    if cluster.worker_labels:
        need = {"CPU": workers * cluster.cpus_per_worker, **gpus}
        require_resources(need, f"{workers} workers", cluster.worker_labels)
    if cluster.data_labels:
        need = {"CPU": actors * config.stream.actor_cpus}
        require_resources(need, f"{actors} data actors", cluster.data_labels)
    need = {"CPU": config.reserved_cpus(actors, workers), **gpus}
    require_resources(need, f"{workers} workers and {actors} data actors")
    require_shared_paths({"data": config.data, "out": config.out})
    warn_of_unused_gpus(cluster)


def _fit(trainer: ray.train.torch.TorchTrainer) -> _Outcome:
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
        raise TrainingError(
            f"the workers could not be started or fed: {_root_cause(error.controller_failure)}"
        ) from error
    assert isinstance(outcome, _Outcome)
    return outcome


def _root_cause(error: BaseException) -> str:
    """The message of the first error of a chain, without the tracebacks that Ray adds."""
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    lines = str(error).strip().splitlines() or [type(error).__name__]
    message = lines[-1] if "Traceback" in lines[0] else lines[0]
    return f"{type(error).__name__}: {message.rstrip('.')}"


def _stream_from_newest(config: PretrainConfig, reporter: Reporter) -> Dataset:
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
        reserved_cpus=config.reserved_cpus(0),
        labels=config.cluster.data_labels,
        reporter=reporter,
    )
    publish_stream(dataset, logs.run_name(config.out))
    return dataset


# --------------------------------------------------------------------------------------------------- the workers


def _train_worker(arguments: dict[str, _WorkerSettings]) -> _Outcome:
    """Build, restore and train one rank. Only the return value of rank 0 is used."""
    settings = arguments["settings"]
    config = settings.config
    context = ray.train.get_context()
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    ranks = current_ranks(use_gpu=config.cluster.use_gpu, local_rank=context.get_local_rank())
    settings.reporter.forward_logs(prefix=f"[rank {ranks.rank}] ")
    logs.set_context(rank=ranks.rank)
    should_stop = StopPoll(settings.stop_flag) if ranks.is_first else None
    try:
        result = _fit_rank(settings, ranks, should_stop)
    except _FINAL_ERRORS as error:
        return _Outcome(step=0, world_size=ranks.world_size, error=error)
    reason: StopReason = should_stop.reason if should_stop is not None and result.stopped else ""
    return _Outcome(step=result.step, world_size=ranks.world_size, stopped_by=reason)


def _fit_rank(settings: _WorkerSettings, ranks: Ranks, should_stop: StopPoll | None) -> FitResult:
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
    metrics = _start_metrics(config, publisher, first.step, ranks)
    checkpoints = _checkpoint_writer(settings, ranks, first.step, metrics)
    validate = build_validation(
        config.data, settings.manifest, learner, micro_batch_size=config.stream.micro_batch_size
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
    settings: _WorkerSettings,
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
    config: PretrainConfig, publisher: Publisher, step: int, ranks: Ranks
) -> TrainMetrics:
    metrics = TrainMetrics(publisher, is_first=ranks.is_first)
    metrics.start(
        config.out,
        step,
        target_steps=config.train.num_steps,
        workers=ranks.world_size,
        interval_steps=config.checkpoint.every_steps,
    )
    return metrics


def _checkpoint_writer(
    settings: _WorkerSettings, ranks: Ranks, step: int, metrics: TrainMetrics
) -> CheckpointWriter:
    config = settings.config
    return CheckpointWriter(
        config.checkpoint,
        config.out,
        ranks,
        identity=run_identity(config, settings.manifest),
        config_fingerprint=_config_fingerprint(config),
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


def _start_tracker(settings: _WorkerSettings, ranks: Ranks, *, is_new_try: bool) -> Tracker:
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


def _report(settings: _WorkerSettings, tracker: Tracker, record: Record) -> None:
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
