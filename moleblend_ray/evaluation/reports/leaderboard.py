"""The results of several fine-tunings or sweeps side by side: scores, ranks, wins, gains over the best baseline."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import numpy as np

from moleblend_ray.data.files import storage
from moleblend_ray.data.files.documents import require_types
from moleblend_ray.errors import ConfigError, DataError
from moleblend_ray.evaluation.results.result_files import LEADERBOARD_NAME, RESULTS_NAME
from moleblend_ray.evaluation.results.results import Spread
from moleblend_ray.evaluation.tasks import Metric, ReplicateRule, TaskKind

logger = logging.getLogger(__name__)

_RESULTS: Final[Mapping[str, Any]] = {
    "task.name": str,
    "task.metric": str,
    "data.molecules": int,
    "data.split.hash": str,
    "final.test.mean": float,
}
"""Members that the results of all versions have, and few other files of this name."""

_ROW: Final[Mapping[str, Any]] = {"name": str, "status": str, "reason": str, "results": str}
"""What is read of a task in ``leaderboard.json``."""
_TASKS: Final[Mapping[str, Any]] = {"tasks": list[Any]}

LEADERBOARD_VERSION = 1
"""Version of the layout of ``leaderboard.json``."""


class Status(StrEnum):
    """The state of a task."""

    FINISHED = "finished"
    """It has results."""
    FAILED = "failed"
    """It ended with an error; repeating the command tries it again."""
    ABSENT = "absent"
    """The source has no molecules for it."""
    WAITING = "waiting"
    """It has not started or not finished."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelScore:
    """One model on one task, trained with several seeds."""

    name: str
    """Name in the results."""
    is_baseline: bool
    """Whether it is one of the models to compare with."""
    valid: Spread
    """Validation scores, in the task's unit."""
    test: Spread
    """Test scores, in the task's unit."""
    test_interval: tuple[float, float] | None = None
    """95 % interval of the mean test score over draws of the test molecules; None if results do not tell."""
    better_by: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Of a fine-tuned model: baseline -> 95 % interval of the difference to it on the same draws, positive where the model is
    better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRow:
    """One task with the scores of all models. Scores of two rows can be compared only if their label columns, split
    hashes and ``labels`` are equal."""

    name: str
    """Name of the task."""
    status: Status
    """Whether there are scores."""
    reason: str = ""
    """Why there are none, for a task that failed or is absent."""
    metric: str = ""
    """Value of a :class:`Metric`; empty without scores, like all fields below."""
    unit: str = ""
    """Unit of the scores; empty for plain numbers."""
    columns: tuple[str, ...] = ()
    """Label columns, of which the scores are means, in alphabetical order."""
    higher_is_better: bool = False
    """Whether a larger score is better."""
    molecules: int = 0
    """Molecules with labels, all parts together."""
    test_molecules: int = 0
    """Molecules of the test part."""
    test_seen: int = 0
    """Of these, those that are also among the molecules for training or validation (``Repeats``); 0 also for results of
    before this was counted."""
    split: str = ""
    """How the molecules were divided, and into how many folds. Of these, the scores of ``models`` have a value for each."""
    split_hash: str = ""
    """16 hexadecimal digits that name the split."""
    labels: str = ""
    """How labels that scores are of differ from those of the table: what became of replicates, and whether errors are also of
    bounds. Empty if they do not."""
    results: str = ""
    """Folder of the results, as a URI or relative to the folder of the leaderboard."""
    models: tuple[ModelScore, ...] = ()
    """The fine-tuned models, then the baselines."""

    @property
    def basis(self) -> str:
        """The kind of the split, and what became of labels: of others, the same split gives other scores."""
        return ", ".join(filter(None, (self.split, self.labels)))

    @property
    def best(self) -> tuple[str, ...]:
        """Names of the models with the best mean test score; empty if there is only one model."""
        ranks = self.ranks()
        return tuple(name for name, rank in ranks.items() if rank == min(ranks.values()))

    @property
    def reference(self) -> ModelScore | None:
        """The baseline that a user would choose: the best on the validation part."""
        baselines = [model for model in self.models if model.is_baseline]
        return max(baselines, key=lambda model: self._sign * model.valid.mean, default=None)

    @property
    def _sign(self) -> float:
        """Factor with which a larger score is a better one."""
        return 1.0 if self.higher_is_better else -1.0

    def score_of(self, model: str) -> ModelScore | None:
        """The scores of the model of this name; None if it has none for this task."""
        return next((score for score in self.models if score.name == model), None)

    def verdict(self, model: ModelScore) -> int | None:
        """1 if the model is better than the reference beyond the chance of which molecules were tested, -1 if worse, 0 if it may be
        either; None if that is not known."""
        reference = self.reference
        limits = None if reference is None else model.better_by.get(reference.name)
        return None if limits is None else int(limits[0] > 0) - int(limits[1] < 0)

    def ranks(self) -> dict[str, float]:
        """Model -> rank by mean test score; 1 is the best, and equal scores share their mean rank. Empty for a single
        model."""
        if len(self.models) < 2:
            return {}
        keys = np.array([self._sign * model.test.mean for model in self.models])
        better = (keys[None, :] > keys[:, None]).sum(axis=1)
        equal = (keys[None, :] == keys[:, None]).sum(axis=1)
        ranks = better + (equal + 1) / 2
        return {model.name: float(rank) for model, rank in zip(self.models, ranks, strict=True)}

    def gain(self, model: ModelScore) -> tuple[float, float] | None:
        """How much better the model is, in percent of the reference's mean test score, and the deviation over seeds.

        None if there is no baseline, if its score is 0, or for a metric whose percentages mean nothing.
        """
        reference = self.reference
        if reference is None or reference.test.mean == 0 or not Metric(self.metric).is_ratio:
            return None
        difference = model.test.mean - reference.test.mean
        scale = 100.0 / abs(reference.test.mean)
        return self._sign * difference * scale, model.test.std * scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """A model over all tasks for which it and at least one other model have scores."""

    name: str
    """Name of the model."""
    is_baseline: bool
    """Whether it is one of the models to compare with."""
    tasks: int
    """Number of these tasks."""
    wins: int
    """Tasks on which it has the best mean test score; a shared best score counts for each model."""
    mean_rank: float
    """Its mean rank on these tasks; 1 is the best."""
    mean_gain: float | None
    """Its mean gain over the best baseline on these tasks, in percent."""
    better: int | None
    """Tasks on which it is better than the best baseline beyond the chance of which molecules were tested; None if that is
    known of no task."""
    worse: int | None
    """Likewise worse."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaderboard:
    """All tasks of one command, or of several that are compared."""

    title: str
    """Title of the tables."""
    rows: tuple[TaskRow, ...]
    """Tasks in the order in which they were asked for."""

    @property
    def finished(self) -> tuple[TaskRow, ...]:
        """The rows with scores."""
        return tuple(row for row in self.rows if row.status is Status.FINISHED)

    @property
    def models(self) -> tuple[ModelScore, ...]:
        """Every model once (with the scores of its first task): the fine-tuned ones, then the baselines."""
        first: dict[str, ModelScore] = {}
        for row in self.finished:
            for model in row.models:
                first.setdefault(model.name, model)
        return tuple(sorted(first.values(), key=lambda model: model.is_baseline))

    def standings(self) -> tuple[Standing, ...]:
        """All models with their tasks, the best mean rank first."""
        found = [self._standing(model) for model in self.models]
        return tuple(sorted(found, key=lambda item: (item.mean_rank, -item.wins)))

    def _standing(self, model: ModelScore) -> Standing:
        ranks, gains, wins = [], [], 0
        verdicts: list[int] = []
        for row in self.finished:
            score, rank = row.score_of(model.name), row.ranks().get(model.name)
            if score is None or rank is None:  # alone, it has no rank
                continue
            ranks.append(rank)
            wins += model.name in row.best
            if (gain := row.gain(score)) is not None:
                gains.append(gain[0])
            if (verdict := row.verdict(score)) is not None:
                verdicts.append(verdict)
        return Standing(
            name=model.name,
            is_baseline=model.is_baseline,
            tasks=len(ranks),
            wins=wins,
            mean_rank=float(np.mean(ranks)) if ranks else float(len(self.models)),
            mean_gain=float(np.mean(gains)) if gains else None,
            better=verdicts.count(1) if verdicts else None,
            worse=verdicts.count(-1) if verdicts else None,
        )

    def to_json(self) -> dict[str, Any]:
        """The leaderboard as a JSON value: rows with ranks and gains, and the standings."""
        return {
            "leaderboard_version": LEADERBOARD_VERSION,
            "title": self.title,
            "tasks": [_row_json(row) for row in self.rows],
            "standings": [dataclasses.asdict(standing) for standing in self.standings()],
        }


def baseline_entries(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The scored baselines of a ``results.json``."""
    entries = results.get("baselines") or [results.get("baseline")]
    return [entry for entry in entries if entry and entry.get("test")]


