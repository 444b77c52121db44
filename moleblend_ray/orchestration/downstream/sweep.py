"""A hyper-parameter search with Ray Tune, judged on validation molecules only.

The trials get only training and validation molecules: the test part is not in their memory. After the search the best
configuration is trained with several seeds, and each is scored once on the test part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import pickle
import re
import signal
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import optuna
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from moleblend_ray.config.accept import accepted
from moleblend_ray.config.downstream import SweepConfig
from moleblend_ray.data.files import storage
from moleblend_ray.errors import DataError, TrainingError, without_credentials
from moleblend_ray.evaluation.models.baselines import BaselineKind
from moleblend_ray.evaluation.results.result_files import EPOCHS_DIR, RESULTS_NAME, TUNE_DIR
from moleblend_ray.evaluation.results.results import Training, TrialResult
from moleblend_ray.evaluation.scoring.scores import best_candidate
from moleblend_ray.evaluation.search import Scalar, plain_values, with_drawn
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import Task
from moleblend_ray.host import available_cpus
from moleblend_ray.orchestration.cluster.cluster_checks import may_grow
from moleblend_ray.orchestration.cluster.placement import cluster_resources, how_many_fit
from moleblend_ray.orchestration.cluster.session import (
    environment_defaults,
    is_private,
    signal_handlers_kept,
)
from moleblend_ray.orchestration.downstream.baselines import SCRATCH_DIR
from moleblend_ray.orchestration.downstream.downstream import (
    Bench,
    LostWorkError,
    train_seeds,
    worker_resources,
)
from moleblend_ray.orchestration.downstream.finetune import (
    FinetuneSummary,
    compute_results,
    summarise,
)
from moleblend_ray.orchestration.downstream.result_writing import has_results
from moleblend_ray.orchestration.downstream.searchers import (
    METRIC,
    RoomLimiter,
    build_scheduler,
    build_searcher,
)
from moleblend_ray.orchestration.downstream.workers import TrialData, run_trial
from moleblend_ray.orchestration.progress.progress import Progress, Reporter

logger = logging.getLogger(__name__)

SEARCH_DIR = "search"
"""Folder in ``TUNE_DIR`` for the state of the search, whose files Ray Tune names."""

_STATE_NAME = re.compile(r"experiment_state-(.+)\.json")

_TUNE_SETTINGS = {
    # One JSON file per trial is enough, without TensorBoard or CSV files.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Trials use absolute paths. Another working directory would only break relative imports of a user.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Seconds between stored states of the search. What happens in between is in the trials' own records.
    "TUNE_GLOBAL_CHECKPOINT_S": "5",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepSummary(FinetuneSummary):
    """What a sweep found, and where it is; its seeds are the final ones."""

    trials: int
    """Number of configurations tried."""
    trials_failed: int
    """Trials without any score."""
    chosen: dict[str, Scalar]
    """The configuration with the best validation score."""


def sweep(config: SweepConfig) -> SweepSummary:
    """Search, choose on validation, train the choice with each final seed, score the test part, write ``results.json``.

    Repeating a finished command does nothing; repeating an interrupted one, or one with further final seeds or baselines,
    keeps the trials and seeds that were finished. InUseError if another command works on the same results.
    """
    config = accepted(config, SweepConfig)
    check_search(config)
    results, already_finished = compute_results(config, config.final_seeds, search_and_train)
    return _summary(summarise(config.out, results, already_finished=already_finished), results)


def check_search(config: SweepConfig) -> None:
    """Raise ConfigError for a searcher that cannot be used, before the molecules are prepared; warn of settings without effect."""
    if not has_results(config):
        warn_of_searched(config)
        search_method(config, config.task.resolve())


def warn_of_searched(config: SweepConfig) -> None:
    """Name the settings of `finetune` that were given, but which the search varies."""
    usual = FinetuneSettings()
    given = {
        name: getattr(config.finetune, name)
        for name in config.search.dimensions(config.task.resolve().epochs)
        if getattr(config.finetune, name) != getattr(usual, name)
    }
    for name, value in given.items():
        logger.warning(
            "finetune.%s=%s has no effect: the search varies it (search.%s)", name, value, name
        )


def search_and_train(config: SweepConfig, bench: Bench) -> Training:
    """Search, choose on validation, train and test the choice with each final seed."""
    trials = known_trials(config.out) or run_trials(config, bench)
    chosen = choose(config.finetune, bench.experiment.task, trials)
    logger.info("chosen on validation: %s", _choice_text(trials, chosen))
    final = train_seeds(config, bench, chosen, config.final_seeds)
    return Training(chosen=chosen, trials=tuple(trials), final=tuple(final))


def known_trials(out: str) -> list[TrialResult]:
    """The trials of the search in ``out``, if its results are there: seeds or baselines are being added to them.

    The search is not continued then: it would run failed trials again, or all if its state was deleted, and what it chose must
    stay. ``out`` may also be the folder of the encoder from scratch in such results, whose trials are told by their scores alone.
    """
    folder, _, name = out.rstrip("/").rpartition("/")
    if (results := _results_of(out)) is not None:
        return [TrialResult(**trial) for trial in results["trials"]]
    if name != SCRATCH_DIR or (results := _results_of(folder)) is None:
        return []
    found = [entry for entry in results["baselines"] if entry["kind"] == BaselineKind.SCRATCH]
    return [
        TrialResult(
            number=number,
            status="failed" if candidate["valid_score"] is None else "finished",
            settings=candidate["settings"],
            valid_score=candidate["valid_score"],
            epochs=0,
            seconds=0.0,
            error=None,
        )
        for entry in found
        for number, candidate in enumerate(entry["candidates"])
    ]


def _results_of(out: str) -> dict[str, Any] | None:
    uri = storage.join(out, RESULTS_NAME)
    members = {"trials": list[dict[str, Any]], "baselines": list[dict[str, Any]]}
    return storage.read_object(uri, members) if storage.exists(uri) else None


def run_trials(config: SweepConfig, bench: Bench) -> list[TrialResult]:
    """Run the search, or the rest of an interrupted one."""
    keep_keys_from_trials()
    experiment = bench.experiment
    trainable = tune.with_resources(
        tune.with_parameters(
            run_trial,
            data=TrialData.of(experiment),
            settings=config.finetune,
            seed=config.search_seed,
            cluster=config.cluster,
            records=storage.join(config.out, EPOCHS_DIR),
        ),
        _tune_resources(config),
    )
    title = f"{experiment.task.name} trials"
    with Progress(title, unit="trial", total=config.num_trials, out=config.out) as progress:
        _ProgressCallback.reporter, _ProgressCallback.total = progress.reporter, config.num_trials
        RoomLimiter.room = partial(room_for_trials, config, may_grow=may_grow())
        try:
            with warnings.catch_warnings():
                # A trial that an interrupted command had started reports its first epochs again.
                warnings.filterwarnings("ignore", "The reported value is ignored", UserWarning)
                # `RoomLimiter` says how many trials wait for nodes; Tune would take the number of the start.
                waiting = {"TUNE_MAX_PENDING_TRIALS_PG": str(config.num_trials)}
                with (
                    environment_defaults(_TUNE_SETTINGS | waiting),
                    signal_handlers_kept(),
                    _interrupts_raised(),
                ):
                    grid = _tuner(config, experiment.task, trainable).fit()
        finally:
            _ProgressCallback.reporter = None
    if len(grid) != config.num_trials:
        raise LostWorkError(
            f"the search in {storage.join(config.out, TUNE_DIR)} ended after {len(grid)} of {config.num_trials} "
            f"trials. Delete its folder {SEARCH_DIR} and run the command again: trials that were over are not trained "
            "again"
        )
    results = (grid[index] for index in range(len(grid)))
    trials = sorted(map(_trial_result, results), key=lambda trial: trial.number)
    for trial in trials:
        if trial.error is not None:
            logger.warning("trial %d failed: %s", trial.number, trial.error)
    return trials


@contextlib.contextmanager
def _interrupts_raised() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end of the body if Ctrl-C came within it.

    Tune handles the signal itself: it stores the state of the search, ends the trials, and returns as if all of them were over.
    """
    # Only the main thread gets signals, and Tune takes them only if the user does not forbid it.
    takes_them = threading.current_thread() is threading.main_thread() and not int(
        os.environ.get("TUNE_DISABLE_SIGINT_HANDLER", "0")
    )
    before = signal.getsignal(signal.SIGINT)
    yield
    # When the signal comes, Tune puts the handler from before back for a second one; without it, its own stays.
    if takes_them and signal.getsignal(signal.SIGINT) is before:
        raise KeyboardInterrupt


