"""Which clusters are refused, and which are waited for."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import ray
import ray._private.state
import ray.experimental.internal_kv

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.errors import ConfigError
from moleblend_ray.orchestration import cluster_checks


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
    cluster_checks.require_resources({"CPU": 4.0}, "2 workers")
    with pytest.raises(
        ConfigError,
        match=r"2 workers need 4\.5 CPU \(the cluster has 4\), 2 GPU \(the cluster has 0\)",
    ):
        cluster_checks.require_resources({"CPU": 4.5, "GPU": 2}, "2 workers")


def test_a_cluster_that_may_grow_is_waited_for(
    attached: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cluster_checks, "may_grow", lambda: True)
    cluster_checks.require_resources({"CPU": 40}, "40 workers")
    assert "40 workers need 40 CPU (the cluster has 4)" in caplog.text


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
