"""Workers that come and go with their nodes: no step is lost or different."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import elastic_run
import pytest
import ray
from in_process import pretrain_in_process
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
)
from synthetic import write_dataset

from moleblend_ray.orchestration.pretraining.elastic import (
    GracefulElasticPolicy,
    count_workers,
)
from moleblend_ray.orchestration.pretraining.fixed_workers import StoppableFixedPolicy
from moleblend_ray.orchestration.pretraining.stopping import StopFlag, StoppedWhileWaitingError
from moleblend_ray.training.metrics import read_records

TIMEOUT_S = 400


@dataclass(frozen=True)
class ElasticRun:
    """A run of `elastic_run.py`, which may still be going on."""

    data: str
    out: str
    process: subprocess.Popen[str]

    @classmethod
    def start(cls, folder: Path, *mode: str) -> ElasticRun:
        data, out = (f"file://{folder}/{name}" for name in ("data", "run"))
        write_dataset(data, 300, shard_rows=60, row_group_rows=32, max_conformers=2)
        command = [sys.executable, elastic_run.__file__, data, out, *mode]
        # Nodes of its cluster announce their end, other than that of the other tests' cluster.
        environment = {**os.environ, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1"}
        with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
            process = subprocess.Popen(
                command, stdout=stdout, stderr=stderr, text=True, env=environment
            )
        return cls(data, out, process)

    def told(self) -> dict[str, Any]:
        """What it tells at its end."""
        folder = Path(self.out.removeprefix("file://")).parent
        try:
            code = self.process.wait(TIMEOUT_S)
        finally:
            self.process.kill()
        assert code == 0, (folder / "stderr").read_text()[-4000:]
        found: dict[str, Any] = json.loads((folder / "stdout").read_text().splitlines()[-1])
        return found


@pytest.fixture(scope="module")
def waiting_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ElasticRun]]:
    """Both kinds of runs that wait in vain, at the same time, each on a cluster of its own."""
    modes = ("fixed", "starved")
    runs = {mode: ElasticRun.start(tmp_path_factory.mktemp(mode), mode) for mode in modes}
    yield runs
    for run in runs.values():
        run.process.kill()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("waits_for", "limit_s"), [("fixed", 20), ("starved", 60)])
def test_a_run_of_two_workers_that_waits_after_a_loss_ends_at_sigterm(
    waiting_runs: dict[str, ElasticRun], waits_for: str, limit_s: float
) -> None:
    found = waiting_runs[waits_for].told()
    assert not found["summary"]["finished"]
    # What was committed is what the next command begins with.
    assert 0 < found["summary"]["steps"] == found["newest"] < elastic_run.NUM_STEPS
    assert found["waited_s"] < limit_s


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_goes_on_through_a_drained_a_new_and_a_lost_node(tmp_path: Path) -> None:
    run = ElasticRun.start(tmp_path)
    # Meanwhile, as it often waits for nodes.
    expected = pretrain_in_process(elastic_run.settings(run.data, "unused"))
    found = run.told()
    assert found["summary"]["finished"]
    assert found["summary"]["steps"] == elastic_run.NUM_STEPS
    sizes = found["world_sizes"]
    assert [size for size, _ in groupby(sizes.values())] == [2, 1, 2, 1]
    records = read_records(run.out)
    assert [record["step"] for record in records] == list(range(elastic_run.NUM_STEPS))
    for ours, theirs in zip(records, expected, strict=True):
        assert ours["molecules_checksum"] == theirs["molecules_checksum"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), ours["step"]


GPU_NODE = {"CPU": 8.0, "GPU": 4.0}
GPU_WORKER = {"CPU": 2.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("nodes", "worker", "actors", "expected"),
    [
        ([GPU_NODE, GPU_NODE, {"CPU": 4.0}], GPU_WORKER, (4, 1.0), 8),
        # Three CPUs less than all workers and actors need.
        ([GPU_NODE, GPU_NODE, {"CPU": 1.0}], GPU_WORKER, (4, 1.0), 4),
        # Seven GPUs are there, of which four divide the streams.
        ([GPU_NODE, {"CPU": 32.0, "GPU": 3.0}], GPU_WORKER, (4, 1.0), 4),
        ([{"CPU": 1.0}] * 3, {"CPU": 1.0}, (1, 1.0), 2),
        ([{"CPU": 1.0}] * 2, {"CPU": 1.0}, (1, 1.0), 1),
        ([{"CPU": 1.0}], {"CPU": 1.0}, (1, 1.0), 0),
        # 1.8 CPUs are left, of which floats make 1.7999999999999998.
        ([{"CPU": 4.0}], {"CPU": 0.9}, (2, 1.1), 2),
        # A worker must fit on one node.
        ([{"CPU": 1.0}] * 8, {"CPU": 2.0}, (1, 1.0), 0),
        ([], {"CPU": 1.0}, (1, 1.0), 0),
    ],
)
def test_as_many_workers_start_as_leave_room_for_the_data_actors(
    nodes: Any, worker: Any, actors: tuple[int, float], expected: int
) -> None:
    assert count_workers(nodes, worker, (1, 2, 4, 8), *actors) == expected


class Flag(StopFlag):
    """In this process; ray.get must give back what it gets."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ask(self, reason: str) -> None:
        self.asked.append(reason)

    def pending_reason(self) -> str:
        return "sigterm" if "sigterm" in self.asked else ""


