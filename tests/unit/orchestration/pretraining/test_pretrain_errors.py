"""What ends a pretraining run from outside is told in words."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
import ray.train

from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.data.files.storage import NotFoundError
from moleblend_ray.errors import ConfigError, MoleBlendError, StorageError, TrainingError
from moleblend_ray.orchestration.pretraining import pretrain as module
from moleblend_ray.orchestration.pretraining.pretrain import OutOfReachError, _fit
from moleblend_ray.orchestration.pretraining.pretrain_group import WorkerOutcome
from moleblend_ray.training.config import TrainConfig


def ended_by(error: Exception) -> None:
    def fit() -> None:
        raise error

    _fit(cast(Any, SimpleNamespace(fit=fit)))


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.ActorDiedError(),
        ray.exceptions.ActorUnschedulableError("The node doesn't exist any more."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_controller_that_is_lost_is_no_traceback(error: Exception) -> None:
    with pytest.raises(
        TrainingError,
        match=rf"leads the workers.*{type(error).__name__}.*the same command continues",
    ):
        ended_by(error)


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (StorageError("Cannot list s3://b/run: Service Unavailable"), OutOfReachError),
        (NotFoundError("Cannot read s3://b/data: it does not exist."), TrainingError),
        (ValueError("a mistake"), TrainingError),
    ],
)
def test_workers_that_lack_their_storage_are_told_from_others(
    cause: Exception, expected: type[TrainingError]
) -> None:
    failure = RuntimeError("the dataset failed")
    failure.__cause__ = cause
    with pytest.raises(TrainingError, match=r"could not be started or fed: \w+: ") as raised:
        ended_by(ray.train.ControllerError(failure))
    assert type(raised.value) is expected


def watched(monkeypatch: pytest.MonkeyPatch, tries: list[tuple[Any, Any]]) -> Any:
    """Settings of a run with these tries: the newest committed step afterwards, or why it cannot be read; and how the try ends."""
    newest: list[Any] = [0]

    def fit(_: object) -> object:
        committed, result = tries.pop(0)
        newest[0] = committed
        if isinstance(result, Exception):
            raise result
        return result

    def newest_step(_: str) -> Any:
        if isinstance(newest[0], Exception):
            raise newest[0]
        return newest[0]

    monkeypatch.setattr(module, "_fit", fit)
    monkeypatch.setattr(module, "_new_trainer", lambda *_: None)
    monkeypatch.setattr(module, "_newest_step", newest_step)
    config = PretrainConfig(data="s3://b/data", out="s3://b/run", train=TrainConfig(max_failures=3))
    flag = SimpleNamespace(is_terminated=threading.Event())
    return SimpleNamespace(config=config, stop_flag=flag, reporter=None)


def test_an_outage_of_the_storage_is_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    away = OutOfReachError("the workers could not be started or fed")
    out_of_reach = StorageError("Cannot list s3://b/run")
    done = WorkerOutcome(step=9, world_size=2)
    first = [(out_of_reach, away)] * 3
    settings = watched(monkeypatch, [*first, (9, done)])
    assert module._train_until_done(settings, "notes") is done
    # It lasts too long.
    settings = watched(monkeypatch, [*first, (out_of_reach, away), (9, done)])
    with pytest.raises(OutOfReachError):
        module._train_until_done(settings, "notes")
    # After new checkpoints, another one has as many tries.
    settings = watched(monkeypatch, [*first[:2], (4, away), *first[:2], (9, done)])
    assert module._train_until_done(settings, "notes") is done


def test_errors_of_ours_in_the_controller_stay_what_they_are() -> None:
    remote = ray.exceptions.RayTaskError("f", "traceback", ConfigError("data: wrong"))
    with pytest.raises(ConfigError) as raised:
        ended_by(cast(Exception, remote.as_instanceof_cause()))
    assert isinstance(raised.value, MoleBlendError)