def row_of_results(results: Mapping[str, Any], folder: str) -> TaskRow:
    """The row of a finished fine-tuning or sweep whose results are in ``folder``."""
    task, data = results["task"], results["data"]
    return TaskRow(
        name=task["name"],
        status=Status.FINISHED,
        metric=task["metric"],
        unit=(task["unit"] or "") if Metric(task["metric"]).is_error else "",
        columns=tuple(sorted(task.get("columns", ()))),
        higher_is_better=task["higher_is_better"],
        molecules=data["molecules"],
        test_molecules=data["split"].get("test", 0),
        test_seen=data.get("repeats", {}).get("test_seen", 0),
        split=_split_text(data["split"]),
        split_hash=data["split"]["hash"],
        labels=_labels_of(results),
        results=folder,
        models=(
            dataclasses.replace(
                _model_score(results["final"], is_baseline=False), better_by=_better_by(results)
            ),
            *(_model_score(entry, is_baseline=True) for entry in baseline_entries(results)),
        ),
    )


def _split_text(split: Mapping[str, Any]) -> str:
    """What :attr:`TaskRow.split` is: the kind, and the folds of a cross-validation, or which of them."""
    if (folds := split.get("folds")) is None:
        return str(split["kind"])
    fold = split.get("fold")
    return (
        f"{split['kind']}, {folds} folds"
        if fold is None
        else f"{split['kind']}, fold {fold} of {folds}"
    )


