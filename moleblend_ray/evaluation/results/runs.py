"""The last step of fine-tuning and sweeps: train the chosen settings with one seed, save, score the test part."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from moleblend_ray.chemistry.scaffolds import Split
from moleblend_ray.data.files import storage
from moleblend_ray.errors import CheckpointError, DataError
from moleblend_ray.evaluation.models.finetune import (
    FinetuneResult,
    StartingPoint,
    finetune_once,
    predict_mean,
)
from moleblend_ray.evaluation.models.property_model import save_property_model
from moleblend_ray.evaluation.molecules.applicability import ApplicabilityDomain, save_domain
from moleblend_ray.evaluation.molecules.dataset import LabelledMolecules
from moleblend_ray.evaluation.results.result_files import MODELS_DIR, SEED_RESULT_NAME
from moleblend_ray.evaluation.results.results import SeedResult, read_seed_result, write_seed_result
from moleblend_ray.evaluation.scoring.scores import other_scores, score
from moleblend_ray.evaluation.scoring.stored_predictions import (
    PREDICTIONS_NAME,
    PartPredictions,
    read_predictions,
    write_predictions,
)
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import Task
from moleblend_ray.model.hub import PROPERTY_NAME


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """Everything that a run needs except its settings and its seed."""

    task: Task
    """The task."""
    molecules: LabelledMolecules
    """All molecules, the test part included."""
    split: Split
    """The part of each molecule."""
    start: StartingPoint
    """Weights to start from."""


def train_and_test(
    experiment: Experiment,
    settings: FinetuneSettings,
    seed: int,
    out: str,
    device: torch.device,
    after_step: Callable[[], None] | None = None,
) -> SeedResult:
    """Fine-tune with ``seed``, then save model, predictions and result in ``<out>/models/seed-<seed>``.

    ``after_step`` as in :func:`finetune_once`.
    """
    began = time.monotonic()
    task, molecules, split = experiment.task, experiment.molecules, experiment.split
    result = finetune_once(
        molecules,
        split.train,
        split.valid,
        task=task,
        start=experiment.start,
        settings=settings,
        seed=seed,
        device=device,
        after_step=after_step,
    )
    predictions = _predictions(result, experiment, settings, device)
    outcome = task.metric, predictions[split.test], *molecules.known(split.test)
    test = score(*outcome)
    path = model_path(seed)
    folder = storage.join(out, path)
    # A result or a model of other settings must not be beside files of these.
    storage.delete(_result_uri(out, seed))
    storage.delete(storage.join(folder, PROPERTY_NAME))
    save_domain(ApplicabilityDomain.of([molecules.smiles[row] for row in split.train]), folder)
    write_predictions(folder, molecules, split, predictions)
    save_property_model(result.model, result.trained, folder)
    last = result.history[-1]
    found = SeedResult(
        seed=seed,
        valid_score=result.valid_score,
        test_score=test.value,
        test_columns=test.columns,
        columns_left_out=test.columns_left_out,
        epochs=last.epoch,
        best_epoch=last.best_epoch,
        seconds=time.monotonic() - began,
        model=path,
        test_others=other_scores(*outcome),
    )
    # Last: with this file the folder is complete, and a repeated command does not train the seed again.
    write_seed_result(_result_uri(out, seed), dataclasses.asdict(settings), found)
    return found


def finished_seed(out: str, seed: int, settings: FinetuneSettings) -> SeedResult | None:
    """The result of an earlier, interrupted command for ``seed``, if it finished that run with these settings.

    A continued sweep may choose other settings than before. Then what was trained with the former ones does not count.
    """
    return read_seed_result(_result_uri(out, seed), dataclasses.asdict(settings))


def _result_uri(out: str, seed: int) -> str:
    return storage.join(out, model_path(seed), SEED_RESULT_NAME)


def model_path(seed: int) -> str:
    """Folder of a seed's model, relative to the results."""
    return f"{MODELS_DIR}/seed-{seed}"


def read_of_seeds(
    out: str, seeds: Sequence[int], part: Literal["valid", "test"], columns: Sequence[str]
) -> list[PartPredictions]:
    """Labels and predictions of a part, as the run of each seed stored them; DataError if they are gone or damaged."""
    return read_of_folders(out, [model_path(seed) for seed in seeds], part, columns)


def read_of_results(
    out: str, seeds: Sequence[SeedResult], part: Literal["valid", "test"], columns: Sequence[str]
) -> list[PartPredictions]:
    """Labels and predictions of a part by each seed of a model or a baseline; DataError if they are gone or damaged."""
    folders = [str(seed.predictions or seed.model) for seed in seeds]
    return read_of_folders(out, folders, part, columns)


def read_of_folders(
    out: str, paths: Sequence[str], part: Literal["valid", "test"], columns: Sequence[str]
) -> list[PartPredictions]:
    """Labels and predictions of a part, as stored in these folders of ``out``; DataError if they are gone or damaged."""
    found = []
    for path in paths:
        folder = storage.join(out, path)
        uri = storage.join(folder, PREDICTIONS_NAME)
        remedy = f"Delete {folder} and run the command again: it trains this seed anew"
        try:
            predictions = read_predictions(folder, part, columns)
        except CheckpointError as error:
            # Not a CheckpointError: of several tasks, the others have theirs.
            reason = str(error.__cause__ or error).rstrip(".")
            raise DataError(f"{uri} is damaged: {reason}. {remedy}") from error
        if predictions is None:
            raise DataError(f"{uri} is gone. {remedy}")
        found.append(predictions)
    return found


def _predictions(
    result: FinetuneResult,
    experiment: Experiment,
    settings: FinetuneSettings,
    device: torch.device,
) -> NDArray[np.float64]:
    """(M, T) predictions for validation and test molecules, as numbers in the unit or probabilities; NaN for others."""
    molecules, split = experiment.molecules, experiment.split
    rows = np.concatenate([split.valid, split.test])
    predictions = np.full(molecules.labels.shape, np.nan)
    predictions[rows] = predict_mean(
        result.model.to(device),
        result.trained,
        molecules,
        rows,
        settings.micro_batch_size,
        device,
    )
    return predictions
