"""What fine-tuning and sweeps write last says what predictions will be, and is not taken for the answer to another question."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moleblend_ray.config.downstream import FinetuneConfig, TaskConfig
from moleblend_ray.data.files import storage
from moleblend_ray.errors import ConfigError
from moleblend_ray.evaluation.results.results import RESULTS_VERSION, SeedResult
from moleblend_ray.evaluation.scoring.resampling import Resampling
from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions, write_predictions
from moleblend_ray.evaluation.tasks import Metric, TaskKind
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.hub import save_pretrained
from moleblend_ray.model.moleblend import MoleBlendModel
from moleblend_ray.orchestration.downstream import result_writing
from moleblend_ray.orchestration.downstream.downstream import starting_point
from moleblend_ray.orchestration.downstream.result_writing import finished_results
from moleblend_ray.orchestration.identity import claim, question
from moleblend_ray.settings import to_dict

TINY = ModelConfig(num_layers=1, dim=16, ffn_dim=16, num_heads=2, num_kernels=4, pair_dim=2)


@pytest.mark.parametrize("num_models", [1, 2])
@pytest.mark.parametrize("kind", list(TaskKind))
def test_results_score_what_predictions_will_be_the_mean_of_all_models(
    kind: TaskKind, num_models: int
) -> None:
    is_class = kind is TaskKind.CLASSIFICATION
    labels = np.array([[0.0], [1.0], [0.0], [1.0]] * 5)
    names = tuple(f"C{row}" for row in range(len(labels)))
    # Each model is wrong where the other is right, so that the mean is better than both.
    right, wrong = np.where(labels == 1.0, 0.9, 0.1), np.full_like(labels, 0.5)
    first, second = labels.copy() * 0.0 + wrong, wrong.copy()
    first[:10], second[10:] = right[:10], right[10:]
    models = [
        PartPredictions(mol_ids=names, smiles=names, labels=labels, predictions=values)
        for values in (first, second)[:num_models]
    ]
    task = TaskConfig(name="own", source="a.csv", columns=("y",), kind=kind).resolve()
    found = result_writing._together(task, ("y",), models, models, Resampling.of(names))
    assert ("ensemble" in found) == (num_models == 2)
    assert ("intervals" in found) == (not is_class)
    assert ("class_sets" in found) == is_class
    if num_models == 2:
        together = found["ensemble"]
        assert together["valid"] == together["test"]
        assert together["test"] == (1.0 if is_class else pytest.approx(0.3))
        assert set(together["test_others"]) == (
            {"pr_auc", "balanced_accuracy", "mcc"} if is_class else {"mae", "r2", "spearman"}
        )
    if is_class:
        sets = found["class_sets"]["columns"]["y"]
        assert (sets["valid_labels"], sets["test_labels"]) == ([10, 10], [10, 10])
    else:
        width = found["intervals"]["columns"]["y"]["half_width"]
        assert width == pytest.approx(0.3 if num_models == 2 else 0.5)


def parts_of_three_classes() -> list[PartPredictions]:
    """Of two models. The right class has most, and less than half; of every fifth molecule the next class has."""
    labels = np.eye(3)[np.arange(30) % 3]
    names = tuple(f"C{row}" for row in range(len(labels)))
    right = 0.3 + 0.15 * np.where((np.arange(30) % 5 == 0)[:, None], np.roll(labels, 1, 1), labels)
    return [
        PartPredictions(mol_ids=names, smiles=names, labels=labels, predictions=right + noise)
        for noise in (-0.01, 0.01)
    ]


def test_draws_of_every_model_decide_for_one_of_several_classes(tmp_path: Path) -> None:
    columns, seeds = ("y=a", "y=b", "y=c"), []
    rows = np.arange(30)
    for seed, part in enumerate(parts_of_three_classes()):
        molecules = SimpleNamespace(**dataclasses.asdict(part), columns=columns)
        split = SimpleNamespace(valid=rows, test=rows)
        write_predictions(f"{tmp_path}/seed-{seed}", molecules, split, part.predictions)
        seeds.append(
            SeedResult(
                seed=seed,
                valid_score=0.8,
                test_score=0.8,
                test_columns={},
                columns_left_out=(),
                epochs=1,
                best_epoch=1,
                seconds=1.0,
                model=f"seed-{seed}",
            )
        )
    resampling = Resampling.of(part.smiles)
    arguments = str(tmp_path), seeds, Metric.BALANCED_ACCURACY, columns, resampling
    found = result_writing._scored(*arguments, ([0, 1, 2],))
    assert found.score == pytest.approx(0.8)
    assert found.draws.mean() == pytest.approx(0.8, abs=0.02)


def test_the_mean_of_all_models_decides_for_one_of_several_classes() -> None:
    columns, models = ("y=a", "y=b", "y=c"), parts_of_three_classes()
    names = models[0].smiles
    task = TaskConfig(
        name="own", source="a.csv", columns=columns, kind=TaskKind.CLASSIFICATION,
        metric=Metric.BALANCED_ACCURACY,
    ).resolve()  # fmt: skip
    found = result_writing._together(
        task, columns, models, models, Resampling.of(names), exclusive=([0, 1, 2],)
    )
    together = found["ensemble"]
    assert together["valid"] == together["test"] == pytest.approx(0.8)
    low, high = together["test_interval"]
    assert 0.6 < low < 0.8 < high < 1.0


def test_a_checkpoint_replaced_under_its_name_is_not_what_the_results_are_of(
    tmp_path: Path,
) -> None:
    config = FinetuneConfig(
        task=TaskConfig(name="esol", source=str(tmp_path / "esol.csv")),
        out=str(tmp_path / "out"),
        checkpoint=str(tmp_path / "model"),
    )
    torch.manual_seed(0)
    save_pretrained(MoleBlendModel(TINY), str(tmp_path / "model"))
    identity = {
        "config": question(config),
        "data_fingerprint": "aaa",
        "checkpoint_fingerprint": starting_point(config).fingerprint,
    }
    claim(config.out, identity)
    stored = {"results_version": RESULTS_VERSION, "seconds": 1.0, "config": to_dict(config)}
    storage.write_json(storage.join(config.out, "results.json"), stored)
    assert finished_results(config) == json.loads(json.dumps(stored))
    assert finished_results(dataclasses.replace(config, seeds=(0, 1))) is None
    save_pretrained(MoleBlendModel(TINY), str(tmp_path / "model"))
    with pytest.raises(ConfigError, match="checkpoint_fingerprint"):
        finished_results(config)


def test_results_of_another_layout_are_refused_saying_what_to_do(tmp_path: Path) -> None:
    config = FinetuneConfig(
        task=TaskConfig(name="esol", source=str(tmp_path / "esol.csv")), out=str(tmp_path)
    )
    storage.write_json(storage.join(config.out, "results.json"), {"results_version": 1})
    with pytest.raises(ConfigError, match=r"layout version 1, .* reads 2.*another `out`"):
        finished_results(config)