def _labels_of(results: Mapping[str, Any]) -> str:
    """What :attr:`TaskRow.labels` is of these results; those of earlier versions know neither replicates nor bounds."""
    metric = Metric(results["task"]["metric"])
    replicates = results["data"].get("replicates") or {"rule": ReplicateRule.KEEP}
    said = []
    if replicates["rule"] != ReplicateRule.KEEP and replicates["molecules"]:
        is_number = metric.kind is TaskKind.REGRESSION
        said.append(f"{replicates['rule'] if is_number else 'majority'} of replicates")
    bounds = results["final"].get("bounds") or {}
    if metric.is_error and any(found["test_bounds"] for found in bounds.values()):
        said.append("with bounds")
    return ", ".join(said)


def read_row(out: str, folder: str) -> TaskRow | None:
    """The row of the results in the folder ``folder`` of ``out``; None if they are not finished."""
    uri = storage.join(out, folder, RESULTS_NAME)
    try:
        row = row_of_results(storage.read_object(uri, _RESULTS), folder)
        require_types(row)
    except storage.NotFoundError:
        return None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{uri} is not as a fine-tuning or sweep writes it ({error!r}): it was changed or damaged. Delete it, and the same "
            "command writes it again from what it holds"
        ) from error
    return row


def read_leaderboard(out: str) -> Leaderboard:
    """The leaderboard of a directory, from the results in it.

    ``leaderboard.json`` tells of tasks without results, and of the order. Every other folder with results is a task, too, or the
    directory itself is one; a file of this name that another program wrote is left out with a warning. Raises DataError if there
    are no results.
    """
    uri = storage.join(out, f"{LEADERBOARD_NAME}.json")
    # The directory of a single task holds the results itself.
    found = [
        read_row(out, row.results or row.name) or read_row(out, row.results) or row
        for row in (_stored_rows(uri) if storage.exists(uri) else ())
    ]
    known = {row.results for row in found if row.status is Status.FINISHED}
    found += [
        row
        for folder in _folders_with_results(out)
        if folder not in known and (row := read_row(out, folder))
    ]
    if not found:
        raise DataError(
            f"{out} holds neither {LEADERBOARD_NAME}.json nor finished results; expected the `out` of a "
            "`moleblend sweep` or `finetune`"
        )
    return Leaderboard(title=storage.name_of(out), rows=tuple(found))


