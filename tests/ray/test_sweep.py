"""A sweep chooses on validation, records what fails, tests the choice with every seed, and continues."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.downstream import BaselineConfig, SweepConfig, TaskConfig
from moleblend_ray.data.files import storage
from moleblend_ray.errors import ConfigError
from moleblend_ray.evaluation.models.baselines import BaselineKind
from moleblend_ray.evaluation.scoring.scores import score
from moleblend_ray.evaluation.scoring.stored_predictions import read_predictions
from moleblend_ray.evaluation.search import SearchSpace
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import Metric, TaskKind
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.orchestration.downstream import sweep as sweep_module
from moleblend_ray.orchestration.downstream.sweep import sweep

pytestmark = pytest.mark.ray

RINGS = (
    "c1ccccc1",
    "c1ccncc1",
    "C1CCCCC1",
    "C1CCNCC1",
    "c1ccsc1",
    "c1ccoc1",
    "C1CCOCC1",
    "C1CCCC1",
)
TINY = ModelConfig(num_layers=1, dim=16, ffn_dim=16, num_heads=2, num_kernels=4, pair_dim=2)


def write_table(path: Path) -> None:
    """100 molecules with a number each, a missing number and a row that is no molecule."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["smiles", "size"])
        for length in range(1, 14):
            writer.writerows(
                ["C" * length + ring, length] for ring in RINGS[: 8 if length < 13 else 4]
            )
        writer.writerow(["CCO", ""])
        writer.writerow(["not a molecule", 1.0])


def config_for(folder: Path) -> SweepConfig:
    return SweepConfig(
        task=TaskConfig(
            name="size",
            source=str(folder / "molecules.csv"),
            columns=("size",),
            kind=TaskKind.REGRESSION,
            conformers=0,
        ),
        out=str(folder / "out"),
        model=TINY,
        finetune=FinetuneSettings(micro_batch_size=64),
        # The upper learning rates overflow: some of these trials must fail.
        search=SearchSpace(learning_rate=(1e-30, 1e20), batch_size=(8, 16), epochs=(1, 2)),
        num_trials=4,
        grace_epochs=1,
        final_seeds=(3, 5),
        baseline=BaselineConfig(
            kinds=(BaselineKind.FOREST, BaselineKind.DESCRIPTORS, BaselineKind.SCRATCH), num_trees=5
        ),
        cluster=ClusterConfig(num_workers=2),
    )


def ray_settings() -> dict[str, str]:
    return {name: os.environ[name] for name in os.environ if name.startswith(("RAY_", "TUNE_"))}


