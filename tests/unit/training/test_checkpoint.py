"""Commit, discovery, damage, restore; in one process."""

from __future__ import annotations

import enum
import io
import json
import logging
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    TensorStorageMetadata,
)

from moleblend_ray.data.files import storage
from moleblend_ray.errors import CheckpointError, ConfigError, StorageError
from moleblend_ray.training import saving
from moleblend_ray.training.checkpoint import (
    _IndexUnpickler,
    restore_training_state,
    training_state,
)
from moleblend_ray.training.commits import (
    COMMIT_NAME,
    abandon_after,
    committed_steps,
    delete_checkpoint,
    delete_old_checkpoints,
    examine_checkpoints,
    latest_committed,
    read_commit,
    require_same_run,
    step_uri,
    steps_to_keep,
)
from moleblend_ray.training.config import CheckpointConfig
from moleblend_ray.training.learner import Learner
from moleblend_ray.training.loop import Hooks, fit
from moleblend_ray.training.metrics import read_records
from moleblend_ray.training.ranks import Ranks
from moleblend_ray.training.saving import AnotherWriterError, CheckpointWriter


def writer(
    run: str, *, start: int = 0, every: int = 2, keep: int = 3, **kept: Any
) -> CheckpointWriter:
    return CheckpointWriter(
        CheckpointConfig(every_steps=every, keep_last=keep, **kept),
        run,
        Ranks(),
        identity={"data_fingerprint": "toy", "model": {"dim": 32}},
        config_fingerprint="f",
        start_step=start,
    )


