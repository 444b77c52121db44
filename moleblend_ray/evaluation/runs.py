"""The last step of fine-tuning and sweeps: train the chosen settings with one seed, save, score the test part."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from moleblend_ray.chemistry.scaffolds import Split
from moleblend_ray.data import storage
from moleblend_ray.evaluation.applicability import ApplicabilityDomain, save_domain
from moleblend_ray.evaluation.dataset import LabelledMolecules
from moleblend_ray.evaluation.finetune import (
    FinetuneResult,
    StartingPoint,
    finetune_once,
    predict_mean,
)
from moleblend_ray.evaluation.property_model import save_property_model
from moleblend_ray.evaluation.result_files import MODELS_DIR, SEED_RESULT_NAME
from moleblend_ray.evaluation.results import SeedResult, read_seed_result, write_seed_result
from moleblend_ray.evaluation.scores import other_scores, score
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import Task

_TABLE_NAME = "predictions.parquet"


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
    outcome = (
        task.metric,
        predictions[split.test],
        molecules.labels[split.test],
        molecules.columns,
    )
    test = score(*outcome)
    path = model_path(seed)
    folder = storage.join(out, path)
    # A result of other settings must not be beside a model of these.
    storage.delete(_result_uri(out, seed))
    save_domain(ApplicabilityDomain.of([molecules.smiles[row] for row in split.train]), folder)
    save_property_model(result.model, result.trained, folder)
    _write_predictions(storage.join(folder, _TABLE_NAME), experiment, predictions)
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


def read_test_predictions(out: str, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Labels and predictions (M, T) of the test molecules, as the run of this seed stored them."""
    content = storage.read_bytes(storage.join(out, model_path(seed), _TABLE_NAME))
    table = pq.read_table(pa.BufferReader(content))
    table = table.filter(pc.equal(table["part"], "test"))
    labels, predictions = (
        np.stack(
            [
                table[name].to_numpy(zero_copy_only=False).astype(np.float64)
                for name in table.column_names
                if name.startswith(prefix)
            ],
            axis=1,
        )
        for prefix in ("label:", "prediction:")
    )
    return labels, predictions


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


def _write_predictions(uri: str, experiment: Experiment, predictions: NDArray[np.float64]) -> None:
    molecules, split = experiment.molecules, experiment.split
    rows = np.concatenate([split.valid, split.test])
    parts = ["valid"] * len(split.valid) + ["test"] * len(split.test)
    columns: dict[str, object] = {
        "mol_id": [molecules.mol_ids[row] for row in rows],
        "smiles": [molecules.smiles[row] for row in rows],
        "part": parts,
    }
    for index, name in enumerate(molecules.columns):
        columns[f"label:{name}"] = pa.array(molecules.labels[rows, index], from_pandas=True)
        columns[f"prediction:{name}"] = predictions[rows, index]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    storage.write_bytes(uri, sink.getvalue().to_pybytes())
