"""Benchmarks run on any source, and the results that are kept say what they are of."""

from __future__ import annotations

import datetime
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from moleblend_ray.data.shards import ShardReader, load_manifest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.name)
def test_a_kept_result_has_date_hardware_and_config(file: Path) -> None:
    value = json.loads(file.read_text())
    assert set(value) == {"date", "hardware", "config", "result"}
    assert file.name.endswith(f"{datetime.date.fromisoformat(value['date'])}.json")
    assert (BENCHMARKS / f"{value['result']['benchmark']}.py").is_file()


def test_the_relations_benchmark_reads_its_source_as_often_as_asked(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("relations", BENCHMARKS / "relations.py")
    assert spec is not None
    assert spec.loader is not None
    relations = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(relations)
    source, uri = tmp_path / "a.csv", str(tmp_path / "out")
    source.write_text("smiles\nC\nCC\nCCC\n")
    assert relations.repeat(uri, relations.prepared(str(source), uri), 7) == 9
    reader = ShardReader(uri, load_manifest(uri), "train")
    assert reader.read(np.arange(9))["num_atoms"].to_pylist() == [1, 2, 3] * 3
