"""What makes a pretraining run another one, and what does not."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.data.dataset.manifest import Manifest
from moleblend_ray.data.files import storage
from moleblend_ray.errors import CheckpointError, ConfigError, DataError
from moleblend_ray.model.config import BlendConfig, LossConfig, ModelConfig
from moleblend_ray.orchestration.pretraining.run_folder import (
    _require_coordinates,
    _require_descriptors,
    _require_same_run,
    _require_validation,
    _tell_untrained_heads,
    open_run,
    run_identity,
)
from moleblend_ray.training.config import CheckpointConfig, TrainConfig

CONFIG = PretrainConfig(data="data", out="run")


def identity(**changes: Any) -> dict[str, Any]:
    manifest = SimpleNamespace(fingerprint="aaa", featurizer_version=1, options={})
    return run_identity(dataclasses.replace(CONFIG, **changes), cast("Manifest", manifest))


def counts(rows_out: int, with_coordinates: int) -> Manifest:
    found = SimpleNamespace(rows_out=rows_out, with_coordinates=with_coordinates)
    return cast("Manifest", SimpleNamespace(counts=found))


def whole() -> Manifest:
    """Of nine molecules, all with coordinates."""
    found = SimpleNamespace(
        fingerprint="aaa",
        featurizer_version=1,
        options={},
        counts=counts(9, 9).counts,
        num_molecules=lambda split: 9,
    )
    return cast("Manifest", found)


def test_a_run_without_any_coordinates_must_be_asked_for() -> None:
    with pytest.raises(
        DataError,
        match=r"none of the 9 molecules of data has coordinates.*generate=true.*loss\.denoise_weight=0",
    ):
        _require_coordinates(CONFIG, counts(9, 0))
    flat = LossConfig(denoise_weight=0.0, direction_weight=0.0)
    _require_coordinates(dataclasses.replace(CONFIG, loss=flat), counts(9, 0))


def test_few_coordinates_are_told_and_most_are_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _require_coordinates(CONFIG, counts(10, 6))
        assert caplog.messages == []
        _require_coordinates(CONFIG, counts(10, 4))
    assert caplog.messages[0].startswith("6 of 10 molecules of data have no coordinates")


def test_descriptors_to_predict_must_be_in_the_data() -> None:
    bare = cast("Manifest", SimpleNamespace(descriptors=None))
    _require_descriptors(CONFIG, bare)
    described = dataclasses.replace(CONFIG, model=ModelConfig(descriptor_head=True))
    with pytest.raises(DataError, match=r"data has no descriptors.*featurize\.descriptors=true"):
        _require_descriptors(described, bare)
    _require_descriptors(described, cast("Manifest", SimpleNamespace(descriptors=object())))


def test_heads_that_learn_nothing_are_named(caplog: pytest.LogCaptureFixture) -> None:
    _tell_untrained_heads(CONFIG)
    model = ModelConfig(distance_head=True, environment_bins=8)
    trained = LossConfig(distance_weight=0.1)
    _tell_untrained_heads(dataclasses.replace(CONFIG, model=model, loss=trained))
    (record,) = caplog.records
    assert "model.environment_bins is set, but loss.environment_weight is 0" in record.message


def test_a_run_without_validations_says_so_and_keeps_no_best(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bare = cast("Manifest", SimpleNamespace(num_molecules=lambda split: 0))
    _require_validation(CONFIG, bare)
    assert "data has no molecules for validation" in caplog.text
    best = dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(keep_best=2))
    _require_validation(best, whole())
    with pytest.raises(DataError, match=r"no molecules for validation.*checkpoint\.keep_best=0$"):
        _require_validation(best, bare)
    with pytest.raises(
        ConfigError, match=r"keep_best: expected 0 while train\.validate_every is 0"
    ):
        dataclasses.replace(best, train=TrainConfig(validate_every=0))
    caplog.clear()
    _require_validation(dataclasses.replace(CONFIG, train=TrainConfig(validate_every=0)), bare)
    assert not caplog.records


def test_the_form_of_the_molecules_is_known_and_that_of_earlier_runs_is_not_compared() -> None:
    def of(**featurize: object) -> dict[str, Any]:
        options = {"featurize": featurize}
        manifest = SimpleNamespace(fingerprint="aaa", featurizer_version=1, options=options)
        return run_identity(CONFIG, cast("Manifest", manifest))

    found = of(explicit_hydrogens=True, max_atoms=9)
    assert found["molecules"]["explicit_hydrogens"] is True
    earlier = {name: value for name, value in found.items() if name != "molecules"}
    _require_same_run(earlier, found, "run")
    # As of a version that knew less of the form.
    before, ordered = of(canonical_order=True), of(canonical_order=True)
    assert before["molecules"].pop("canonical_order") is True
    _require_same_run(before, ordered, "run")
    with pytest.raises(CheckpointError, match=r"molecules\.explicit_hydrogens: .* asks for True"):
        _require_same_run(before, found, "run")
    with pytest.raises(CheckpointError, match=r"molecules\.canonical_order: .* asks for False"):
        _require_same_run(ordered, of(), "run")


def test_where_a_run_is_computed_may_change() -> None:
    _require_same_run(identity(), identity(cluster=ClusterConfig(num_workers=4)), "run")


def test_runs_from_before_a_choice_existed_are_those_without_it() -> None:
    before = identity()
    assert "view_probabilities" not in before["blend"]
    assert {"environment_bins", "descriptor_head"}.isdisjoint(before["model"])
    blended = BlendConfig(view_probabilities=(1.0, 0.0, 0.0, 0.0))
    _require_same_run(before, identity(blend=blended), "run")
    blend = identity(blend=BlendConfig(view_probabilities=(0.0, 0.0, 0.0, 1.0)))
    model = identity(model=ModelConfig(environment_bins=512))
    described = identity(model=ModelConfig(descriptor_head=True))
    usual, shown = r"\[1\.0, 0\.0, 0\.0, 0\.0\]", r"\[0\.0, 0\.0, 0\.0, 1\.0\]"
    for one, other, told in (
        (before, blend, rf"blend\.view_probabilities: the run has {usual}, .* asks for {shown}"),
        (blend, before, rf"blend\.view_probabilities: the run has {shown}, .* asks for {usual}"),
        (before, model, r"model\.environment_bins: the run has 0, .* asks for 512"),
        (model, before, r"model\.environment_bins: the run has 512, .* asks for 0"),
        (before, described, r"model\.descriptor_head: the run has False, .* asks for True"),
    ):
        with pytest.raises(CheckpointError, match=told):
            _require_same_run(one, other, "run")


@pytest.mark.parametrize("job", ["finetune", "sweep", "embed", "predict"])
def test_results_of_another_command_are_told_by_its_name_and_stay_as_they_are(
    tmp_path: Path, job: str
) -> None:
    uri = str(tmp_path / "config.json")
    document = {"config": {"job": f"{job.title()}Config"}, "data_fingerprint": "aaa"}
    storage.write_json(uri, document)
    with pytest.raises(
        ConfigError,
        match=rf"holds results of `moleblend {job}`\. Give another `out` for `moleblend pretrain`$",
    ):
        open_run(dataclasses.replace(CONFIG, out=str(tmp_path)), whole())
    assert storage.read_json(uri) == document


@pytest.mark.parametrize("content", ['{"config": {"order": {}}}', "{}", "[]", '{"conf'])
def test_a_run_that_committed_nothing_starts_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert open_run(dataclasses.replace(CONFIG, out=str(tmp_path)), whole()) is None
    stored = storage.read_json(str(tmp_path / "config.json"))
    assert stored["config"]["data"] == "data"
