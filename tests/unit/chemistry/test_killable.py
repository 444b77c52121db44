"""The child process is killed at its deadline, replaced after a crash, and never outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from moleblend_ray.chemistry.killable import (
    KillableWorker,
    WorkerCrashedError,
    WorkerStartError,
    WorkerTimeoutError,
)

# Answers with the result of `eval`; `sum(range(10**12))` blocks the interpreter practically for ever.
PROGRAM = "import os, signal, time; from moleblend_ray.chemistry.killable import serve; serve(eval)"


@pytest.fixture
def worker() -> Iterator[KillableWorker]:
    worker = KillableWorker(("-c", PROGRAM))
    yield worker
    worker.close()


def is_running(pid: int) -> bool:
    """Whether the process runs; not so for a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_running(pid)


def test_one_warm_child_answers_request_after_request(worker: KillableWorker) -> None:
    first = worker.call("os.getpid()", 5.0)
    assert [worker.call(f"{k} + 1", 5.0) for k in range(100)] == list(range(1, 101))
    assert worker.call("os.getpid()", 5.0) == first == worker.pid
    assert first != os.getpid()


def test_a_request_and_answer_larger_than_any_pipe_come_through(worker: KillableWorker) -> None:
    text = "x" * 3_000_000
    assert worker.call(repr(text), 20.0) == text


def test_a_request_that_hangs_ends_at_its_deadline_and_the_next_is_answered(
    worker: KillableWorker,
) -> None:
    child = worker.call("os.getpid()", 5.0)
    started = time.monotonic()
    with pytest.raises(WorkerTimeoutError):
        worker.call("sum(range(10**12))", 0.2)
    assert 0.2 <= time.monotonic() - started < 0.7
    assert not os.path.exists(f"/proc/{child}")  # killed and reaped: no zombie
    assert worker.call("1 + 1", 5.0) == 2


def test_a_stopped_child_does_not_hold_up_its_parent(worker: KillableWorker) -> None:
    os.kill(worker.call("os.getpid()", 5.0), signal.SIGSTOP)
    with pytest.raises(WorkerTimeoutError):
        worker.call(repr("x" * 3_000_000), 0.2)


def test_a_child_that_dies_at_a_request_is_asked_once_more_and_then_reported(
    worker: KillableWorker,
) -> None:
    with pytest.raises(WorkerCrashedError, match="SIGSEGV"):
        worker.call("os.kill(os.getpid(), signal.SIGSEGV)", 5.0)
    with pytest.raises(WorkerCrashedError, match="exit status 3"):
        worker.call("os._exit(3)", 5.0)
    assert worker.call("1 + 1", 5.0) == 2


def test_a_child_killed_from_outside_during_work_costs_no_answer(worker: KillableWorker) -> None:
    child = worker.call("os.getpid()", 5.0)
    killer = threading.Timer(0.1, os.kill, (child, signal.SIGKILL))
    killer.start()
    assert worker.call("time.sleep(0.5) or os.getpid()", 5.0) != child
    killer.join()


def test_what_the_child_prints_does_not_get_between_the_answers(worker: KillableWorker) -> None:
    assert worker.call("os.write(1, b'noise') and 7", 5.0) == 7
    assert worker.call("8", 5.0) == 8


def test_a_program_that_cannot_start_is_an_error_that_says_so() -> None:
    with pytest.raises(WorkerStartError, match=r"no_such_module.*exit status 1"):
        KillableWorker(("-m", "no_such_module")).call("1", 1.0)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit()"])
def test_a_working_child_ends_with_its_parent_however_that_ends(end: str) -> None:
    parent = (
        "import os, signal, sys, threading, time\n"
        "from moleblend_ray.chemistry.killable import KillableWorker\n"
        f"worker = KillableWorker(('-c', {PROGRAM!r}))\n"
        "print(worker.call('os.getpid()', 5.0), flush=True)\n"
        "hang = threading.Thread(target=worker.call, args=('sum(range(10**12))', 60.0), daemon=True)\n"
        "hang.start()\n"
        "time.sleep(0.2)\n" + end
    )
    done = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, check=False, timeout=30
    )
    assert wait_until_gone(int(done.stdout))


def test_a_child_outlives_the_thread_that_started_it(worker: KillableWorker) -> None:
    pids: list[int] = []
    thread = threading.Thread(target=lambda: pids.append(worker.call("os.getpid()", 5.0)))
    thread.start()
    thread.join()
    time.sleep(0.1)
    assert worker.call("os.getpid()", 5.0) == pids[0]
