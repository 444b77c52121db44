"""A cross-validation is what its folds are alone, tests every molecule once, and repeats nothing that is finished."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.downstream import (
    BaselineConfig,
    FinetuneConfig,
    PredictConfig,
    RefitConfig,
    SweepConfig,
    TaskConfig,
)
from moleblend_ray.data.files import storage
from moleblend_ray.errors import ConfigError
from moleblend_ray.evaluation.models.baselines import BaselineKind
from moleblend_ray.evaluation.molecules.applicability import ApplicabilityDomain
from moleblend_ray.evaluation.reports.leaderboard import read_leaderboard
from moleblend_ray.evaluation.results.cross_validation import Fold, combine_folds
from moleblend_ray.evaluation.search import SearchSpace
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import SplitKind, TaskKind
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.orchestration.downstream.cross_validation import (
    CrossValidationSummary,
    cross_validate,
)
from moleblend_ray.orchestration.downstream.finetune import finetune
from moleblend_ray.orchestration.downstream.refit import refit
from moleblend_ray.orchestration.library.predict import predict

pytestmark = pytest.mark.ray

RINGS = ("c1ccccc1", "c1ccncc1", "C1CCCCC1", "C1CCNCC1", "c1ccsc1", "c1ccoc1", "C1CCOCC1")
TINY = ModelConfig(num_layers=1, dim=16, ffn_dim=16, num_heads=2, num_kernels=4, pair_dim=2)
NUM_MOLECULES = 63
FOLDS = 3


def config_for(folder: Path) -> FinetuneConfig:
    return FinetuneConfig(
        task=TaskConfig(
            name="size",
            source=str(folder / "molecules.csv"),
            columns=("size",),
            kind=TaskKind.REGRESSION,
            split=SplitKind.RANDOM,
            conformers=0,
            folds=FOLDS,
        ),
        out=str(folder / "out"),
        model=TINY,
        finetune=FinetuneSettings(micro_batch_size=64, epochs=2, learning_rate=1e-2),
        baseline=BaselineConfig(kinds=(BaselineKind.DESCRIPTORS,)),
        cluster=ClusterConfig(num_workers=2),
    )


@pytest.fixture(scope="module")
def config(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    folder = tmp_path_factory.mktemp("folds")
    molecules = [(f"{'C' * length}{ring}", length) for length in range(1, 10) for ring in RINGS]
    rows = [f"{text},{size},pair {row // 2}" for row, (text, size) in enumerate(molecules)]
    (folder / "molecules.csv").write_text("\n".join(["smiles,size,pair", *rows]) + "\n")
    return config_for(folder)


@pytest.fixture(scope="module")
def summary(config: FinetuneConfig) -> CrossValidationSummary:
    return cross_validate(config)


def files_of(out: str) -> dict[str, int]:
    """Every file but those of leases -> when it was written."""
    return {
        str(path): path.stat().st_mtime_ns
        for path in Path(out).rglob("*")
        if path.is_file() and "leases" not in path.parts
    }


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(one) for name, one in value.items() if name != "seconds"}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def test_scores_are_means_of_folds_that_test_each_molecule_once(
    config: FinetuneConfig, summary: CrossValidationSummary
) -> None:
    results = storage.read_json(summary.results)
    own = [
        storage.read_json(f"{config.out}/folds/fold-{fold}/results.json") for fold in range(FOLDS)
    ]
    tests = [one["final"]["test"]["mean"] for one in own]
    assert summary.fold_scores == tuple(tests) == tuple(results["final"]["test"]["values"])
    assert summary.test_score == pytest.approx(np.mean(tests))
    assert summary.test_std == pytest.approx(np.std(tests, ddof=1))
    assert summary.test_interval is not None
    assert summary.test_interval[0] < summary.test_score < summary.test_interval[1]
    (baseline,) = results["baselines"]
    assert baseline["test"]["values"] == [one["baselines"][0]["test"]["mean"] for one in own]
    low, high = baseline["model_is_better_by"]
    assert low < baseline["test"]["mean"] - summary.test_score < high
    table = pq.read_table(f"{config.out}/out_of_fold.parquet")
    assert len(set(table["smiles"].to_pylist())) == table.num_rows == NUM_MOLECULES
    labels, predictions = (table[f"{kind}:size"].to_numpy() for kind in ("label", "prediction"))
    for fold, score in enumerate(tests):
        rows = table["fold"].to_numpy() == fold
        errors = (labels - predictions)[rows]
        assert np.sqrt((errors**2).mean()) == pytest.approx(score)
    report = Path(summary.report).read_text()
    assert (
        f"mean over {FOLDS} folds. Each of the {NUM_MOLECULES} molecules was tested once" in report
    )
    assert "[2](folds/fold-2/report.md)" in report


def test_a_fold_is_what_a_command_for_it_alone_makes(
    config: FinetuneConfig, summary: CrossValidationSummary, tmp_path: Path
) -> None:
    alone = dataclasses.replace(
        config, task=dataclasses.replace(config.task, fold=1), out=str(tmp_path / "alone")
    )
    finetune(alone)
    there, here = (
        storage.read_json(f"{folder}/results.json")
        for folder in (f"{config.out}/folds/fold-1", alone.out)
    )
    for part in ("final", "baselines", "resampling"):
        assert without_times(there[part]) == without_times(here[part])
    assert there["data"]["split"] == here["data"]["split"]
    weights = [
        Path(folder, "models/seed-0/model.safetensors").read_bytes()
        for folder in (f"{config.out}/folds/fold-1", alone.out)
    ]
    assert weights[0] == weights[1]


def test_a_repeated_command_does_nothing_and_a_lost_fold_is_trained_as_before(
    config: FinetuneConfig, summary: CrossValidationSummary
) -> None:
    before = files_of(config.out)
    assert cross_validate(config).already_finished
    assert files_of(config.out) == before
    results = storage.read_json(summary.results)
    lost = [f"{config.out}/{name}" for name in ("results.json", "folds/fold-2/results.json")]
    lost += [
        path for path in before if "/folds/fold-2/models/" in path or path.endswith("report.md")
    ]
    for path in lost:
        Path(path).unlink(missing_ok=True)
    assert not cross_validate(config).already_finished
    assert without_times(storage.read_json(summary.results)) == without_times(results)
    after = files_of(config.out)
    kept = [path for path in before if "/folds/fold-0/" in path or "/folds/fold-1/" in path]
    assert {path: after[path] for path in kept if path not in lost} == {
        path: before[path] for path in kept if path not in lost
    }


def test_all_models_predict_together_with_intervals_from_all_molecules(
    config: FinetuneConfig, summary: CrossValidationSummary, tmp_path: Path
) -> None:
    (tmp_path / "new.csv").write_text("smiles\nCCCCCc1ccccc1\nCCO\n")
    out = str(tmp_path / "predictions")
    predict(
        PredictConfig(
            models=config.out,
            source=str(tmp_path / "new.csv"),
            out=out,
            csv=True,
            cluster=ClusterConfig(num_data_actors=1),
        )
    )
    told = json.loads(Path(out, "predictions.json").read_text())
    assert len(told["models"]) == FOLDS
    results = storage.read_json(summary.results)
    column = results["final"]["intervals"]["columns"]["size"]
    assert column["valid_labels"] == column["test_labels"] == NUM_MOLECULES
    assert told["half_widths"] == {"size": column["half_width"]}


def test_a_refit_trains_on_all_molecules_for_the_median_of_the_best_epochs(
    config: FinetuneConfig, summary: CrossValidationSummary, tmp_path: Path
) -> None:
    results = storage.read_json(summary.results)
    wanted = RefitConfig(results=config.out, out=str(tmp_path / "final"), cluster=config.cluster)
    before = files_of(config.out)
    found = refit(wanted)
    assert files_of(config.out) == before
    best = [seed["best_epoch"] for seed in results["final"]["seeds"]]
    assert found.epochs == (statistics.median_high(best),)
    assert (found.molecules, found.models) == (NUM_MOLECULES, 1)
    made = files_of(found.out)
    assert refit(wanted).already_finished
    assert files_of(found.out) == made

    (tmp_path / "new.csv").write_text("smiles\nCCCCCc1ccccc1\nCCO\n")
    library = PredictConfig(
        models=found.out,
        source=str(tmp_path / "new.csv"),
        out=str(tmp_path / "predictions"),
        cluster=ClusterConfig(num_data_actors=1),
    )
    predict(library)
    told = json.loads(Path(library.out, "predictions.json").read_text())
    (model,) = told["models"]
    smiles = pq.read_table(f"{config.out}/out_of_fold.parquet")["smiles"].to_pylist()
    everything = ApplicabilityDomain.of(smiles).fingerprints
    assert model["training_fingerprints"] == len(everything)
    column = results["final"]["intervals"]["columns"]["size"]
    assert told["half_widths"] == {"size": column["half_width"]}

    # What an interrupted command lacks is made again, the same; a single split has been tested in each fold.
    weights = Path(found.out, "models/seed-0/model.safetensors").read_bytes()
    shutil.rmtree(Path(found.out, "models/seed-0"))
    Path(found.out, "refit.json").unlink()
    assert not refit(wanted).already_finished
    assert Path(found.out, "models/seed-0/model.safetensors").read_bytes() == weights
    of_fold = refit(
        dataclasses.replace(
            wanted, results=f"{config.out}/folds/fold-1", out=str(tmp_path / "of-fold")
        )
    )
    assert of_fold.epochs == (best[1],)
    assert not Path(config.out, "folds/fold-1/data").exists()
    with pytest.raises(ConfigError, match=r"final holds results of other settings.*results: "):
        refit(dataclasses.replace(wanted, results=f"{config.out}/folds/fold-1"))


def test_it_stands_in_a_leaderboard_as_one_row(
    config: FinetuneConfig, summary: CrossValidationSummary
) -> None:
    (row,) = read_leaderboard(config.out).rows
    assert row.score_of("MoleBLEND, from scratch") is not None
    assert row.models[0].test.mean == summary.test_score
    assert (row.molecules, row.test_molecules) == (NUM_MOLECULES, NUM_MOLECULES)
    assert row.split == f"random, {FOLDS} folds"


def test_folds_are_not_changed_in_an_out_with_results(
    config: FinetuneConfig, summary: CrossValidationSummary
) -> None:
    other = dataclasses.replace(config, task=dataclasses.replace(config.task, folds=4))
    with pytest.raises(ConfigError, match=r"differ in task\.folds: 3 there, 4 here"):
        cross_validate(other)
    with pytest.raises(ConfigError, match=r"task\.folds=3 asks for a cross-validation"):
        finetune(config)


def test_a_further_seed_is_trained_in_every_fold_and_a_sweep_searches_in_each(
    config: FinetuneConfig, summary: CrossValidationSummary, tmp_path: Path
) -> None:
    before = files_of(config.out)
    final = RefitConfig(results=config.out, out=str(tmp_path / "final"), cluster=config.cluster)
    refit(final)
    of_all = files_of(final.out)
    more = cross_validate(dataclasses.replace(config, seeds=(0, 1)))
    results = storage.read_json(more.results)
    assert [(seed["fold"], seed["seed"]) for seed in results["final"]["seeds"]] == [
        (fold, seed) for fold in range(FOLDS) for seed in (0, 1)
    ]
    first = [path for path in before if "/models/seed-0/" in path]
    after = files_of(config.out)
    assert first
    assert all(after[path] == before[path] for path in first)
    assert refit(final).models == 2
    first = [path for path in of_all if "/models/seed-0/" in path]
    after = files_of(final.out)
    assert first
    assert all(after[path] == of_all[path] for path in first)

    by_pair = dataclasses.replace(config.task, split=SplitKind.GROUP, split_column="pair")
    search = SweepConfig(
        task=by_pair,
        out=str(tmp_path / "sweep"),
        model=TINY,
        finetune=config.finetune,
        search=SearchSpace(
            learning_rate=(1e-4, 1e-2), batch_size=(16,), epochs=(1, 1), scheduler="none"
        ),
        num_trials=2,
        final_seeds=(0,),
        baseline=BaselineConfig(kinds=()),
        cluster=config.cluster,
    )
    nested = storage.read_json(cross_validate(search).results)
    with pytest.raises(ConfigError, match="each fold of the cross-validation chose settings"):
        refit(dataclasses.replace(final, results=search.out))
    assert [fold["trials"] for fold in nested["folds"]] == [2] * FOLDS
    for fold in nested["folds"]:
        own = storage.read_json(f"{search.out}/{fold['results']}/results.json")
        best = min(own["trials"], key=lambda trial: trial["valid_score"])
        assert fold["chosen"]["learning_rate"] == best["settings"]["learning_rate"]
        assert own["resampling"]["of"] == "groups"
    assert (nested["resampling"]["of"], nested["resampling"]["units"]) == ("groups", 32)
    table = pq.read_table(f"{search.out}/out_of_fold.parquet")
    pairs = np.array([int(name.rpartition("_")[2]) // 2 for name in table["mol_id"].to_pylist()])
    assert len(set(zip(pairs.tolist(), table["fold"].to_pylist(), strict=True))) == 32
    folds = [Fold.read(search.out, fold) for fold in range(FOLDS)]
    drawn = combine_folds(search.out, folds, pairs).entries["final"]["test_interval"]
    assert nested["final"]["test_interval"] == list(drawn)
