"""Which nodes do what, and what an autoscaler is asked for where there are none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import growing_run
import placement_run
import pytest
import ray
from synthetic import write_dataset

from moleblend_ray.data.config import StreamConfig
from moleblend_ray.errors import ConfigError
from moleblend_ray.orchestration.cluster import cluster_checks
from moleblend_ray.orchestration.cluster.cluster_checks import Need, require_room
from moleblend_ray.orchestration.cluster.session import GIB
from moleblend_ray.orchestration.pretraining.elastic import GracefulElasticPolicy
from moleblend_ray.orchestration.streaming.stream import most_actors, object_store_budget

TIMEOUT_S = 300
DATA, TRAIN = placement_run.DATA, placement_run.TRAIN


@pytest.mark.ray
@pytest.mark.slow
def test_workers_and_data_actors_ask_for_nodes_of_their_own_and_stay_on_them(
    tmp_path: Path,
) -> None:
    data, out = (f"file://{tmp_path}/{name}" for name in ("data", "run"))
    write_dataset(data, 300, shard_rows=60, row_group_rows=32, max_conformers=2)
    done = subprocess.run(
        [sys.executable, placement_run.__file__, data, out],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["summary"]["finished"]
    # Two workers that come together, then two actors that may come one by one: never one in the place of the other.
    one_cpu = {"resources": {"CPU": 1.0}}
    assert found["for_workers"] == [{**one_cpu, "labels": TRAIN, "count": 1, "together": True}] * 2
    assert found["for_data"] == [{**one_cpu, "labels": DATA, "count": 2, "together": False}]
    actors = found["actors"]
    assert actors["RayTrainWorker"] == ["train"]
    assert actors["MapWorker(MapBatches(_BlockBuilder))"] == ["data"]
    # What outlives the nodes of workers and data stays with the driver.
    assert actors["TrainController"] == actors["SplitCoordinator"] == ["head"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_runs_more_trials_as_nodes_come_and_always_asks_for_one_more(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, growing_run.__file__, tmp_path],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # No node, a node of one CPU, another of two.
    assert found["stages"] == [[0, 1], [1, 1], [3, 1]]
    assert found["trials"] == growing_run.NUM_TRIALS


def node(
    cpus: float, labels: dict[str, str] | None, *, gpus: float = 0.0, store: float = 0.0
) -> dict[str, Any]:
    return {
        "Alive": True,
        "NodeID": f"{cpus}-{gpus}",
        "Labels": {"ray.io/node-id": "0", **(labels or {})},
        "Resources": {"CPU": cpus, "GPU": gpus, "object_store_memory": store},
    }


@pytest.fixture
def cluster_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the nodes that Ray seems to have; nothing adds any."""

    def fake(*nodes: dict[str, Any]) -> None:
        total = {
            name: sum(node["Resources"][name] for node in nodes if node["Alive"])
            for name in ("CPU", "GPU")
        }
        monkeypatch.setattr(ray, "nodes", lambda: list(nodes))
        monkeypatch.setattr(ray, "cluster_resources", lambda: total)
        monkeypatch.setattr(cluster_checks, "may_grow", lambda: False)

    return fake


def test_labels_that_no_live_node_carries_are_refused_with_those_that_are_there(
    cluster_of: Any,
) -> None:
    cluster_of(node(8, {"role": "cpu"}), {**node(4, DATA), "Alive": False}, node(1, None))
    with pytest.raises(
        ConfigError,
        match=r"cluster\.data_labels: no node .* label moleblend-role=data \(labels of its nodes: role=cpu\)"
        r": the work would wait for ever\. Label nodes .* cluster\.data_labels=null",
    ):
        require_room(Need("prepare", {}, DATA, "data_labels"))
    require_room(Need("prepare", {}, {"role": "cpu"}, "data_labels"))
    require_room(Need("prepare", {}, None, "data_labels"))


def test_room_elsewhere_in_the_cluster_does_not_count(cluster_of: Any) -> None:
    cluster_of(node(8, TRAIN, gpus=4), node(2, DATA))
    require_room(Need("all", {"CPU": 10, "GPU": 4}), Need("2 data actors", {"CPU": 2}, DATA))
    with pytest.raises(
        ConfigError,
        match=r"4 data actors need 4 CPU at the same time \(its nodes with moleblend-role=data have 2 CPU\)",
    ):
        require_room(Need("4 data actors", {"CPU": 4}, DATA))


@pytest.mark.parametrize(
    ("reserved", "labels", "expected"),
    [
        (4.0, None, 8),  # 12 CPUs, 4 of them for workers
        (4.0, DATA, 4),  # what the nodes of data have; workers take none of it
        (10.0, DATA, 2),  # fewer, if workers were counted on some of these CPUs
        (4.0, {"no": "node"}, 1),  # the least number waits for a node
    ],
)
def test_data_actors_grow_into_the_nodes_they_may_use(
    cluster_of: Any, reserved: float, labels: dict[str, str] | None, expected: int
) -> None:
    cluster_of(node(8, TRAIN, gpus=4), node(4, DATA))
    stream = StreamConfig(min_actors=1, actor_cpus=1.0)
    assert most_actors(stream, reserved, labels) == expected


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (None, 0.3 * 22),
        # Not the 16 of the nodes of workers: blocks wait where they were built.
        (DATA, 0.3 * 4),
        # As if the node that an autoscaler will add were the smallest that is there.
        ({"no": "node"}, 0.3 * 2),
    ],
)
def test_blocks_take_a_share_of_the_stores_in_which_they_wait(
    cluster_of: Any, labels: dict[str, str] | None, expected: float
) -> None:
    train = [node(8, TRAIN, gpus=4, store=8 * GIB)] * 2
    cluster_of(node(0, None, store=2 * GIB), node(4, DATA, store=4 * GIB), *train)
    budget = object_store_budget(StreamConfig(), labels)
    assert budget / GIB == pytest.approx(expected)
    assert object_store_budget(StreamConfig(object_store_gib=5.0), labels) == 5 * GIB


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        # 4 + 4 CPUs, and 4 data actors.
        ((None, None), 4),
        # The actors have their own node, so all of the other is for workers.
        ((TRAIN, DATA), 4),
        # Workers may not use the node of data, but share theirs with actors that run anywhere: these fit elsewhere.
        ((TRAIN, None), 4),
        # Actors that may only run beside the workers.
        ((TRAIN, TRAIN), 0),
        ((DATA, TRAIN), 4),
    ],
)
def test_an_elastic_group_counts_the_nodes_its_workers_may_use(
    cluster_of: Any,
    monkeypatch: pytest.MonkeyPatch,
    labels: tuple[dict[str, str] | None, dict[str, str] | None],
    expected: int,
) -> None:
    cluster_of(node(4, TRAIN), node(4, DATA))
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", dict)
    monkeypatch.setattr(
        "moleblend_ray.orchestration.pretraining.elastic.ElasticScalingPolicy._count_possible_workers",
        lambda *_: 8,
    )
    policy = GracefulElasticPolicy(
        SimpleNamespace(_resources_per_worker_not_none={"CPU": 1.0}),  # of a worker
        (1, 2, 4, 8),
        (4, 1.0),
        None,  # type: ignore[arg-type]
        "run",
        labels,
    )
    assert policy._count_possible_workers({}) == expected
