"""`moleblend status` of a pretraining run: what files tell, how little is read, and what they cannot tell."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
import toy

from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.files import storage
from moleblend_ray.training.commits import COMMIT_NAME, FINISHED_NAME, committed_steps, read_commit
from moleblend_ray.training.config import CheckpointConfig
from moleblend_ray.training.loop import Hooks, fit
from moleblend_ray.training.metrics import write_records
from moleblend_ray.training.ranks import Ranks
from moleblend_ray.training.saving import CheckpointWriter
from moleblend_ray.training.status import RunStatus, run_status

NUM_STEPS = 30
EVERY = 5


def document(
    data: str = "nowhere", num_steps: int = NUM_STEPS, fingerprint: str = "toy"
) -> dict[str, Any]:
    return {
        "config": {
            "data": data,
            "seed": 1,
            "order": {"global_batch_size": 16},
            "train": {"num_steps": num_steps, "strategy": "none", "precision": "fp32"},
            "checkpoint": {"every_steps": EVERY},
            "model": {"num_layers": 2, "dim": 32},
        },
        "data_fingerprint": fingerprint,
        "versions": {"torch": "2"},
    }


def train(run: Path, *, start: int = 0, stop_at: int | None = None) -> None:
    """Train a toy, from nothing (the numbers of its steps are what counts)."""
    writer = CheckpointWriter(
        CheckpointConfig(every_steps=EVERY, keep_last=3),
        str(run),
        Ranks(),
        identity={},
        config_fingerprint="f",
        start_step=start,
    )
    asked = repeat(False) if stop_at is None else chain([False] * stop_at, repeat(True))
    fit(
        toy.learner(num_steps=NUM_STEPS, validate_every=10),
        toy.steps(start=start),
        start_step=start,
        checkpoints=writer,
        validate=lambda: {"valid_loss": 1.5},
        hooks=Hooks(should_stop=lambda: next(asked)),
    )
    storage.write_json(str(run / "config.json"), document())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("status") / "run"
    train(run)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def look(run: Path, later: timedelta = timedelta(0), **changes: Any) -> RunStatus:
    """At a moment ``later`` than the newest marker."""
    steps = committed_steps(str(run))
    written = read_commit(str(run), steps[0]).created if steps else None
    now = (datetime.fromisoformat(written) if written else datetime.now(UTC)) + later
    return run_status(str(run), document(**changes), now=now)


def unfinished(run: Path) -> Path:
    """As the run was at step 25."""
    for step in range(26, NUM_STEPS + 1):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    (run / "metrics" / "steps-00000025-00000030.jsonl").unlink()
    return run


def test_a_run_between_two_checkpoints_is_running(run: Path) -> None:
    found = look(unfinished(run), timedelta(seconds=1))
    assert found.state == "running"
    assert (found.step, found.num_steps, found.age_s) == (25, NUM_STEPS, 1.0)
    assert found.seconds_a_step is not None
    assert found.eta_s == pytest.approx(5 * found.seconds_a_step)
    assert found.expected_interval_s == pytest.approx(5 * found.seconds_a_step)


def test_an_overdue_checkpoint_means_stalled_and_the_text_says_what_that_may_be(run: Path) -> None:
    found = look(unfinished(run), timedelta(hours=3))
    assert found.state == "stalled"
    assert "killed, hanging, or waiting for machines; the same command continues" in found.detail


def test_a_stop_on_request_is_told_from_a_killed_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, stop_at=7)
    assert committed_steps(str(run))[0] == 8
    assert look(run, timedelta(hours=3)).state == "stopped"
    # For some minutes after it the workers may be starting anew elsewhere, however short the interval is.
    soon = look(run, timedelta(seconds=170))
    assert soon.expected_interval_s is not None
    assert soon.expected_interval_s < 10
    assert soon.state == "running"
    assert soon.detail.startswith("the next checkpoint is due, and overdue 3 min ")
    at_once = look(run, timedelta(seconds=-1))
    assert (at_once.state, at_once.detail) == ("running", "the next checkpoint is not due yet")
    # A run that was killed at its last step, before its summary, was not asked to stop.
    assert look(run, timedelta(hours=3), num_steps=8).state == "stalled"


def test_a_checkpoint_that_a_running_command_deletes_meanwhile_is_not_called_damaged(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_json = storage.read_json

    def deleting_first(uri: str) -> Any:
        if uri.endswith(f"step-00000020/{COMMIT_NAME}"):
            shutil.rmtree(Path(uri).parent)
        return read_json(uri)

    monkeypatch.setattr(storage, "read_json", deleting_first)
    found = look(unfinished(run), timedelta(seconds=1))
    assert {one.state for one in found.checkpoints} == {"whole"}
    assert 20 not in [one.step for one in found.checkpoints]


def rewrite_marker(run: Path, step: int, /, **changes: Any) -> None:
    marker = run / "checkpoints" / f"step-{step:08d}" / COMMIT_NAME
    marker.write_text(json.dumps({**json.loads(marker.read_text()), **changes}))


def test_markers_of_one_worker_group_tell_the_time_of_a_step_and_when_the_next_is_overdue(
    run: Path,
) -> None:
    unfinished(run)
    rewrite_marker(run, 20, created="2026-01-01T00:00:00+00:00")
    rewrite_marker(run, 25, created="2026-01-01T01:00:00+00:00")
    found = look(run, timedelta(minutes=119))
    assert (found.seconds_a_step, found.expected_interval_s) == (720.0, 3600.0)
    assert found.state == "running"
    # Twice the interval, and three minutes for a start.
    assert look(run, timedelta(minutes=122)).state == "running"
    assert look(run, timedelta(minutes=124)).state == "stalled"
    rewrite_marker(run, 25, attempt="another group")
    by_records = look(run).seconds_a_step
    assert by_records is not None
    assert by_records < 60


def test_a_marker_of_a_clock_that_is_ahead_is_no_older_than_now(run: Path) -> None:
    assert look(run, timedelta(minutes=-5)).age_s == 0.0


def test_checkpoints_of_a_newer_version_are_not_called_damaged(run: Path) -> None:
    for step in (20, 25, 30):
        rewrite_marker(run, step, format=99)
    found = run_status(str(run), document())
    assert {one.state for one in found.checkpoints} == {"newer"}
    assert found.state == "damaged"
    assert "of a newer version" in found.detail


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"created": "yesterday"}, "yesterday"),
        ({"created": "2026-01-01T00:00:00"}, "created: expected a time with its zone"),
        ({"world_size": None}, "world_size: expected int, found null"),
        ({"attempt": []}, "attempt: expected str, found"),
        ({"step": 25}, "it is that of step 25"),
        ({"files": [{"name": "a", "num_bytes": "1", "sha256": ""}]}, "num_bytes: expected int"),
    ],
)
def test_a_marker_that_was_changed_is_damaged(
    run: Path, changes: dict[str, Any], problem: str
) -> None:
    rewrite_marker(run, 30, **changes)
    found = run_status(str(run), document())
    assert [one.state for one in found.checkpoints] == ["damaged", "whole", "whole"]
    assert problem in found.checkpoints[0].detail
    assert found.step == 25


def test_a_finished_run_says_so_however_old_it_is(run: Path) -> None:
    unfinished(run)
    storage.write_json(str(run / FINISHED_NAME), {"steps": NUM_STEPS, "finished": True})
    found = look(run, timedelta(days=400))
    assert (found.state, found.step, found.eta_s) == ("finished", NUM_STEPS, None)


def test_a_run_that_committed_nothing_has_started_at_most(tmp_path: Path) -> None:
    found = look(tmp_path / "run")
    assert (found.state, found.step, found.losses, found.checkpoints) == ("started", 0, (), ())


def test_damaged_checkpoints_are_named_and_the_whole_one_before_counts(run: Path) -> None:
    newest = run / "checkpoints" / "step-00000030"
    shard = next(newest.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    found = look(run, timedelta(seconds=1))
    assert [one.state for one in found.checkpoints] == ["damaged", "whole", "whole"]
    assert shard.name in found.checkpoints[0].detail
    assert found.step == 25
    for folder in (run / "checkpoints").iterdir():
        for shard in folder.glob("*.distcp"):
            shard.unlink()
    assert look(run, timedelta(seconds=1)).state == "damaged"


def test_a_folder_without_marker_is_incomplete(run: Path) -> None:
    (run / "checkpoints" / "step-00000030" / COMMIT_NAME).unlink()
    assert look(run).checkpoints[0].state == "incomplete"


def test_numbers_of_the_last_steps_are_means_over_them(run: Path) -> None:
    lines = [
        json.loads(line)
        for file in sorted((run / "metrics").iterdir())
        for line in file.read_text().splitlines()
    ]
    found = look(run)
    molecules = sum(line["molecules"] for line in lines)
    seconds = sum(line["step_s"] for line in lines)
    assert found.window == NUM_STEPS
    assert found.rates["molecules_per_s"] == pytest.approx(molecules / seconds)
    waited = sum(line["data_wait_s"] for line in lines)
    assert found.rates["data_wait_share"] == pytest.approx(waited / seconds)
    assert {loss.name for loss in found.losses} == {
        name for name in lines[-1] if name.startswith("loss")
    }
    assert found.validation == ((10, 1.5), (20, 1.5), (30, 1.5))
    assert (found.worker_groups, found.workers) == (1, 1)
    for name in ("learning_rate", "grad_norm", "peak_memory_mib"):
        assert found.rates[name] == lines[-1][name]
    newest = run / "checkpoints" / "step-00000030"
    assert found.checkpoints[0].num_bytes == sum(
        file.stat().st_size for file in newest.iterdir() if file.name != COMMIT_NAME
    )


def test_the_newest_count_of_skipped_steps_is_shown(tmp_path: Path) -> None:
    lines = [{**line, "skipped_steps": line["step"] // 4} for line in records(0, 10, 0.0)]
    write_records(str(tmp_path), lines, 0, 10)
    assert look(tmp_path).skipped_steps == 2


def test_a_second_worker_group_is_seen(run: Path) -> None:
    marker = run / "checkpoints" / "step-00000030" / COMMIT_NAME
    marker.write_text(marker.read_text().replace(read_commit(str(run), 30).attempt, "other"))
    assert look(run).worker_groups == 2


def records(first: int, end: int, slope: float) -> list[dict[str, Any]]:
    noise = [0.01, -0.01, 0.02, -0.02]
    return [
        {"step": step, "loss": 5.0 + slope * step + noise[step % 4], "step_s": 1.0, "molecules": 8}
        for step in range(first, end)
    ]


@pytest.mark.parametrize(
    ("slope", "trend"), [(-0.001, "falling"), (0.001, "rising"), (0.0, "level")]
)
def test_a_trend_is_told_only_where_it_stands_out_of_the_noise(
    tmp_path: Path, slope: float, trend: str
) -> None:
    write_records(str(tmp_path), records(0, 400, slope), 0, 400)
    (loss,) = run_status(str(tmp_path), document()).losses
    assert loss.trend == trend
    assert loss.last == pytest.approx(5.0 + slope * 349.5, abs=1e-3)


def test_long_runs_are_read_at_their_ends_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    padding = {f"other_{number}": 0.123456789 for number in range(40)}
    total = 0
    for first in range(0, 40_000, 1000):
        lines = [record | padding for record in records(first, first + 1000, -1e-5)]
        write_records(str(tmp_path), lines, first, first + 1000)
        total += (
            (tmp_path / "metrics" / f"steps-{first:08d}-{first + 1000:08d}.jsonl").stat().st_size
        )
    read = 0
    original = storage.read_range

    def counted(uri: str, offset: int, length: int) -> bytes:
        nonlocal read
        read += length
        return original(uri, offset, length)

    monkeypatch.setattr(storage, "read_range", counted)
    monkeypatch.setattr(storage, "read_bytes", lambda uri: pytest.fail(f"read all of {uri}"))
    monkeypatch.setattr(
        storage, "read_json", lambda uri: (_ for _ in ()).throw(storage.NotFoundError(uri))
    )
    found = run_status(str(tmp_path), document())
    assert found.losses[0].first == pytest.approx(5.0, abs=0.01)
    assert found.losses[0].last == pytest.approx(5.0 - 0.4, abs=0.01)
    assert 10 <= len(found.curve) <= 30
    assert list(found.curve) == sorted(found.curve, reverse=True)
    assert read < 1_000_000 < total / 20


def test_the_data_set_is_described_if_it_can_be_read(run: Path, tmp_path: Path) -> None:
    from synthetic import write_dataset

    write_dataset(str(tmp_path / "data"), 40, shard_rows=20)
    data = str(tmp_path / "data")
    found = look(run, data=data, fingerprint=load_manifest(data).fingerprint)
    assert found.data["molecules"] == 40
    assert found.data["epochs"] == pytest.approx(NUM_STEPS * 16 / 40)
    assert "cannot be read" in look(run).data["problem"]


def test_numbers_of_another_data_set_at_that_place_are_not_those_of_the_run(
    run: Path, tmp_path: Path
) -> None:
    from synthetic import write_dataset

    write_dataset(str(tmp_path / "data"), 40, shard_rows=20)
    found = look(run, data=str(tmp_path / "data")).data
    assert found["problem"] == "replaced by another data set since the run began"
    assert "molecules" not in found
