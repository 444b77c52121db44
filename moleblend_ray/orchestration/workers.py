"""What runs in the worker processes of a fine-tuning or a sweep.

A module of its own with few imports: every worker starts by importing it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray import tune

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.data import storage
from moleblend_ray.evaluation.dataset import LabelledMolecules
from moleblend_ray.evaluation.finetune import EpochReport, StartingPoint, finetune_once
from moleblend_ray.evaluation.results import SeedResult
from moleblend_ray.evaluation.runs import Experiment, train_and_test
from moleblend_ray.evaluation.search import with_drawn
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


class TrialRecord:
    """The epochs of one configuration on storage.

    Ray Tune saves the state of its search every few seconds: a killed command may have lost a trial's end.
    """

    def __init__(self, uri: str, settings: FinetuneSettings, epochs: list[dict[str, Any]]) -> None:
        self.uri = uri
        self._settings = settings
        self.epochs = epochs

    @classmethod
    def read(cls, folder: str, settings: FinetuneSettings, seed: int) -> TrialRecord:
        """The record of ``settings`` and ``seed`` in ``folder``, empty if there is none."""
        key = json.dumps([dataclasses.asdict(settings), seed], sort_keys=True).encode()
        uri = storage.join(folder, f"{storage.sha256_bytes(key)[:16]}.json")
        return cls(uri, settings, storage.read_json(uri) if storage.exists(uri) else [])

    @property
    def is_over(self) -> bool:
        """Whether the last epoch was reported."""
        return bool(self.epochs) and bool(self.epochs[-1]["over"])

    def add(self, epoch: EpochReport) -> None:
        """Write down and report an epoch that is not there yet."""
        if epoch.epoch <= len(self.epochs):
            return
        patience = self._settings.patience
        over = epoch.epoch == self._settings.epochs or epoch.epoch - epoch.best_epoch >= patience
        self.epochs.append({**dataclasses.asdict(epoch), "over": over})
        storage.write_json(self.uri, self.epochs)
        tune.report(self.epochs[-1])


def run_trial(
    drawn: dict[str, Any],
    data: TrialData,
    settings: FinetuneSettings,
    seed: int,
    cluster: ClusterConfig,
    records: str,
) -> None:
    """One trial of a sweep: ``settings`` with the ``drawn`` values, reported after each epoch.

    What an interrupted command had reported of these values, by its files in ``records``, is reported again
    without training; a trial that was over, or that is stopped there again, is not repeated.
    """
    settings = with_drawn(settings, drawn)
    record = TrialRecord.read(records, settings, seed)
    for values in record.epochs:
        tune.report(values)
    if record.is_over:
        return
    finetune_once(
        data.molecules,
        data.train,
        data.valid,
        task=data.task,
        start=data.start,
        settings=settings,
        seed=seed,
        device=use_reserved(cluster),
        report=record.add,
    )


def train_seed(
    experiment: Experiment, settings: FinetuneSettings, seed: int, out: str, cluster: ClusterConfig
) -> SeedResult:
    """Train the chosen settings with one seed and score the test part."""
    return train_and_test(experiment, settings, seed, out, use_reserved(cluster))


def reserved_threads(cluster: ClusterConfig) -> int:
    """Threads that a task may use: one for each CPU it reserved."""
    return max(1, int(cluster.cpus_per_worker))


def use_reserved(cluster: ClusterConfig) -> torch.device:
    """Keep torch to the CPUs this process reserved, and give the device it may use."""
    torch.set_num_threads(reserved_threads(cluster))
    return torch.device("cuda" if cluster.use_gpu else "cpu")
