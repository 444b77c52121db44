"""What a fine-tuning or a sweep found: the values that ``results.json`` holds."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moleblend_ray.evaluation.dataset import FRACTIONS, LabelledMolecules
from moleblend_ray.evaluation.tasks import Task

RESULTS_NAME = "results.json"
RESULTS_VERSION = 1
"""Version of the layout of ``results.json``."""

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
    """One training of the chosen configuration, or one fit of the baseline."""

    seed: int
    """Of initialisation, order and dropout, or of the forest."""
    valid_score: float
    """Score on the validation molecules."""
    test_score: float
    """Score on the test molecules, computed once, after training."""
    test_columns: Mapping[str, float]
    """Test score of each column."""
    columns_left_out: tuple[str, ...]
    """Columns the test molecules cannot score."""
    epochs: int
    """Epochs trained; 0 for the baseline."""
    best_epoch: int
    """Epoch whose weights were kept; 0 for the baseline."""
    seconds: float
    """Running time."""
    model: str | None
    """Folder of the fine-tuned model within ``out``."""


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


def seeds_entry(name: str, seeds: Sequence[SeedResult]) -> dict[str, Any]:
    """The part of ``results.json`` for one model trained with several seeds."""
    return {
        "name": name,
        "valid": dataclasses.asdict(Spread.of([seed.valid_score for seed in seeds])),
        "test": dataclasses.asdict(Spread.of([seed.test_score for seed in seeds])),
        "seeds": [dataclasses.asdict(seed) for seed in seeds],
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
