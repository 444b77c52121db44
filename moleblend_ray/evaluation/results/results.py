"""The results of fine-tuning or a sweep, as ``results.json`` holds them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moleblend_ray.chemistry.scaffolds import FRACTIONS
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.documents import require_types
from moleblend_ray.data.sources.classes import Exclusive
from moleblend_ray.errors import ConfigError, DataError
from moleblend_ray.evaluation.models.baselines import BaselineKind
from moleblend_ray.evaluation.molecules.dataset import LabelledMolecules
from moleblend_ray.evaluation.molecules.repeats import Repeats
from moleblend_ray.evaluation.scoring.scores import other_scores, score
from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import Task, TaskKind

logger = logging.getLogger(__name__)

RESULTS_VERSION = 2
"""Version of the layout of ``results.json``. In version 1 there was a single ``baseline`` instead of a list."""


def require_version(uri: str, results: Mapping[str, Any]) -> None:
    """Raise ConfigError if ``results``, of the file ``uri``, have another layout than this release reads."""
    version = results.get("results_version")
    if version != RESULTS_VERSION:
        raise ConfigError(
            f"{uri} has layout version {version}, and this release of moleblend-ray reads {RESULTS_VERSION}: the "
            "results there were made by another release, with other baselines. Their models and predictions can still "
            "be used. Run the command that made them with another `out` for the results of this release"
        )


_PACKAGES = ("moleblend-ray", "torch", "ray", "rdkit", "numpy", "scikit-learn", "optuna", "pyarrow")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """One configuration that a sweep tried, without the test molecules."""

    number: int
    """Number of the trial in the order of starting, from 0."""
    status: str
    """``finished``, ``stopped`` (worse than others after the same number of epochs) or ``failed``."""
    settings: Mapping[str, Any]
    """The values that were drawn."""
    valid_score: float | None
    """Best validation score of any epoch; None if none was completed."""
    epochs: int
    """Epochs completed."""
    seconds: float
    """Running time."""
    error: str | None
    """Why it failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedResult:
    """One training of the chosen configuration, or one fit of a baseline."""

    seed: int
    """Seed of initialisation, order and dropout, or of the random numbers of a baseline."""
    valid_score: float
    """Score on the validation molecules."""
    test_score: float
    """Score on the test molecules, computed once, after training."""
    test_columns: Mapping[str, float]
    """Test score of each column."""
    columns_left_out: tuple[str, ...]
    """Columns that cannot be scored with the test molecules."""
    epochs: int
    """Epochs trained; 0 for a baseline that has none."""
    best_epoch: int
    """Epoch whose weights were kept; 0 for a baseline that has none."""
    seconds: float
    """Running time."""
    model: str | None
    """Folder of the trained model within ``out``; None for a baseline that is not stored."""
    test_others: Mapping[str, float] = field(default_factory=dict)
    """Scores on the test molecules by the other metrics of this type of labels (a value of `Metric` -> score). Nothing is
    chosen by them."""
    predictions: str | None = None
    """Folder of the predictions for validation and test molecules within ``out``; None: that of the model."""


def write_seed_result(uri: str, settings: Mapping[str, Any], found: SeedResult) -> None:
    """Store the result of one seed, with its settings."""
    storage.write_json(uri, {"settings": dict(settings), **dataclasses.asdict(found)})


def read_seed_result(uri: str, settings: Mapping[str, Any]) -> SeedResult | None:
    """What :func:`write_seed_result` stored for these settings; None if there is nothing, or a result of others."""
    if not storage.exists(uri):
        return None
    value = storage.read_object(uri)
    if value.pop("settings", None) != dict(settings):
        logger.info("%s is of other settings: seed %s is run again", uri, value.get("seed"))
        return None
    try:
        found = SeedResult(**{**value, "columns_left_out": tuple(value["columns_left_out"])})
        require_types(found)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{uri} is not the result of a seed ({error}): it was changed, or another version wrote it. Delete it, and the same "
            "command trains that seed again"
        ) from error
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """The training of a model: its settings, the search for them if there was one, and the scores."""

    chosen: FinetuneSettings
    """Settings with which it was trained."""
    trials: tuple[TrialResult, ...] = ()
    """The search; empty if the settings were given."""
    final: tuple[SeedResult, ...]
    """One training per seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A score over seeds."""

    mean: float
    """Mean."""
    std: float
    """Sample standard deviation (n - 1); 0 for a single seed."""
    values: tuple[float, ...]
    """One value per seed, in the order of the seeds."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Mean and spread of ``values``."""
        array = np.asarray(values, dtype=np.float64)
        std = float(array.std(ddof=1)) if len(array) > 1 else 0.0
        return cls(mean=float(array.mean()), std=std, values=tuple(float(value) for value in array))


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """Settings that a baseline could have had."""

    settings: Mapping[str, Any]
    """Name of a setting -> value."""
    valid_score: float | None
    """Score on the validation molecules, by which it was judged; None if it failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineResult:
    """A model to compare with: what was tried, chosen and found."""

    kind: BaselineKind
    """Which one."""
    chosen: Mapping[str, Any]
    """Its settings, chosen on the validation molecules."""
    candidates: tuple[Candidate, ...]
    """All settings that were tried, with the first seed; empty if there was no choice."""
    seeds: tuple[SeedResult, ...]
    """One result per seed; equal ones for a baseline without randomness."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Baselines:
    """All models to compare with."""

    results: tuple[BaselineResult, ...] = ()
    """Results in the order in which the baselines were asked for."""
    absent: Mapping[BaselineKind, str] = field(default_factory=dict)
    """Baselines that were asked for but are missing -> reason."""


