"""The tracker that a configuration asks for."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import wandb

from moleblend_ray.errors import ConfigError
from moleblend_ray.training.config import TrackingConfig
from moleblend_ray.training.tracking import NoTracker, start_tracker


def test_disabled_tracking_does_not_import_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = start_tracker(TrackingConfig(mode="disabled"), "runs/a", {})
    assert isinstance(tracker, NoTracker)
    tracker.log({"loss": 1.0}, step=0)
    tracker.finish()


def test_a_missing_wandb_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"install wandb or set tracking\.mode=disabled"):
        start_tracker(TrackingConfig(mode="offline"), "runs/a", {})


def test_offline_tracking_leaves_files_to_sync(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    tracker = start_tracker(
        TrackingConfig(mode="offline", dir=str(folder)), "s3://bucket/runs/a", {"seed": 1}
    )
    tracker.log({"step": 0, "loss": 1.5}, step=0)
    tracker.finish()
    (run,) = (folder / "wandb").glob("offline-run-*")
    assert next(run.glob("*.wandb")).stat().st_size > 0


@pytest.mark.parametrize("failure", [wandb.errors.UsageError, wandb.errors.CommError])
def test_wandb_that_does_not_start_is_an_error_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, failure: type[Exception]
) -> None:
    def refuse(**_: object) -> None:
        raise failure("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"api_key not configured .*WANDB_API_KEY"):
        start_tracker(TrackingConfig(mode="online"), "runs/a", {})


def test_files_that_wandb_does_not_keep_where_it_was_asked_to_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "below")
    start_tracker(TrackingConfig(mode="offline", dir=folder), "runs/a", {}).finish()
    (warning,) = (one for one in caplog.records if one.name.startswith("moleblend_ray"))
    assert f"tracking.dir: {folder} cannot be written" in warning.message
    elsewhere = Path(warning.message.rpartition(" are in ")[2])
    assert list(elsewhere.glob("*.wandb"))
    shutil.rmtree(elsewhere)


def test_wandb_that_fails_later_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        dir = str(tmp_path / "wandb/offline-run-1/files")

        def log(self, record: object, step: int) -> None:
            raise wandb.errors.CommError("the server is gone")

        def finish(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    tracker = start_tracker(TrackingConfig(mode="online", dir=str(tmp_path)), "runs/a", {})
    tracker.log({"loss": 1.0}, step=0)
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish()
    (warning,) = caplog.records
    assert "the server is gone" in warning.message
