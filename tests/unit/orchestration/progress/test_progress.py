"""Reports from other processes reach the driver's log."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import ray

from moleblend_ray.orchestration.progress import progress
from moleblend_ray.orchestration.progress.progress import Reporter


def test_records_are_kept_until_the_driver_has_them() -> None:
    board = progress._Board()
    for number in range(3):
        board.log(30, "moleblend_ray", f"warning {number}", {})
    assert len(board.read("", 0).records) == 3
    # That answer was lost: the driver asks again, and what came meanwhile is there as well.
    board.log(30, "moleblend_ray", "warning 3", {})
    first = board.read("", 0)
    assert [record[2] for record in first.records] == [f"warning {n}" for n in range(4)]
    board.log(30, "moleblend_ray", "warning 4", {})
    assert [record[2] for record in board.read(first.board, 4).records] == ["warning 4"]
    assert board.read(first.board, 5).records == []
    # A board that was started anew has seen nothing of these, however many it has by now.
    anew = progress._Board()
    for number in range(5, 15):
        anew.log(30, "moleblend_ray", f"warning {number}", {})
    found = anew.read(first.board, 5)
    assert [record[2] for record in found.records] == [f"warning {n}" for n in range(5, 15)]
    assert anew.read(found.board, 10).records == []


def test_what_one_actor_shows_for_several_stays_apart_and_ends_with_each() -> None:
    boards = progress._Boards()
    boards.call("one", "update", {"done": 1})
    boards.call("other", "update", {"done": 2})
    boards.call("other", "log", 30, "moleblend_ray", "of the other", {})
    assert boards.call("one", "read", "", 0).values == {"done": 1}
    assert boards.call("one", "read", "", 0).records == []
    boards.close("one")
    # A process that nobody waits for any more.
    boards.call("one", "update", {"done": 9})
    assert boards.call("one", "read", "", 0) is None
    assert boards.call("other", "read", "", 0).values == {"done": 2}


def test_bodies_of_one_process_share_an_actor_that_ends_with_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[object] = []
    killed: list[object] = []

    def start() -> object:
        started.append(object())
        return started[-1]

    monkeypatch.setattr(progress, "_users", 0)
    monkeypatch.setattr(progress, "_actor", None)
    actor_class = SimpleNamespace(remote=start)
    monkeypatch.setattr(ray, "remote", lambda **_: lambda _: actor_class)
    monkeypatch.setattr(ray, "kill", killed.append)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with progress.one_board_actor():
        assert not started, "it is started when it is needed"
        first = progress._new_board()
        with progress.one_board_actor():
            second = progress._new_board()
        assert first._actor is second._actor is started[0]
        assert first._key != second._key
        assert not killed
    assert killed == started
    # The next cluster gets another one.
    with progress.one_board_actor():
        assert progress._new_board()._actor is started[1]
    assert killed == started


def test_secrets_of_a_node_do_not_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET_KEY", "wJalrXUtnFEMIbPx")
    sent: list[tuple[object, ...]] = []
    board = SimpleNamespace(log=SimpleNamespace(remote=lambda *record: sent.append(record)))
    forwarder = progress._Forwarder(board, "rank 0: ", logging.WARNING)
    monkeypatch.delenv("SOME_SECRET_KEY")
    try:
        raise ValueError("key wJalrXUtnFEMIbPx refused")
    except ValueError as error:
        caught = (ValueError, error, error.__traceback__)
    record = logging.LogRecord(
        "moleblend_ray", 30, __file__, 1, "with %s", ("wJalrXUtnFEMIbPx",), caught
    )
    forwarder.emit(record)
    assert "rank 0: with ***" in sent[0]
    assert "ValueError" in str(sent)
    assert "wJalr" not in str(sent)


class Board:
    """Stands in for the actor: keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[dict[str, object]] = []
        self.update = self

    def remote(self, values: dict[str, object]) -> None:
        self.sent.append(dict(values))


def test_reports_in_quick_succession_are_merged_and_the_last_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    awaited: list[object] = []
    monkeypatch.setattr(progress, "_await_arrival", awaited.append)
    board = Board()
    reporter = Reporter(board, min_interval_s=60.0)
    for done in range(1, 6):
        reporter({"done": done, "total": 5, f"value{done}": done})
    assert len(board.sent) == 2
    assert board.sent[0] == {"done": 1, "total": 5, "value1": 1}
    assert board.sent[1] == {"done": 5, "total": 5, **{f"value{n}": n for n in (2, 3, 4, 5)}}
    assert len(awaited) == 1, "only the last report waits"


def test_what_processes_count_moves_the_display_until_a_piece_is_reported() -> None:
    board = progress._Board()

    def shown() -> dict[str, float | int | str]:
        values, counts = progress._with_unfinished(board.read("", 0))
        assert counts == {"worker_groups": 1}
        return values

    board.count("worker_groups", 1)
    assert shown() == {}
    board.count("done", 64)
    board.count("done", 36)
    assert shown() == {"done": 100}
    # The piece of these is finished, and another one is at work.
    board.update({"done": 120, "quarantined": 3})
    assert shown() == {"done": 120, "quarantined": 3}
    board.count("done", 60)
    assert shown()["done"] == 160
    # A piece was begun again: its rows were counted twice.
    board.update({"done": 150, "total": 150})
    assert shown()["done"] == 150


def test_work_of_which_nothing_is_heard_is_told_ever_more_rarely_until_the_first_report(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    silence = progress._Silence("pretrain", 1000.0)
    for second in range(300):
        silence.observe(1000.0 + second, is_silent=True)
    silence.observe(1300.0, is_silent=False)
    for second in range(300, 2000):
        silence.observe(1000.0 + second, is_silent=True)
    told = [message.split(" s:")[0] for message in caplog.messages]
    assert told == [f"pretrain: nothing done after {seconds}" for seconds in (60, 120, 240)]
