"""Ensembles of fine-tuned models for the same question: finds and checks the models, and combines their predictions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.files import storage
from moleblend_ray.errors import CheckpointError, ConfigError, without_credentials
from moleblend_ray.evaluation.models.property_model import (
    SavedProperty,
    TrainedProperty,
    is_property_model,
    load_property_model,
)
from moleblend_ray.evaluation.molecules.applicability import ApplicabilityDomain, load_domain
from moleblend_ray.evaluation.reports.leaderboard import read_leaderboard
from moleblend_ray.evaluation.results.result_files import (
    IDENTITY_NAME,
    LEADERBOARD_NAME,
    REFIT_NAME,
    RESULTS_NAME,
)
from moleblend_ray.evaluation.results.results import weights_fingerprint
from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions, read_predictions
from moleblend_ray.model.hub import PROPERTY_NAME

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One fine-tuned model of an ensemble."""

    uri: str
    """URI of its folder."""
    saved: SavedProperty
    """The model and what it predicts."""
    fingerprint: str
    """Result of :func:`property_fingerprint`."""
    domain: ApplicabilityDomain | None
    """Fingerprints of its training molecules; None if its folder has none."""
    validation: PartPredictions | None = None
    """Its predictions for the validation molecules; None if its folder has none."""


class Combined(NamedTuple):
    """Predictions of several models for T properties of M molecules."""

    mean: NDArray[np.float64]
    """(M, T) mean over models and conformers."""
    std: NDArray[np.float64]
    """(M, T) sample standard deviation (n - 1) over models, of means over conformers; NaN with one model."""
    conformer_std: NDArray[np.float64]
    """(M, T) sample standard deviation (n - 1) over conformers, of means over models; NaN with one conformer."""


def combine(values: NDArray[np.float64], views: NDArray[np.int64]) -> Combined:
    """Mean and spreads of (S, R, T) ``values``: S models and R rows, of which ``views`` (M,) >= 1 belong to each
    molecule.

    All conformers of a molecule have the same weight.
    """
    first_row = np.cumsum(views) - views
    of_models = np.add.reduceat(values, first_row, axis=1) / views[:, None]
    of_views = values.mean(axis=0)
    mean = np.add.reduceat(of_views, first_row, axis=0) / views[:, None]
    squares = (of_views - np.repeat(mean, views, axis=0)) ** 2
    freedom = np.where(views > 1, views - 1, np.nan)[:, None]
    std = of_models.std(axis=0, ddof=1) if len(values) > 1 else np.full_like(mean, np.nan)
    return Combined(mean, std, np.sqrt(np.add.reduceat(squares, first_row, axis=0) / freedom))


def model_folders(models: Sequence[str]) -> tuple[str, ...]:
    """The folders of all fine-tuned models: a URI is one folder, or a finished fine-tuning, sweep or refit with one per seed, or the
    `out` of several tasks, with those of all that are finished.

    Raises CheckpointError for anything else.
    """
    found: list[str] = []
    for uri in models:
        if is_property_model(uri):
            found.append(uri)
        elif (results := list_of_models(uri)) is not None:
            if (tasks := _refitted_tasks(uri, results)) is not None:
                found += model_folders(tasks)
                continue
            seeds = storage.read_object(results, {"final.seeds": list[Any]})["final"]["seeds"]
            for seed in seeds:
                storage.require_members(results, seed, {"model": str})
            folders = [storage.join(uri, seed["model"]) for seed in seeds]
            _require_models(results, folders)
            found += folders
        elif is_of_several_tasks(uri):
            if not (tasks := _finished_tasks(uri, tells=True)):
                raise CheckpointError(several_tasks(uri))
            found += model_folders(tasks)
        else:
            raise CheckpointError(
                f"{uri} is neither the folder of a fine-tuned model nor the `out` of a finished fine-tuning, sweep or refit "
                f"(no property.json, no {RESULTS_NAME}, no {REFIT_NAME}). Finish that command, or name its models/seed-N"
            )
    return tuple(found)


def list_of_models(uri: str) -> str | None:
    """The file that names the models of a finished fine-tuning, sweep or refit in ``uri``; None if there is none."""
    candidates = (storage.join(uri, name) for name in (RESULTS_NAME, REFIT_NAME))
    return next(filter(storage.exists, candidates), None)


def is_of_several_tasks(uri: str) -> bool:
    """Whether the directory ``uri`` is the `out` of a fine-tuning or sweep of several tasks.

    Leaderboards can be written elsewhere, too, but what else a leaderboard and models have in common notes its settings.
    """
    names = (f"{LEADERBOARD_NAME}.json", IDENTITY_NAME)
    has_board, has_note = (storage.exists(storage.join(uri, name)) for name in names)
    return has_board and not has_note


def _refitted_tasks(uri: str, results: str) -> list[str] | None:
    """The directories in ``uri`` of the tasks that its list of models ``results`` names; None if it names models."""
    if "tasks" not in storage.read_object(results):
        return None
    tasks = storage.read_object(results, {"tasks": list[dict[str, Any]]})["tasks"]
    for task in tasks:
        storage.require_members(results, task, {"folder": str})
    return [storage.join(uri, task["folder"]) for task in tasks]


