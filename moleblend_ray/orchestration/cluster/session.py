"""Attach to the Ray cluster of the configuration, or start a private one that ends with the command."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private.node import Node
from ray._private.services import resolve_ip_for_localhost
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.util.client import ray as ray_client

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.errors import ConfigError, MoleBlendError
from moleblend_ray.host import available_cpus
from moleblend_ray.orchestration.progress.progress import one_board_actor

logger = logging.getLogger(__name__)

GIB = 1024**3

_QUIET_SETTINGS = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Workers that reserve no GPU keep CUDA_VISIBLE_DEVICES: the future default of Ray, and without a warning.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

_PRIVATE_SETTINGS = {
    # Ray starts one process per CPU in advance. Workers and actors have environments of their own and cannot use these
    # processes, but would wait for the cores that start them.
    "RAY_prestart_worker_first_driver": "0",
    # With three times this number of processes Ray prints "N PYTHON worker processes have been started" on stdout.
    "RAY_worker_maximum_startup_concurrency": "32",
    # No node of such a cluster is ever announced to end. The actor of Ray Train that looks for it takes 2 s to start.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray's C++ code prints hints about Ray Data's actors on the user's screen. Failures are raised as exceptions.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}

_QUIET_LEVELS = {
    "ray.data": logging.WARNING,
    # It warns that there will be no progress bar, although that was asked for.
    "ray.data._internal.progress": logging.ERROR,
    # Tune would print the traceback of a failed trial; the reason is in the results and in our own log.
    "ray.tune": logging.CRITICAL,
}

_UNNEEDED = ("start_api_server", "start_monitor", "start_log_monitor")
"""Methods of Ray's node, each of which starts a process."""

# A private cluster listens on all interfaces of the machine (Ray turns 127.0.0.1 into its address) and accepts
# whoever has the token. It is in the environment, because Ray itself would keep it in a file in the user's home.
_TOKEN = secrets.token_hex(32)


_ANSWER_S = 15.0
"""Seconds in which a head node must accept a connection; one that just starts takes some."""

_users_lock = threading.Lock()
_users = 0
"""Bodies in this process, of several threads, that use the cluster which the first of them started or attached to."""
_end_of_cluster = contextlib.ExitStack()
_quiet_users = 0
_end_of_quiet = contextlib.ExitStack()


@contextlib.contextmanager
def ray_session(cluster: ClusterConfig, *, data_cpus: float | None = None) -> Iterator[None]:
    """Ray for the body: the connection of this process if there is one, else an attached or a private cluster.

    A private cluster has room for the workers and for data actors that reserve `data_cpus` CPUs in total (None: one per
    actor of `cluster.num_data_actors`). What is started or connected here is shut down here, after the bodies of other
    threads that joined it. A connection that existed before is left alone. In the end signals are handled as before, and Ray Data and
    Ray Tune say what they said before.
    """
    with signal_handlers_kept(), _connected(cluster, data_cpus), one_board_actor(), _quiet():
        yield


@contextlib.contextmanager
def _connected(cluster: ClusterConfig, data_cpus: float | None) -> Iterator[None]:
    global _users
    _refuse_ray_client(cluster)
    with _users_lock:
        is_ours = _users > 0 or not ray.is_initialized()
        if is_ours and not _users:
            _end_of_cluster.enter_context(_cluster(cluster, data_cpus))
        _users += is_ours
    try:
        yield
    finally:
        with _users_lock:
            _users -= is_ours
            if is_ours and not _users:
                _end_of_cluster.close()


def _refuse_ray_client(cluster: ClusterConfig) -> None:
    """ConfigError if the cluster would be reached through Ray Client, which lacks much of what Ray's libraries need."""
    address = cluster.address or os.environ.get("RAY_ADDRESS") or ""
    is_connected = ray_client.is_connected()  # type: ignore[no-untyped-call]
    if is_connected or (address.startswith("ray://") and not ray.is_initialized()):
        found = "this process is connected by ray.init" if is_connected else f"found {address!r}"
        raise ConfigError(
            f"cluster.address: Ray Client (ray://) is not supported, {found}. Have the cluster run the command (`moleblend "
            "submit`), or run it on a node of the cluster with address auto"
        )


