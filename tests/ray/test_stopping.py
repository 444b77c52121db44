"""Who is asked to leave, and why."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup

from moleblend_ray.orchestration.pretraining import stopping
from moleblend_ray.orchestration.pretraining.stopping import (
    StoppedWhileWaitingError,
    StopPoll,
    _StopFlag,
)


class Flag:
    """A handle whose answers are always there."""

    def pending_reason(self) -> str:
        return "pending"


def poll_of(monkeypatch: pytest.MonkeyPatch, answers: list[Any]) -> StopPoll:
    """A poll to which the flag answers so, in turn."""
    coming: Iterator[Any] = iter(answers)

    def get(pending: str) -> str:
        answer = next(coming)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(ray, "wait", lambda pending, timeout: (pending, []))
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(stopping, "_is_draining", lambda: False)
    return StopPoll(Flag())  # type: ignore[arg-type]


def test_a_lost_stop_flag_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    should_stop = poll_of(monkeypatch, [ray.exceptions.RayActorError(), "", "sigterm"])
    assert [should_stop() for _ in range(4)] == [False, False, True, True]
    assert should_stop.reason == "sigterm"


def test_a_flag_that_was_started_anew_takes_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    should_stop = poll_of(monkeypatch, ["resize", "", ""])
    assert [should_stop() for _ in range(3)] == [True, True, True]
    assert should_stop.reason == "resize"


@pytest.mark.parametrize("weaker", ["resize", "drain"])
def test_sigterm_comes_before_other_reasons(monkeypatch: pytest.MonkeyPatch, weaker: str) -> None:
    should_stop = poll_of(monkeypatch, [weaker, "sigterm"])
    assert [should_stop() for _ in range(2)] == [True, True]
    assert should_stop.reason == "sigterm"
    flag = _StopFlag()
    flag.ask("sigterm")
    flag.ask("resize")
    flag.ask("")
    assert flag.reason() == "sigterm"


def test_sigterm_ends_a_wait_for_data_but_not_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    poll = poll_of(monkeypatch, ["", "sigterm"])
    for waited_s in (1.0, 9.0, 11.0):
        poll.end_wait(waited_s)  # nobody has asked for a stop yet
    with pytest.raises(StoppedWhileWaitingError, match=r"no data for the next step in 12 s"):
        poll.end_wait(12.0)
    just_asked = poll_of(monkeypatch, ["sigterm"])
    just_asked.end_wait(2.0)


@pytest.mark.parametrize("weaker", ["resize", "drain"])
def test_other_reasons_do_not_end_a_wait_for_data(
    monkeypatch: pytest.MonkeyPatch, weaker: str
) -> None:
    poll_of(monkeypatch, [weaker]).end_wait(60.0)


def test_only_the_waiting_groups_of_this_job_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    this, other = "02000000", "01000000"
    groups = {
        f"{number:028x}{job}": {"state": state}
        for number, (job, state) in enumerate(
            [(this, "PENDING"), (this, "CREATED"), (this, "RESCHEDULING"), (other, "PENDING")]
        )
    }
    removed: list[PlacementGroup] = []
    context = SimpleNamespace(get_job_id=lambda: this)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(stopping, "placement_group_table", lambda: groups)
    monkeypatch.setattr(stopping, "remove_placement_group", removed.append)
    stopping._remove_waiting_groups()
    assert [group.id.hex() for group in removed] == [next(iter(groups))]


def test_a_draining_node_asks_without_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    should_stop = poll_of(monkeypatch, ["", ""])
    monkeypatch.setattr(stopping, "_is_draining", lambda: True)
    assert should_stop()
    assert should_stop.reason == "drain"