def _finished_tasks(uri: str, *, tells: bool = False) -> list[str]:
    """The directories of the tasks in ``uri`` that have results; ``tells`` which have none."""
    board = read_leaderboard(uri)
    lacking = [row.name for row in board.rows if row not in board.finished]
    if tells and board.finished and lacking:
        logger.warning(
            "%s: %s have no results, and are not predicted",
            without_credentials(uri),
            ", ".join(lacking),
        )
    return [storage.join(uri, row.results) for row in board.finished]


def several_tasks(uri: str) -> str:
    """What is told to those who ask for one model at ``uri``, where several tasks have theirs."""
    finished = _finished_tasks(uri)
    listed = f"name one of them: {', '.join(finished)}" if finished else "none of them is finished"
    return f"{uri} is the `out` of a fine-tuning or sweep of several tasks, each with models of its own; {listed}"


def _require_models(results: str, folders: Sequence[str]) -> None:
    """Raise CheckpointError if a folder that ``results`` names holds no model: an ensemble of fewer would be another one."""
    gone = [folder for folder in folders if not is_property_model(folder)]
    if gone:
        raise CheckpointError(
            f"{results} names {len(folders)} models, but {', '.join(gone)} hold{'s' * (len(gone) == 1)} none. Copy them from where "
            "they were made, or name the folders of those that are there"
        )


def load_members(models: Sequence[str]) -> tuple[Member, ...]:
    """All models that ``models`` name, in evaluation mode on the CPU.

    Raises ConfigError if two of the same task answer different questions, or two are the same model: the spread of copies would
    look like certainty.
    """
    members: list[Member] = []
    for uri in model_folders(models):
        saved = load_property_model(uri)
        member = Member(
            uri=uri,
            saved=saved,
            fingerprint=property_fingerprint(uri, saved),
            domain=load_domain(uri),
            validation=read_predictions(uri, "valid", saved.trained.columns),
        )
        for other in members:
            _check_pair(other, member)
        members.append(member)
    lacking = [member.uri for member in members if member.domain is None]
    if lacking:
        logger.warning(
            "similarity and in_domain stay empty: %s do not tell what they were trained on; models that are fine-tuned "
            "again will",
            without_credentials(", ".join(lacking)),
        )
    return tuple(members)


def conformers_of(members: Sequence[Member]) -> int:
    """Conformers of each molecule with which ``members`` were scored, so that predictions are as good as these scores say; 0: no
    coordinates.

    Models that see 2D relations alone need none. Raises ConfigError if only some of the others were fine-tuned without
    coordinates.
    """
    seeing = [member for member in members if member.saved.model.readout.relations != "2d"]
    counts = [member.saved.trained.conformers for member in seeing]
    if 0 in counts and any(counts):
        without, with_them = seeing[counts.index(0)], seeing[counts.index(max(counts))]
        raise ConfigError(
            f"conformers: {without.uri} was fine-tuned without coordinates and {with_them.uri} with them; say with how many "
            "conformers to predict (0: without coordinates), or predict with each into its own `out`"
        )
    return max(counts, default=0)


def form_of(members: Sequence[Member]) -> MoleculeForm | None:
    """The form of the molecules that ``members`` were fine-tuned on; None: unknown. Raises ConfigError if two differ."""
    known = [
        (member.uri, form)
        for member in members
        if (form := member.saved.trained.molecules) is not None
    ]
    for uri, form in known[1:]:
        first_uri, first = known[0]
        if differing := first.difference(form):
            raise ConfigError(
                f"models: {first_uri} and {uri} were fine-tuned on molecules of different forms ({differing}). Predict with "
                "each into its own `out`"
            )
    return known[0][1] if known else None


def property_fingerprint(uri: str, saved: SavedProperty) -> str:
    """SHA-256 of the weights and the ``property.json`` (units, settings) of a fine-tuned model."""
    weights = weights_fingerprint(saved.model.state_dict())
    document = storage.read_bytes(storage.join(uri, PROPERTY_NAME))
    return storage.sha256_bytes(weights.encode() + document)


def _check_pair(first: Member, second: Member) -> None:
    one, two = question_of(first.saved.trained), question_of(second.saved.trained)
    differing = [
        f"{name} {one[name]!r} and {two[name]!r}" for name in one if one[name] != two[name]
    ]
    if differing and one["task"] == two["task"]:
        raise ConfigError(
            f"models: {first.uri} and {second.uri} answer different questions, and have one task, {one['task']!r}: "
            f"{'; '.join(differing)}. Predict with each kind into its own `out`"
        )
    if first.fingerprint == second.fingerprint:
        raise ConfigError(f"models: {first.uri} and {second.uri} are the same model; name it once")


def question_of(trained: TrainedProperty) -> dict[str, object]:
    """Task, kind, columns and unit, which the models of an ensemble must have in common."""
    return {
        "task": trained.task,
        "kind": trained.kind.value,
        "columns": list(trained.columns),
        "unit": trained.unit,
    }