def train(run: str, *, num_steps: int = 6, model: Any = toy.MODEL, **options: Any) -> Learner:
    learner = toy.learner(num_steps=num_steps, model=model)
    fit(learner, toy.steps(), checkpoints=writer(run, **options))
    return learner


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints at 2, 4, 6; tests that change it must copy it."""
    run = tmp_path_factory.mktemp("run")
    train(str(run))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(trained, tmp_path / "run"))


def shard(run: Path, step: int) -> Path:
    return next(Path(step_uri(str(run), step)).glob("*.distcp"))


def test_a_marker_names_every_file_with_size_and_checksum(trained: Path) -> None:
    commit = read_commit(str(trained), 6)
    folder = Path(step_uri(str(trained), 6))
    assert {file.name for file in commit.files} == {
        path.name for path in folder.iterdir() if path.name != COMMIT_NAME
    }
    for file in commit.files:
        content = (folder / file.name).read_bytes()
        assert (file.num_bytes, file.sha256) == (len(content), storage.sha256_bytes(content))
    assert commit.world_size == 1
    assert commit.versions["torch"] == torch.__version__
    assert (commit.identity["data_fingerprint"], commit.config_fingerprint) == ("toy", "f")


def test_each_record_is_on_file_once_in_the_file_of_its_checkpoint(trained: Path) -> None:
    lines = {
        file.name: [json.loads(line)["step"] for line in file.read_text().splitlines()]
        for file in (trained / "metrics").iterdir()
    }
    assert lines == {
        f"steps-{first:08d}-{first + 2:08d}.jsonl": [first, first + 1] for first in (0, 2, 4)
    }


def test_the_newest_whole_checkpoint_is_found(trained: Path) -> None:
    commit = latest_committed(str(trained), verify_content=True)
    assert commit is not None
    assert commit.step == 6


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert latest_committed(str(tmp_path / "absent")) is None


def test_shards_without_a_marker_are_not_believed(run: Path) -> None:
    (Path(step_uri(str(run), 6)) / COMMIT_NAME).unlink()
    commit = latest_committed(str(run))
    assert commit is not None
    assert commit.step == 4


@pytest.mark.parametrize("damage", ["missing", "cut", "longer", "altered", "marker"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
    run: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    victim = shard(run, 6)
    content = victim.read_bytes()
    expected = victim.name
    if damage == "missing":
        victim.unlink()
    elif damage == "cut":
        victim.write_bytes(content[:-10])
    elif damage == "longer":
        victim.write_bytes(content + b"\0")
    elif damage == "altered":
        middle = len(content) // 2
        victim.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        (victim.parent / COMMIT_NAME).write_text("{ half a mark")
        expected = COMMIT_NAME
    with caplog.at_level(logging.WARNING):
        # Sizes alone show all but an altered byte.
        commit = latest_committed(str(run), verify_content=damage == "altered")
    assert commit is not None
    assert commit.step == 4
    assert expected in caplog.text
    assert "step-00000006" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_nothing(run: Path) -> None:
    for step in committed_steps(str(run)):
        shard(run, step).unlink()
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        latest_committed(str(run))


def test_restoring_an_altered_shard_is_refused(run: Path) -> None:
    victim = shard(run, 6)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(bytes(content))
    learner = toy.learner()
    with pytest.raises(CheckpointError, match="SHA-256"):
        restore_training_state(learner.model, learner.optimizer, str(run), 6, Ranks())


def test_a_marker_of_a_newer_format_asks_for_an_upgrade(run: Path) -> None:
    marker = Path(step_uri(str(run), 6)) / COMMIT_NAME
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "format": 99}))
    for read in (lambda: read_commit(str(run), 6), lambda: latest_committed(str(run))):
        with pytest.raises(CheckpointError, match=r"format 99.*Upgrade"):
            read()


def test_a_run_below_another_run_s_checkpoint_has_its_own_steps(
    trained: Path, tmp_path: Path
) -> None:
    import shutil

    inner = tmp_path / "checkpoints" / "step-00000077" / "run"
    shutil.copytree(trained, inner)
    assert committed_steps(str(inner)) == [6, 4, 2]


@pytest.mark.parametrize("model", [toy.MODEL, toy.DROPOUT_MODEL], ids=["plain", "dropout"])
def test_a_continued_run_is_the_uninterrupted_one(tmp_path: Path, model: Any) -> None:
    whole = toy.learner(num_steps=6, model=model)
    expected = toy.records(whole, toy.steps())
    half = str(tmp_path / "half")
    first = toy.learner(num_steps=6, model=model)
    answers = iter([False, False, True])
    fit(
        first, toy.steps(), checkpoints=writer(half), hooks=Hooks(should_stop=lambda: next(answers))
    )
    second = toy.learner(num_steps=6, model=model)
    restore_training_state(second.model, second.optimizer, half, 3, Ranks())
    continued = toy.records(
        second, toy.steps(start=3), start_step=3, checkpoints=writer(half, start=3)
    )
    assert [r["loss"] for r in continued] == [r["loss"] for r in expected[3:]]
    state = training_state(second.model, second.optimizer)
    for name, value in training_state(whole.model, whole.optimizer).items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0)
    assert [(r["step"], r["loss"]) for r in read_records(half)] == [
        (r["step"], r["loss"]) for r in expected
    ]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run = str(tmp_path)
    orphan = Path(step_uri(run, 1))
    orphan.mkdir(parents=True)
    (orphan / "__0_0.distcp").write_bytes(b"left by a crash")
    train(run, num_steps=6, every=1, keep=2)
    assert committed_steps(run) == [6, 5]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000005",
        "step-00000006",
    ]
    assert [record["step"] for record in read_records(run)] == list(range(6))


def test_a_checkpoint_that_is_only_half_deleted_is_not_believed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(uri: str) -> None:
        raise StorageError(f"{uri}: out of reach")

    monkeypatch.setattr(storage, "delete_tree", fail)
    with pytest.raises(StorageError):
        delete_checkpoint(str(run), 4)
    assert shard(run, 4).exists()
    assert committed_steps(str(run)) == [6, 2]


def test_nothing_is_deleted_where_a_listing_does_not_show_the_new_checkpoint_yet(run: Path) -> None:
    for step in (2, 4, 6):
        (Path(step_uri(str(run), step)) / COMMIT_NAME).unlink()
    delete_old_checkpoints(str(run), lambda _: set())
    assert len(list((run / "checkpoints").iterdir())) == 3


def test_a_save_under_way_is_not_deleted_with_the_old_checkpoints(run: Path) -> None:
    for step in (1, 8):
        Path(step_uri(str(run), step)).mkdir()
        (Path(step_uri(str(run), step)) / "__0_0.distcp").write_bytes(b"no marker yet")
    delete_old_checkpoints(str(run), lambda steps: {max(steps)})
    assert [one.step for one in examine_checkpoints(str(run))] == [8, 6]


def test_milestones_and_the_best_validated_checkpoints_are_kept_across_a_restart(
    tmp_path: Path,
) -> None:
    run = str(tmp_path)
    losses = dict(enumerate([9.0, 2.0, 7.0, 3.0, 6.0, 2.5, 8.0, 5.0]))
    kept = {"every": 1, "keep": 1, "keep_every_steps": 4, "keep_best": 2}

    def train_on(start: int, stop_before: int) -> None:
        learner = toy.learner(num_steps=8, validate_every=1)
        steps, polls = iter(range(start, 8)), iter(range(start, 8))
        fit(
            learner,
            toy.steps(start=start),
            start_step=start,
            checkpoints=writer(run, start=start, **kept),
            validate=lambda: {"valid_loss": losses[next(steps)]},
            hooks=Hooks(should_stop=lambda: next(polls) == stop_before - 1),
        )

    train_on(0, 5)
    # Steps done: 4 is a milestone and with 2 (loss 2.0) the best, 5 the newest (a stop does not validate).
    assert committed_steps(run) == [5, 4, 2]
    train_on(5, 100)
    # 2 (loss 2.0) was the first command's, 6 (2.5) is the second's.
    assert committed_steps(run) == [8, 6, 4, 2]


def test_a_checkpoint_has_the_loss_of_its_own_step_alone(tmp_path: Path) -> None:
    run = str(tmp_path)
    losses = iter([0.5, math.nan, 0.9])
    fit(
        toy.learner(num_steps=6, validate_every=2),
        toy.steps(),
        checkpoints=writer(run, every=1, keep=1, keep_best=1),
        validate=lambda: {"valid_loss": next(losses)},
    )
    # 3 has no loss of its own, 4 none that can be ranked: 2 (loss 0.5) stays the best.
    assert committed_steps(run) == [6, 2]


def test_a_damaged_metrics_file_does_not_end_a_run_that_keeps_its_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = str(tmp_path)
    train(run, num_steps=2)
    next((tmp_path / "metrics").iterdir()).write_text("not JSON\n")
    learner = toy.learner(num_steps=4)
    fit(learner, toy.steps(start=2), start_step=2, checkpoints=writer(run, start=2, keep_best=1))
    assert committed_steps(run) == [4, 2]
    assert "old checkpoints were not deleted" in caplog.text


def test_what_to_keep_is_a_function_of_steps_and_losses() -> None:
    steps = [60, 50, 40, 30, 20, 10]
    config = CheckpointConfig(every_steps=10, keep_last=2)
    assert steps_to_keep(steps, config, {}) == {60, 50}
    config = CheckpointConfig(every_steps=10, keep_last=1, keep_every_steps=20)
    assert steps_to_keep(steps, config, {10: 1.0}) == {60, 40, 20}
    config = CheckpointConfig(every_steps=10, keep_last=1, keep_best=2)
    assert steps_to_keep(steps, config, {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.0}) == {60, 20, 40}
    assert steps_to_keep(steps, config, {}) == {60}
    with pytest.raises(ConfigError, match=r"keep_every_steps: expected null or a multiple of .*10"):
        CheckpointConfig(every_steps=10, keep_every_steps=15)


def test_a_failed_upload_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(tmp_path)
    train(run, num_steps=2)

    def refuse(path: Path, folder: str) -> None:
        raise StorageError(f"Cannot write {folder}: the disk is full")

    monkeypatch.setattr(saving, "_place_file", refuse)
    learner = toy.learner(num_steps=4)
    with pytest.raises(CheckpointError, match="the disk is full"):
        fit(learner, toy.steps(start=2), start_step=2, checkpoints=writer(run, start=2))
    commit = latest_committed(run, verify_content=True)
    assert commit is not None
    assert commit.step == 2


def test_a_full_local_disk_is_an_error_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, folder: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "_place_file", refuse)
    # What a rank raises by itself leaves the others waiting; a CheckpointError was agreed on.
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(str(tmp_path), num_steps=2)


def test_old_checkpoints_that_cannot_be_deleted_do_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(run_uri: str, keep: Any) -> None:
        raise StorageError(f"Cannot delete below {run_uri}: access denied")

    monkeypatch.setattr(saving, "delete_old_checkpoints", refuse)
    train(str(tmp_path), num_steps=4)
    assert committed_steps(str(tmp_path)) == [4, 2]
    assert "old checkpoints were not deleted" in caplog.text
    assert "access denied" in caplog.text


@pytest.mark.parametrize("others_first", [3, 2, 4])
def test_two_writers_of_one_run_do_not_replace_each_other_s_checkpoints(
    tmp_path: Path, others_first: int
) -> None:
    run = str(tmp_path)
    learner = toy.learner()
    state = training_state(learner.model, learner.optimizer)
    ours, other = (writer(run, asynchronous=False) for _ in range(2))
    ours.commit(2, state, [])
    # The other one either comes to our last step, or has passed it.
    if others_first == 2:
        delete_checkpoint(run, 2)
    else:
        other = writer(run, start=2, asynchronous=False)
    other.commit(others_first, state, [])
    before = read_commit(run, others_first)
    with pytest.raises(AnotherWriterError, match=f"another driver .* step {others_first}"):
        ours.commit(4, state, [])
    assert read_commit(run, others_first) == before


def test_what_is_newer_than_the_start_is_abandoned_if_it_is_damaged_or_has_no_marker(
    run: Path,
) -> None:
    content = bytearray(shard(run, 6).read_bytes())
    content[len(content) // 2] ^= 1
    shard(run, 6).write_bytes(content)
    (Path(step_uri(str(run), 4)) / COMMIT_NAME).unlink()
    abandon_after(str(run), 2)
    assert [one.step for one in examine_checkpoints(str(run))] == [2]


def test_what_another_command_commits_while_this_one_starts_is_kept(run: Path) -> None:
    (Path(step_uri(str(run), 6)) / COMMIT_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"step 4 of .* was committed while this command"):
        abandon_after(str(run), 2)
    assert [one.step for one in examine_checkpoints(str(run))] == [6, 4, 2]


@pytest.mark.parametrize("name", ["../outside", "folder/file", "/tmp/file", "..", ""])
def test_a_marker_that_names_files_elsewhere_is_refused(run: Path, name: str) -> None:
    marker = shard(run, 6).parent / COMMIT_NAME
    value = json.loads(marker.read_text())
    value["files"][0]["name"] = name
    marker.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="is no file name"):
        read_commit(str(run), 6)


@pytest.mark.parametrize("called", [print, torch.nn.Linear, torch.hub.load, pickle.loads])
def test_an_index_that_would_run_code_is_refused(run: Path, called: Any) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (called, (1, 1))

    index = shard(run, 6).parent / ".metadata"
    index.write_bytes(pickle.dumps(Evil()))
    marker = index.parent / COMMIT_NAME
    value = json.loads(marker.read_text())
    for file in value["files"]:
        if file["name"] == ".metadata":
            content = index.read_bytes()
            file |= {"num_bytes": len(content), "sha256": storage.sha256_bytes(content)}
    marker.write_text(json.dumps(value))
    learner = toy.learner()
    with pytest.raises(CheckpointError, match="tampered"):
        restore_training_state(learner.model, learner.optimizer, str(run), 6, Ranks())


class PicklerOfEarly311(pickle.Pickler):
    """Stores members of enumerations as Python 3.11.2 does."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, enum.Enum):
            return getattr, (type(value), value.name)
        return NotImplemented


