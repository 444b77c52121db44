"""Saving behind the training step: what is committed, when, and what a failing save does."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from moleblend_ray.data.files.scratch import scratch_folder
from moleblend_ray.errors import CheckpointError, StorageError, TrainingError
from moleblend_ray.training import saving
from moleblend_ray.training.checkpoint import restore_training_state, training_state
from moleblend_ray.training.commits import (
    COMMIT_NAME,
    Commit,
    CommittedFile,
    committed_steps,
    latest_committed,
    read_commit,
    step_uri,
    write_commit,
)
from moleblend_ray.training.config import CheckpointConfig
from moleblend_ray.training.learner import Learner
from moleblend_ray.training.loop import Hooks, fit
from moleblend_ray.training.metrics import read_records
from moleblend_ray.training.ranks import Ranks
from moleblend_ray.training.saving import CheckpointWriter

LIMIT_S = 30.0

both_ways = pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])


def writer(run: Path | str, **options: Any) -> CheckpointWriter:
    return CheckpointWriter(
        CheckpointConfig(**{"every_steps": 2, **options}),
        str(run),
        Ranks(),
        identity={"data_fingerprint": "toy"},
        config_fingerprint="f",
        start_step=0,
    )


def change_in_place(learner: Learner) -> None:
    with torch.no_grad():
        for value in training_state(learner.model, learner.optimizer).values():
            value.add_(1)


class Gate:
    """Files wait at it, before they are in their place, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.concurrent = self.most = 0
        place, lock = saving._place_file, threading.Lock()

        def wait_and_place(path: Path, folder: str) -> CommittedFile:
            with lock:
                self.concurrent += 1
                self.most = max(self.most, self.concurrent)
            self.reached.set()
            assert self.opened.wait(LIMIT_S)
            placed = place(path, folder)
            with lock:
                self.concurrent -= 1
            return placed

        monkeypatch.setattr(saving, "_place_file", wait_and_place)


def fail_saves(
    monkeypatch: pytest.MonkeyPatch, is_failing: Callable[[str], bool], error: Exception
) -> None:
    place = saving._place_file

    def maybe(path: Path, folder: str) -> CommittedFile:
        if is_failing(folder):
            raise error
        return place(path, folder)

    monkeypatch.setattr(saving, "_place_file", maybe)


