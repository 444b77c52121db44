"""A fine-tuning stands beside baselines of the same split and seeds, and continues among them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.downstream import BaselineConfig, FinetuneConfig, SweepConfig, TaskConfig
from moleblend_ray.data.files import storage
from moleblend_ray.errors import TrainingError
from moleblend_ray.evaluation.models.baselines import BaselineKind
from moleblend_ray.evaluation.models.property_model import load_property_model
from moleblend_ray.evaluation.results.results import Training
from moleblend_ray.evaluation.search import SearchSpace
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import SplitKind, TaskKind
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.hub import save_pretrained
from moleblend_ray.model.moleblend import MoleBlendModel
from moleblend_ray.orchestration.downstream.baselines import run_baselines
from moleblend_ray.orchestration.downstream.downstream import (
    Bench,
    LostWorkError,
    read_inputs,
    set_up,
)
from moleblend_ray.orchestration.downstream.finetune import finetune
from moleblend_ray.orchestration.downstream.sweep import sweep

pytestmark = pytest.mark.ray

TINY = ModelConfig(num_layers=1, dim=16, ffn_dim=16, num_heads=2, num_kernels=4, pair_dim=2)
# Boosting goes the way of the forest; each process more costs seconds.
KINDS = (BaselineKind.FOREST, BaselineKind.DESCRIPTORS, BaselineKind.SCRATCH)
TAILS = ("c1ccccc1", "c1ccncc1", "C1CCCCC1", "C1CCNCC1", "O", "N")


def config_for(folder: Path) -> FinetuneConfig:
    return FinetuneConfig(
        task=TaskConfig(
            name="size",
            source=str(folder / "molecules.csv"),
            columns=("size",),
            kind=TaskKind.REGRESSION,
            split=SplitKind.RANDOM,
            conformers=0,
        ),
        checkpoint=str(folder / "model"),
        out=str(folder / "out"),
        finetune=FinetuneSettings(epochs=1, frozen_blocks=1),
        seeds=(3, 5),
        baseline=BaselineConfig(kinds=KINDS, num_trees=5),
        # Two tasks at a time on the tests' cluster of 8: a process takes seconds to start.
        cluster=ClusterConfig(num_workers=2, cpus_per_worker=3),
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    folder = tmp_path_factory.mktemp("baselines")
    rows = [f"{'C' * length}{tail},{length}" for length in range(1, 9) for tail in TAILS]
    (folder / "molecules.csv").write_text("\n".join(["smiles,size", *rows]) + "\n")
    torch.manual_seed(99)  # no seed of a training: its weights from scratch would be these
    save_pretrained(MoleBlendModel(TINY), str(folder / "model"))
    return config_for(folder)


@pytest.fixture(scope="module")
def results(ray_cluster: None, config: FinetuneConfig) -> dict[str, Any]:
    summary = finetune(config)
    assert storage.read_bytes(summary.report).startswith(b"# ")
    found: dict[str, Any] = storage.read_json(summary.results)
    assert summary.baselines == {
        entry["name"]: entry["test"]["mean"] for entry in found["baselines"]
    }
    return found


def test_every_baseline_has_a_score_of_every_seed(
    config: FinetuneConfig, results: dict[str, Any]
) -> None:
    assert [entry["kind"] for entry in results["baselines"]] == list(KINDS)
    assert results["baselines_absent"] == {}
    for entry in results["baselines"]:
        assert [seed["seed"] for seed in entry["seeds"]] == list(config.seeds)
        if entry["kind"] == "descriptors":
            assert entry["test"]["std"] == 0.0


def test_the_encoder_from_scratch_is_the_models_but_for_its_weights(
    config: FinetuneConfig, results: dict[str, Any]
) -> None:
    scratch = results["baselines"][-1]
    assert scratch["test"]["values"] != results["final"]["test"]["values"]
    # Blocks without pretraining are trained.
    assert scratch["chosen"] == {**results["chosen"], "frozen_blocks": None}
    assert [seed["epochs"] for seed in scratch["seeds"]] == [1, 1]
    for seed in scratch["seeds"]:
        model = load_property_model(f"{config.out}/{seed['model']}").model
        assert model.config.dim == TINY.dim


def test_an_interrupted_command_repeats_no_finished_step(
    config: FinetuneConfig, results: dict[str, Any]
) -> None:
    out = Path(config.out)
    (out / "results.json").unlink()
    (out / "baselines/forest/seed-5.json").unlink()
    shutil.rmtree(out / "scratch/models/seed-3")
    kept = {
        path: path.stat().st_mtime_ns
        for path in (*out.glob("baselines/*/*.json"), *out.glob("scratch/models/*/result.json"))
    }
    # Four settings and a seed of the forest, the linear model's grid and seed, an encoder.
    assert len(kept) == 4 + 1 + 1 + 1 + 1
    again = storage.read_json(finetune(config).results)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert [entry["test"] for entry in again["baselines"]] == [
        entry["test"] for entry in results["baselines"]
    ]


def test_an_encoder_that_cannot_be_trained_from_scratch_is_absent_with_its_reason_but_not_if_it_was_lost(
    config: FinetuneConfig, results: dict[str, Any]
) -> None:
    bench = set_up(config, read_inputs(config))
    config = dataclasses.replace(config, baseline=BaselineConfig(kinds=(BaselineKind.SCRATCH,)))

    def diverges(config: FinetuneConfig, bench: Bench) -> Training:
        assert bench.experiment.start.encoder is None
        raise TrainingError("step 3: loss nan")

    found = run_baselines(config, bench, config.seeds, diverges)
    assert found.results == ()
    assert found.absent == {BaselineKind.SCRATCH: "step 3: loss nan"}

    def lost(config: FinetuneConfig, bench: Bench) -> Training:
        raise LostWorkError("a node went")

    with pytest.raises(LostWorkError, match="a node went"):
        run_baselines(config, bench, config.seeds, lost)


def test_a_sweep_searches_for_the_encoder_from_scratch_as_for_the_model(
    config: FinetuneConfig, results: dict[str, Any]
) -> None:
    del results  # the files are there then
    sweep_config = SweepConfig(
        task=dataclasses.replace(config.task, source=f"{config.out}/data"),
        checkpoint=config.checkpoint,
        out=f"{config.out}-sweep",
        search=SearchSpace(epochs=(1, 1), batch_size=(16,)),
        num_trials=2,
        grace_epochs=1,
        final_seeds=(0,),
        baseline=BaselineConfig(kinds=(BaselineKind.SCRATCH,)),
        cluster=config.cluster,
    )
    found = storage.read_json(sweep(sweep_config).results)
    (scratch,) = found["baselines"]
    assert len(scratch["candidates"]) == len(found["trials"]) == 2
    # The same draws, judged anew, on weights that are new.
    for candidate, trial in zip(scratch["candidates"], found["trials"], strict=True):
        assert candidate["settings"] == trial["settings"]
        assert candidate["valid_score"] != trial["valid_score"]
    best = min(scratch["candidates"], key=lambda candidate: candidate["valid_score"])
    assert {name: scratch["chosen"][name] for name in best["settings"]} == best["settings"]
    assert (Path(sweep_config.out) / "scratch/models/seed-0/result.json").exists()
