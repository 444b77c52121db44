"""What ``checkpoint=URI`` may name."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import toy

from moleblend_ray.data import storage
from moleblend_ray.data.molecule_form import MoleculeForm
from moleblend_ray.errors import CheckpointError
from moleblend_ray.model.moleblend import MoleBlendModel
from moleblend_ray.training import checkpoint, commits
from moleblend_ray.training.commits import (
    FINISHED_NAME,
    committed_steps,
    delete_checkpoint,
    step_uri,
)
from moleblend_ray.training.config import CheckpointConfig
from moleblend_ray.training.export import export_run, load_model
from moleblend_ray.training.learner import Learner
from moleblend_ray.training.loop import Hooks, fit
from moleblend_ray.training.ranks import Ranks
from moleblend_ray.training.saving import CheckpointWriter

HYDROGENS = MoleculeForm(explicit_hydrogens=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Learner]:
    uri = str(tmp_path_factory.mktemp("run"))
    learner = toy.learner(num_steps=4)
    writer = CheckpointWriter(
        CheckpointConfig(every_steps=2),
        uri,
        Ranks(),
        identity={
            "model": asdict(toy.MODEL),
            "data_fingerprint": "d" * 64,
            "molecules": asdict(HYDROGENS),
        },
        config_fingerprint="f",
        start_step=0,
    )
    fit(learner, toy.steps(), checkpoints=writer)
    return uri, learner


def assert_same_weights(left: MoleBlendModel, right: MoleBlendModel) -> None:
    theirs = right.state_dict()
    for name, value in left.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)


def test_an_unfinished_run_gives_its_newest_checkpoint(run: tuple[str, Learner]) -> None:
    uri, learner = run
    model = load_model(uri)
    assert not model.training
    assert_same_weights(model, learner.model)


def test_a_model_says_where_it_comes_from_wherever_it_is_stored(
    run: tuple[str, Learner], tmp_path: Path
) -> None:
    uri, _ = run
    model = load_model(step_uri(uri, 2))
    origin = model.origin
    assert origin is not None
    assert (origin.uri, origin.step, origin.data_fingerprint) == (uri, 2, "d" * 64)
    assert origin.molecules == HYDROGENS
    assert origin.versions["torch"] == torch.__version__
    model.save_pretrained(str(tmp_path / "exported"))
    copy = load_model(str(tmp_path / "exported"))
    assert copy.origin == origin
    assert_same_weights(copy, model)


def test_a_checkpoint_folder_gives_that_step(run: tuple[str, Learner]) -> None:
    uri, _ = run
    answers = iter([False, True])
    after_two = toy.learner(num_steps=4)
    fit(after_two, toy.steps(), hooks=Hooks(should_stop=lambda: next(answers)))
    assert_same_weights(load_model(step_uri(uri, 2) + "/"), after_two.model)


def test_an_export_and_a_finished_run_give_the_same_model(
    run: tuple[str, Learner], tmp_path: Path
) -> None:
    uri, learner = run
    copy = str(tmp_path / "copy")
    shutil.copytree(uri, copy)
    assert_same_weights(load_model(export_run(copy)), learner.model)
    storage.write_json(storage.join(copy, FINISHED_NAME), {})
    shutil.rmtree(storage.join(copy, "checkpoints"))
    assert_same_weights(load_model(copy), learner.model)


def test_a_damaged_newest_checkpoint_is_passed_over(
    run: tuple[str, Learner], tmp_path: Path
) -> None:
    uri, _ = run
    copy = str(tmp_path / "copy")
    shutil.copytree(uri, copy)
    newest, before = committed_steps(copy)[:2]
    shard = next(Path(step_uri(copy, newest)).glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    expected = load_model(step_uri(copy, before))
    assert_same_weights(load_model(copy), expected)
    assert_same_weights(load_model(export_run(copy)), expected)
    with pytest.raises(CheckpointError, match="another SHA-256"):
        load_model(step_uri(copy, newest))


def test_a_folder_without_a_model_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="names no model: expected a run"):
        load_model(str(tmp_path))
    with pytest.raises(CheckpointError, match="no committed checkpoint to export"):
        export_run(str(tmp_path))


def test_a_checkpoint_that_a_running_command_deletes_while_it_is_read_gives_way_to_a_newer_one(
    run: tuple[str, Learner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, learner = run
    copy = str(tmp_path / "copy")
    shutil.copytree(uri, copy)
    newer = tmp_path / "newer"
    shutil.move(step_uri(copy, 4), newer)
    download = storage.download

    def late_download(source: str, target: str | Path) -> None:
        if newer.exists():
            shutil.move(newer, step_uri(copy, 4))
            delete_checkpoint(copy, 2)
        download(source, target)

    monkeypatch.setattr(checkpoint, "TRANSFER_THREADS", 1)
    monkeypatch.setattr(storage, "download", late_download)
    assert_same_weights(load_model(copy), learner.model)
    assert not newer.exists()


def test_a_checkpoint_that_is_deleted_while_it_is_checked_is_not_called_damaged(
    run: tuple[str, Learner],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    uri, learner = run
    copy = str(tmp_path / "copy")
    shutil.copytree(uri, copy)
    newer = tmp_path / "newer"
    shutil.move(step_uri(copy, 4), newer)
    size = storage.size

    def late_size(source: str) -> int:
        if newer.exists():
            shutil.move(newer, step_uri(copy, 4))
            delete_checkpoint(copy, 2)
        return size(source)

    monkeypatch.setattr(commits, "_CHECK_THREADS", 1)
    monkeypatch.setattr(storage, "size", late_size)
    assert_same_weights(load_model(copy), learner.model)
    assert "damaged" not in caplog.text