def keep_keys_from_trials() -> None:
    """Keep the keys of object storage out of the environment of trials, which the dashboard shows.

    Tune would put them there. The nodes have keys of their own.
    """
    class_cache.ENV_VARS_TO_PROPAGATE -= {
        name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")
    }


def choose(fixed: FinetuneSettings, task: Task, trials: list[TrialResult]) -> FinetuneSettings:
    """The settings of the trial with the best validation score; of equal trials, the earliest."""
    if all(trial.valid_score is None for trial in trials):
        errors = "; ".join(dict.fromkeys(trial.error or "no score" for trial in trials))
        raise TrainingError(f"none of {len(trials)} trials has a validation score: {errors}")
    best = best_candidate(task.metric, sorted(trials, key=lambda trial: trial.number))
    return with_drawn(fixed, best.settings)


def _choice_text(trials: list[TrialResult], chosen: FinetuneSettings) -> str:
    """The chosen values of the settings that the search varied."""
    names = dict.fromkeys(name for trial in trials for name in trial.settings)
    values = ((name, getattr(chosen, name)) for name in names)
    return ", ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values
    )


def room_for_trials(config: SweepConfig, *, may_grow: bool) -> int:
    """Number of trials that may wait or run now: as many as the nodes have resources for, but at least one.

    If the cluster ``may_grow``, one more, for which its autoscaler adds a node: more would all be drawn before they can
    learn from the trials that run. A private cluster may have more logical CPUs than the machine has cores. There the
    cores count, as more trials than cores would only slow each other down.
    """
    total = cluster_resources(config.cluster.worker_labels)
    need = worker_resources(config)
    fits = how_many_fit(need["num_cpus"], total.get("CPU", 0))
    if need["num_gpus"]:
        fits = min(fits, how_many_fit(need["num_gpus"], total.get("GPU", 0)))
    elif is_private(config.cluster):
        fits = min(fits, how_many_fit(need["num_cpus"], available_cpus()))
    return max(1, fits + may_grow)


