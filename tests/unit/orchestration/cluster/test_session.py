"""A private cluster's size, and the settings it leaves behind."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
import ray._private.state
import ray.experimental.internal_kv
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.data import DataContext
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR
from ray.util.client import ray as ray_client

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.errors import ConfigError, MoleBlendError
from moleblend_ray.orchestration.cluster import session


def test_every_worker_and_actor_fits_however_small_the_machine() -> None:
    cluster = ClusterConfig(num_workers=40, cpus_per_worker=1.5, num_data_actors=3)
    assert session.logical_cpus(cluster) == 60 + 3 + 1
    assert session.logical_cpus(cluster, data_cpus=10.5) == 60 + 11 + 1
    assert session.logical_cpus(ClusterConfig(local_cpus=2)) == 2


def test_only_clusters_whose_nodes_can_be_taken_away_are_watched_for_it() -> None:
    # A name that Ray no longer knows would change nothing.
    name = ENABLE_PREEMPTION_WATCHER_ENV_VAR
    assert session._private_settings()[name] == "0"
    assert name not in session._QUIET_SETTINGS  # of a cluster that a command joins


def test_the_object_store_is_what_was_asked_for_else_a_share_of_the_memory() -> None:
    assert session.object_store_bytes(ClusterConfig(object_store_gib=0.5)) == session.GIB // 2
    assert session.GIB // 4 <= session.object_store_bytes(ClusterConfig()) <= 8 * session.GIB


@pytest.mark.parametrize("answers", [False, True], ids=["nobody", "another program"])
def test_a_cluster_that_does_not_answer_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    asked: list[str] = []

    def refuse(*, address: str, **_: object) -> None:
        asked.append(address)
        raise ConnectionError("no answer")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(session, "_ANSWER_S", 0.1)
    monkeypatch.setattr(session, "resolve_ip_for_localhost", lambda host: host)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if not answers:
            server.close()
        with (
            pytest.raises(ConfigError, match=rf"no Ray cluster answers at '{address}'"),
            session.ray_session(ClusterConfig(address=address)),
        ):
            pass
    # It would try for a quarter of an hour where nobody listens.
    assert asked == ([address] if answers else [])


def test_ray_client_is_refused_before_it_fails_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def enter(address: str | None) -> None:
        with session.ray_session(ClusterConfig(address=address)):
            pass

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"Ray Client .* not supported, found 'ray://head:10001'"):
        enter("ray://head:10001")
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(ConfigError, match=r"Ray Client .*moleblend submit"):
        enter(None)
    monkeypatch.setattr(ray_client, "is_connected", lambda: True)
    with pytest.raises(ConfigError, match=r"this process is connected by ray\.init"):
        enter("auto")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [("The current node timed out during startup.", MoleBlendError), ("another", RuntimeError)],
)
def test_a_machine_too_busy_for_ray_to_start_is_told(
    monkeypatch: pytest.MonkeyPatch, raised: str, expected: type[Exception]
) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError(raised)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    with (
        pytest.raises(expected, match="machine is busy" if expected is MoleBlendError else raised),
        session.ray_session(ClusterConfig(address="local")),
    ):
        pass


@pytest.fixture
def cluster_events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What becomes of the private cluster of a session; none is really started."""
    events: list[str] = []

    def start(*_: object) -> None:
        # As Ray does, and Ray Tune.
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGUSR1, lambda *_: None)
        os.environ["PYTHONBREAKPOINT"] = "ray.util.rpdb._driver_set_trace"
        events.append("start")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("PYTHONBREAKPOINT", raising=False)
    monkeypatch.setattr(session, "_start", start)
    monkeypatch.setattr(session, "_libraries_quieted", contextlib.nullcontext)
    monkeypatch.setattr(ray, "is_initialized", lambda: events[-1:] == ["start"])
    monkeypatch.setattr(ray, "shutdown", lambda: events.append("end"))
    return events