def test_training_goes_on_while_the_state_of_the_commit_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    learner = toy.learner(num_steps=2)
    fit(learner, toy.steps())  # moments are not 0 any more
    with writer(tmp_path) as checkpoints:
        before = {
            name: value.clone()
            for name, value in training_state(learner.model, learner.optimizer).items()
        }
        checkpoints.commit(2, training_state(learner.model, learner.optimizer), [])
        change_in_place(learner)
        assert gate.reached.wait(LIMIT_S)
        assert committed_steps(str(tmp_path)) == []
        gate.opened.set()
    assert committed_steps(str(tmp_path)) == [2]
    other = toy.learner()
    restore_training_state(other.model, other.optimizer, str(tmp_path), 2, Ranks())
    for name, value in training_state(other.model, other.optimizer).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_shards_are_on_disk_before_the_marker_that_vouches_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flush(file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(file)

    def rename(source: Any, target: Any) -> None:
        done.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    learner = toy.learner()
    with writer(tmp_path, asynchronous=False) as checkpoints:
        checkpoints.commit(2, training_state(learner.model, learner.optimizer), [])
    marker = done.index("COMMIT.json")
    shards = {path.name for path in tmp_path.rglob("*.distcp")}
    assert shards
    assert shards <= set(done[:marker])


def test_what_an_interrupted_save_left_is_no_part_of_the_checkpoint_of_its_step(
    tmp_path: Path,
) -> None:
    folder = Path(step_uri(str(tmp_path), 2))
    folder.mkdir(parents=True)
    left = [folder / "__0_1.distcp", folder / "__3_0.distcp"]  # the latter of a fourth worker
    for path in left:
        path.write_bytes(b"half a shard")
    fit(toy.learner(num_steps=2), toy.steps(), checkpoints=writer(tmp_path))
    named = {file.name for file in read_commit(str(tmp_path), 2).files}
    assert not named & {path.name for path in left}
    assert {path.name for path in folder.iterdir()} == {*named, COMMIT_NAME}


def test_records_are_on_file_before_the_marker_of_their_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is killed in between has no checkpoint of which steps are missing."""

    def check_and_write(run_uri: str, commit: Commit) -> None:
        assert [record["step"] for record in read_records(run_uri)] == list(range(commit.step))
        write_commit(run_uri, commit)

    monkeypatch.setattr(saving, "write_commit", check_and_write)
    fit(toy.learner(num_steps=4), toy.steps(), checkpoints=writer(tmp_path))
    assert committed_steps(str(tmp_path)) == [4, 2]


def test_a_synchronous_commit_returns_with_its_marker(tmp_path: Path) -> None:
    learner = toy.learner()
    with writer(tmp_path, asynchronous=False) as checkpoints:
        checkpoints.commit(2, training_state(learner.model, learner.optimizer), [])
        assert committed_steps(str(tmp_path)) == [2]


def test_a_commit_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    learner = toy.learner()
    state = training_state(learner.model, learner.optimizer)
    files = 2  # index and one shard, uploaded side by side
    with writer(tmp_path) as checkpoints:
        checkpoints.commit(2, state, [])
        assert gate.reached.wait(LIMIT_S)
        second = threading.Thread(target=checkpoints.commit, args=(4, state, []))
        second.start()
        second.join(0.3)
        assert second.is_alive()
        gate.opened.set()
        second.join(LIMIT_S)
    assert committed_steps(str(tmp_path)) == [4, 2]
    assert gate.most <= files


def test_an_error_in_training_does_not_lose_the_save_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)

    def steps() -> Any:
        yield from zip(range(2), toy.steps(), strict=False)

    def only_two() -> Any:
        for _, step in steps():
            yield step
        threading.Timer(0.3, gate.opened.set).start()

    with pytest.raises(TrainingError, match="ended before step 2"):
        fit(toy.learner(num_steps=4), only_two(), checkpoints=writer(tmp_path))
    assert committed_steps(str(tmp_path)) == [2]
    assert [record["step"] for record in read_records(str(tmp_path))] == [0, 1]


@both_ways
@pytest.mark.parametrize(
    "error", [StorageError("the storage cannot be reached"), OSError(28, "No space left on device")]
)
def test_a_save_that_fails_is_a_warning_and_its_steps_come_with_the_next(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asynchronous: bool,
    error: Exception,
) -> None:
    fail_saves(monkeypatch, lambda folder: "step-00000004" in folder, error)
    with caplog.at_level(logging.WARNING):
        fit(
            toy.learner(num_steps=8),
            toy.steps(),
            checkpoints=writer(tmp_path, asynchronous=asynchronous),
        )
    assert committed_steps(str(tmp_path)) == [8, 6, 2]
    assert [record["step"] for record in read_records(str(tmp_path))] == list(range(8))
    (warning,) = [r for r in caplog.records if "could not be saved" in r.message]
    assert str(error.args[-1]) in warning.message
    assert latest_committed(str(tmp_path), verify_content=True) is not None


@both_ways
def test_one_failing_save_too_many_ends_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    fail_saves(monkeypatch, lambda folder: "step-00000002" not in folder, StorageError("gone"))
    reported: list[int] = []
    with pytest.raises(CheckpointError, match="save 3 in a row"):
        fit(
            toy.learner(num_steps=20),
            toy.steps(),
            checkpoints=writer(tmp_path, max_failed_saves=2, asynchronous=asynchronous),
            hooks=Hooks(report=lambda record: reported.append(int(record["step"]))),
        )
    assert committed_steps(str(tmp_path)) == [2]
    # Saves of 4, 6 and 8 fail; behind the steps, the third failure is seen when step 10 is due.
    assert reported[-1] == (9 if asynchronous else 7)


@both_ways
def test_failures_count_in_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    failing = ("step-00000002", "step-00000006", "step-00000010")
    fail_saves(monkeypatch, lambda folder: folder.endswith(failing), StorageError("gone"))
    fit(
        toy.learner(num_steps=12),
        toy.steps(),
        checkpoints=writer(tmp_path, max_failed_saves=1, asynchronous=asynchronous),
    )
    assert committed_steps(str(tmp_path)) == [12, 8, 4]


@both_ways
def test_the_last_save_must_not_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    fail_saves(monkeypatch, lambda folder: "step-00000004" in folder, StorageError("gone"))
    with pytest.raises(CheckpointError, match="gone"):
        fit(
            toy.learner(num_steps=4),
            toy.steps(),
            checkpoints=writer(tmp_path, asynchronous=asynchronous),
        )
    assert committed_steps(str(tmp_path)) == [2]


def test_shards_that_find_no_local_space_are_an_error_of_that_save_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = f"memory://{uuid.uuid4().hex}/run"  # not on a disk: shards go through a local folder
    failing = iter([True, False, False])

    def refuse_once(purpose: str) -> AbstractContextManager[Path]:
        if next(failing):
            raise OSError(28, "No space left on device")
        return scratch_folder(purpose)

    monkeypatch.setattr(saving, "scratch_folder", refuse_once)
    fit(toy.learner(num_steps=6), toy.steps(), checkpoints=writer(run))
    assert committed_steps(run) == [6, 4]
    assert latest_committed(run, verify_content=True) is not None
    assert [record["step"] for record in read_records(run)] == list(range(6))
