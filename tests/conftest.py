"""Fixtures that every test folder shares: real data where present, one Ray cluster, one S3 server."""

from __future__ import annotations

import logging
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
# Where tests that start clusters or commands lie; `make test` looks for them there alone.
CLUSTER_TESTS = tuple(REPOSITORY / "tests" / name for name in ("ray", "e2e"))

# One thread for each of the processes a test starts: they share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels for GPUs run in Triton's interpreter, which must be chosen before Triton is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A loopback cluster for tests needs no token; see "Token authentication" in docs.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# No process per CPU ahead of need, and those that are needed at the same time: otherwise a simulated node of one CPU
# starts one after the other. A private cluster of a command has the same settings.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "32")
# Nor an actor that looks for nodes which announce their end; test_elastic takes this back.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# Nothing is sent to Ray's makers, nor is there an actor that collects it.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
# Processes tell their metrics every two seconds instead of ten: a test waits for them.
os.environ.setdefault("RAY_metrics_report_interval_ms", "2000")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

# A shell that starts the tests in the background lets them ignore Ctrl-C, and so the commands that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("moleblend", deadline=None)
hypothesis.settings.load_profile("moleblend")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        action="append",
        default=[],
        metavar="DIR",
        help="folder of golden vectors (mols.npz, run_*.npz, params_*.npz) to check; may be repeated",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("ray") and not any(map(item.path.is_relative_to, CLUSTER_TESTS)):
            raise pytest.UsageError(
                f"{item.nodeid} has the marker `ray`: it belongs into tests/ray or tests/e2e"
            )
        if "s3_endpoint" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.s3)
        if item.get_closest_marker("shared_data") and not SHARED_DATA.is_dir():
            item.add_marker(
                pytest.mark.skip(reason="the real molecules are not beside this checkout")
            )


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real molecules; tests that use it also carry the ``shared_data`` marker."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real molecules are not beside this checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray cluster for the whole session: starting one costs seconds."""
    import ray

    from moleblend_ray.orchestration.cluster.session import quick_start
    from moleblend_ray.orchestration.progress.progress import one_board_actor

    with quick_start():
        ray.init(
            "local",
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    # As in one long session: what shows progress needs no new process in each test.
    with one_board_actor():
        yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[None]:
    """An S3 server: the one of ``AWS_ENDPOINT_URL`` if set, else moto in this process."""
    if os.environ.get("AWS_ENDPOINT_URL"):
        yield
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    yield
    server.stop()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def s3_uri(s3_endpoint: None) -> str:
    """An empty prefix of its own in a bucket that exists, as an ``s3://`` URI."""
    import s3fs

    filesystem = s3fs.S3FileSystem(use_listings_cache=False)
    bucket = "moleblend-tests"
    if not filesystem.exists(bucket):
        filesystem.mkdir(bucket)
    return f"s3://{bucket}/{uuid.uuid4().hex[:12]}"
