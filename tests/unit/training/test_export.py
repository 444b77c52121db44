"""What ``checkpoint=URI`` may name."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
import toy

from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.files import storage
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
    # As of a fine-tuned model.
    for name in ("model.safetensors", "property.json"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"fine-tuned model, .* PropertyPredictor"):
        load_model(str(tmp_path))


@dataclass(frozen=True)
class RunningRun:
    """A copy of a run whose newest checkpoint is not yet there."""

    uri: str
    newer: Path

    def go_on(self) -> None:
        """Commit the newest checkpoint and delete the one before, if that was not done yet."""
        if self.newer.exists():
            shutil.move(self.newer, step_uri(self.uri, 4))
            delete_checkpoint(self.uri, 2)


@pytest.fixture
def running(run: tuple[str, Learner], tmp_path: Path) -> RunningRun:
    copy = RunningRun(str(tmp_path / "copy"), tmp_path / "newer")
    shutil.copytree(run[0], copy.uri)
    shutil.move(step_uri(copy.uri, 4), copy.newer)
    return copy


def test_a_checkpoint_that_a_running_command_deletes_while_it_is_read_gives_way_to_a_newer_one(
    run: tuple[str, Learner], running: RunningRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = storage.download

    def late_download(source: str, target: str | Path) -> None:
        running.go_on()
        download(source, target)

    monkeypatch.setattr(checkpoint, "TRANSFER_THREADS", 1)
    monkeypatch.setattr(storage, "download", late_download)
    assert_same_weights(load_model(running.uri), run[1].model)
    assert not running.newer.exists()


def test_a_checkpoint_that_is_deleted_while_it_is_checked_is_not_called_damaged(
    run: tuple[str, Learner],
    running: RunningRun,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    size = storage.size

    def late_size(source: str) -> int:
        running.go_on()
        return size(source)

    monkeypatch.setattr(commits, "_CHECK_THREADS", 1)
    monkeypatch.setattr(storage, "size", late_size)
    assert_same_weights(load_model(running.uri), run[1].model)
    assert not running.newer.exists()
    assert "damaged" not in caplog.text