@contextlib.contextmanager
def _cluster(cluster: ClusterConfig, data_cpus: float | None) -> Iterator[None]:
    """An attached or a private cluster for the body."""
    address = None if is_private(cluster) else cluster.address or os.environ["RAY_ADDRESS"]
    on_sigterm = signal.getsignal(signal.SIGTERM)
    settings = _QUIET_SETTINGS if address else _private_settings()
    with environment_defaults(settings), _token_read_anew(), _lasting_thread() as run:
        if address:
            _attach(address)
        else:
            run(partial(_start, cluster, logical_cpus(cluster, data_cpus)))
        try:
            _take_sigterm_back(on_sigterm)
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _lasting_thread() -> Iterator[Callable[[Callable[[], None]], None]]:
    """The given function calls another one in a thread that lives as long as the body, and waits for it.

    Linux ends the processes of a cluster with the thread that started them (Ray asks for this), and a thread of the caller's may
    end before others that use the cluster.
    """
    if threading.current_thread() is threading.main_thread():
        yield lambda call: call()
        return
    with ThreadPoolExecutor(1, thread_name_prefix="ray cluster") as thread:
        yield lambda call: thread.submit(call).result()


@contextlib.contextmanager
def _token_read_anew() -> Iterator[None]:
    """Let Ray read the token for the body, and again afterwards. It keeps the first that it reads in a process, which may be of a
    cluster that the caller had before, and no other cluster would know it."""
    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()
    try:
        yield
    finally:
        loader.reset_cache()


@contextlib.contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Handle SIGINT, SIGTERM and SIGUSR1 as before when the body is over.

    `ray.init`, Ray Train and Ray Tune leave handlers: Ctrl-C in a notebook would no longer interrupt, but ask a trainer or a search
    that is gone to stop.
    """
    is_main = threading.current_thread() is threading.main_thread()  # Others cannot set any.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) if is_main else ()
    before = [(number, signal.getsignal(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            if handler is not None:  # None: one of C, which Python cannot set again.
                signal.signal(number, handler)


def is_private(cluster: ClusterConfig) -> bool:
    """Whether the command starts a cluster of its own, which ends with it."""
    return (cluster.address or os.environ.get("RAY_ADDRESS") or "local") == "local"


def _take_sigterm_back(handler: Any) -> None:
    """Have SIGTERM handled by ``handler``, or by that of `ray.init` if it is none of Python.

    Ray's C++ code puts a handler of its own before that: it writes a stack trace, and ends a process that is still there three
    seconds later by SIGABRT, while it shuts down in order.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGTERM, handler if callable(handler) else signal.getsignal(signal.SIGTERM)
        )


def logical_cpus(cluster: ClusterConfig, data_cpus: float | None = None) -> int:
    """Logical CPUs of a private cluster: room for every worker, every actor and one task, whatever the machine has.

    On a machine with fewer cores the processes share them. The alternative would be to wait forever.
    """
    if cluster.local_cpus is not None:
        return cluster.local_cpus
    workers = cluster.num_workers * cluster.cpus_per_worker
    actors = cluster.num_data_actors if data_cpus is None else data_cpus
    return max(available_cpus(), math.ceil(workers + actors) + 1)