def test_an_index_of_another_release_of_python_is_read(run: Path) -> None:
    index = shard(run, 6).parent / ".metadata"
    expected = _IndexUnpickler(io.BytesIO(index.read_bytes())).load()
    stored = io.BytesIO()
    PicklerOfEarly311(stored).dump(expected)
    assert b"getattr" in stored.getvalue()
    assert _IndexUnpickler(io.BytesIO(stored.getvalue())).load() == expected


@pytest.mark.parametrize("name", ["__class__", "__init_subclass__", "mro", "_member_map_", "none"])
@pytest.mark.parametrize("kind", [_MEM_FORMAT_ENCODING, TensorStorageMetadata])
def test_an_index_gets_no_attribute_but_members_of_enumerations(kind: type, name: str) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return getattr, (kind, name)

    with pytest.raises(CheckpointError, match=rf"asks for '{name}' of .*tampered"):
        _IndexUnpickler(io.BytesIO(pickle.dumps(Evil()))).load()


def test_an_index_imports_no_module_but_those_of_torch() -> None:
    assert "antigravity" not in sys.modules
    with pytest.raises(CheckpointError, match=r"asks for antigravity\.fly"):
        _IndexUnpickler(io.BytesIO(b"cantigravity\nfly\n.")).load()
    assert "antigravity" not in sys.modules


