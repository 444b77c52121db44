"""What ends a pretraining run from outside is told in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray

from moleblend_ray.errors import ConfigError, MoleBlendError, TrainingError
from moleblend_ray.orchestration.pretraining.pretrain import _fit


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


def test_errors_of_ours_in_the_controller_stay_what_they_are() -> None:
    remote = ray.exceptions.RayTaskError("f", "traceback", ConfigError("data: wrong"))
    with pytest.raises(ConfigError) as raised:
        ended_by(cast(Exception, remote.as_instanceof_cause()))
    assert isinstance(raised.value, MoleBlendError)