@pytest.fixture(scope="module")
def finished(
    ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SweepConfig, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sweep")
    write_table(folder / "molecules.csv")
    config = config_for(folder)
    before = ray_settings()
    summary = sweep(config)
    assert not summary.already_finished
    # Ray's own settings are for the search, not for what this process does later.
    assert ray_settings() == before
    return config, storage.read_json(summary.results)


def test_the_trial_with_the_best_validation_score_is_chosen(
    finished: tuple[SweepConfig, dict[str, Any]],
) -> None:
    config, results = finished
    scored = [trial for trial in results["trials"] if trial["valid_score"] is not None]
    best = min(scored, key=lambda trial: trial["valid_score"])
    assert len(results["trials"]) == config.num_trials
    assert {name: results["chosen"][name] for name in best["settings"]} == best["settings"]


def test_a_failing_trial_is_recorded_with_its_reason_and_ends_nothing(
    finished: tuple[SweepConfig, dict[str, Any]],
) -> None:
    failed = [trial for trial in finished[1]["trials"] if trial["status"] == "failed"]
    assert failed
    assert all("finetune.learning_rate" in trial["error"] for trial in failed)
    assert all(trial["valid_score"] is None for trial in failed)


def test_results_name_seeds_split_data_versions_and_baselines(
    finished: tuple[SweepConfig, dict[str, Any]],
) -> None:
    config, results = finished
    data = results["data"]
    assert [seed["seed"] for seed in results["final"]["seeds"]] == list(config.final_seeds)
    values = results["final"]["test"]["values"]
    assert results["final"]["test"]["mean"] == pytest.approx(np.mean(values))
    assert results["final"]["test"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert (data["molecules"], data["unlabelled"], data["quarantined"]) == (100, 1, 1)
    assert sum(data["split"][part] for part in ("train", "valid", "test")) == 100
    assert len(data["split"]["hash"]) == 16
    assert len(data["fingerprint"]) == 64
    assert (data["replicates"]["rule"], data["replicates"]["molecules"]) == ("keep", 0)
    assert 0 < data["similarity"]["percentile_5"] <= data["similarity"]["median"] < 1
    assert "similarity of test molecules" in (Path(config.out) / "report.md").read_text()
    assert [entry["kind"] for entry in results["baselines"]] == ["forest", "descriptors"]
    for entry in results["baselines"]:
        assert [seed["seed"] for seed in entry["seeds"]] == list(config.final_seeds)
        assert math.isfinite(entry["test"]["mean"])
        best = min(entry["candidates"], key=lambda candidate: candidate["valid_score"])
        assert entry["chosen"] == best["settings"]
    assert "starts from scratch" in results["baselines_absent"]["scratch"]
    assert {"torch", "ray", "rdkit"} <= set(results["versions"])
    assert json.loads(json.dumps(results["config"])) == results["config"]


def test_stored_predictions_give_the_reported_test_score(
    finished: tuple[SweepConfig, dict[str, Any]],
) -> None:
    config, results = finished
    for seed in results["final"]["seeds"]:
        table = pq.read_table(Path(config.out) / seed["model"] / "predictions.parquet")
        rows = [row for row in table.to_pylist() if row["part"] == "test"]
        errors = [row["prediction:size"] - row["label:size"] for row in rows]
        assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(seed["test_score"])


def test_scores_and_differences_have_intervals_from_stored_predictions(
    finished: tuple[SweepConfig, dict[str, Any]],
) -> None:
    config, results = finished
    models = [results["final"], *results["baselines"]]
    for entry in models:
        low, high = entry["test_interval"]
        assert low <= entry["test"]["mean"] <= high
    for entry in results["baselines"]:
        low, high = entry["model_is_better_by"]
        assert low <= entry["test"]["mean"] - results["final"]["test"]["mean"] <= high
        for seed in entry["seeds"]:
            test = read_predictions(str(Path(config.out) / seed["predictions"]), "test", ("size",))
            assert test is not None
            found = score(Metric.RMSE, test.predictions, test.labels, ("size",))
            assert found.value == pytest.approx(seed["test_score"])
    text = (Path(config.out) / "report.md").read_text()
    assert "compared with" in text


def test_the_report_shows_the_model_beside_the_baselines(
    finished: tuple[SweepConfig, dict[str, Any]],
) -> None:
    out = Path(finished[0].out)
    text = (out / "report.md").read_text()
    assert "| **MoleBLEND, from scratch** |" in text
    assert "| ECFP4 + random forest |" in text
    assert "| RDKit descriptors + linear model |" in text
    assert (out / "figures" / "test.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "figures" / "trials.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_sweep_is_not_run_again_and_its_folder_is_for_no_other_question(
    finished: tuple[SweepConfig, dict[str, Any]],
) -> None:
    config, _ = finished
    assert sweep(config).already_finished
    with pytest.raises(ConfigError, match="num_trials: 4 there, 5 here"):
        sweep(dataclasses.replace(config, num_trials=5))


def test_an_interrupted_sweep_keeps_its_trials_and_trains_the_missing_seed(
    finished: tuple[SweepConfig, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    config, before = finished
    out = Path(config.out)
    kept = (out / "models/seed-3/result.json").stat().st_mtime_ns
    (out / "results.json").unlink()
    shutil.rmtree(out / "models/seed-5")
    with caplog.at_level(logging.INFO, "moleblend_ray"):
        summary = sweep(config)
    assert "continuing the search" in caplog.text, "Ray Tune's files are not understood"
    after = storage.read_json(summary.results)
    assert not summary.already_finished
    assert (out / "models/seed-3/result.json").stat().st_mtime_ns == kept
    for results in (before, after):
        for trial in results["trials"]:
            trial.pop("seconds")
    assert after["trials"] == before["trials"]
    assert after["final"]["test"]["values"] == before["final"]["test"]["values"]


def test_further_seeds_and_baselines_are_added_to_finished_results(
    finished: tuple[SweepConfig, dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, _ = finished
    before = storage.read_json(str(Path(config.out) / "results.json"))
    # A search that ran failed trials again might choose other settings.
    monkeypatch.setattr(sweep_module, "run_trials", lambda *_: pytest.fail("a search was run"))
    more = dataclasses.replace(
        config,
        final_seeds=(*config.final_seeds, 8),
        baseline=dataclasses.replace(
            config.baseline, kinds=(BaselineKind.BOOSTING, *config.baseline.kinds)
        ),
    )
    stored = storage.read_json(f"{config.out}/results.json")["trials"]
    with caplog.at_level(logging.INFO, "moleblend_ray"):
        summary = sweep(more)
    assert "adding final_seeds=[8], baseline.kinds=['boosting'] to them" in caplog.text
    after = storage.read_json(summary.results)
    # None was tried again, nor one that had failed: each has its seconds.
    assert after["trials"] == stored
    assert any(trial["status"] == "failed" for trial in stored)
    assert (after["trials"], after["chosen"]) == (before["trials"], before["chosen"])
    grown = [after["final"], *after["baselines"]]
    assert [model.get("kind") for model in grown] == [None, "boosting", "forest", "descriptors"]
    assert {len(model["test"]["values"]) for model in grown} == {3}
    for model in (before["final"], *before["baselines"]):
        values = next(other for other in grown if other["name"] == model["name"])["test"]["values"]
        assert values[:2] == model["test"]["values"]
    assert sweep(more).already_finished
    with pytest.raises(ConfigError, match=r"final_seeds: \[3, 5, 8\] there, \[3, 5\] here"):
        sweep(config)
