"""What a refit takes from results, and that its folders are whole and of the settings asked for, or do not count."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moleblend_ray.chemistry.scaffolds import Split
from moleblend_ray.data.files import storage
from moleblend_ray.errors import CheckpointError, ConfigError, DataError
from moleblend_ray.evaluation.models.finetune import StartingPoint
from moleblend_ray.evaluation.models.property_model import is_property_model
from moleblend_ray.evaluation.molecules.applicability import load_domain
from moleblend_ray.evaluation.prediction.ensemble import load_members
from moleblend_ray.evaluation.results.refit import (
    Choice,
    Everything,
    SeedFindings,
    finished_model,
    refit_and_save,
)
from moleblend_ray.evaluation.results.results import RESULTS_VERSION
from moleblend_ray.evaluation.results.runs import Experiment, train_and_test
from moleblend_ray.evaluation.scoring.intervals import Calibration
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import TaskKind, resolve_task
from moleblend_ray.settings import to_dict

from ..conftest import MakeLabelled, all_smiles

CPU = torch.device("cpu")
SETTINGS = FinetuneSettings(epochs=3, learning_rate=3e-4)


def entry(seed: int, best_epoch: int, **more: Any) -> dict[str, Any]:
    """What results say of a model."""
    path = f"models/seed-{seed}"
    return {"seed": seed, "epochs": 20, "best_epoch": best_epoch, "model": path, **more}


def results(folder: Path, *seeds: dict[str, Any], **changed: Any) -> str:
    """Finished results of these models."""
    document = {
        "config": {"seeds": [0]},
        "task": {"columns": ["y0"]},
        "data": {"fingerprint": "d" * 64},
        "checkpoint": {"fingerprint": None},
        "results_version": RESULTS_VERSION,
        "chosen": to_dict(SETTINGS),
        "final": {"seeds": list(seeds)},
        **changed,
    }
    storage.write_json(str(folder / "results.json"), document)
    return str(folder)


def test_each_seed_trains_as_long_as_was_best_for_it(tmp_path: Path) -> None:
    choice = Choice.read(results(tmp_path, entry(0, 7), entry(3, 12)))
    assert {seed: tested.epochs for seed, tested in choice.seeds.items()} == {0: 7, 3: 12}
    assert choice.seeds[3].folders == (f"{tmp_path}/models/seed-3",)
    assert (choice.settings, choice.columns) == (SETTINGS, ("y0",))
    assert choice.split_fingerprint is None
    storage.write_json(f"{tmp_path}/config.json", {"config": {}, "split_fingerprint": "s" * 64})
    assert Choice.read(str(tmp_path)).split_fingerprint == "s" * 64


def test_without_a_score_in_any_epoch_the_last_weights_were_kept(tmp_path: Path) -> None:
    assert Choice.read(results(tmp_path, entry(0, 0))).seeds[0].epochs == 20


def test_of_a_cross_validation_the_median_over_folds_counts(tmp_path: Path) -> None:
    best = {0: (4, 9, 30, 10), 1: (5, 6, 7, 8)}
    seeds = [
        entry(seed, best[seed][fold], fold=fold, model=f"folds/fold-{fold}/models/seed-{seed}")
        for fold in range(4)
        for seed in (0, 1)
    ]
    choice = Choice.read(results(tmp_path, *seeds))
    assert {seed: tested.epochs for seed, tested in choice.seeds.items()} == {0: 10, 1: 7}
    assert choice.seeds[1].folders == tuple(
        f"{tmp_path}/folds/fold-{fold}/models/seed-1" for fold in range(4)
    )


def test_what_is_no_choice_for_all_molecules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"has no results\.json; expected the `out` of a finished"
    ):
        Choice.read(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"results\.json has layout version 1, and this release"):
        Choice.read(results(tmp_path, entry(0, 3), results_version=1))
    with pytest.raises(ConfigError, match="each fold of the cross-validation chose settings"):
        Choice.read(results(tmp_path, entry(0, 3), chosen=None))
    with pytest.raises(DataError, match=r"results\.json.*'best_epoch'"):
        Choice.read(results(tmp_path, {"seed": 0, "epochs": 3, "model": "m"}))


@pytest.fixture
def experiment(make_labelled: MakeLabelled, tiny_start: StartingPoint) -> Experiment:
    smiles = all_smiles()[:40]
    rows = np.arange(40, dtype=np.int64)
    return Experiment(
        task=resolve_task("size", columns=("y0",), kind=TaskKind.REGRESSION),
        molecules=make_labelled(smiles, np.array([float(len(text)) for text in smiles])),
        split=Split(rows[:20], rows[20:32], rows[32:]),
        start=tiny_start,
    )


def everything_of(experiment: Experiment, settings: FinetuneSettings = SETTINGS) -> Everything:
    return Everything(
        task=experiment.task,
        molecules=experiment.molecules,
        chosen_on=(),
        start=experiment.start,
        settings=settings,
    )


def test_models_predict_with_the_intervals_of_the_scored_ones_and_know_all_molecules(
    experiment: Experiment, tmp_path: Path
) -> None:
    scored, out = str(tmp_path / "scored"), str(tmp_path / "out")
    columns = experiment.molecules.columns
    for seed in (0, 1):
        found = train_and_test(experiment, SETTINGS, seed, scored, CPU)
        tested = SeedFindings.of(scored, [dataclasses.asdict(found)])
        refit_and_save(
            everything_of(experiment), seed, tested.epochs, tested.validation(columns), out, CPU
        )
    of_scored, of_all = (
        load_members([f"{folder}/models/seed-{seed}" for seed in (0, 1)])
        for folder in (scored, out)
    )
    there, here = (
        Calibration.of([member.validation for member in members]) for members in (of_scored, of_all)
    )
    assert there is not None
    assert here is not None
    assert here.half_widths(0.9) == there.half_widths(0.9)
    assert len(here.errors[0]) == 12
    for member in of_all:
        assert member.domain is not None
        assert len(member.domain.fingerprints) == 40
        mean = member.saved.trained.standardisation.mean
        assert mean == pytest.approx(experiment.molecules.labels.mean(axis=0))


def test_without_predictions_of_the_scored_models_it_tells_that_there_are_no_intervals(
    experiment: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = train_and_test(experiment, SETTINGS, 0, str(tmp_path), CPU)
    folder = Path(str(tmp_path), str(found.model))
    (folder / "predictions.parquet").unlink()
    tested = SeedFindings.of(str(tmp_path), [dataclasses.asdict(found)])
    assert tested.validation(("y0",)) is None
    assert f"will stay empty: predictions.parquet is gone from {folder}" in caplog.text


@pytest.mark.parametrize("writes", range(5))
def test_a_training_killed_while_it_replaces_a_model_leaves_none_beside_files_of_the_former(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    out, scored = str(tmp_path / "out"), str(tmp_path / "scored")
    found = train_and_test(experiment, SETTINGS, 4, scored, CPU)
    validation = SeedFindings.of(scored, [dataclasses.asdict(found)]).validation(("y0",))
    model = refit_and_save(everything_of(experiment), 4, 1, validation, out, CPU)
    assert finished_model(out, 4, 1, SETTINGS) == model
    assert finished_model(out, 4, 2, SETTINGS) is None
    assert finished_model(out, 5, 1, SETTINGS) is None
    other = dataclasses.replace(SETTINGS, relations="2d")
    assert finished_model(out, 4, 1, other) is None
    write, left = storage.write_bytes, iter(range(writes))

    def killed(uri: str, content: bytes) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(uri, content)

    monkeypatch.setattr(storage, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        refit_and_save(everything_of(experiment, other), 4, 1, validation, out, CPU)
    assert finished_model(out, 4, 1, SETTINGS) is finished_model(out, 4, 1, other) is None
    # The result is the fifth and last file. Without it, the model is whole, too.
    assert is_property_model(f"{out}/{model.model}") == (writes == 4)


def test_a_changed_result_of_a_model_is_named(experiment: Experiment, tmp_path: Path) -> None:
    out = str(tmp_path)
    refit_and_save(everything_of(experiment), 0, 1, None, out, CPU)
    assert load_domain(f"{out}/models/seed-0") is not None
    uri = f"{out}/models/seed-0/result.json"
    storage.write_json(uri, {**storage.read_json(uri), "seconds": "long"})
    with pytest.raises(CheckpointError, match=r"seconds: expected float.*Delete it"):
        finished_model(out, 0, 1, SETTINGS)