def object_store_bytes(cluster: ClusterConfig) -> int:
    """Bytes of shared memory for blocks in progress, never more than the machine's /dev/shm can hold."""
    if cluster.object_store_gib is not None:
        return int(cluster.object_store_gib * GIB)
    wanted = min(_memory_bytes() // 10, 8 * GIB)
    shared_memory = Path("/dev/shm")
    if shared_memory.is_dir():
        free = shutil.disk_usage(shared_memory).free
        # Containers often have 64 MB there. Ray then uses /tmp instead, and says so.
        if free >= GIB // 4:
            wanted = min(wanted, int(free * 0.8))
    return max(wanted, GIB // 4)


def _private_settings() -> dict[str, str]:
    access = {} if "RAY_AUTH_TOKEN_PATH" in os.environ else {"RAY_AUTH_TOKEN": _TOKEN}
    return _QUIET_SETTINGS | _PRIVATE_SETTINGS | access


def _attach(address: str) -> None:
    logger.info("attaching to the Ray cluster at %s", address)
    try:
        _await_answer(address)
        ray.init(
            address=address,
            # What matters is raised as an error or shown by `progress`; the rest is in the dashboard of the cluster.
            log_to_driver=logger.isEnabledFor(logging.DEBUG),
            logging_level=logging.WARNING,
        )
    except (OSError, ValueError, RuntimeError, OverflowError) as error:  # the last: no such port
        raise ConfigError(
            f"cluster.address: no Ray cluster answers at {address!r} ({error}). "
            "Start it, correct the address, or leave it (and RAY_ADDRESS) empty for a private one"
        ) from error


def _await_answer(address: str) -> None:
    """Raise OSError if nobody listens at ``address`` ("host:port") for a while. `ray.init` would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return  # "auto"
    host = resolve_ip_for_localhost(host.strip("[]"))  # as Ray does
    deadline_s = time.monotonic() + _ANSWER_S
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(1.0)
        else:
            return


def _start(cluster: ClusterConfig, cpus: int) -> None:
    """Start a private cluster. The output of workers stays in its session folder: what matters is raised as an error or
    shown by `progress`."""
    # It would say at every start that the cluster asks for the token below.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    logger.info("starting a private Ray cluster with %d logical CPUs", cpus)
    try:
        with _native_stderr_held(), quick_start():
            ray.init(
                address="local",
                num_cpus=cpus,
                object_store_memory=object_store_bytes(cluster),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                runtime_env=_quoted_python(),
            )
    except Exception as error:
        # Ray has no class of its own for this.
        if "timed out during startup" not in str(error):
            raise
        raise MoleBlendError(
            "Ray did not start on this machine in the 30 s that it waits: the machine is busy or short of memory. Run the "
            "same command again later, or start Ray beforehand (`ray start --head`) and give cluster.address=auto"
        ) from error


def _quoted_python() -> dict[str, str] | None:
    """The runtime environment with which workers start although the path of Python holds a space.

    Ray starts those with environment variables of their own, such as Ray Train's, by a shell for which it does not quote the path:
    they would never start, and training would wait for them without a word.
    """
    quoted = shlex.quote(sys.executable)
    return None if quoted == sys.executable else {"py_executable": quoted}


@contextlib.contextmanager
def quick_start() -> Iterator[None]:
    """In the body, `ray.init` starts no processes that only a cluster for others needs, and waits for no port.

    These are the server of the dashboard (which without a dashboard would send statistics alone, and for whose start `ray.init`
    waits), the monitor of an autoscaler, and the reader of the output of workers, for drivers that show it. They take two seconds of
    a core to start, of each command.

    The agent of the node tries for 3.4 seconds to get its usual port, 52365, if another cluster on the machine has it, and then does
    without; `ray.init` waits for it. Any port will do, as nobody asks for this one.
    """

    def start_raylet(node: Any, *arguments: Any, **settings: Any) -> None:
        node._ray_params.dashboard_agent_listen_port = 0
        before["start_raylet"](node, *arguments, **settings)

    changed = {
        **dict.fromkeys(_UNNEEDED, lambda *_, **__: None),
        "start_raylet": start_raylet,
    }
    before = {name: getattr(Node, name) for name in changed}
    for name, start in changed.items():
        setattr(Node, name, start)
    try:
        yield
    finally:
        for name, start in before.items():
            setattr(Node, name, start)


@contextlib.contextmanager
def _native_stderr_held() -> Iterator[None]:
    """Do not show what C++ code writes to file descriptor 2, unless the body fails.

    Ray's log library announces its log level there, whatever the level.
    """
    sys.stderr.flush()
    screen = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            sys.stderr.flush()
            held.seek(0)
            os.write(screen, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(screen, 2)
            os.close(screen)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray's libraries say nothing in the body of the first thread that comes, and what they said before after that of the last."""
    global _quiet_users
    with _users_lock:
        if not _quiet_users:
            _end_of_quiet.enter_context(_libraries_quieted())
        _quiet_users += 1
    try:
        yield
    finally:
        with _users_lock:
            _quiet_users -= 1
            if not _quiet_users:
                _end_of_quiet.close()


@contextlib.contextmanager
def _libraries_quieted() -> Iterator[None]:
    from ray.data import DataContext

    context = DataContext.get_current()
    bars, starts = context.enable_progress_bars, context.print_on_execution_start
    levels = {name: logging.getLogger(name).level for name in _QUIET_LEVELS}
    context.enable_progress_bars = context.print_on_execution_start = False
    for name, level in _QUIET_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = bars, starts
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _memory_bytes() -> int:
    """Bytes of memory that this process may use: those of the machine, or the limit of its container if that is
    lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit_file = Path("/sys/fs/cgroup/memory.max")
    limit = limit_file.read_text().strip() if limit_file.is_file() else "max"
    return min(physical, int(limit)) if limit.isdigit() else physical


@contextlib.contextmanager
def environment_defaults(settings: Mapping[str, str]) -> Iterator[None]:
    """While the body runs, set the environment variables that the user has not set."""
    added = [name for name in settings if name not in os.environ]
    # Ray sets these itself in the body, and would take the first for the user's choice in the next session. With the second,
    # breakpoint() starts Ray's debugger.
    changed_by_ray = [
        name for name in ("RAY_AUTH_MODE", "PYTHONBREAKPOINT") if name not in os.environ
    ]
    os.environ.update({name: settings[name] for name in added})
    try:
        yield
    finally:
        for name in [*added, *changed_by_ray]:
            os.environ.pop(name, None)
