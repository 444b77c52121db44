"""Benchmarks run on any source, and the results that are kept say what they are of."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.dataset.shard_reader import ShardReader
from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.name)
def test_a_kept_result_has_date_hardware_and_config(file: Path) -> None:
    value = json.loads(file.read_text())
    assert set(value) == {"date", "hardware", "config", "result"}
    assert file.name.endswith(f"{datetime.date.fromisoformat(value['date'])}.json")
    assert (BENCHMARKS / f"{value['result']['benchmark']}.py").is_file()


def test_the_relations_benchmark_takes_its_molecules_in_turn(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("relations", BENCHMARKS / "relations.py")
    assert spec is not None
    assert spec.loader is not None
    relations = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(relations)
    source, sample, uri = tmp_path / "a.csv", str(tmp_path / "sample"), str(tmp_path / "grown")
    source.write_text("smiles\nC\nCC\nCCC\n")
    relations.prepared(str(source), sample)
    relations.grow(uri, sample, 9, num_shard_rows=4)
    reader = ShardReader(uri, load_manifest(uri), "train")
    assert reader.num_rows == 9
    found = reader.read(np.arange(9))["num_atoms"].to_pylist()
    assert found == [1, 2, 3, 1, 1, 2, 3, 1, 1]


def test_the_score_of_intervals_is_their_width_and_what_labels_are_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    intervals = importlib.import_module("intervals")

    def part(predictions: list[float]) -> PartPredictions:
        names = tuple(map(str, predictions))
        values = np.array(predictions)[:, None]
        return PartPredictions(
            mol_ids=names, smiles=names, labels=np.zeros_like(values), predictions=values
        )

    valid, test = part([float(error) for error in range(1, 20)]), part([0.0, 20.0])
    ones = np.ones((19, 1)), np.ones((2, 1))
    # Nine of ten errors are at most 18; the second label is 2 outside.
    found = intervals.judged(valid, test, *ones)
    assert found == {"inside": 0.5, "width": 36.0, "interval_score": 36.0 + 0.5 * 20.0 * 2.0}
    # Twice as wide where the scale is twice that of all others.
    found = intervals.judged(valid, test, ones[0], np.array([[1.0], [2.0]]))
    assert found == {"inside": 1.0, "width": 54.0, "interval_score": 54.0}


@pytest.mark.parametrize("name", ["train_step", "attention", "heads"])
def test_benchmarks_of_the_model_need_torch_and_numba_alone(name: str) -> None:
    code = f"""
import sys
for missing in ("ray", "rdkit", "pyarrow", "s3fs", "hydra", "omegaconf", "wandb"):
    sys.modules[missing] = None
sys.path.insert(0, {str(BENCHMARKS)!r})
import {name}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
