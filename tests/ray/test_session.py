"""A session on a cluster: what it leaves as it was, what it refuses, and how its processes' records reach the driver."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.errors import ConfigError
from moleblend_ray.orchestration.cluster import cluster_checks, session
from moleblend_ray.orchestration.progress import progress
from moleblend_ray.orchestration.progress.progress import Progress, Reporter

pytestmark = pytest.mark.ray


def test_a_cluster_without_an_autoscaler_does_not_grow(ray_cluster: None) -> None:
    with pytest.raises(ConfigError, match="1000 workers need 1000 CPU"):
        cluster_checks.require_room(cluster_checks.Need("1000 workers", {"CPU": 1000}))


def test_a_session_inside_a_connected_process_leaves_the_connection(ray_cluster: None) -> None:
    before = dict(os.environ)
    with session.ray_session(ClusterConfig()):
        assert ray.is_initialized()
    assert ray.is_initialized()
    assert dict(os.environ) == before


@ray.remote(num_cpus=0)
def work(reporter: Reporter) -> None:
    reporter.forward_logs("rank 1: ")
    logging.getLogger("moleblend_ray.somewhere").warning("odd molecule %d", 5)
    for done in range(4):
        reporter({"done": done + 1, "total": 4, "loss": 0.25})


def test_reports_and_warnings_of_a_worker_are_logged_on_the_driver(
    ray_cluster: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "_SILENT_S", 0.0)
    with Progress("pretrain", unit="step") as shown:
        shown._show_newest(is_last=True)
        assert any("pretrain: nothing done after" in message for message in caplog.messages)
        ray.get(work.remote(shown.reporter))
    assert "rank 1: odd molecule 5" in caplog.messages
    assert "pretrain: 4/4 steps loss=0.25" in caplog.messages


def test_a_private_cluster_starts_after_one_of_the_caller_and_before_the_next(
    tmp_path: Path,
) -> None:
    """Also if the path of Python holds a space, with workers that have environment variables of their own."""
    script = """
import ray
from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.orchestration.cluster.session import ray_session

def start() -> None:
    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level=40)

def told() -> str:
    import os
    return os.environ["TOLD"]

start()
ray.shutdown()
with ray_session(ClusterConfig(address="local", local_cpus=1)):
    told = ray.remote(runtime_env={"env_vars": {"TOLD": "private"}})(told)
    print(ray.get(told.remote(), timeout=60))
start()
print("own")
"""
    prefix = tmp_path / "of two words"
    prefix.symlink_to(sys.prefix)
    python = prefix / Path(sys.executable).relative_to(sys.prefix)
    command = [str(python), "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["private", "own"]