class Group:
    num_workers = 2


def policy_that_sees(monkeypatch: pytest.MonkeyPatch, sizes: list[int], flag: Flag) -> list[Any]:
    """The policy's decisions for a running group of two workers while the room is for ``sizes``, look after look."""
    policy = GracefulElasticPolicy(None, (1, 2, 4), (1, 1.0), flag, "run")
    looks = iter(sizes)

    def look(self: Any, state: Any, status: Any) -> Any:
        self._latest_monitor_time += 1.0
        size = next(looks)
        return ResizeDecision(size, {}) if size != state.num_workers else NoopDecision()

    monkeypatch.setattr(ElasticScalingPolicy, "make_decision_for_running_worker_group", look)
    policy._latest_monitor_time = 0.0
    return [policy.make_decision_for_running_worker_group(Group, None) for _ in sizes]


def test_room_for_more_workers_asks_the_running_ones_to_leave_only_if_it_lasts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flag = Flag()
    decisions = policy_that_sees(monkeypatch, [4, 2, 4, 2, 2, 4], flag)
    assert flag.asked == []
    decisions += policy_that_sees(monkeypatch, [4, 4], flag)
    assert flag.asked == ["resize"]
    assert all(isinstance(decision, NoopDecision) for decision in decisions)


def test_workers_that_took_the_place_of_the_data_actors_are_resized_though_they_do_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flag = Flag()
    *before, last = policy_that_sees(monkeypatch, [1] * 6, flag)
    assert all(isinstance(decision, NoopDecision) for decision in before)
    assert isinstance(last, ResizeDecision)
    assert last.num_workers == 1
    assert flag.asked[0] == "resize"
    assert flag.asked[-1] == ""  # the new group must not leave at once


def test_a_new_group_is_not_asked_what_the_one_before_was(monkeypatch: pytest.MonkeyPatch) -> None:
    flag = Flag()
    policy = GracefulElasticPolicy(None, (1, 2), (1, 1.0), flag, "run")
    decisions = iter([NoopDecision(), ResizeDecision(2, {})])
    monkeypatch.setattr(ray, "get", lambda reason, timeout: reason)
    monkeypatch.setattr(
        ElasticScalingPolicy,
        "make_decision_for_non_running_worker_group",
        lambda _: next(decisions),
    )
    policy.make_decision_for_non_running_worker_group()
    assert flag.asked == []
    policy.make_decision_for_non_running_worker_group()
    assert flag.asked == [""]


def test_sigterm_ends_a_wait_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    flag = Flag()
    policy = GracefulElasticPolicy(None, (1, 2), (1, 1.0), flag, "run")
    monkeypatch.setattr(
        ElasticScalingPolicy,
        "make_decision_for_non_running_worker_group",
        lambda _: NoopDecision(),
    )
    monkeypatch.setattr(ray, "get", lambda reason, timeout: reason)
    policy.make_decision_for_non_running_worker_group()
    flag.ask("sigterm")
    with pytest.raises(StoppedWhileWaitingError, match="SIGTERM"):
        policy.make_decision_for_non_running_worker_group()


def test_sigterm_ends_a_wait_of_a_fixed_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    flag = Flag()
    policy = StoppableFixedPolicy(None, flag)
    started = ResizeDecision(2, {})
    monkeypatch.setattr(ray, "get", lambda reason, timeout: reason)
    monkeypatch.setattr(
        FixedScalingPolicy, "make_decision_for_non_running_worker_group", lambda _: started
    )
    assert policy.make_decision_for_non_running_worker_group() is started
    flag.ask("sigterm")
    with pytest.raises(StoppedWhileWaitingError, match="SIGTERM"):
        policy.make_decision_for_non_running_worker_group()