def seeds_entry(name: str, seeds: Sequence[SeedResult]) -> dict[str, Any]:
    """The part of ``results.json`` for one model trained with several seeds."""
    return {
        "name": name,
        "valid": dataclasses.asdict(Spread.of([seed.valid_score for seed in seeds])),
        "test": dataclasses.asdict(Spread.of([seed.test_score for seed in seeds])),
        "test_others": {
            name: dataclasses.asdict(Spread.of([seed.test_others[name] for seed in seeds]))
            for name in seeds[0].test_others
            if all(name in seed.test_others for seed in seeds)
        },
        "seeds": [dataclasses.asdict(seed) for seed in seeds],
    }


def ensemble_entry(
    task: Task,
    columns: Sequence[str],
    valid: PartPredictions,
    test: PartPredictions,
    exclusive: Exclusive = (),
) -> dict[str, Any]:
    """The part of ``results.json`` for the mean of the predictions of all seeds, for validation and test molecules; ``exclusive``
    as for :func:`score`."""
    chosen_by, tested = (
        (task.metric, part.predictions, part.labels, columns, part.bounds, exclusive)
        for part in (valid, test)
    )
    return {
        "valid": score(*chosen_by).value,
        "test": score(*tested).value,
        "test_others": other_scores(*tested),
    }


def baseline_entry(result: BaselineResult) -> dict[str, Any]:
    """The part of ``results.json`` for one baseline: as for a model, and how its settings were chosen."""
    return {
        "kind": result.kind.value,
        "chosen": dict(result.chosen),
        "candidates": [dataclasses.asdict(candidate) for candidate in result.candidates],
        **seeds_entry(result.kind.label, result.seeds),
    }


def task_entry(task: Task, molecules: LabelledMolecules) -> dict[str, Any]:
    """The part of ``results.json`` about the task."""
    return {
        "name": task.name,
        "kind": task.kind.value,
        "columns": list(molecules.columns),
        "metric": task.metric.value,
        "higher_is_better": task.metric.higher_is_better,
        "unit": task.unit,
        "citation": task.citation,
        "selection": "the validation part alone; the test part is scored once, after the choice",
    }


def data_entry(
    uri: str, molecules: LabelledMolecules, task: Task, split: Mapping[str, Any]
) -> dict[str, Any]:
    """The part of ``results.json`` about the molecules."""
    return {
        "uri": uri,
        "fingerprint": molecules.fingerprint,
        "molecules": len(molecules),
        "with_coordinates": int(molecules.has_coordinates.sum()),
        "unlabelled": molecules.num_unlabelled,
        "quarantined": molecules.num_quarantined,
        "unreadable_labels": molecules.num_unreadable,
        "split": {"kind": task.split.value, "fractions": list(FRACTIONS), **split},
    }


def repeats_entry(repeats: Repeats) -> dict[str, int]:
    """The part of ``results.json`` about molecules that occur more than once."""
    return {
        "distinct": repeats.distinct,
        "test_seen": repeats.test_seen,
        "valid_seen": repeats.valid_seen,
    }


def labels_entry(
    kind: TaskKind, molecules: LabelledMolecules, parts: Mapping[str, NDArray[np.int64]]
) -> dict[str, dict[str, dict[str, int]]]:
    """The part of ``results.json`` about the labels: column -> part -> number of known labels, of classes also of ones, of
    censored labels also of bounds; ``parts`` gives the rows of each part."""
    bounds = molecules.bounds
    return {
        column: {
            part: {
                **_label_counts(kind, molecules.labels[rows, index]),
                **({} if bounds is None else {"bounds": int(bounds.known[rows, index].sum())}),
            }
            for part, rows in parts.items()
        }
        for index, column in enumerate(molecules.columns)
    }


def _label_counts(kind: TaskKind, labels: NDArray[np.float64]) -> dict[str, int]:
    counts = {"labels": int((~np.isnan(labels)).sum())}
    if kind is TaskKind.CLASSIFICATION:
        counts["positives"] = int((labels == 1).sum())
    return counts


def versions() -> dict[str, str]:
    """Versions of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, shapes, types and values of a state dict, independent of the file that it came from."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(
            value.view(torch.uint8).numpy().tobytes() if value.ndim else str(value.item()).encode()
        )
    return digest.hexdigest()