def search_method(config: SweepConfig, task: Task) -> tuple[Searcher, TrialScheduler]:
    """Searcher and scheduler of the configuration. Raises ConfigError if they cannot be used for this task."""
    # It would log each study that it starts.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    mode = "max" if task.metric.higher_is_better else "min"
    longest = (config.search.epochs or task.epochs)[1]
    return (
        build_searcher(
            config.search, config.search.dimensions(task.epochs), mode, config.search_seed
        ),
        build_scheduler(config.search, mode, config.grace_epochs, longest),
    )


def _tuner(config: SweepConfig, task: Task, trainable: Any) -> tune.Tuner:
    storage_path = storage.join(config.out, TUNE_DIR)
    experiment_path = storage.join(storage_path, SEARCH_DIR)
    # First, as restoring a stored search needs the same classes.
    searcher, scheduler = search_method(config, task)
    if _can_continue(experiment_path, config.search.dimensions(task.epochs)):
        logger.info("continuing the search in %s", experiment_path)
        # Failed trials are run again: they may have failed for the reason that interrupted the command.
        return tune.Tuner.restore(experiment_path, trainable=trainable, resume_errored=True)
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=RoomLimiter(searcher),
            scheduler=scheduler,
            num_samples=config.num_trials,
            # In a new process a short trial would spend more time on imports than on training.
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=SEARCH_DIR,
            storage_path=storage_path,
            # If a node is lost, its trials run again. A trial that fails twice is recorded as failed.
            failure_config=tune.FailureConfig(max_failures=1),
            callbacks=[_ProgressCallback(), JsonLoggerCallback()],  # type: ignore[no-untyped-call]
            verbose=0,
        ),
    )


def _can_continue(experiment_path: str, varied: Collection[str]) -> bool:
    """Whether an interrupted search left a complete state to continue from; incomplete ones are removed, and searches
    that vary other settings than ``varied``.

    Tune writes its settings at the start, and the state seconds later as several files, none of them atomically. From
    settings without a state it would run a single trial and call the search finished.
    """
    settings_uri = storage.join(experiment_path, "tuner.pkl")
    if not storage.exists(settings_uri):
        return False
    if _unpickled(settings_uri) is not None:
        for state in _states(experiment_path):
            if _is_whole(*state):
                return _varies_only(experiment_path, state[0], varied)
            for uri in state:
                storage.delete(uri)
    logger.warning(
        "the search in %s has no whole state that this version can continue, and begins again; trials that were over are "
        "not trained again",
        without_credentials(experiment_path),
    )
    storage.delete_tree(experiment_path)
    return False


def _varies_only(experiment_path: str, trials_uri: str, varied: Collection[str]) -> bool:
    """Whether the stored trials vary none but these settings; a search that varies others is removed.

    Its searcher would go on to draw them. An earlier version drew frozen blocks for an encoder from scratch.
    """
    trials = storage.read_json(trials_uri)["trial_data"]
    others = {name for trial, _ in trials for name in json.loads(trial)["config"]} - set(varied)
    if not others:
        return True
    logger.warning(
        "the search in %s was begun by an earlier version, which varied %s there too, and begins again",
        without_credentials(experiment_path),
        ", ".join(sorted(others)),
    )
    storage.delete_tree(experiment_path)
    return False


