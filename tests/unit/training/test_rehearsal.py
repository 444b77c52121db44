"""A rehearsal measures what it says, in processes of its own, and tells why it could not."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import toy
from synthetic import write_dataset

from moleblend_ray.errors import TrainingError
from moleblend_ray.training.rehearsal import Found, Rehearsal, _summary, rehearse

SETTINGS = Rehearsal(
    data="",
    model=toy.MODEL,
    batch=8,
    micro_batch_size=8,
    strategy="fsdp",
    precision="fp32",
    workers=2,
    threads=1,
    message_bytes=10_000,
    steps=1,
    rounds=2,
)


@pytest.mark.slow
def test_two_processes_find_every_figure(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), 60, shard_rows=60)
    found = rehearse(replace(SETTINGS, data=str(tmp_path)))
    assert all(getattr(found, field.name) > 0 for field in fields(Found))
    assert found.step_s < 60
    assert found.actor_us < 1e5


@pytest.mark.slow
def test_a_process_that_fails_ends_all_and_its_reason_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"could not be measured: DataError: .*nowhere"):
        rehearse(replace(SETTINGS, data=str(tmp_path / "nowhere")))


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_too(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), 60, shard_rows=60)
    killed: list[int] = []

    def kill_one() -> None:
        while not killed:
            for process in multiprocessing.active_children():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)
                break
            time.sleep(0.05)

    killer = threading.Thread(target=kill_one)
    killer.start()
    began = time.monotonic()
    with pytest.raises(
        TrainingError, match="could not be measured: a process ended with status -9"
    ):
        rehearse(replace(SETTINGS, data=str(tmp_path)))
    killer.join()
    # The others would wait ten minutes for it.
    assert time.monotonic() - began < 300
    assert multiprocessing.active_children() == []


def test_rounds_are_compared_within_themselves() -> None:
    """A machine that gets slower from round to round changes the step, not how much slower two are than one."""
    rank = {
        "message": [1e-3] * 3,
        "large": [3e-3] * 3,
        "actor_us": [12.0],
        "trainer_host_us": [5.0],
    }
    first = {**rank, "alone": [1.0, 2.0, 4.0], "independent": [1.5, 3.0, 6.0]}
    second = {**rank, "alone": [0.0] * 3, "independent": [1.2, 3.0, 5.0]}
    found = _summary(SETTINGS, [first, second])
    assert (found.step_s, found.contention) == (2.0, 1.5)
    # Each of two workers sends its 10,000 bytes to the other, in 2 ms beside the latency.
    assert found.sent_bytes_per_s == pytest.approx(2 * 10_000 / 2e-3)


def test_one_worker_sends_nothing() -> None:
    rank = {"message": [0.0], "large": [0.0], "actor_us": [12.0], "trainer_host_us": [5.0]}
    times = {"alone": [2.0, 2.0], "independent": [2.0, 2.0]}
    found = _summary(replace(SETTINGS, workers=1), [{**rank, **times}])
    assert (found.step_s, found.contention) == (2.0, 1.0)
    assert (found.message_s, found.sent_bytes_per_s) == (None, None)


def test_each_step_waits_for_its_own_slowest_worker() -> None:
    """Two workers that are slow in turn make every step slow; the median of a round leaves out what came once."""
    rank = {"message": [1e-3], "large": [3e-3], "actor_us": [12.0], "trainer_host_us": [5.0]}
    first = {**rank, "alone": [1.0, 1.0, 9.0], "independent": [2.0, 1.0, 2.0]}
    second = {**rank, "alone": [0.0], "independent": [1.0, 2.0, 1.0]}
    found = _summary(replace(SETTINGS, steps=3, rounds=1), [first, second])
    assert (found.step_s, found.contention) == (1.0, 2.0)
