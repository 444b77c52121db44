"""What a fine-tuning or a sweep found: the values that ``results.json`` holds."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moleblend_ray.evaluation.baselines import BaselineKind
from moleblend_ray.evaluation.dataset import FRACTIONS, LabelledMolecules
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import Task

RESULTS_NAME = "results.json"
RESULTS_VERSION = 2
"""Version of the layout of ``results.json``. In version 1 a single ``baseline`` stood for the list of now."""

_PACKAGES = ("moleblend-ray", "torch", "ray", "rdkit", "numpy", "scikit-learn", "optuna", "pyarrow")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """One configuration that a sweep tried. It never saw the test molecules."""

    number: int
    """In the order of starting, from 0."""
    status: str
    """``finished``, ``stopped`` (worse than others after as many epochs), or ``failed``."""
    settings: Mapping[str, Any]
    """The values drawn."""
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
    """Of initialisation, order and dropout, or of a baseline's draws."""
    valid_score: float
    """Score on the validation molecules."""
    test_score: float
    """Score on the test molecules, computed once, after training."""
    test_columns: Mapping[str, float]
    """Test score of each column."""
    columns_left_out: tuple[str, ...]
    """Columns the test molecules cannot score."""
    epochs: int
    """Epochs trained; 0 for a baseline that has none."""
    best_epoch: int
    """Epoch whose weights were kept; 0 for a baseline that has none."""
    seconds: float
    """Running time."""
    model: str | None
    """Folder of the trained model within ``out``; None for a baseline that is not stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """A model's way from its settings, or from a search of them, to its scores."""

    chosen: FinetuneSettings
    """What it was trained with."""
    trials: tuple[TrialResult, ...] = ()
    """The search; empty where the settings were given."""
    final: tuple[SeedResult, ...]
    """One training for each seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A score over seeds."""

    mean: float
    """Mean."""
    std: float
    """Sample standard deviation (n - 1); 0 for a single seed."""
    values: tuple[float, ...]
    """One for each seed, in the seeds' order."""

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
    """By name."""
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
    """All that were tried, with the first seed; empty where there was nothing to choose."""
    seeds: tuple[SeedResult, ...]
    """One for each seed; equal ones for a baseline that draws nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Baselines:
    """All models to compare with."""

    results: tuple[BaselineResult, ...] = ()
    """In the order asked for."""
    absent: Mapping[BaselineKind, str] = field(default_factory=dict)
    """Those that were asked for, but are not there, and why."""


def seeds_entry(name: str, seeds: Sequence[SeedResult]) -> dict[str, Any]:
    """The part of ``results.json`` for one model trained with several seeds."""
    return {
        "name": name,
        "valid": dataclasses.asdict(Spread.of([seed.valid_score for seed in seeds])),
        "test": dataclasses.asdict(Spread.of([seed.test_score for seed in seeds])),
        "seeds": [dataclasses.asdict(seed) for seed in seeds],
    }


def baseline_entry(result: BaselineResult) -> dict[str, Any]:
    """The part of ``results.json`` for one baseline: that of a model, and how its settings were chosen."""
    return {
        "kind": result.kind.value,
        "chosen": dict(result.chosen),
        "candidates": [dataclasses.asdict(candidate) for candidate in result.candidates],
        **seeds_entry(result.kind.label, result.seeds),
    }


def task_entry(task: Task, molecules: LabelledMolecules) -> dict[str, Any]:
    """The part of ``results.json`` that says what was asked."""
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
    """The part of ``results.json`` that says on which molecules."""
    block = molecules.block
    first_atoms = np.cumsum(block.num_atoms, dtype=np.int64) - block.num_atoms
    return {
        "uri": uri,
        "fingerprint": molecules.fingerprint,
        "molecules": len(molecules),
        "with_coordinates": int(np.logical_or.reduceat(block.position_mask, first_atoms).sum()),
        "unlabelled": molecules.num_unlabelled,
        "quarantined": molecules.num_quarantined,
        "split": {"kind": task.split.value, "fractions": list(FRACTIONS), **split},
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and values of a state dict, whatever file it came from."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(
            value.view(torch.uint8).numpy().tobytes() if value.ndim else str(value.item()).encode()
        )
    return digest.hexdigest()
