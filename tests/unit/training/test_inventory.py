"""What `moleblend checkpoints` finds: whole, damaged and incomplete checkpoints, differences, deletions."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from moleblend_ray.cli import EXIT_CONFIG, EXIT_ERROR, main
from moleblend_ray.errors import CheckpointError
from moleblend_ray.orchestration.progress.terminal import json_text
from moleblend_ray.training.checkpoint import training_state
from moleblend_ray.training.commits import COMMIT_NAME, committed_steps, step_uri
from moleblend_ray.training.config import CheckpointConfig
from moleblend_ray.training.inventory import compare_checkpoints, take_inventory
from moleblend_ray.training.loop import fit
from moleblend_ray.training.metrics import read_records
from moleblend_ray.training.ranks import Ranks
from moleblend_ray.training.saving import CheckpointWriter


def train(run: Path, *, seed: int = 1, num_steps: int = 6, **changes: Any) -> None:
    identity = {"data_fingerprint": "toy", "seed": seed, "model": {"dim": 32, **changes}}
    writer = CheckpointWriter(
        CheckpointConfig(every_steps=2, keep_last=10),
        str(run),
        Ranks(),
        identity=identity,
        config_fingerprint="f",
        start_step=0,
    )
    fit(
        toy.learner(num_steps=num_steps, validate_every=4),
        toy.steps(),
        checkpoints=writer,
        validate=lambda: {"valid_loss": 1.5},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at 2, 4 and 6."""
    run = tmp_path_factory.mktemp("inventory") / "run"
    train(run)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(trained, tmp_path / "run")


def shard(run: Path, step: int) -> Path:
    return next(Path(step_uri(str(run), step)).glob("*.distcp"))


def test_every_checkpoint_is_listed_newest_first_with_its_loss(run: Path) -> None:
    report = take_inventory(str(run))
    assert [one.step for one in report.checkpoints] == [6, 4, 2]
    assert {one.state for one in report.checkpoints} == {"whole"}
    assert (report.continues_at, report.finished, report.damages) == (6, False, ())
    losses = [record["loss"] for record in read_records(str(run))]
    assert [one.loss for one in report.checkpoints] == [losses[5], losses[3], losses[1]]
    # Validated after 4 steps and at the end: 2 has no loss of its own.
    assert [one.valid_loss for one in report.checkpoints] == [1.5, 1.5, None]
    for one in report.checkpoints:
        files = [f for f in Path(step_uri(str(run), one.step)).iterdir() if f.name != COMMIT_NAME]
        assert one.num_files == len(files)
        assert one.num_bytes == sum(file.stat().st_size for file in files)
    assert report.identity["seed"] == 1