def test_another_run_is_refused_with_both_values_named() -> None:
    stored = {"data_fingerprint": "aaa", "order": {"global_batch_size": 256, "num_streams": 4}}
    wanted = {"data_fingerprint": "bbb", "order": {"global_batch_size": 512, "num_streams": 4}}
    require_same_run(stored, stored, "run")
    # A marker comes from JSON, where tuples are lists.
    require_same_run({"blend": {"pair": [0.2, 0.8]}}, {"blend": {"pair": (0.2, 0.8)}}, "run")
    with pytest.raises(CheckpointError) as caught:
        require_same_run(stored, wanted, "s3://bucket/run")
    message = str(caught.value)
    for part in (
        "s3://bucket/run",
        "data_fingerprint: the run has 'aaa', the configuration asks for 'bbb'",
        "order.global_batch_size: the run has 256, the configuration asks for 512",
    ):
        assert part in message
    assert "num_streams" not in message


def test_a_setting_that_an_earlier_version_did_not_store_is_not_compared() -> None:
    stored = {"data_fingerprint": "aaa", "order": {"num_streams": 4}}
    require_same_run(stored, {**stored, "featurizer_version": 2}, "run")
    with pytest.raises(CheckpointError, match=r"order\.shuffle_window: the run has None"):
        require_same_run(stored, {"order": {"num_streams": 4, "shuffle_window": 8}}, "run")


def test_checkpoints_live_in_object_storage(s3_uri: str) -> None:
    learner = train(s3_uri, num_steps=4, every=1, keep=2)
    assert committed_steps(s3_uri) == [4, 3]
    commit = latest_committed(s3_uri, verify_content=True)
    assert commit is not None
    other = toy.learner(num_steps=4)
    restore_training_state(other.model, other.optimizer, s3_uri, 4, Ranks())
    restored = training_state(other.model, other.optimizer)
    for name, value in training_state(learner.model, learner.optimizer).items():
        torch.testing.assert_close(restored[name], value, rtol=0, atol=0)
