"""Which clusters are refused, and which are waited for."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray._private.state
import ray.experimental.internal_kv

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.errors import ConfigError
from moleblend_ray.orchestration.cluster import cluster_checks
from moleblend_ray.orchestration.cluster.cluster_checks import Need, require_room
from moleblend_ray.orchestration.pretraining import pretrain


def test_gpus_that_nobody_asked_for_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cluster_checks, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    with caplog.at_level(logging.WARNING):
        cluster_checks.warn_of_unused_gpus(ClusterConfig(use_gpu=True))
        assert caplog.messages == []
        cluster_checks.warn_of_unused_gpus(ClusterConfig())
    assert "2 GPUs and this job uses none: add cluster=gpu" in caplog.messages[0]


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of two live nodes and a dead one, without an autoscaler."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "memory": 1e9})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": alive} for alive in (True, False, True)])
    monkeypatch.setattr(cluster_checks, "may_grow", lambda: False)


def test_a_cluster_too_small_is_refused_naming_need_and_what_is_there(attached: None) -> None:
    require_room(Need("2 workers", {"CPU": 4.0}))
    with pytest.raises(
        ConfigError,
        match=r"2 workers need 4\.5 CPU, 2 GPU at the same time \(the cluster has 4 CPU, 0 GPU\)",
    ):
        require_room(Need("2 workers", {"CPU": 4.5, "GPU": 2}))


def test_a_cluster_that_may_grow_is_waited_for(
    attached: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cluster_checks, "may_grow", lambda: True)
    require_room(Need("40 workers", {"CPU": 40}))
    assert "40 workers need 40 CPU at the same time (the cluster has 4 CPU)" in caplog.text
    assert "If none come (`ray status` tells why), end this command. Add nodes" in caplog.text


def test_an_empty_cluster_is_waited_for_with_one_warning_that_names_everything(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(cluster_checks, "may_grow", lambda: True)
    monkeypatch.setattr(pretrain, "require_shared_paths", lambda paths: None)
    labels = {"worker_labels": {"role": "train"}, "data_labels": {"role": "data"}}
    for chosen in ({}, labels):
        cluster: Any = {"num_workers": 2, "use_gpu": True, **chosen}
        pretrain._require_fitting_cluster(
            PretrainConfig(data="s3://b/data", out="s3://b/run", cluster=ClusterConfig(**cluster))
        )
    plain, labelled = caplog.messages
    assert "2 workers and 1 data actors need 3 CPU, 2 GPU at the same time" in plain
    assert "cluster.worker_labels: no node" in labelled
    assert "role=train, where 2 workers need 2 CPU, 2 GPU (labels of its nodes: none)" in labelled
    assert "cluster.data_labels: no node" in labelled
    assert "role=data, where 1 data actors need 1 CPU (" in labelled
    assert "at the same time" not in labelled
    assert labelled.endswith("with cluster.worker_labels=null cluster.data_labels=null")


def test_what_each_has_alone_may_not_be_there_for_both(attached: None) -> None:
    alone = (Need("workers", {"CPU": 3.0}), Need("actors", {"CPU": 3.0}))
    require_room(*alone)
    with pytest.raises(ConfigError, match=r"^cluster: both need 6 CPU at the same time"):
        require_room(*alone, together=Need("both", {"CPU": 6.0}))


@pytest.mark.parametrize(
    ("report", "version", "expected"),
    [
        (None, "0", False),  # no autoscaler, or a monitor of version 2 that only looks
        ('{"autoscaler_report": {"active_nodes": {"node_e24a": 1}}}', "0", False),  # of version 1
        ('{"autoscaler_report": {"active_nodes": {"headgroup": 1}}}', "0", True),
        (None, "2", True),  # of version 2, with a head node alone
    ],
)
def test_both_versions_of_the_autoscaler_are_recognized(
    monkeypatch: pytest.MonkeyPatch, report: str | None, version: str, expected: bool
) -> None:
    status = SimpleNamespace(stats=SimpleNamespace(autoscaler_version=version))
    context = SimpleNamespace(gcs_address="head:6379")
    monkeypatch.setattr(ray._private.state.state, "get_cluster_config", lambda: None)
    monkeypatch.setattr(
        ray.experimental.internal_kv, "_internal_kv_get", lambda _: report and report.encode()
    )
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(cluster_checks, "get_cluster_status", {"head:6379": status}.__getitem__)
    assert cluster_checks.may_grow() is expected


def test_local_paths_are_refused_on_several_machines(
    attached: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_checks.require_shared_paths({"data": "s3://bucket/data", "out": "file:///mnt/run"})
    with pytest.raises(ConfigError, match=r"^out=/tmp/run: a local path, but .* 2 nodes"):
        cluster_checks.require_shared_paths({"data": "s3://bucket/data", "out": "/tmp/run"})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}])
    cluster_checks.require_shared_paths({"out": "/tmp/run"})