def _states(experiment_path: str) -> list[tuple[str, str, str]]:
    """The files of each stored state, newest first: trials, searcher, generator of trials.

    Each command that continued the search has its own state, named after the time when the command started.
    """
    names = [storage.name_of(file.uri) for file in storage.list_files(experiment_path)]
    starts = [found[1] for name in names if (found := _STATE_NAME.fullmatch(name))]
    return [
        (
            storage.join(experiment_path, f"experiment_state-{start}.json"),
            storage.join(experiment_path, f"searcher-state-{start}.pkl"),
            storage.join(experiment_path, f"search_gen_state-{start}.json"),
        )
        for start in sorted(starts, reverse=True)
    ]


def _is_whole(trials_uri: str, searcher_uri: str, generator_uri: str) -> bool:
    """Whether the files of a state are complete and belong together, that is, contain the same trials."""
    try:
        state = storage.read_json(trials_uri)
        trials = {json.loads(trial)["trial_id"] for trial, _ in state["trial_data"]}
    except (storage.NotFoundError, DataError, KeyError, TypeError, ValueError):
        return False
    searcher, generator = _unpickled(searcher_uri), _unpickled(generator_uri)
    if searcher is None or generator is None or generator["counter"] != len(trials):
        return False
    # Optuna's state lists its trials. Others have at most a number of trials, which is that of the generator.
    known = searcher.get("_ot_trials") if isinstance(searcher, Mapping) else None
    return known is None or set(known) == trials


def _unpickled(uri: str) -> Any:
    """The content of a file that Tune would unpickle itself; None if the file is missing or incomplete, or names classes that
    are no longer where they were."""
    try:
        return pickle.loads(storage.read_bytes(uri))
    except (storage.NotFoundError, EOFError, pickle.UnpicklingError):
        return None
    except (ImportError, AttributeError) as error:
        # Of this project, Ray, Optuna, or the user's searcher.
        logger.warning("%s was written by another version: %s", without_credentials(uri), error)
        return None


def _tune_resources(config: SweepConfig) -> tune.PlacementGroupFactory:
    need = worker_resources(config)
    bundle = {"CPU": need["num_cpus"], "GPU": need["num_gpus"]}
    labels = config.cluster.worker_labels
    placement: dict[str, Any] = {"bundle_label_selector": [dict(labels)]} if labels else {}
    return tune.PlacementGroupFactory([bundle], **placement)


def _trial_name(trial: Trial) -> str:
    # Tune's tag starts with a counter from 1, which continues in a restored search.
    return f"trial-{int(trial.experiment_tag.split('_', 1)[0]) - 1:04d}"


class _ProgressCallback(tune.Callback):
    """Shows finished trials in the progress display of the driver.

    The reporter is a class attribute: Tune pickles its callbacks with the state of the search, and a restored search
    must not get the display of the interrupted command.
    """

    reporter: Reporter | None = None
    total = 0

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:  # noqa: ARG002 - Tune's signature
        """Report the number of trials that have ended."""
        if self.reporter is not None:
            over = [trial for trial in trials if trial.status in (Trial.TERMINATED, Trial.ERROR)]
            failed = sum(trial.status == Trial.ERROR for trial in over)
            self.reporter({"done": len(over), "total": self.total, "failed": failed})


def _trial_result(result: tune.Result) -> TrialResult:
    metrics = result.metrics or {}
    score = float(metrics.get(METRIC, math.nan))
    if result.error is not None:
        status = "failed"
    elif metrics.get("over", False):
        status = "finished"
    else:
        status = "stopped"
    return TrialResult(
        number=int(str(result.path).rsplit("-", 1)[-1]),
        status=status,
        settings=plain_values(result.config or {}),
        valid_score=score if math.isfinite(score) and status != "failed" else None,
        epochs=int(metrics.get("epoch", 0)),
        seconds=float(metrics.get("seconds", 0.0)),
        error=None if result.error is None else _last_line(result.error),
    )


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _summary(found: FinetuneSummary, results: Mapping[str, Any]) -> SweepSummary:
    drawn = {name for trial in results["trials"] for name in trial["settings"]}
    return SweepSummary(
        **dataclasses.asdict(found),
        trials=len(results["trials"]),
        trials_failed=sum(trial["status"] == "failed" for trial in results["trials"]),
        chosen={name: value for name, value in results["chosen"].items() if name in drawn},
    )