def _stored_rows(uri: str) -> list[TaskRow]:
    """What the ``leaderboard.json`` at ``uri`` says of its tasks; DataError if their results are in other directories."""
    rows = [_stored_row(uri, value) for value in storage.read_object(uri, _TASKS)["tasks"]]
    if any(is_elsewhere(row.results or row.name) for row in rows):
        raise DataError(
            f"{uri} is a leaderboard of results in other directories; expected the directory of the results"
        )
    return rows


def _folders_with_results(out: str) -> list[str]:
    """The folders directly in ``out``, and ``""`` for itself, that hold a ``results.json`` of this program."""
    base = storage.absolute(out).rstrip("/")
    names = [file.uri[len(base) + 1 :] for file in storage.list_files(out)]
    return [
        name.removesuffix(RESULTS_NAME).rstrip("/")
        for name in names
        if _is_results(name) and _is_ours(storage.join(out, name))
    ]


def rows_of_states(out: str, states: Sequence[TaskRow]) -> tuple[TaskRow, ...]:
    """The rows of tasks that have folders with their names in ``out``, with scores if there are results by now."""
    return tuple(
        row if row.status in (Status.ABSENT, Status.FAILED) else read_row(out, row.name) or row
        for row in states
    )


def seen_from_elsewhere(board: Leaderboard, uri: str) -> Leaderboard:
    """The leaderboard of the results in ``uri`` for a page in another directory: their folders as URIs."""
    rows = (
        dataclasses.replace(row, results=storage.join(uri, row.results)) if row.models else row
        for row in board.rows
    )
    return dataclasses.replace(board, rows=tuple(rows))


def is_elsewhere(folder: str) -> bool:
    """Whether the folder of a row is a URI or an absolute path, not a folder below the leaderboard."""
    return "://" in folder or folder.startswith("/")


def compare(boards: Mapping[str, Leaderboard]) -> Leaderboard:
    """Several leaderboards, each with its own label, as one: all models side by side, equal baselines once.

    A board that answers a question in several folders has the models of each, labelled with the folder, too. Scores are in the
    same row only if task, metric, unit, label columns, split and what became of labels are the same. A baseline
    that has other scores in another board (the encoder from scratch, or one of other settings or seeds) is labelled like the models;
    one without randomness has the same for any number of seeds. Raises ConfigError for a single board.
    """
    if len(boards) < 2:
        raise ConfigError(f"compare: expected several leaderboards, found {len(boards)}")
    by_question: dict[tuple[object, ...], dict[str, TaskRow]] = {}
    for label, board in boards.items():
        keyed = [_with_question(row, label) for row in board.rows]
        counts = Counter(question for question, _ in keyed)
        for question, row in keyed:
            # One board may answer a question in several folders, as with several checkpoints.
            own = label if counts[question] == 1 else f"{label}/{storage.name_of(row.results)}"
            by_question.setdefault(question, {})[own] = row
    unequal = set[str]().union(
        *(_unequal_baselines(rows.values()) for rows in by_question.values())
    )
    order = list(dict.fromkeys(key[0] for key in by_question))
    rows = sorted(
        (_joined(rows, unequal) for rows in by_question.values()),
        key=lambda row: order.index(row.name),
    )
    return Leaderboard(title=" and ".join(boards), rows=tuple(rows))


