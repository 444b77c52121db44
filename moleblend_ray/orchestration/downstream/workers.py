"""Functions that run in the worker processes of fine-tuning and sweeps.

They have their own module with few imports, as every worker process imports it when it starts.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from ray import tune

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.data.files import storage
from moleblend_ray.evaluation.models.finetune import EpochReport, StartingPoint, finetune_once
from moleblend_ray.evaluation.molecules.dataset import LabelledMolecules
from moleblend_ray.evaluation.results.refit import Everything, RefitModel, refit_and_save
from moleblend_ray.evaluation.results.results import SeedResult
from moleblend_ray.evaluation.results.runs import Experiment, train_and_test
from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions
from moleblend_ray.evaluation.search import with_drawn
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import Task
from moleblend_ray.orchestration.cluster.reserved import use_reserved

if TYPE_CHECKING:
    from moleblend_ray.orchestration.progress.progress import Reporter

_TELL_S: Final = 0.5
"""Seconds between messages about steps, which may take milliseconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialData:
    """Data that all trials share through the object store. It has no test molecules, so a trial cannot see them."""

    task: Task
    """The task."""
    molecules: LabelledMolecules
    """Molecules: first those for training, then those for validation."""
    num_train: int
    """Number of molecules for training."""
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


_EPOCH: Final[Mapping[str, Any]] = {
    "epoch": int,
    "valid_score": float,
    "best_valid_score": float,
    "over": bool,
}
"""What an epoch of a record has."""


class TrialRecord:
    """Stores the reported epochs of one configuration.

    Ray Tune saves the state of its search every few seconds, so after a kill the end of a trial may be missing there.
    """

    def __init__(self, uri: str, settings: FinetuneSettings, epochs: list[dict[str, Any]]) -> None:
        self.uri = uri
        self._settings = settings
        self.epochs = epochs

    @classmethod
    def read(cls, folder: str, settings: FinetuneSettings, seed: int) -> TrialRecord:
        """The record for ``settings`` and ``seed`` in ``folder``; empty if there is none."""
        key = json.dumps([dataclasses.asdict(settings), seed], sort_keys=True).encode()
        uri = storage.join(folder, f"{storage.sha256_bytes(key)[:16]}.json")
        epochs = storage.read_json(uri) if storage.exists(uri) else []
        for epoch in epochs if isinstance(epochs, list) else [None]:
            storage.require_members(uri, epoch, _EPOCH)
        return cls(uri, settings, epochs)

    @property
    def is_over(self) -> bool:
        """Whether the last epoch of the trial was reported."""
        return bool(self.epochs) and bool(self.epochs[-1]["over"])

    def add(self, epoch: EpochReport) -> None:
        """Store and report an epoch that is not in the record yet."""
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
    """Run one trial of a sweep: ``settings`` with the ``drawn`` values, with a report after each epoch.

    Epochs that an interrupted command had reported for these values (its files are in ``records``) are reported again
    without training. A trial that had ended, or that the scheduler stops during this, is not trained again.
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


class StepCount:
    """Counts the steps of one training on the progress display of the driver, a few times a second."""

    def __init__(self, reporter: Reporter, num_steps: int) -> None:
        self._reporter = reporter
        self._left = num_steps
        self._untold = 0
        self._told_s = time.monotonic()

    def add(self) -> None:
        """One more step was made."""
        self._untold += 1
        if time.monotonic() - self._told_s >= _TELL_S:
            self._tell(self._untold)

    def end(self) -> None:
        """The training is over: steps that it was spared, as validation got no better, count as made."""
        self._tell(self._left)

    def _tell(self, steps: int) -> None:
        self._reporter.count("done", steps)
        self._left -= steps
        self._untold, self._told_s = 0, time.monotonic()


def train_seed(
    experiment: Experiment,
    settings: FinetuneSettings,
    seed: int,
    out: str,
    cluster: ClusterConfig,
    reporter: Reporter,
) -> SeedResult:
    """Train the chosen settings with one seed and score the test part."""
    steps = StepCount(reporter, settings.num_steps(len(experiment.split.train)))
    device = use_reserved(cluster)
    result = train_and_test(experiment, settings, seed, out, device, after_step=steps.add)
    steps.end()
    return result


def refit_seed(
    everything: Everything,
    seed: int,
    epochs: int,
    validation: PartPredictions | None,
    out: str,
    cluster: ClusterConfig,
    reporter: Reporter,
) -> RefitModel:
    """Train the chosen settings with one seed on all molecules; arguments as of :func:`refit_and_save`."""
    steps_per_epoch = everything.settings.steps_per_epoch(len(everything.molecules))
    steps = StepCount(reporter, epochs * steps_per_epoch)
    device = use_reserved(cluster)
    result = refit_and_save(everything, seed, epochs, validation, out, device, after_step=steps.add)
    steps.end()
    return result
