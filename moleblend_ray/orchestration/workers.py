"""What runs in the worker processes of a fine-tuning or a sweep.

A module of its own with few imports: every worker starts by importing it.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray import tune

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.evaluation.dataset import LabelledMolecules
from moleblend_ray.evaluation.finetune import EpochReport, StartingPoint, finetune_once
from moleblend_ray.evaluation.results import SeedResult
from moleblend_ray.evaluation.runs import Experiment, fit_baseline, train_and_test
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialData:
    """What every trial shares through the object store. It holds no test molecule: a trial cannot look at them."""

    task: Task
    """What is asked."""
    molecules: LabelledMolecules
    """Training, then validation molecules."""
    num_train: int
    """How many of them are the training part."""
    start: StartingPoint
    """Weights to start from."""

    @classmethod
    def of(cls, experiment: Experiment) -> TrialData:
        """The part of ``experiment`` that trials may see."""
        seen = np.concatenate([experiment.split.train, experiment.split.valid])
        return cls(
            task=experiment.task,
            molecules=experiment.molecules.take(seen),
            num_train=len(experiment.split.train),
            start=experiment.start,
        )

    @property
    def train(self) -> NDArray[np.int64]:
        """Rows of the training part."""
        return np.arange(self.num_train, dtype=np.int64)

    @property
    def valid(self) -> NDArray[np.int64]:
        """Rows of the validation part."""
        return np.arange(self.num_train, len(self.molecules), dtype=np.int64)


def run_trial(
    drawn: dict[str, Any],
    data: TrialData,
    settings: FinetuneSettings,
    seed: int,
    cluster: ClusterConfig,
) -> None:
    """One trial of a sweep: ``settings`` with the ``drawn`` values, reported after each epoch."""
    settings = dataclasses.replace(settings, **drawn)
    finetune_once(
        data.molecules,
        data.train,
        data.valid,
        task=data.task,
        start=data.start,
        settings=settings,
        seed=seed,
        device=use_reserved(cluster),
        report=functools.partial(_report, settings),
    )


def train_seed(
    experiment: Experiment, settings: FinetuneSettings, seed: int, out: str, cluster: ClusterConfig
) -> SeedResult:
    """Train the chosen settings with one seed and score the test part."""
    return train_and_test(experiment, settings, seed, out, use_reserved(cluster))


def baseline_seed(
    experiment: Experiment, seed: int, num_trees: int, cluster: ClusterConfig
) -> SeedResult:
    """Fit and score the fingerprint baseline with one seed."""
    return fit_baseline(experiment, seed, num_trees, max(1, int(cluster.cpus_per_worker)))


def use_reserved(cluster: ClusterConfig) -> torch.device:
    """Keep torch to the CPUs this process reserved, and give the device it may use."""
    torch.set_num_threads(max(1, int(cluster.cpus_per_worker)))
    return torch.device("cuda" if cluster.use_gpu else "cpu")


def _report(settings: FinetuneSettings, epoch: EpochReport) -> None:
    over = epoch.epoch == settings.epochs or epoch.epoch - epoch.best_epoch >= settings.patience
    tune.report({**dataclasses.asdict(epoch), "over": over})
