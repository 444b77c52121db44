"""A seed's folder is whole and of the settings asked for, or it does not count."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from moleblend_ray.chemistry.scaffolds import Split
from moleblend_ray.data.files import storage
from moleblend_ray.errors import CheckpointError, DataError
from moleblend_ray.evaluation.models.finetune import StartingPoint
from moleblend_ray.evaluation.models.property_model import is_property_model
from moleblend_ray.evaluation.molecules.applicability import ApplicabilityDomain, load_domain
from moleblend_ray.evaluation.results.runs import (
    Experiment,
    finished_seed,
    read_of_seeds,
    train_and_test,
)
from moleblend_ray.evaluation.scoring.intervals import intervals_entry, mean_of
from moleblend_ray.evaluation.scoring.stored_predictions import PREDICTIONS_NAME
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import TaskKind, resolve_task
from moleblend_ray.inference import PropertyPredictor

from ..conftest import MakeLabelled, all_smiles

SETTINGS = FinetuneSettings(epochs=1, learning_rate=3e-4)


@pytest.fixture
def experiment(make_labelled: MakeLabelled, tiny_start: StartingPoint) -> Experiment:
    smiles = all_smiles()[:20]
    rows = np.arange(20, dtype=np.int64)
    return Experiment(
        task=resolve_task("size", columns=("y0",), kind=TaskKind.REGRESSION),
        molecules=make_labelled(smiles, np.array([float(len(text)) for text in smiles])),
        split=Split(rows[:12], rows[12:16], rows[16:]),
        start=tiny_start,
    )


PARTS: tuple[Literal["valid", "test"], ...] = ("valid", "test")


def test_a_finished_seed_counts_for_its_own_settings_alone(
    experiment: Experiment, tmp_path: Path
) -> None:
    out = str(tmp_path)
    found = train_and_test(experiment, SETTINGS, 4, out, torch.device("cpu"))
    assert finished_seed(out, 4, SETTINGS) == found
    assert finished_seed(out, 4, dataclasses.replace(SETTINGS, learning_rate=1e-3)) is None
    assert finished_seed(out, 5, SETTINGS) is None


@pytest.mark.parametrize("writes", range(5))
def test_a_training_killed_while_it_replaces_a_model_leaves_none_beside_files_of_the_former(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    out, other = str(tmp_path), dataclasses.replace(SETTINGS, relations="2d")
    found = train_and_test(experiment, SETTINGS, 4, out, torch.device("cpu"))
    write, left = storage.write_bytes, iter(range(writes))

    def killed(uri: str, content: bytes) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(uri, content)

    monkeypatch.setattr(storage, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        train_and_test(experiment, other, 4, out, torch.device("cpu"))
    assert finished_seed(out, 4, SETTINGS) is finished_seed(out, 4, other) is None
    # The result is the fifth and last file. Without it, the model is whole, too.
    assert is_property_model(f"{out}/{found.model}") == (writes == 4)


def test_predictions_of_new_molecules_are_those_that_were_scored(
    experiment: Experiment, tmp_path: Path
) -> None:
    # These molecules have no coordinates, so neither may the new ones.
    result = train_and_test(experiment, SETTINGS, 0, str(tmp_path), torch.device("cpu"))
    folder = f"{tmp_path}/{result.model}"
    scored = pq.read_table(f"{folder}/predictions.parquet")
    asked = PropertyPredictor.from_pretrained(folder).predict(scored["smiles"])
    assert set(asked["conformer_status"].to_pylist()) == {"none"}
    np.testing.assert_allclose(
        asked["prediction:y0"].to_numpy(), scored["prediction:y0"].to_numpy(), rtol=1e-4
    )


def test_a_model_knows_the_fingerprints_of_its_training_part_alone(
    experiment: Experiment, tmp_path: Path
) -> None:
    found = train_and_test(experiment, SETTINGS, 4, str(tmp_path), torch.device("cpu"))
    assert found.model is not None
    domain = load_domain(str(tmp_path / found.model))
    assert domain is not None
    trained_on = [experiment.molecules.smiles[row] for row in experiment.split.train]
    assert domain.checksum == ApplicabilityDomain.of(trained_on).checksum


def test_a_training_tells_of_each_of_its_steps(experiment: Experiment, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, epochs=3, batch_size=5)
    steps: list[None] = []
    train_and_test(
        experiment,
        settings,
        0,
        str(tmp_path),
        torch.device("cpu"),
        after_step=lambda: steps.append(None),
    )
    assert len(steps) == settings.num_steps(len(experiment.split.train)) == 9


def test_intervals_of_predictions_are_those_that_the_results_judge(
    experiment: Experiment, tmp_path: Path
) -> None:
    seeds, columns, out = (0, 1), experiment.molecules.columns, str(tmp_path)
    found = [train_and_test(experiment, SETTINGS, seed, out, torch.device("cpu")) for seed in seeds]
    valid, test = (read_of_seeds(out, seeds, part, columns) for part in PARTS)
    assert [len(one.smiles) for one in (*valid, *test)] == [4, 4, 4, 4]
    mean = mean_of(test)
    entry = intervals_entry(columns, valid, mean)
    assert entry is not None
    # Of four labels nothing can be told that holds nine of ten; half of them can.
    assert entry["columns"]["y0"]["half_width"] is None
    predictor = PropertyPredictor.from_pretrained(
        [f"{tmp_path}/{one.model}" for one in found], interval=0.5
    )
    asked = predictor.predict([*mean.smiles, "not a molecule"])
    np.testing.assert_allclose(
        asked["prediction:y0"].to_numpy()[:-1], mean.predictions[:, 0], rtol=1e-4
    )
    errors = np.sort(np.abs(mean_of(valid).predictions - valid[0].labels)[:, 0])
    for name, side in (("lower", -1), ("upper", 1)):
        np.testing.assert_allclose(
            asked[f"{name}:y0"].to_numpy()[:-1],
            mean.predictions[:, 0] + side * errors[2],
            rtol=1e-4,
        )
        assert asked[f"{name}:y0"].to_pylist()[-1] is None


def test_a_folder_without_predictions_or_with_damaged_ones_says_what_to_do(
    experiment: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = train_and_test(experiment, SETTINGS, 0, str(tmp_path), torch.device("cpu"))
    file = tmp_path / str(found.model) / PREDICTIONS_NAME
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"damaged.*or delete the file to predict without"):
        PropertyPredictor.from_pretrained(file.parent)
    with pytest.raises(
        DataError, match=r"is damaged: .*\. Delete .*seed-0 and run the command"
    ) as told:
        read_of_seeds(str(tmp_path), [0], "valid", experiment.molecules.columns)
    assert "Copy the model again" not in str(told.value)
    assert ".." not in str(told.value)
    file.unlink()
    with pytest.raises(DataError, match=r"is gone\. Delete .*seed-0 and run the command"):
        read_of_seeds(str(tmp_path), [0], "valid", experiment.molecules.columns)
    table = PropertyPredictor.from_pretrained(file.parent).predict(["CCO"])
    assert table["lower:y0"].null_count == 1
    assert f"{PREDICTIONS_NAME} is absent" in caplog.text