def _with_question(row: TaskRow, label: str) -> tuple[tuple[object, ...], TaskRow]:
    """What rows with comparable scores have in common, and the row, whose reason tells the board ``label`` that it is of."""
    reason = f"{label}: {row.reason}" if row.reason else ""
    question = row.name, row.metric, row.unit, row.columns, row.split_hash, row.labels, reason
    return question, dataclasses.replace(row, reason=reason)


def _unequal_baselines(rows: Iterable[TaskRow]) -> set[str]:
    """Names of baselines with other scores in one of these rows than in another."""
    found: dict[str, object] = {}
    baselines = [model for row in rows for model in row.models if model.is_baseline]
    return {
        model.name
        for model in baselines
        if found.setdefault(model.name, _scores_of(model)) != _scores_of(model)
    }


def _scores_of(model: ModelScore) -> tuple[tuple[float, ...], ...]:
    """What tells a baseline from another of its name. Of one without randomness all seeds are equal, however many they are."""
    return tuple(
        spread.values[:1] if len(set(spread.values)) == 1 else spread.values
        for spread in (model.valid, model.test)
    )


def _joined(rows: Mapping[str, TaskRow], labelled: Collection[str]) -> TaskRow:
    """The models of all rows, by the labels of their boards, in one row; baselines that are not ``labelled`` once."""
    models: dict[str, ModelScore] = {}
    for label, row in rows.items():
        names = {
            model.name: model.name
            if model.is_baseline and model.name not in labelled
            else f"{model.name} ({label})"
            for model in row.models
        }
        for model in row.models:
            better_by = {names[name]: limits for name, limits in model.better_by.items()}
            renamed = dataclasses.replace(model, name=names[model.name], better_by=better_by)
            models.setdefault(renamed.name, renamed)
    ordered = sorted(models.values(), key=lambda model: model.is_baseline)
    return dataclasses.replace(next(iter(rows.values())), models=tuple(ordered))


def _model_score(entry: Mapping[str, Any], *, is_baseline: bool) -> ModelScore:
    return ModelScore(
        name=entry["name"],
        is_baseline=is_baseline,
        valid=_spread(entry["valid"]),
        test=_spread(entry["test"]),
        test_interval=_limits(entry.get("test_interval")),
    )


def _better_by(results: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """What :attr:`ModelScore.better_by` is of the fine-tuned model; nothing of results of earlier versions."""
    known = {
        entry["name"]: _limits(entry.get("model_is_better_by"))
        for entry in baseline_entries(results)
    }
    return {name: limits for name, limits in known.items() if limits is not None}


def _limits(values: Sequence[float] | None) -> tuple[float, float] | None:
    return None if values is None else (values[0], values[1])


def _spread(value: Mapping[str, Any]) -> Spread:
    return Spread(mean=value["mean"], std=value["std"], values=tuple(value["values"]))


def _row_json(row: TaskRow) -> dict[str, Any]:
    value = dataclasses.asdict(row)
    ranks = row.ranks()
    for entry, model in zip(value["models"], row.models, strict=True):
        gain = row.gain(model)
        entry["rank"] = ranks.get(model.name)
        entry["gain_percent"] = None if gain is None else gain[0]
    reference = row.reference
    return {**value, "reference": None if reference is None else reference.name}


def _stored_row(uri: str, value: Any) -> TaskRow:
    """What the ``leaderboard.json`` at ``uri`` says about a task without results."""
    storage.require_members(uri, value, _ROW)
    if value["status"] not in set(Status):
        raise DataError(
            f"{uri}: expected a status of {', '.join(Status)} for the task {value['name']}, found {value['status']!r}. Delete "
            "the file: it is written again from the results"
        )
    status = Status(value["status"])
    if status is Status.FINISHED:
        status = Status.WAITING
    return TaskRow(
        name=value["name"], status=status, reason=value["reason"], results=value["results"]
    )


def _is_results(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    return name == RESULTS_NAME and "/" not in folder


def _is_ours(uri: str) -> bool:
    value = storage.read_json(uri)
    try:
        storage.require_members(uri, value, _RESULTS)
    except DataError as error:
        logger.warning("left out: %s", error)
        return False
    return True
