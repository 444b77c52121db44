"""Models for use from a finished fine-tuning or sweep: each seed is trained on all labelled molecules, in its own Ray task."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import ray

from moleblend_ray.config.accept import accepted
from moleblend_ray.config.downstream import (
    FinetuneConfig,
    PropertyConfig,
    RefitConfig,
    SweepConfig,
    TaskConfig,
)
from moleblend_ray.data.dataset.dataset_files import is_prepared
from moleblend_ray.data.dataset.lease import leased
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.claim import PreparedOtherwiseError
from moleblend_ray.errors import (
    HIDDEN,
    ConfigError,
    DataError,
    MoleBlendError,
    without_credentials,
)
from moleblend_ray.evaluation.models.finetune import ChoiceRows
from moleblend_ray.evaluation.prediction.ensemble import is_of_several_tasks
from moleblend_ray.evaluation.reports.leaderboard import Status, read_leaderboard
from moleblend_ray.evaluation.results.refit import (
    Choice,
    Everything,
    RefitModel,
    SeedFindings,
    finished_model,
)
from moleblend_ray.evaluation.results.result_files import DATA_DIR, REFIT_NAME
from moleblend_ray.evaluation.results.results import task_entry, versions
from moleblend_ray.orchestration.cluster.cluster_checks import require_shared_paths
from moleblend_ray.orchestration.cluster.placement import placed
from moleblend_ray.orchestration.cluster.session import ray_session
from moleblend_ray.orchestration.downstream.downstream import (
    Inputs,
    Loaded,
    folds_of,
    inputs_of,
    load,
    run_all,
    split_identity,
    split_of,
    with_descriptors,
    worker_resources,
)
from moleblend_ray.orchestration.downstream.task_groups import raise_for_failures
from moleblend_ray.orchestration.downstream.workers import refit_seed
from moleblend_ray.orchestration.identity import check_claim, claim, question
from moleblend_ray.orchestration.preparation.molecules import RAW_SETTINGS
from moleblend_ray.orchestration.progress.progress import Reporter
from moleblend_ray.settings import build, to_dict

logger = logging.getLogger(__name__)

REFIT_VERSION: Final = 1
"""Version of the layout of ``refit.json``."""

_FINISHED: Final[Mapping[str, Any]] = {
    "task.name": str,
    "molecules": int,
    "final.seeds": list[dict[str, Any]],
    "seconds": float,
}
"""What is read of ``refit.json``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitSummary:
    """Which models were trained, and where they are."""

    out: str
    """Directory of the models, which `moleblend predict models=` takes."""
    task: str
    """Name of the task."""
    molecules: int
    """Molecules that each model was trained on: all with labels."""
    models: int
    """Number of models, one for each seed."""
    epochs: tuple[int, ...]
    """Epochs of each."""
    results: str
    """Directory of the results, whose scores tell how good such models are."""
    seconds: float
    """Wall time of the command that finished the work."""
    already_finished: bool
    """True if an earlier command had finished the work and this one did nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitTasksSummary:
    """Which models of several tasks were trained, and where they are."""

    out: str
    """Directory of the models, a folder for each task; `moleblend predict models=` takes it for all of them."""
    tasks: int
    """Number of tasks with results."""
    models: int
    """Number of models of all tasks."""
    results: str
    """Directory of the results, whose scores tell how good such models are."""
    seconds: float
    """Wall time of this command."""
    already_finished: bool
    """True if earlier commands had finished every task."""


def refit_or_tasks(config: RefitConfig) -> RefitSummary | RefitTasksSummary:
    """What `moleblend refit` does: the models of one task, or of several."""
    config = accepted(config, RefitConfig)
    return refit_tasks(config) if is_of_several_tasks(config.results) else refit(config)


def refit_tasks(config: RefitConfig) -> RefitTasksSummary:
    """:func:`refit` of each task with results in ``config.results``, into a folder of the same name in ``config.out``.

    Repeating the command trains what is missing. After all tasks it raises TrainingError that names those that failed, if any.
    ConfigError if ``results`` are not those of several tasks, or none of them has some.
    """
    config = accepted(config, RefitConfig)
    began = time.monotonic()
    check_claim(config.out, {"config": question(config)})
    own = _own_configs(config)
    with contextlib.ExitStack() as stack:
        # Finished tasks only look at files: they need neither a session, which takes seconds to start, nor a lease.
        if works := not _are_finished(own, config.out):
            lease = stack.enter_context(leased(config.out, partial(_are_finished, own)))
            stack.enter_context(ray_session(config.cluster))
            claim(config.out, {"config": question(config)})
        summaries = _refit_each(own, config.out)
        if works:
            document = {
                "refit_version": REFIT_VERSION,
                "results": without_credentials(config.results),
                "tasks": [
                    {"name": one.task, "folder": folder} for folder, one in summaries.items()
                ],
            }
            lease.confirm()
            storage.write_json(storage.join(config.out, REFIT_NAME), document)
    return RefitTasksSummary(
        out=config.out,
        tasks=len(summaries),
        models=sum(one.models for one in summaries.values()),
        results=config.results,
        seconds=time.monotonic() - began,
        already_finished=all(one.already_finished for one in summaries.values()),
    )


def _own_configs(config: RefitConfig) -> dict[str, RefitConfig]:
    """Folder -> what :func:`refit` of each task with results takes."""
    return {
        folder: dataclasses.replace(
            config,
            results=storage.join(config.results, folder),
            out=storage.join(config.out, folder),
        )
        for folder in _folders_of_tasks(config.results)
    }


def _refit_each(own: Mapping[str, RefitConfig], out: str) -> dict[str, RefitSummary]:
    """Folder -> the models of its task. TrainingError, after all of them, that names those that failed."""
    summaries: dict[str, RefitSummary] = {}
    failed: dict[str, str] = {}
    for folder, config in own.items():
        try:
            summaries[folder] = refit(config)
        except MoleBlendError as error:
            logger.error("%s: %s", folder, error)
            failed[folder] = " ".join(str(error).split())
    raise_for_failures(out, failed, len(own))
    return summaries


def _are_finished(own: Mapping[str, RefitConfig], out: str) -> bool:
    """Whether ``out`` names the models of these tasks, and has all of them."""
    uri = storage.join(out, REFIT_NAME)
    if not storage.exists(uri):
        return False
    listed = storage.read_object(uri, {"tasks": list[dict[str, Any]]})["tasks"]
    if [task.get("folder") for task in listed] != list(own):
        return False
    try:
        return all(_is_finished(Choice.read(one.results), one.out) for one in own.values())
    except MoleBlendError:  # which `refit` of this task raises
        return False


def _folders_of_tasks(results: str) -> list[str]:
    """The folder of each task with results."""
    if not is_of_several_tasks(results):
        raise ConfigError(
            f"results: {results} is not the `out` of several tasks; in Python, call refit for one"
        )
    board = read_leaderboard(results)
    if not board.finished:
        raise ConfigError(f"results: none of the tasks in {results} is finished")
    if lacking := [row.name for row in board.rows if row.status is not Status.FINISHED]:
        logger.warning("%s have no results, and get no models", ", ".join(lacking))
    return [row.results for row in board.finished]


def refit(config: RefitConfig) -> RefitSummary:
    """Train the settings that a finished fine-tuning or sweep chose on all of its molecules, for as many epochs as were best.

    Repeating a finished command does nothing; repeating an interrupted one, or one of results that have got further seeds, trains
    those that are missing. InUseError if another command works on the same ``out``. ConfigError if ``results`` are not finished, or
    have no settings that are common to all molecules.
    """
    config = accepted(config, RefitConfig)
    began = time.monotonic()
    choice = Choice.read(config.results)
    # First, as of other results everything else differs, too.
    check_claim(config.out, {"config": question(config)})
    identity = _identity(config, choice)
    check_claim(config.out, identity)
    if (stored := _finished(config.out, choice)) is not None:
        logger.info("%s is finished", without_credentials(config.out))
        return _summary(config, stored, already_finished=True)
    own = _own_settings(config, choice)
    try:
        inputs = inputs_of(own)
    except storage.NotFoundError as error:
        raise DataError(
            f"what {without_credentials(config.results)} was made of is not in its place any more, and a refit reads it again: {error} "
            "Bring it back, or fine-tune anew"
        ) from error
    with leased(config.out, partial(_is_finished, choice)) as lease:
        # The command that held the lease before may have finished the work.
        if (stored := _finished(config.out, choice)) is not None:
            return _summary(config, stored, already_finished=True)
        with ray_session(config.cluster):
            loaded = _load(config, choice, own, inputs)
            claim(config.out, identity)
            models = _train(config, choice, own, loaded)
        document = {
            "refit_version": REFIT_VERSION,
            "results": without_credentials(config.results),
            "task": task_entry(loaded.task, loaded.molecules),
            "settings": to_dict(choice.settings),
            "molecules": len(loaded.molecules),
            "final": {"seeds": [dataclasses.asdict(model) for model in models]},
            "versions": versions(),
            "seconds": time.monotonic() - began,
        }
        lease.confirm()
        storage.write_json(storage.join(config.out, REFIT_NAME), document)
    return _summary(config, document, already_finished=False)


def _identity(config: RefitConfig, choice: Choice) -> dict[str, Any]:
    """What the models in ``out`` are made of. Seeds can be added."""
    return {
        "config": question(config),
        "chosen": to_dict(choice.settings),
        "data_fingerprint": choice.data_fingerprint,
        "checkpoint_fingerprint": choice.checkpoint_fingerprint,
    }


def _own_settings(config: RefitConfig, choice: Choice) -> PropertyConfig:
    """The settings of the command that made the results, where they lie now, on this cluster."""
    of_sweep = "search" in choice.config
    found = build(SweepConfig if of_sweep else FinetuneConfig, choice.config)
    return dataclasses.replace(
        found,
        task=_readable(found.task, config.results),
        checkpoint=_told("checkpoint", found.checkpoint),
        out=config.results,
        gpus_per_worker=config.gpus_per_worker,
        cluster=config.cluster,
    )


def _readable(task: TaskConfig, results: str) -> TaskConfig:
    """The task, with the prepared molecules beside the results for a source whose credentials these do not tell."""
    prepared = storage.join(results, DATA_DIR)
    _told("task.split_file", task.split_file)
    if HIDDEN in task.source and task.split_column is None and is_prepared(prepared):
        return dataclasses.replace(task, source=prepared, **RAW_SETTINGS)
    _told("task.source", task.source)
    return task


def _told(name: str, uri: str | None) -> str | None:
    """The location ``uri`` of a setting, if results tell all of it; else a ConfigError."""
    if uri is not None and HIDDEN in uri:
        raise ConfigError(
            f"results: credentials in URIs are written nowhere, so {name}, {uri}, cannot be read again for a refit. Repeat the "
            "fine-tuning or sweep from a copy, or with credentials from the environment"
        )
    return uri


def _load(config: RefitConfig, choice: Choice, own: PropertyConfig, inputs: Inputs) -> Loaded:
    """The labelled molecules. DataError if these, their parts or the weights to start from are not those that the settings were
    chosen with."""
    require_shared_paths({"out": config.out})
    if not is_prepared(storage.join(config.results, DATA_DIR)):
        # Results are only read.
        own = dataclasses.replace(own, out=config.out)
    try:
        loaded = load(own, inputs)
    except PreparedOtherwiseError as error:
        # Not what this error says: the data set is that of the results.
        raise DataError(
            f"the molecules have changed since {without_credentials(config.results)} was made: {error.problems}. Bring them back, or "
            "fine-tune anew"
        ) from error
    # Earlier results do not tell.
    noted_split = choice.split_fingerprint and split_identity(loaded.named).get("split_fingerprint")
    for what, there, now in (
        ("molecules", choice.data_fingerprint, loaded.molecules.fingerprint),
        ("weights of the checkpoint", choice.checkpoint_fingerprint, loaded.start.fingerprint),
        # Which rows are replicates of each other depends on it, and by which molecules descriptors are judged.
        ("parts of the molecules", choice.split_fingerprint, noted_split),
    ):
        if there != now:
            raise DataError(
                f"the {what} have changed since {without_credentials(config.results)} was made: expected the fingerprint {there}, "
                f"found {now}. Bring them back, or fine-tune anew"
            )
    return loaded


def _train(
    config: RefitConfig, choice: Choice, own: PropertyConfig, loaded: Loaded
) -> list[RefitModel]:
    """The models of all seeds, of which finished ones are kept."""
    everything = _everything(own, choice, loaded)
    logger.info(
        "%s: training on all %d molecules, epochs: %s",
        loaded.task.name,
        len(loaded.molecules),
        ", ".join(str(tested.epochs) for tested in choice.seeds.values()),
    )
    shared = ray.put(everything)
    runs = {
        seed: _Run(config=config, shared=shared, everything=everything, seed=seed, tested=tested)
        for seed, tested in choice.seeds.items()
    }
    found = {
        seed: finished_model(config.out, seed, run.tested.epochs, choice.settings)
        for seed, run in runs.items()
    }
    missing = {seed: run for seed, run in runs.items() if found[seed] is None}
    found |= run_all(missing, _start, f"{loaded.task.name} on all molecules", "models")
    return [model for model in found.values() if model is not None]


def _everything(own: PropertyConfig, choice: Choice, loaded: Loaded) -> Everything:
    """What all models are trained on."""
    molecules = loaded.molecules
    chosen_on: tuple[ChoiceRows, ...] = ()
    if choice.settings.descriptors:
        molecules = with_descriptors(molecules)
        chosen_on = tuple(_chosen_on(own, loaded))
    return Everything(
        task=loaded.task,
        molecules=molecules,
        chosen_on=chosen_on,
        start=loaded.start,
        settings=choice.settings,
    )


def _chosen_on(own: PropertyConfig, loaded: Loaded) -> list[ChoiceRows]:
    """The parts by which settings were chosen, of a cross-validation those of each fold."""
    task = own.task
    if not task.is_cross_validated:
        splits = [split_of(own, loaded)]
    else:
        numbers = folds_of(own, loaded)
        folds = [dataclasses.replace(task, fold=fold) for fold in range(task.folds or 0)]
        splits = [split_of(dataclasses.replace(own, task=one), loaded, numbers) for one in folds]
    return [ChoiceRows(split.train, split.valid) for split in splits]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """One training on all molecules."""

    config: RefitConfig
    shared: Any
    """Reference to ``everything`` in the object store (``ray.ObjectRef``)."""
    everything: Everything
    seed: int
    tested: SeedFindings

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        everything = self.everything
        return self.tested.epochs * everything.settings.steps_per_epoch(len(everything.molecules))


def _start(run: _Run, report: Reporter) -> Any:
    """A reference to the model of the run, which begins as soon as there are resources for it."""
    cluster = run.config.cluster
    options = {**worker_resources(run.config), **placed(cluster.worker_labels)}
    return (
        ray.remote(refit_seed)
        .options(**options)
        .remote(
            run.shared,
            run.seed,
            run.tested.epochs,
            run.tested.validation(run.everything.molecules.columns),
            run.config.out,
            cluster,
            report,
        )
    )


def _finished(out: str, choice: Choice) -> dict[str, Any] | None:
    """What ``refit.json`` in ``out`` says, if it has a model for each seed and its number of epochs."""
    uri = storage.join(out, REFIT_NAME)
    if not storage.exists(uri):
        return None
    stored = storage.read_object(uri, _FINISHED)
    there = {seed.get("seed"): seed.get("epochs") for seed in stored["final"]["seeds"]}
    asked = {seed: tested.epochs for seed, tested in choice.seeds.items()}
    return stored if there == asked else None


def _is_finished(choice: Choice, out: str) -> bool:
    return _finished(out, choice) is not None


def _summary(
    config: RefitConfig, document: Mapping[str, Any], *, already_finished: bool
) -> RefitSummary:
    seeds = document["final"]["seeds"]
    return RefitSummary(
        out=config.out,
        task=document["task"]["name"],
        molecules=document["molecules"],
        models=len(seeds),
        epochs=tuple(seed["epochs"] for seed in seeds),
        results=config.results,
        seconds=document["seconds"],
        already_finished=already_finished,
    )