def test_damage_is_named_and_the_run_continues_before_it(run: Path) -> None:
    content = bytearray(shard(run, 6).read_bytes())
    content[len(content) // 2] ^= 1
    shard(run, 6).write_bytes(content)
    shard(run, 4).write_bytes(content[:100])
    unread = take_inventory(str(run))
    assert [one.state for one in unread.checkpoints] == ["whole", "damaged", "whole"]
    assert "has 100 bytes" in unread.damages[0]
    told: list[tuple[int, int]] = []
    read = take_inventory(
        str(run), verify_content=True, progress=lambda done, total: told.append((done, total))
    )
    assert [one.state for one in read.checkpoints] == ["damaged", "damaged", "whole"]
    assert "another SHA-256" in read.damages[0]
    assert read.continues_at == 2
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_folder_without_a_marker_is_incomplete(run: Path) -> None:
    (Path(step_uri(str(run), 6)) / COMMIT_NAME).unlink()
    report = take_inventory(str(run))
    assert [one.state for one in report.checkpoints] == ["incomplete", "whole", "whole"]
    assert report.continues_at == 4
    assert not report.damages


def test_a_marker_that_is_not_one_is_damage(run: Path) -> None:
    (Path(step_uri(str(run), 6)) / COMMIT_NAME).write_text("{}")
    report = take_inventory(str(run))
    assert "not a commit marker" in report.damages[0]
    assert report.identity["seed"] == 1


def test_deleting_keeps_the_newest_whole_ones_and_what_may_be_being_written(run: Path) -> None:
    shutil.copytree(step_uri(str(run), 6), step_uri(str(run), 8))
    (Path(step_uri(str(run), 8)) / COMMIT_NAME).unlink()  # a command is at it
    shard(run, 6).unlink()
    report = take_inventory(str(run), keep_last=1)
    assert report.deleted == (2,)
    assert [one.step for one in report.checkpoints] == [8, 6, 4]
    assert committed_steps(str(run)) == [6, 4]
    assert Path(step_uri(str(run), 8)).is_dir()


def test_nothing_is_deleted_where_nothing_is_whole(run: Path) -> None:
    for step in (2, 4, 6):
        shard(run, step).unlink()
    report = take_inventory(str(run), keep_last=1)
    assert report.deleted == ()
    assert report.continues_at is None
    assert committed_steps(str(run)) == [6, 4, 2]


def test_a_checkpoint_equals_its_copy_and_differs_from_an_earlier_one(
    run: Path, trained: Path
) -> None:
    same = compare_checkpoints(str(run), str(trained))
    assert (same.tensors, same.settings, same.optimizer_equal) == ((), (), True)
    earlier = compare_checkpoints(str(run), step_uri(str(run), 4))
    assert earlier.second.endswith("step-00000004")
    assert not earlier.optimizer_equal
    assert 0 < len(earlier.tensors) <= earlier.num_tensors
    relative = [tensor.relative for tensor in earlier.tensors]
    assert relative == sorted(relative, reverse=True)
    assert all(tensor.max_abs > 0 for tensor in earlier.tensors)


def test_runs_with_other_settings_are_told_apart(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(other, seed=2, num_steps=2, heads=8)
    report = compare_checkpoints(str(run), str(other))
    assert report.settings == ("model.heads: None and 8", "seed: 1 and 2")


def test_a_place_without_checkpoints_is_an_error_that_says_what_was_expected(
    tmp_path: Path,
) -> None:
    with pytest.raises(CheckpointError, match="expected the folder of a run"):
        take_inventory(str(tmp_path))
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        compare_checkpoints(str(tmp_path), str(tmp_path))


def test_the_command_shows_tables_or_json_and_fails_on_damage(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoints", str(run), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "continues at step 6" in shown
    assert "all bytes were compared" in shown
    assert main(["checkpoints", str(run), f"against={step_uri(str(run), 2)}"]) == 0
    assert "relative difference" in capsys.readouterr().out
    shard(run, 6).unlink()
    assert main(["checkpoints", str(run), "format=json", "keep_last=1"]) == EXIT_ERROR
    report = json.loads(capsys.readouterr().out)
    assert report["continues_at"] == 4
    assert report["deleted"] == [2]
    assert main(["checkpoints", str(run), "against=x", "keep_last=1"]) == EXIT_CONFIG
    assert main(["checkpoints", str(run), "keep_last=0"]) == EXIT_CONFIG


def test_weights_that_are_not_numbers_differ_from_those_that_are(tmp_path: Path) -> None:
    for name, broken in (("one", False), ("other", True)):
        learner = toy.learner(num_steps=2)
        if broken:
            with torch.no_grad():
                learner.model.spd_head.bias[0] = float("nan")
        with CheckpointWriter(
            CheckpointConfig(every_steps=2),
            str(tmp_path / name),
            Ranks(),
            identity={},
            config_fingerprint="f",
            start_step=0,
        ) as writer:
            writer.commit(2, training_state(learner.model, learner.optimizer), [])
    report = compare_checkpoints(str(tmp_path / "one"), str(tmp_path / "other"))
    assert [tensor.name for tensor in report.tensors] == ["spd_head.bias"]
    assert json.loads(json_text(report))["tensors"][0]["max_abs"] is None


def test_a_checkpoint_of_a_newer_version_is_neither_damaged_nor_deleted(run: Path) -> None:
    for step in (2, 6):
        marker = Path(step_uri(str(run), step)) / COMMIT_NAME
        marker.write_text(json.dumps({**json.loads(marker.read_text()), "format": 99}))
    report = take_inventory(str(run), keep_last=1)
    assert [one.state for one in report.checkpoints] == ["newer", "whole", "newer"]
    assert (report.continues_at, report.damages, report.deleted) == (None, (), ())


def test_a_run_without_any_marker_starts_anew(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4, 6):
        (Path(step_uri(str(run), step)) / COMMIT_NAME).unlink()
    assert main(["checkpoints", str(run)]) == 0
    assert "its command starts anew" in capsys.readouterr().out


def test_comparing_runs_no_code_of_a_checkpoint(run: Path) -> None:
    folder = Path(step_uri(str(run), 6))
    content = b"cos\nsystem\n(S'true'\ntR."
    (folder / ".metadata").write_bytes(content)
    marker = json.loads((folder / COMMIT_NAME).read_text())
    for file in marker["files"]:
        if file["name"] == ".metadata":
            file |= {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / COMMIT_NAME).write_text(json.dumps(marker))
    with pytest.raises(CheckpointError, match=r"asks for os\.system"):
        compare_checkpoints(str(run), step_uri(str(run), 4))