def test_a_session_leaves_signals_and_the_environment_as_they_were(
    cluster_events: list[str],
) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = dict(os.environ), [signal.getsignal(number) for number in numbers]
    with session.ray_session(ClusterConfig()):
        pass
    assert cluster_events == ["start", "end"]
    assert (dict(os.environ), [signal.getsignal(number) for number in numbers]) == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_ray_data_and_tune_speak_again_after_the_last_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those who use them in the same process would miss their progress bars and reasons of failures."""

    def state() -> list[object]:
        context = DataContext.get_current()
        levels = [logging.getLogger(name).level for name in session._QUIET_LEVELS]
        return [context.enable_progress_bars, context.print_on_execution_start, *levels]

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(DataContext.get_current(), "enable_progress_bars", True)
    before, quiet = state(), [False, False, *session._QUIET_LEVELS.values()]
    first, second = (contextlib.ExitStack() for _ in range(2))
    first.enter_context(session.ray_session(ClusterConfig()))
    second.enter_context(session.ray_session(ClusterConfig()))
    first.close()  # as of another thread
    assert state() == quiet
    second.close()
    assert state() == before != quiet


def test_the_agent_of_a_private_cluster_gets_a_port_that_no_other_cluster_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ports = []
    monkeypatch.setattr(Node, "start_raylet", lambda node, *_: ports.append(_port_of(node)))
    usual = cast("Node", SimpleNamespace(_ray_params=RayParams()))
    node = cast("Node", SimpleNamespace(_ray_params=RayParams()))
    with session.quick_start():
        Node.start_raylet(node, "plasma", "fallback", 1)
    Node.start_raylet(usual, "plasma", "fallback", 1)
    assert ports == [0, 52365]


def _port_of(node: Any) -> int:
    port: int = node._ray_params.dashboard_agent_listen_port
    return port


def test_only_the_start_of_a_private_cluster_leaves_processes_out() -> None:
    # Methods that Ray no longer has would leave nothing out.
    before = {name: getattr(Node, name) for name in session._UNNEEDED}
    with session.quick_start():
        assert [getattr(Node, name)(None, some=1) for name in session._UNNEEDED] == [None] * 3
    assert {name: getattr(Node, name) for name in session._UNNEEDED} == before


def test_a_cluster_ends_with_the_last_command_that_uses_it(
    cluster_events: list[str],
) -> None:
    joined, may_leave = threading.Event(), threading.Event()

    def join() -> None:
        with session.ray_session(ClusterConfig()):
            joined.set()
            may_leave.wait(10)

    events = cluster_events
    other = threading.Thread(target=join)
    with session.ray_session(ClusterConfig()):
        other.start()
        assert joined.wait(10)
    assert events == ["start"]
    may_leave.set()
    other.join()
    assert events == ["start", "end"]
    with session.ray_session(ClusterConfig()):
        assert events == ["start", "end", "start"]


def test_the_thread_that_starts_a_cluster_lives_as_long_as_its_last_user(
    cluster_events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the thread, the kernel would end the processes that it started.
    starters: list[threading.Thread] = []
    start = session._start

    def note(*arguments: Any) -> None:
        monkeypatch.setattr(signal, "signal", lambda *_: None)  # It is for the main thread only.
        starters.append(threading.current_thread())
        start(*arguments)

    monkeypatch.setattr(session, "_start", note)
    joined, may_leave = threading.Event(), threading.Event()

    def first() -> None:
        with session.ray_session(ClusterConfig()):
            assert joined.wait(10)

    def second() -> None:
        with session.ray_session(ClusterConfig()):
            joined.set()
            may_leave.wait(10)

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    while not cluster_events:
        time.sleep(0.01)
    threads[1].start()
    threads[0].join()
    assert [thread.is_alive() for thread in starters] == [True]
    may_leave.set()
    threads[1].join()
    assert cluster_events == ["start", "end"]
    assert [thread.is_alive() for thread in starters] == [False]
