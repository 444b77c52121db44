"""The state of a command that fine-tunes, sweeps, refits, embeds or predicts, from its files alone."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from moleblend_ray.data.dataset.dataset_files import SPLITS, is_prepared
from moleblend_ray.data.dataset.lease import command_at_work, was_leased
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.documents import lack, member
from moleblend_ray.data.status import data_status, has_data_set
from moleblend_ray.errors import DataError
from moleblend_ray.evaluation.results.additions import missing_in
from moleblend_ray.evaluation.results.result_files import (
    BASELINES_DIR,
    DATA_DIR,
    EMBED,
    EPOCHS_DIR,
    IDENTITY_NAME,
    LEADERBOARD_NAME,
    MODELS_DIR,
    PARTS_DIR,
    PREDICT,
    PREPARED_DIR,
    REFIT_NAME,
    RESULTS_NAME,
    SEED_RESULT_NAME,
    fold_path,
)
from moleblend_ray.evaluation.settings import MOST_FOLDS

logger = logging.getLogger(__name__)


PARTS_KINDS: Final = {
    "EmbedConfig": EMBED,
    "PredictConfig": PREDICT,
}
"""Name of its configuration -> command."""

TRAINING_JOBS: Final = ("FinetuneConfig", "SweepConfig")

REFIT_JOB: Final = "RefitConfig"

_MODEL: Final[Mapping[str, Any]] = {"name": str, "test.mean": float}
"""What is read of each model of the results, fine-tuned or a baseline."""

_RESULTS: Final[Mapping[str, Any]] = {
    "config": dict[str, Any],
    "task.name": str,
    "task.metric": str,
    "task.higher_is_better": bool,
    "trials": list[dict[str, Any]],
    **{f"final.{name}": annotation for name, annotation in _MODEL.items()},
}
"""What is read of the results."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartsStatus:
    """An embedding or prediction."""

    kind: str
    """``embed`` or ``predict``."""
    uri: str
    state: str
    """``finished``, ``running`` or ``unfinished``."""
    detail: str
    parts_done: int
    parts: int | None
    """Number of parts in total; None while the molecules are being prepared."""
    molecules: int | None
    """Molecules in all parts or, while unfinished, in the data set."""
    bytes: int
    """Bytes of the existing parts."""
    rejected: int | None
    molecules_per_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepStatus:
    """A sweep or fine-tuning of one task."""

    kind: str
    """``sweep`` or ``finetune``."""
    uri: str
    state: str
    """``finished``, ``running`` or ``unfinished``."""
    detail: str
    task: str
    trials_done: int
    """Trials that have ended, or that were stopped early and are in the results."""
    trials_begun: int
    trials: int | None
    """Number of trials; None for fine-tuning, which has none."""
    best_valid_score: float | None
    """Best validation score of any trial so far."""
    seeds_done: int
    seeds: int
    baselines: tuple[str, ...]
    """Baselines with at least one result."""
    test: Mapping[str, float]
    """Model -> mean test score, once there are results."""
    metric: str
    folds_done: int = 0
    """Folds of a cross-validation with results of their own."""
    folds: int | None = None
    """Number of its folds; None for a single split. Trials and seeds are those of all folds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitStatus:
    """A training of the models of finished results on all molecules."""

    kind: str
    """``refit``."""
    uri: str
    state: str
    """``finished``, ``running`` or ``unfinished``."""
    detail: str
    results: str
    """Directory of the results."""
    models_done: int
    molecules: int | None
    """Molecules that each model was trained on; None while unfinished, and of several tasks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskStatus:
    """One task of several."""

    name: str
    state: str
    """``finished``, ``failed``, ``absent`` or ``waiting``."""
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TasksStatus:
    """Sweeps or fine-tunings of several tasks."""

    kind: str
    uri: str
    state: str
    """``finished``, ``running``, ``failed`` (some tasks did) or ``unfinished``."""
    detail: str
    tasks: tuple[TaskStatus, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class BegunStatus:
    """A command that has not noted yet what its results are for: it does so once it knows its molecules."""

    kind: str
    """``begun``."""
    uri: str
    state: str
    """``running`` or ``unfinished``."""
    detail: str


def begun_status(uri: str) -> BegunStatus | None:
    """The status of a directory in which a command holds or held a lease, and nothing else tells which; None without a
    lease."""
    if not was_leased(uri):
        return None
    state, then = _unfinished(uri, "the same command continues")
    places = (storage.join(uri, folder) for folder in (DATA_DIR, PREPARED_DIR))
    data_uri = next(filter(has_data_set, places), None)
    detail = "nothing is written yet"
    if data_uri is not None:
        detail = "its molecules are prepared, nothing else is recorded yet"
        if not is_prepared(data_uri):
            detail = _preparing(data_uri)
    return BegunStatus(kind="begun", uri=uri, state=state, detail=detail + then)


def tasks_status(uri: str) -> TasksStatus:
    """The status of a directory with a leaderboard."""
    board_uri = storage.join(uri, f"{LEADERBOARD_NAME}.json")
    board = storage.read_object(board_uri, {"tasks": list[Any]})
    for row in board["tasks"]:
        storage.require_members(board_uri, row, {"name": str, "status": str})
    tasks = tuple(
        TaskStatus(name=row["name"], state=row["status"], reason=member(row, "reason", str) or "")
        for row in board["tasks"]
    )
    states = {task.state for task in tasks}
    done = sum(task.state == "finished" for task in tasks)
    state, then = "finished", ""
    # Seeds may be added to tasks that have results.
    if states & {"failed", "waiting"} or command_at_work(uri) is not None:
        state, then = _unfinished(uri, "the same command continues with the others")
    if state == "unfinished" and "failed" in states:
        state = "failed"
    return TasksStatus(
        kind="tasks",
        uri=uri,
        state=state,
        detail=f"{done} of {len(tasks)} tasks have results{then}",
        tasks=tasks,
    )


def _unfinished(uri: str, then: str) -> tuple[str, str]:
    """The state of unfinished work, and what is said of it: which command works there, or ``then``.

    It follows on what there is and what is missing, which is true of killed commands, too.
    """
    at_work = command_at_work(uri)
    if at_work is None:
        return "unfinished", f"; {then}"
    return "running", f"; a command works on it ({at_work})"


def parts_status(uri: str, identity: Mapping[str, Any]) -> PartsStatus:
    """The status of an embedding or prediction whose config.json is ``identity``."""
    kind = PARTS_KINDS[identity["config"]["job"]]
    there = _listed([uri], PARTS_DIR)
    size = sum(info.size for info in there)
    summary = _read(uri, kind.summary_name, {"parts": list[Any]})
    if summary is not None:
        lost = len(summary["parts"]) - len(there)
        state, detail = "finished", f"its summary ({kind.summary_name}) is there"
        if lost > 0:
            state, then = _unfinished(uri, "the same command makes them again")
            detail = f"it was finished, but {lost} of its parts are gone{then}"
        return PartsStatus(
            kind=kind.command,
            uri=uri,
            state=state,
            detail=detail,
            parts_done=len(there),
            parts=len(summary["parts"]),
            molecules=member(summary, kind.counted, int),
            bytes=size,
            rejected=member(summary, "rejected", int),
            molecules_per_s=member(summary, "molecules_per_s", float),
        )
    source = member(identity, "config.source", str | list[str])
    sources = [source] if isinstance(source, str) else source or []
    parts, molecules, detail = _planned(uri, *sources)
    state, then = _unfinished(uri, "the same command continues")
    return PartsStatus(
        kind=kind.command,
        uri=uri,
        state=state,
        detail=detail + then,
        parts_done=len(there),
        parts=parts,
        molecules=molecules,
        bytes=size,
        rejected=None,
        molecules_per_s=None,
    )


def _planned(uri: str, *sources: str) -> tuple[int | None, int | None, str]:
    """The expected numbers of parts and molecules, and what is being done."""
    prepared = storage.join(uri, PREPARED_DIR)
    for data_uri in (prepared, *sources):
        if is_prepared(data_uri):
            manifest = load_manifest(data_uri)
            parts = sum(len(manifest.shards_of(split)) for split in SPLITS)
            return (
                parts,
                manifest.counts.rows_out,
                "its molecules are prepared, its parts or their summary are not complete",
            )
    return None, None, _preparing(prepared)


def _preparing(data_uri: str) -> str:
    if not has_data_set(data_uri):
        return "its molecules are not prepared yet"
    return f"its molecules are not all prepared: {data_status(data_uri).rows_in:,} rows so far"


def sweep_status(uri: str, identity: Mapping[str, Any]) -> SweepStatus:
    """The status of a sweep or fine-tuning whose config.json is ``identity``."""
    storage.require_members(storage.join(uri, IDENTITY_NAME), identity, {"config.task.name": Any})
    config = identity["config"]
    is_sweep = config["job"] == "SweepConfig"
    results = _results(uri)
    folds = _folds(config)
    runs = [uri] if folds is None else [storage.join(uri, fold_path(fold)) for fold in range(folds)]
    trials = [record for info in _listed(runs, EPOCHS_DIR) if _is_trial(record := _json(info.uri))]
    wanted = member(config, "final_seeds", list[int]) or member(config, "seeds", list[int]) or [0]
    # Others were begun by an addition that was given up.
    of_wanted = {f"seed-{seed}/{SEED_RESULT_NAME}" for seed in wanted}
    seeds = sum(_end_of(info.uri) in of_wanted for info in _listed(runs, MODELS_DIR))
    baselines = dict.fromkeys(_baseline_of(info.uri) for info in _listed(runs, BASELINES_DIR))
    scores = [trial[-1]["best_valid_score"] for trial in trials if trial]
    higher = bool(results["task"]["higher_is_better"]) if results else _direction(trials)
    missing = missing_in(results["config"], config) if results else {}
    state, detail = "finished", f"its results ({RESULTS_NAME}) are there"
    if missing or not results:
        state, then = _unfinished(uri, "the same command continues")
        detail = (_missing_detail(missing) if missing else _sweep_detail(trials, seeds)) + then
    return SweepStatus(
        kind="sweep" if is_sweep else "finetune",
        uri=uri,
        state=state,
        detail=detail,
        task=str(results["task"]["name"] if results else config["task"]["name"]),
        trials_done=len(results["trials"])
        if results and is_sweep and folds is None
        else sum(bool(trial) and bool(trial[-1].get("over")) for trial in trials),
        trials_begun=len(trials),
        trials=(member(config, "num_trials", int) or 0) * len(runs) if is_sweep else None,
        best_valid_score=_best(results, scores, higher),
        seeds_done=seeds,
        seeds=len(wanted) * len(runs),
        baselines=tuple(baselines),
        test=_test_scores(results),
        metric=str(results["task"]["metric"]) if results else "",
        folds_done=sum(storage.exists(storage.join(run, RESULTS_NAME)) for run in runs)
        if folds
        else 0,
        folds=folds,
    )


def refit_status(uri: str, identity: Mapping[str, Any]) -> RefitStatus:
    """The status of a refit whose config.json is ``identity``."""
    # Of several tasks, each has a folder.
    done = [info for info in storage.list_files(uri) if info.uri.endswith(f"/{SEED_RESULT_NAME}")]
    found = _read(uri, REFIT_NAME, {"results": str})
    state, detail = "finished", f"its list of models ({REFIT_NAME}) is there"
    # Models may be added for further seeds or tasks of the results.
    if found is None or command_at_work(uri) is not None:
        state, then = _unfinished(uri, "the same command continues")
        detail = f"not all models are trained{then}"
    return RefitStatus(
        kind="refit",
        uri=uri,
        state=state,
        detail=detail,
        results=member(identity, "config.results", str) or "",
        models_done=len(done),
        molecules=member(found, "molecules", int),
    )


def _folds(config: Mapping[str, Any]) -> int | None:
    """Number of folds if all of a cross-validation are asked for."""
    folds = member(config, "task.folds", int)
    is_one = member(config, "task.fold", int) is not None
    # More are not of this program, and would all be looked for.
    return None if is_one or folds is None or not 0 < folds <= MOST_FOLDS else folds


def _sweep_detail(trials: list[Any], seeds: int) -> str:
    if seeds:
        return "not all seeds and baselines are trained, or the report is not written"
    if trials:
        return "the search is not over"
    # They are, wherever they lie: only then is noted what the results are for.
    return "its molecules are prepared, no training is recorded yet"


def _missing_detail(missing: Mapping[str, list[Any]]) -> str:
    listed = ", ".join(f"{name}={values}" for name, values in missing.items())
    return f"its results ({RESULTS_NAME}) are there, those of {listed} are not"


def _direction(trials: list[Any]) -> bool | None:
    """Whether a higher score is better, according to the best scores in the epochs of trials; None if they do not
    tell."""
    for trial in trials:
        scores = [epoch["valid_score"] for epoch in trial]
        if scores and min(scores) < max(scores):
            return bool(trial[-1]["best_valid_score"] == max(scores))
    return None


def _best(results: Any, scores: list[float], higher: bool | None) -> float | None:
    if results:
        scores = [
            score
            for trial in results["trials"]
            if (score := member(trial, "valid_score", float)) is not None
        ]
    if not scores or higher is None:
        return None
    return max(scores) if higher else min(scores)


def _test_scores(results: Any) -> dict[str, float]:
    if not results:
        return {}
    models = [results["final"], *results.get("baselines", [])]
    return {model["name"]: float(model["test"]["mean"]) for model in models}


def _end_of(file_uri: str) -> str:
    """The last folder and the name of a file."""
    return "/".join(file_uri.rsplit("/", 2)[-2:])


def _baseline_of(file_uri: str) -> str:
    """The kind in .../baselines/KIND/seed-0.json."""
    return file_uri.rpartition(f"/{BASELINES_DIR}/")[2].partition("/")[0]


def _listed(uris: Sequence[str], folder: str) -> list[storage.FileInfo]:
    """The files in a folder of each of these directories."""
    found = []
    for uri in uris:
        with contextlib.suppress(storage.NotFoundError):
            found += storage.list_files(storage.join(uri, folder))
    return found


def _results(uri: str) -> Any:
    """The results; None if they are not there."""
    results = _read(uri, RESULTS_NAME, _RESULTS)
    if results and "baselines" in results:
        results_uri = storage.join(uri, RESULTS_NAME)
        storage.require_members(results_uri, results, {"baselines": list[Any]})
        for baseline in results["baselines"]:
            storage.require_members(results_uri, baseline, _MODEL)
    return results


def _read(uri: str, name: str, members: Mapping[str, Any]) -> Any:
    """The object in a file; None if it is not there or not whole. DataError if it lacks one of the ``members``."""
    value = _json(storage.join(uri, name))
    if value is not None:
        storage.require_members(storage.join(uri, name), value, members)
    return value


def _is_trial(record: Any) -> bool:
    """Whether it is what a trial writes: an object for each epoch."""
    return (
        bool(record)
        and isinstance(record, list)
        and not any(
            lack(epoch, {"valid_score": float, "best_valid_score": float}) for epoch in record
        )
    )


def _json(uri: str) -> Any:
    try:
        return storage.read_json(uri)
    except storage.NotFoundError:
        return None
    except DataError as error:
        # A running command may be writing it.
        logger.debug("left out: %s", error)
        return None
