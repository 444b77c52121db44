"""A column of three classes in words, from the table to results and predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.downstream import BaselineConfig, FinetuneConfig, TaskConfig
from moleblend_ray.data.files import storage
from moleblend_ray.evaluation.models.baselines import BaselineKind
from moleblend_ray.evaluation.scoring.intervals import mean_of
from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions, read_predictions
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import Metric, SplitKind, TaskKind
from moleblend_ray.inference import PropertyPredictor
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.orchestration.downstream.finetune import finetune

pytestmark = pytest.mark.ray

WORDS = ("short", "medium", "long")
LABELS = tuple(f"chain={word}" for word in WORDS)
RINGS = ("c1ccccc1", "c1ccncc1", "C1CCCCC1", "C1CCNCC1", "c1ccsc1")


def read(out: Path, seed: dict[str, Any]) -> PartPredictions:
    """The predictions of one model for the test part."""
    found = read_predictions(str(out / (seed["predictions"] or seed["model"])), "test", LABELS)
    assert found is not None
    return found


def confusion(part: PartPredictions) -> np.ndarray:
    """How many molecules of each class (rows) got which (columns) as the most probable one."""
    counts = np.zeros((3, 3), dtype=int)
    for labels, probabilities in zip(part.labels, part.predictions, strict=True):
        counts[labels.argmax(), probabilities.argmax()] += 1
    return counts


def balanced_accuracy(counts: np.ndarray) -> float:
    """Mean over the classes that occur of the share that is right."""
    return float(np.mean([row[index] / row.sum() for index, row in enumerate(counts) if any(row)]))


def test_results_count_and_predictions_name_the_most_probable_class(
    ray_cluster: None, tmp_path: Path
) -> None:
    rows = [
        f"{'C' * length}{ring},{WORDS[(length - 1) // 4].upper()}"
        for length in range(1, 13)
        for ring in RINGS
    ]
    (tmp_path / "table.csv").write_text("\n".join(["smiles,chain", *rows]) + "\n")
    out = tmp_path / "out"
    finetune(
        FinetuneConfig(
            task=TaskConfig(
                name="chains",
                source=str(tmp_path / "table.csv"),
                columns=("chain",),
                classes=WORDS,
                kind=TaskKind.CLASSIFICATION,
                metric=Metric.BALANCED_ACCURACY,
                split=SplitKind.RANDOM,
                conformers=0,
            ),
            seeds=(0, 1),
            out=str(out),
            model=ModelConfig(
                num_layers=1, dim=16, ffn_dim=16, num_heads=2, num_kernels=4, pair_dim=2
            ),
            finetune=FinetuneSettings(epochs=2),
            baseline=BaselineConfig(kinds=(BaselineKind.DESCRIPTORS,)),
            cluster=ClusterConfig(num_workers=1),
        )
    )
    results = storage.read_json(str(out / "results.json"))
    assert tuple(results["task"]["columns"]) == LABELS
    found = results["final"]["alternatives"]["chain"]
    assert tuple(found["classes"]) == WORDS
    final, (baseline,) = results["final"], results["baselines"]
    for seed in (*final["seeds"], *baseline["seeds"]):
        counts = confusion(read(out, seed))
        assert counts.sum() == results["data"]["split"]["test"] > 0
        assert seed["test_score"] == pytest.approx(balanced_accuracy(counts))
    together = confusion(mean_of([read(out, seed) for seed in final["seeds"]]))
    assert found["test_confusion"] == together.tolist()
    assert final["ensemble"]["test"] == pytest.approx(balanced_accuracy(together))
    assert (
        "`moleblend predict` also names the most probable class of chain"
        in (out / "report.md").read_text()
    )

    table = PropertyPredictor.from_pretrained(str(out)).predict(["CCCc1ccccc1", "no molecule"])
    chances = [table[f"prediction:{label}"][0].as_py() for label in LABELS]
    assert sum(chances) == pytest.approx(1.0)
    assert table["class:chain"].to_pylist() == [WORDS[int(np.argmax(chances))], None]
