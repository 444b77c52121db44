"""Models are asked together only if they answer the same question, and what they say is put together as by hand."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moleblend_ray.data.files import storage
from moleblend_ray.errors import CheckpointError, ConfigError
from moleblend_ray.evaluation.models.property_model import (
    Standardisation,
    TrainedProperty,
    load_property_model,
    save_property_model,
)
from moleblend_ray.evaluation.molecules.applicability import ApplicabilityDomain, save_domain
from moleblend_ray.evaluation.prediction.encoders import load_encoder
from moleblend_ray.evaluation.prediction.ensemble import (
    combine,
    conformers_of,
    load_members,
    model_folders,
)
from moleblend_ray.evaluation.results.results import SeedResult, seeds_entry
from moleblend_ray.evaluation.results.runs import model_path
from moleblend_ray.evaluation.tasks import TaskKind
from moleblend_ray.model.config import ModelConfig, ReadoutConfig
from moleblend_ray.model.hub import save_pretrained
from moleblend_ray.model.moleblend import MoleBlendModel, PropertyModel

TINY = ModelConfig(num_layers=1, dim=16, ffn_dim=16, num_heads=2, num_kernels=4, pair_dim=2)
SOLUBILITY = TrainedProperty(
    task="esol",
    kind=TaskKind.REGRESSION,
    columns=("y",),
    unit="log10(mol/L)",
    standardisation=Standardisation(mean=np.array([-3.0]), std=np.array([2.0])),
)


def save_model(folder: Path, seed: int, trained: TrainedProperty = SOLUBILITY) -> str:
    torch.manual_seed(seed)
    model = PropertyModel(MoleBlendModel(TINY), len(trained.columns))
    save_property_model(model, trained, str(folder))
    save_domain(ApplicabilityDomain.of(["CCO", "CCN", "CCC"]), str(folder))
    return str(folder)


def test_means_and_spreads_are_those_of_each_molecule_by_itself() -> None:
    views = np.array([1, 4, 2, 3, 1])
    values = np.random.default_rng(0).normal(size=(3, views.sum(), 2))
    found = combine(values, views)
    for molecule, rows in enumerate(np.split(np.arange(views.sum()), np.cumsum(views)[:-1])):
        own = values[:, rows]
        np.testing.assert_allclose(found.mean[molecule], own.mean(axis=(0, 1)))
        np.testing.assert_allclose(found.std[molecule], np.std(own.mean(axis=1), axis=0, ddof=1))
        if len(rows) > 1:
            spread = np.std(own.mean(axis=0), axis=0, ddof=1)
            np.testing.assert_allclose(found.conformer_std[molecule], spread)
    np.testing.assert_array_equal(np.isnan(found.conformer_std).all(axis=1), views == 1)


def test_one_model_has_no_spread_over_models() -> None:
    values = np.arange(6.0).reshape(1, 6, 1)
    found = combine(values, np.array([3, 3]))
    assert found.mean.tolist() == [[1.0], [4.0]]
    assert found.conformer_std.tolist() == [[1.0], [1.0]]
    assert np.isnan(found.std).all()


def test_a_finished_fine_tuning_stands_for_the_models_of_all_its_seeds(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    seeds = [save_model(out / f"models/seed-{seed}", seed) for seed in (0, 7)]
    save_model(out / "models/seed-9", 9)  # of other settings, left by an interrupted sweep
    single = save_model(tmp_path / "single", 3)
    with pytest.raises(CheckpointError, match=r"sweep is neither.*finished"):
        model_folders([str(out)])
    results = [
        SeedResult(
            seed=seed,
            valid_score=0.5,
            test_score=0.5,
            test_columns={"y": 0.5},
            columns_left_out=(),
            epochs=1,
            best_epoch=1,
            seconds=1.0,
            model=model_path(seed),
        )
        for seed in (0, 7)
    ]
    storage.write_json(str(out / "results.json"), {"final": seeds_entry("a model", results)})
    assert model_folders([single, str(out)]) == (single, *seeds)
    # As when only some of them were copied.
    (out / "models/seed-7/property.json").unlink()
    with pytest.raises(CheckpointError, match=r"names 2 models, but \S+/models/seed-7 holds none"):
        model_folders([str(out)])


def test_the_folder_of_several_tasks_is_answered_by_those_that_have_models(tmp_path: Path) -> None:
    out = tmp_path / "many"
    rows = [
        {"name": name, "status": "waiting", "reason": "", "results": ""}
        for name in ("esol", "bbbp")
    ]
    storage.write_json(str(out / "leaderboard.json"), {"tasks": rows})
    asks: list[Callable[[str], object]] = [lambda uri: model_folders([uri]), load_encoder]
    for ask in asks:
        with pytest.raises(CheckpointError, match=r"several tasks.*none of them is finished"):
            ask(str(out))
    spread = {"mean": 1.0, "std": 0.0, "values": [1.0]}
    results = {
        "task": {"name": "esol", "metric": "rmse", "higher_is_better": False, "unit": ""},
        "data": {"molecules": 9, "split": {"kind": "random", "hash": "0"}},
        "final": {"name": "a model", "valid": spread, "test": spread},
    }
    storage.write_json(str(out / "esol/results.json"), results)
    with pytest.raises(CheckpointError, match=r"name one of them: \S+/many/esol$"):
        load_encoder(str(out))
    # The models of all tasks that are finished predict together.
    results["final"] |= {"seeds": [{"model": "models/seed-0"}]}  # type: ignore[operator]
    storage.write_json(str(out / "esol/results.json"), results)
    model = save_model(out / "esol/models/seed-0", 0)
    assert model_folders([str(out)]) == (model,)


def test_a_run_that_has_a_leaderboard_of_its_fine_tunings_is_still_a_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MoleBlendModel(TINY)
    save_pretrained(model, str(tmp_path))
    storage.write_json(str(tmp_path / "leaderboard.json"), {"tasks": []})
    assert load_encoder(str(tmp_path)).start.model == TINY


@pytest.mark.parametrize(
    "changes",
    [
        {"columns": ("z",)},
        {"unit": "g/L"},
        {"kind": TaskKind.CLASSIFICATION},
    ],
)
def test_models_of_one_task_with_two_questions_are_refused_naming_both(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    first = save_model(tmp_path / "first", 0)
    second = save_model(tmp_path / "second", 1, dataclasses.replace(SOLUBILITY, **changes))
    (name,) = changes
    with pytest.raises(ConfigError, match=rf"{first} and {second} .* different .*: {name}"):
        load_members([first, second])
    # Of two tasks they may be.
    other = dataclasses.replace(SOLUBILITY, task="logp", **changes)
    assert len(load_members([first, save_model(tmp_path / "third", 1, other)])) == 2


def test_models_may_differ_in_what_their_labels_were_standardised_by(tmp_path: Path) -> None:
    other = dataclasses.replace(
        SOLUBILITY, standardisation=Standardisation(mean=np.array([0.0]), std=np.array([1.0]))
    )
    members = load_members([save_model(tmp_path / "a", 0), save_model(tmp_path / "b", 0, other)])
    assert members[0].fingerprint != members[1].fingerprint


def test_models_are_asked_with_as_many_conformers_as_they_were_scored_with(tmp_path: Path) -> None:
    flat, single, several = (
        save_model(tmp_path / name, seed, dataclasses.replace(SOLUBILITY, conformers=seed))
        for seed, name in enumerate(("flat", "single", "several"))
    )
    assert conformers_of(load_members([flat])) == 0
    assert conformers_of(load_members([single, several])) == 2
    with pytest.raises(ConfigError, match=r"conformers: .*flat was .* without .*several with"):
        conformers_of(load_members([single, flat, several]))
    # What sees no coordinates does not mind them.
    blind = PropertyModel(MoleBlendModel(TINY), 1, ReadoutConfig(relations="2d"))
    save_property_model(blind, SOLUBILITY, str(tmp_path / "blind"))
    assert conformers_of(load_members([str(tmp_path / "blind")])) == 0
    assert conformers_of(load_members([str(tmp_path / "blind"), flat])) == 0
    assert conformers_of(load_members([str(tmp_path / "blind"), single])) == 1


def test_a_model_from_before_conformers_were_stored_had_one(tmp_path: Path) -> None:
    uri = save_model(tmp_path, 0, dataclasses.replace(SOLUBILITY, conformers=0))
    document = storage.read_json(f"{uri}/property.json")
    assert document.pop("conformers") == 0
    storage.write_json(f"{uri}/property.json", document)
    assert conformers_of(load_members([uri])) == 1


def test_a_model_given_twice_is_refused(tmp_path: Path) -> None:
    model, copy = save_model(tmp_path / "a", 0), save_model(tmp_path / "b", 0)
    with pytest.raises(ConfigError, match="are the same model"):
        load_members([model, copy])


def test_a_head_trained_anew_on_the_same_encoder_is_another_model(tmp_path: Path) -> None:
    uri = save_model(tmp_path, 0)
    (before,) = load_members([uri])
    saved = load_property_model(uri)
    with torch.no_grad():
        next(saved.model.head.parameters()).add_(1.0)
    save_property_model(saved.model, saved.trained, uri)
    (after,) = load_members([uri])
    assert after.fingerprint != before.fingerprint


def test_models_that_do_not_tell_their_training_molecules_are_named_in_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uris = [save_model(tmp_path / name, seed) for seed, name in enumerate("abc")]
    for name in "bc":
        (tmp_path / name / "training_fingerprints.npz").unlink()
    with caplog.at_level(logging.WARNING):
        members = load_members(uris)
    assert [member.domain is None for member in members] == [False, True, True]
    (record,) = caplog.records
    assert f"{uris[1]}, {uris[2]} do not tell" in record.getMessage()
