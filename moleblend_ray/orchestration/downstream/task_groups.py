"""Several tasks in one command: each is fine-tuned or swept in its own folder, and a leaderboard shows them together.

The folder of a task is what a command for this task alone would write. So it is continued, or left alone when finished,
in the same way. The tasks follow one another in one Ray session; a task that fails does not stop the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.config.accept import accepted
from moleblend_ray.config.downstream import FinetuneConfig, PropertyConfig, SweepConfig
from moleblend_ray.data.dataset.dataset_files import is_prepared
from moleblend_ray.data.dataset.lease import leased
from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.files import storage
from moleblend_ray.data.sources import SourceSet
from moleblend_ray.errors import CheckpointError, ConfigError, MoleBlendError, TrainingError
from moleblend_ray.evaluation.reports.leaderboard import (
    Leaderboard,
    Status,
    TaskRow,
    read_row,
    rows_of_states,
)
from moleblend_ray.evaluation.reports.leaderboard_page import write_leaderboard
from moleblend_ray.evaluation.results.result_files import (
    DATA_DIR,
    IDENTITY_NAME,
    LEADERBOARD_NAME,
    command_of,
    require_command,
)
from moleblend_ray.evaluation.sources import TaskSources, task_sources
from moleblend_ray.evaluation.splits.given_split import rows_of_column
from moleblend_ray.orchestration.cluster.session import ray_session
from moleblend_ray.orchestration.downstream.cross_validation import (
    CrossValidationSummary,
    cross_validate,
)
from moleblend_ray.orchestration.downstream.downstream import check_cluster, starting_point
from moleblend_ray.orchestration.downstream.finetune import FinetuneSummary, finetune
from moleblend_ray.orchestration.downstream.result_writing import has_results
from moleblend_ray.orchestration.downstream.sweep import SweepSummary, search_method, sweep
from moleblend_ray.orchestration.identity import check_finished, question
from moleblend_ray.orchestration.preparation.molecules import (
    RAW_SETTINGS,
    look_at_source,
    prepare_molecules,
    refuse_raw_settings,
)

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=PropertyConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class TasksSummary:
    """What a command for several tasks found, and where it is."""

    out: str
    """Directory of the leaderboard; the results of each task are in a folder with its name."""
    leaderboard: str
    """URI of ``leaderboard.html``."""
    tasks: int
    """Number of tasks asked for."""
    tasks_finished: int
    """Tasks with results."""
    tasks_absent: int
    """Tasks left out, as the source does not hold them."""
    wins: dict[str, int]
    """Model -> tasks on which it has the best mean test score."""
    mean_rank: dict[str, float]
    """Model -> its mean rank over the tasks; 1 is the best."""
    seconds: float
    """Wall time of this command."""
    already_finished: bool
    """True if earlier commands had finished every task."""


def sweep_or_tasks(config: SweepConfig) -> SweepSummary | CrossValidationSummary | TasksSummary:
    """What `moleblend sweep` does: one task, its folds, or several tasks."""
    return sweep_tasks(config) if config.task.is_group else _sweep_one(config)


def finetune_or_tasks(
    config: FinetuneConfig,
) -> FinetuneSummary | CrossValidationSummary | TasksSummary:
    """What `moleblend finetune` does: one task, its folds, or several tasks."""
    return finetune_tasks(config) if config.task.is_group else _finetune_one(config)


def _sweep_one(config: SweepConfig) -> SweepSummary | CrossValidationSummary:
    return cross_validate(config) if config.task.is_cross_validated else sweep(config)


def _finetune_one(config: FinetuneConfig) -> FinetuneSummary | CrossValidationSummary:
    return cross_validate(config) if config.task.is_cross_validated else finetune(config)


def sweep_tasks(config: SweepConfig) -> TasksSummary:
    """:func:`sweep`, or the cross-validation, of each task that ``config.task.name`` stands for, in ``<out>/<task>``, and a
    leaderboard.

    Repeating the command continues where it was interrupted, tries failed tasks again, and repeats nothing that is
    finished. Before any work it raises ConfigError, DataError or CheckpointError if settings or files are missing, or differ
    from those of ``out``. After all tasks it raises TrainingError that names the tasks that failed, if any.
    """
    config = accepted(config, SweepConfig)
    for task in config.task.tasks().values():
        search_method(config, task)
    return _run_tasks(config, _sweep_one)


def finetune_tasks(config: FinetuneConfig) -> TasksSummary:
    """:func:`finetune`, or the cross-validation, of each task that ``config.task.name`` stands for; otherwise as
    :func:`sweep_tasks`."""
    return _run_tasks(accepted(config, FinetuneConfig), _finetune_one)


def _run_tasks(config: C, run: Callable[[C], Any]) -> TasksSummary:
    began = time.monotonic()
    sources = _find_sources(config)
    states = {name: _first_state(name, config, sources) for name in config.task.tasks()}
    configs = _task_configs(config, sources)
    _check_questions(config.out, configs)
    finished_before = {name for name, task_config in configs.items() if has_results(task_config)}
    is_finished = finished_before == set(configs)
    for name, source in sources.found.items():
        if name not in finished_before:
            refuse_raw_settings(dataclasses.replace(config.task, name=name, source=source))
    # What is finished needs its molecules no more: nothing is prepared again for it.
    prepares = not is_finished or _is_shared_prepared(config, sources)
    shared = _look_at_shared(config, sources) if prepares else {}
    form = None if is_finished and not shared else starting_point(config).molecules
    with contextlib.ExitStack() as stack:
        # Finished tasks only look at files: they need neither a session, which takes seconds to start, nor a lease.
        if not is_finished:
            stack.enter_context(leased(config.out, partial(_are_finished, configs)))
            stack.enter_context(ray_session(config.cluster))
            check_cluster(config)
        board = _write_board(config.out, states)
        failed: dict[str, str] = {}
        _prepare_shared(config, shared, form)
        for number, (name, task_config) in enumerate(configs.items(), start=1):
            logger.info("task %d of %d: %s", number, len(configs), name)
            error = _error_of(run, task_config)
            if error is not None:
                logger.error("%s failed: %s", name, error)
                failed[name] = error
                # Where seeds or baselines were to be added, the results without them stay.
                row = TaskRow(name=name, status=Status.FAILED, reason=error)
                states[name] = read_row(config.out, name) or row
            board = _write_board(config.out, states)
    raise_for_failures(config.out, failed, len(board.rows))
    return _summary(config.out, board, time.monotonic() - began, is_finished)


def _find_sources(config: PropertyConfig) -> TaskSources:
    """The molecules of each task. Raises a ConfigError that names all missing ones, unless they may be missing."""
    identity = storage.join(config.out, IDENTITY_NAME)
    if storage.exists(identity):
        stored = storage.read_object(identity, {"config": dict[str, Any]})["config"]
        require_command(config.out, stored, str(command_of(question(config))))
        raise ConfigError(
            f"out: {config.out} holds the results of a single task; expected a directory for several. Give another"
        )
    sources = task_sources(config.task.source, tuple(config.task.tasks().values()))
    if sources.missing and not (config.task.skip_missing and sources.found):
        listed = "; ".join(f"{name} ({looked_for})" for name, looked_for in sources.missing.items())
        raise ConfigError(
            f"task.source: {config.task.source} has no molecules for {listed}, or another format. Add the files, name "
            "the tasks you have (task.name=[...]), or leave the others out with task.skip_missing=true"
        )
    return sources


def _first_state(name: str, config: PropertyConfig, sources: TaskSources) -> TaskRow:
    if name in sources.found:
        return TaskRow(name=name, status=Status.WAITING)
    reason = f"{config.task.source} has no {sources.missing[name]} or the like"
    return TaskRow(name=name, status=Status.ABSENT, reason=reason)


def _task_configs(config: C, sources: TaskSources) -> dict[str, C]:
    """The configuration of each single task: its name, its molecules, its folder."""
    shared = _shared_sources(sources)
    configs = {}
    for name, source in sources.found.items():
        task = dataclasses.replace(config.task, name=name, source=source, skip_missing=False)
        if source in shared:
            task = dataclasses.replace(
                task,
                source=_shared_data(config.out, source),
                split_file=_shared_split(config, source),
                split_column=None,
                **RAW_SETTINGS,  # They have made the shared molecules.
            )
        out = storage.join(config.out, name)
        configs[name] = dataclasses.replace(config, task=task, out=out)
    return configs


def _check_questions(out: str, configs: Mapping[str, PropertyConfig]) -> None:
    """Refuse an ``out`` with results of other settings before its leaderboard is replaced by one with errors only."""
    for name, config in configs.items():
        if storage.exists(storage.join(out, name, IDENTITY_NAME)):
            check_finished(config.out, question(config), dict)


def _error_of(run: Callable[[C], Any], config: C) -> str | None:
    """Why the task failed; None if it did not."""
    try:
        run(config)
    except CheckpointError:
        # All tasks have the same checkpoint.
        raise
    # Whatever it is (memory, a singular matrix, an error of Ray Tune): the other tasks should still be done.
    except Exception as error:
        cause = getattr(error, "cause", None) or error
        if not isinstance(cause, MoleBlendError):
            logger.warning("task %s failed", config.task.name, exc_info=error)
        return " ".join(str(cause).split()) or type(cause).__name__
    return None


def raise_for_failures(out: str, failed: Mapping[str, str], num_tasks: int) -> None:
    """TrainingError that names the ``failed`` of several tasks with their reasons, if there are some."""
    if failed:
        listed = "; ".join(f"{name}: {reason.rstrip('.')}" for name, reason in failed.items())
        others = f"The others are in {out}; the" if len(failed) < num_tasks else "The"
        raise TrainingError(
            f"{len(failed)} of {num_tasks} tasks failed: {listed}. {others} same command tries only these again"
        )


def _are_finished(configs: Mapping[str, PropertyConfig], out: str) -> bool:  # noqa: ARG001 - a lease asks of its out
    return all(map(has_results, configs.values()))


def _write_board(out: str, states: Mapping[str, TaskRow]) -> Leaderboard:
    rows = rows_of_states(out, tuple(states.values()))
    board = Leaderboard(title=storage.name_of(out), rows=rows)
    write_leaderboard(out, board)
    return board


# -- molecules that several tasks share -------------------------------------------------------------------


def _shared_sources(sources: TaskSources) -> list[str]:
    """Raw sources that several tasks have in common; they are prepared once."""
    counts = Counter(sources.found.values())
    return [source for source, count in counts.items() if count > 1 and not is_prepared(source)]


def _shared_data(out: str, source: str) -> str:
    stem = re.sub(r"[^\w-]", "_", storage.name_of(source).partition(".")[0]) or "all"
    return storage.join(out, DATA_DIR, stem)


def _shared_split(config: PropertyConfig, source: str) -> str | None:
    """URI of the split file that is made from the split column, as prepared molecules have no such column."""
    if config.task.split_column is None:
        return None
    return f"{_shared_data(config.out, source)}.split.json"


def _is_shared_prepared(config: PropertyConfig, sources: TaskSources) -> bool:
    return all(is_prepared(_shared_data(config.out, source)) for source in _shared_sources(sources))


class _Shared(NamedTuple):
    """What is read of a shared source before Ray is started."""

    sources: SourceSet | None
    """Files and columns."""
    rows: dict[str, NDArray[np.int64]] | None
    """Word in the split column -> rows; None without such a column."""


def _look_at_shared(config: PropertyConfig, sources: TaskSources) -> dict[str, _Shared]:
    """Each source that several tasks share; ConfigError or DataError if it lacks a column that all of them need."""
    column = config.task.split_column
    return {
        source: _Shared(
            look_at_source(dataclasses.replace(config.task, source=source), None),
            None if column is None else rows_of_column(source, column),
        )
        for source in _shared_sources(sources)
    }


def _prepare_shared(
    config: PropertyConfig, shared: Mapping[str, _Shared], form: MoleculeForm | None
) -> None:
    """Prepare, check or complete the molecules that several tasks share, in the ``form`` of the starting point, with every
    numeric column as a label."""
    for source, found in shared.items():
        split = _shared_split(config, source)
        if split is not None and found.rows is not None:
            storage.write_json(split, {word: rows.tolist() for word, rows in found.rows.items()})
        prepare_molecules(
            dataclasses.replace(config.task, source=source),
            _shared_data(config.out, source),
            label_columns=None,
            conformers=config.task.conformers,
            form=form,
            cluster=config.cluster,
            sources=found.sources,
        )


def _summary(out: str, board: Leaderboard, seconds: float, already_finished: bool) -> TasksSummary:
    standings = board.standings()
    return TasksSummary(
        out=out,
        leaderboard=storage.join(out, f"{LEADERBOARD_NAME}.html"),
        tasks=len(board.rows),
        tasks_finished=len(board.finished),
        tasks_absent=sum(row.status is Status.ABSENT for row in board.rows),
        wins={item.name: item.wins for item in standings},
        mean_rank={item.name: item.mean_rank for item in standings},
        seconds=seconds,
        already_finished=already_finished,
    )
