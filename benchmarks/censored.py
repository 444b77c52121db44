"""What bounds (`>10`) are worth in training: labels beyond a limit are hidden, as an assay would, then predicted.

    moleblend prepare source=esol.csv.gz out=DATA valid_fraction=0
    python benchmarks/censored.py DATA --task esol [--share 0.3] [--side above] [--model mini] [--epochs 15] [--seeds 3]

The true labels of the test molecules beyond the limit are known here, so that what models say of them can be judged. Four ways
to train, with the same split, settings and seeds: on bounds; with such molecules left out; with the bound in place of the label;
and on the true labels, which no assay gives. Validation labels beyond the limit are as in training, or missing. For the mean of all seeds' models,
on test molecules: RMSE of those within the range and of all, the rank correlation of all, and ROC-AUC of being beyond the limit.
The baselines, with settings chosen on the same validation labels, do the same. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moleblend_ray.chemistry.scaffolds import Split, split_hash
from moleblend_ray.config.compose import model_preset
from moleblend_ray.evaluation.models.baselines import (
    BaselineData,
    BaselineKind,
    candidate_groups,
    predict_group,
    validation_scores,
)
from moleblend_ray.evaluation.models.finetune import StartingPoint, finetune_once, predict_mean
from moleblend_ray.evaluation.molecules.censoring import LabelBounds
from moleblend_ray.evaluation.molecules.dataset import LabelledMolecules, load_labelled
from moleblend_ray.evaluation.results.baseline_runs import compute_features
from moleblend_ray.evaluation.scoring.scores import roc_auc, spearman
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.splits.split import split_molecules
from moleblend_ray.evaluation.tasks import Task, resolve_task

CPU = torch.device("cpu")
Predict = Callable[[LabelledMolecules], NDArray[np.float64]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--task", required=True)
    parser.add_argument("--share", type=float, default=0.3, help="labels beyond the limit")
    parser.add_argument("--side", choices=("above", "below"), default="above")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    task = resolve_task(arguments.task)
    truth = load_labelled(arguments.data, task)
    split = split_molecules(truth.smiles, task.split, 0, truth.parts)
    ways, limit = censored_ways(truth, split, arguments.share, above=arguments.side == "above")
    models: dict[str, Predict] = {
        "encoder": lambda molecules: encoder_predictions(task, molecules, split, arguments)
    }
    for kind in (BaselineKind.FOREST, BaselineKind.BOOSTING, BaselineKind.DESCRIPTORS):
        models[kind.value] = baseline_predictor(task, kind, truth, split, arguments.seeds)
    labels = truth.labels[split.test, 0]
    beyond = labels > limit if arguments.side == "above" else labels < limit
    found: dict[str, Any] = {}
    for name, predict in models.items():
        found[name] = {
            way: judged(predict(molecules), labels, beyond, above=arguments.side == "above")
            for way, molecules in ways.items()
        }
        print(name, json.dumps(found[name]), flush=True)
    result = {
        "benchmark": "censored",
        "task": task.name,
        "split_hash": split_hash(split),
        "limit": round(limit, 4),
        "test": {"measured": int((~beyond).sum()), "bounds": int(beyond.sum())},
        "models": found,
    }
    print(json.dumps(result))


def censored_ways(
    truth: LabelledMolecules, split: Split, share: float, *, above: bool
) -> tuple[dict[str, LabelledMolecules], float]:
    """The molecules with labels as each way of training has them, and the limit; test molecules keep nothing beyond it."""
    limit = float(np.quantile(truth.labels, 1 - share if above else share))
    beyond = truth.labels > limit if above else truth.labels < limit
    measured = np.where(beyond, np.nan, truth.labels)
    at_limit, none = np.where(beyond, limit, np.nan), np.full_like(measured, np.nan)
    bounds = LabelBounds(at_least=at_limit if above else none, at_most=none if above else at_limit)
    as_labels, uncensored = measured.copy(), measured.copy()
    as_labels[split.train] = np.where(beyond, limit, truth.labels)[split.train]
    uncensored[split.train] = truth.labels[split.train]
    left_out = dataclasses.replace(truth, labels=measured)
    return {
        "bounds": dataclasses.replace(left_out, bounds=bounds),
        "left_out": left_out,
        "as_labels": dataclasses.replace(truth, labels=as_labels),
        "uncensored": dataclasses.replace(truth, labels=uncensored),
    }, limit


def encoder_predictions(
    task: Task, molecules: LabelledMolecules, split: Split, arguments: argparse.Namespace
) -> NDArray[np.float64]:
    """(K,) the mean over seeds of the predictions for the test molecules."""
    settings = FinetuneSettings(learning_rate=arguments.learning_rate, epochs=arguments.epochs)
    start = StartingPoint(model=model_preset(arguments.model), encoder=None, fingerprint=None)
    found = []
    for seed in range(arguments.seeds):
        result = finetune_once(
            molecules,
            split.train,
            split.valid,
            task=task,
            start=start,
            settings=settings,
            seed=seed,
            device=CPU,
        )
        found.append(
            predict_mean(result.model, result.trained, molecules, split.test, 64, CPU)[:, 0]
        )
    mean: NDArray[np.float64] = np.mean(found, axis=0)
    return mean


def baseline_predictor(
    task: Task, kind: BaselineKind, truth: LabelledMolecules, split: Split, num_seeds: int
) -> Predict:
    """What trains a baseline on molecules and predicts the test molecules, with the settings that validation prefers."""
    features = compute_features(kind.features, truth.smiles)

    def predict(molecules: LabelledMolecules) -> NDArray[np.float64]:
        data = BaselineData(
            task=task,
            mol_ids=molecules.mol_ids,
            smiles=molecules.smiles,
            features=features,
            labels=molecules.labels,
            bounds=molecules.bounds,
            columns=molecules.columns,
            train=split.train,
            valid=split.valid,
            test=split.test,
        )
        groups = candidate_groups(
            kind,
            task.kind,
            data.labels[split.train],
            num_trees=200,
            num_rounds=300,
            censored=molecules.bounds is not None,
        )
        scores = [
            (value, group[index])
            for group in groups
            for index, value in enumerate(validation_scores(data, kind, group, 0, 2))
        ]
        _, chosen = min(scores, key=lambda pair: pair[0])  # errors: all tasks here are regression
        seeds = range(num_seeds if kind.is_random else 1)
        parts = [predict_group(data, kind, [chosen], split.test, seed, 2)[0] for seed in seeds]
        mean: NDArray[np.float64] = np.mean(parts, axis=0)[:, 0]
        return mean

    return predict


def judged(
    predictions: NDArray[np.float64],
    labels: NDArray[np.float64],
    beyond: NDArray[np.bool_],
    *,
    above: bool,
) -> dict[str, float]:
    """Scores of the predictions (K,) against the true labels (K,), of which some are ``beyond`` the limit."""
    errors = (predictions - labels) ** 2
    ranking = predictions if above else -predictions
    return {
        "rmse_measured": round(float(np.sqrt(errors[~beyond].mean())), 4),
        "rmse_all": round(float(np.sqrt(errors.mean())), 4),
        "spearman_all": round(spearman(labels, predictions), 4),
        "auc_beyond": round(roc_auc(beyond.astype(np.float64), ranking), 4),
    }


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
