"""The evidence for pretraining: shared work, splits of other data refused, intervals and the table."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moleblend_ray.chemistry.scaffolds import Split
from moleblend_ray.errors import ConfigError, DataError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

CHORES = """
import os

def chore(number):
    if number == 3:
        raise ValueError("three")
    if number == 4:
        os._exit(7)
    return {"double": 2 * number, "process": os.getpid()}
"""

SPLIT = Split(np.arange(6), np.arange(6, 8), np.arange(8, 10))


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.fixture
def moleculenet(monkeypatch: pytest.MonkeyPatch) -> Any:
    return module("moleculenet", monkeypatch)


def test_jobs_are_shared_a_failure_stops_no_other_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared_work = module("shared_work", monkeypatch)
    (tmp_path / "chores.py").write_text(CHORES)
    monkeypatch.syspath_prepend(str(tmp_path))
    chore = importlib.import_module("chores").chore
    out = tmp_path / "out"
    reported: list[int] = []

    def jobs(numbers: list[int], kind: str = "a") -> list[Any]:
        return [
            shared_work.Job(
                name=str(number),
                labels={"number": number},
                identity={"kind": kind},
                cost=number,
                payload=number,
            )
            for number in numbers
        ]

    def run(todo: list[Any], workers: int = 2) -> list[dict[str, Any]]:
        reported.clear()
        return list(
            shared_work.run_jobs(
                todo, chore, out, workers=workers, report=lambda done, _: reported.append(done)
            )
        )

    documents = run(jobs([1, 2, 3, 4, 5, 6]))
    assert [d.get("double") for d in documents] == [2, 4, None, None, 10, 12]
    assert documents[2]["error"] == "ValueError: three"
    assert "exit code 7" in documents[3]["error"]
    assert len({d["process"] for d in documents if "process" in d}) >= 2
    assert reported == [1, 2, 3, 4, 5, 6]
    assert json.loads((out / "3.json").read_text()) == documents[2]

    again = run(jobs([1, 2, 3, 5, 6]), workers=1)
    assert reported == [5]  # the failed one alone
    assert again[0] == documents[0]
    with pytest.raises(ConfigError, match=r"other settings \(kind differ\)"):
        run(jobs([1], kind="b"))


def test_the_longest_jobs_begin_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared_work = module("shared_work", monkeypatch)
    begun: list[str] = []

    def work(name: str) -> dict[str, Any]:
        begun.append(name)
        return {}

    jobs = [
        shared_work.Job(name=name, labels={}, identity={}, cost=cost, payload=name)
        for name, cost in (("a", 1), ("b", 3), ("c", 2), ("d", 3))
    ]
    shared_work.run_jobs(jobs, work, tmp_path, report=lambda *_: None)
    assert begun == ["b", "d", "c", "a"]


def test_a_split_of_other_data_is_refused(tmp_path: Path, moleculenet: Any) -> None:
    folder = str(tmp_path)
    moleculenet.save_split(folder, "esol", "1234", SPLIT, 10)
    found = moleculenet.read_split(folder, "esol", "1234")
    assert [part.tolist() for part in found.split] == [part.tolist() for part in SPLIT]
    assert found.num_molecules == 10
    with pytest.raises(DataError, match=r"dataset 1234, but the dataset of esol is 5678"):
        moleculenet.read_split(folder, "esol", "5678")
    with pytest.raises(DataError, match="--write-splits"):
        moleculenet.read_split(folder, "bbbp", "1234")
    (tmp_path / "bbbp.npz").write_bytes((tmp_path / "esol.npz").read_bytes())
    with pytest.raises(DataError, match="is the split of esol"):
        moleculenet.read_split(folder, "bbbp", "1234")
    (tmp_path / "esol.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match="is no split"):
        moleculenet.read_split(folder, "esol", "1234")


def test_settings_are_those_of_the_table_with_changes(moleculenet: Any) -> None:
    for name in moleculenet.SETTINGS:
        settings = moleculenet.settings_of(name, "bf16", {})
        assert settings.micro_batch_size == settings.batch_size
        assert settings.patience == settings.epochs
        assert settings.precision == "bf16"
    changes = moleculenet.changed_settings(["learning_rate=3e-4", "readout=mean", "batch_size=16"])
    settings = moleculenet.settings_of("esol", "fp32", changes)
    assert (settings.learning_rate, settings.readout) == (3e-4, "mean")
    assert (settings.batch_size, settings.micro_batch_size) == (16, 16)
    with pytest.raises(ConfigError, match="fresh_blocks"):
        moleculenet.settings_of("esol", "fp32", {"fresh_block": 1})
    with pytest.raises(ConfigError, match="epochs"):
        moleculenet.settings_of("esol", "fp32", {"epochs": 0})
    with pytest.raises(ConfigError, match="key=value"):
        moleculenet.changed_settings(["epochs"])


def test_only_baselines_need_no_checkpoint(
    moleculenet: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", "DATA", "--out", "OUT", "--tasks", "esol"]
    found = moleculenet.parse_arguments([*words, "--arms", "descriptors,forest"])
    assert (found.arms, found.checkpoint) == (["forest", "descriptors"], None)
    with pytest.raises(SystemExit):
        moleculenet.parse_arguments([*words, "--arms", "descriptors,scratch"])
    assert "--checkpoint is needed" in capsys.readouterr().err


def test_intervals_are_students_and_differences_paired_by_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evidence = module("evidence", monkeypatch)
    assert evidence.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.302653 / math.sqrt(3)))
    assert evidence.interval([5.0]) == pytest.approx((5.0, math.nan), nan_ok=True)
    assert math.isnan(evidence.interval([]).mean)
    change = evidence.difference({0: 1.0, 1: 5.0, 2: 9.0}, {1: 4.0, 0: 3.0})
    assert change.mean == pytest.approx((-2.0 + 1.0) / 2)


def test_the_pooled_interval_is_that_of_a_least_squares_fit_of_arms_and_seeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evidence = module("evidence", monkeypatch)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(5, 3)) + 10 * rng.normal(size=(5, 1)) + 100 * rng.normal(size=3)
    arms = [dict(enumerate(row)) for row in values]
    # One indicator for each arm, one for each seed but the first.
    design = np.hstack([np.repeat(np.eye(5), 3, axis=0), np.tile(np.eye(3)[:, 1:], (5, 1))])
    _, (residual,), rank, _ = np.linalg.lstsq(design, values.ravel(), rcond=None)
    contrast = np.zeros(7)
    contrast[0], contrast[1] = 1, -1
    freedom = 15 - rank
    spread = contrast @ np.linalg.inv(design.T @ design) @ contrast * residual / freedom
    expected = 2.306004 * math.sqrt(spread)  # Student's t, 8 degrees of freedom
    assert evidence.pooled_half_width(arms) == pytest.approx(expected, rel=1e-6)
    unfinished = [*arms[:4], {0: values[4, 0], 2: values[4, 2]}]
    both = [{seed: arm[seed] for seed in (0, 2)} for arm in arms]
    assert evidence.pooled_half_width(unfinished) == evidence.pooled_half_width(both)
    assert math.isnan(evidence.pooled_half_width(arms[:1]))
    assert math.isnan(evidence.pooled_half_width([{0: 1.0}, {0: 2.0}]))


def test_the_table_of_ablations_marks_what_is_outside_its_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ablations = module("ablations", monkeypatch)
    tests = {
        "default": (1.0, 1.2, 1.1),
        "both": (0.51, 0.69, 0.6),
        "distance": (1.01, 1.19, 1.1),
        "scratch": (1.5, 2.5, 2.0),
    }
    results = [
        {"arm": arm, "seed": seed, "test": {"qm9_gap": value}}
        for arm, values in tests.items()
        for seed, value in enumerate(values)
    ]
    options = argparse.Namespace(tasks="qm9_gap", epochs=2, finetune_lr=1e-3)
    settings = argparse.Namespace(preset="mini", steps=10, batch=4, labels=5, seeds="0,1,2")
    text, rows = ablations.table(results, ablations.measures_of(options), settings)
    cells = {
        row["arm"]: line.split(" | ")[-1]
        for row, line in zip(rows, text.splitlines()[4:], strict=True)
    }
    assert cells["default"] == "1.1 ± 0.25 |"
    assert "**(-0.5 ± 0.01" in cells["both"]
    assert "**" not in cells["distance"]
    assert cells["scratch"] == "2 ± 1.2 (+0.9 ± 0.99) |"
    json.dumps(rows, allow_nan=False)
    # An arm with one seed so far takes nothing from the others' interval, and has none.
    unfinished = {"arm": "rotation", "seed": 0, "test": {"qm9_gap": 1.3}}
    *same, last = ablations.table([*results, unfinished], ablations.measures_of(options), settings)[
        1
    ]
    assert same == rows
    assert last["qm9_gap"]["difference"] == {"mean": pytest.approx(0.3), "half_width_95": None}
    (alone,) = ablations.table(results[:1], ablations.measures_of(options), settings)[1]
    assert alone["qm9_gap"]["half_width_95"] is None


def result(task: str, metric: str, arm: str, seed: int, test: float | None) -> dict[str, Any]:
    found = {"error": "lost"} if test is None else {"test": test}
    return {"task": task, "metric": metric, "arm": arm, "seed": seed, **found}


def test_the_table_says_which_arm_is_better_by_the_metric(moleculenet: Any) -> None:
    rows = moleculenet.table_rows(
        [
            *(result("esol", "rmse", "pretrained", s, v) for s, v in enumerate((0.8, 0.82, 0.81))),
            *(result("esol", "rmse", "scratch", s, v) for s, v in enumerate((0.9, 0.91, 0.92))),
            *(result("bbbp", "roc_auc", "pretrained", s, v) for s, v in enumerate((0.6, 0.8))),
            *(result("bbbp", "roc_auc", "scratch", s, v) for s, v in enumerate((0.8, 0.7))),
            result("sider", "roc_auc", "pretrained", 0, 0.6),
            result("sider", "roc_auc", "scratch", 0, None),
        ]
    )
    assert [row["better"] for row in rows] == ["pretrained", "scratch", None]
    assert [row["beyond_interval"] for row in rows] == [True, False, False]
    assert rows[0]["difference"]["mean"] == pytest.approx(-0.1)
    assert rows[1]["difference"]["mean"] == pytest.approx(-0.05)
    assert moleculenet.wins(rows) == {
        "pretrained": {"better": 1, "beyond_interval": 1},
        "scratch": {"better": 1, "beyond_interval": 0},
    }
    json.dumps(rows, allow_nan=False)
    assert moleculenet.shown(rows[0]["pretrained"]) == "0.81 ± 0.025"
    assert moleculenet.listed(rows[1]["pretrained"]) == "0.6, 0.8"
    assert moleculenet.shown(rows[2].get("scratch")) == "—"


def test_the_benchmarks_need_neither_ray_nor_rdkit() -> None:
    code = f"""
import sys
for missing in ("ray", "rdkit", "s3fs", "hydra", "omegaconf", "wandb"):
    sys.modules[missing] = None
sys.path.insert(0, {str(BENCHMARKS)!r})
import ablations, moleculenet
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
