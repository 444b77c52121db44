"""Submitting a job and following it to its end, over a cluster that answers as it likes."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus
from ray.tune.execution import class_cache

from moleblend_ray import cli
from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.config.submit import SubmitConfig
from moleblend_ray.errors import ConfigError
from moleblend_ray.orchestration import submit as submitting
from moleblend_ray.orchestration.downstream.sweep import keep_keys_from_trials
from moleblend_ray.orchestration.follow import Follower, SubmitError
from moleblend_ray.orchestration.submit import (
    check_size,
    connect,
    entrypoint,
    exit_status_of,
    find_token,
    next_submission_id,
    run_name,
    runtime_env,
    staged_code,
)

JOB = "pretrain-run-12345678-1"
LOG = "".join(f"line {number}\n" for number in range(40))


def details(status: JobStatus, code: int | None = None, **more: Any) -> JobDetails:
    return JobDetails(
        type="SUBMISSION",
        submission_id=more.pop("submission_id", JOB),
        status=status,
        entrypoint="python",
        driver_exit_code=code,
        **more,
    )


class Away(Exception):
    """Raised by a scripted stream: the connection breaks here."""


Event = str | type[Away] | Callable[[], Any]


class Cluster:
    """Ray's client, as far as it is used to follow: each stream brings what the script says, from the log's
    beginning."""

    def __init__(
        self,
        streams: Iterable[Sequence[Event]],
        end: JobDetails,
        *,
        log: str = LOG,
    ) -> None:
        self.streams, self.end, self.log = list(streams), end, log
        self.ended = False
        self.stopped: list[str] = []
        self.unreachable = 0
        """Requests that fail before the next is answered."""

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        assert job == JOB
        for event in self.streams.pop(0):
            await asyncio.sleep(0)
            if event is Away:
                raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
            if callable(event):
                result = event()
                if asyncio.iscoroutine(result):
                    await result
            else:
                yield event

    def get_job_info(self, job: str) -> JobDetails:
        assert job == JOB
        if self.unreachable:
            self.unreachable -= 1
            raise ConnectionError("connection refused")
        return self.end if self.ended else details(JobStatus.RUNNING)

    def get_job_logs(self, job: str) -> str:
        return self.log

    def stop_job(self, job: str) -> bool:
        self.stopped.append(job)
        return True

    def finish(self) -> None:
        self.ended = True


def follow(cluster: Cluster, **options: Any) -> tuple[str, JobDetails]:
    """What was shown of the log, and the job's end."""
    shown: list[str] = []
    follower = Follower(
        cluster,  # type: ignore[arg-type]
        JOB,
        write=shown.append,
        look_s=0.02,
        **{"pause_s": 0.01, **options},
    )
    ended = follower.run()
    assert ended is not None
    return "".join(shown), ended


async def forever() -> None:
    await asyncio.Event().wait()


def test_the_log_is_shown_once_whatever_happens_to_the_connection() -> None:
    done = details(JobStatus.SUCCEEDED, 0)
    cluster = Cluster(
        [
            [LOG[:30], LOG[30:47], Away],
            [LOG[:10], Away],  # breaks before it reaches what is new
            [LOG[:60], LOG[60:61]],  # ends too early, as when a proxy cuts it
            [LOG[:60], LOG[60:90], lambda: cluster.finish()],
        ],
        done,
    )
    assert follow(cluster) == (LOG, done)


def test_a_connection_that_died_without_a_sign_is_made_anew() -> None:
    cluster = Cluster(
        [[LOG[:30], forever], [LOG, lambda: cluster.finish()]], details(JobStatus.SUCCEEDED, 0)
    )
    cluster.unreachable = 4
    assert follow(cluster)[0] == LOG
    assert cluster.streams == []


def test_a_job_that_ended_while_the_cluster_was_out_of_reach_is_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failed = details(JobStatus.FAILED, 3)

    def away() -> None:
        cluster.unreachable = 3
        cluster.finish()

    cluster = Cluster([[LOG[:30], away, Away], [Away], [Away]], failed)
    shown, ended = follow(cluster)
    assert shown == LOG
    assert exit_status_of(ended) == 3
    assert "the connection is lost" in caplog.text


def test_a_cluster_that_stays_away_ends_the_following_and_not_the_job() -> None:
    def away() -> None:
        cluster.unreachable = 10_000

    cluster = Cluster([[LOG[:30], away, Away], *[[Away]] * 500], details(JobStatus.RUNNING))
    with pytest.raises(SubmitError, match=r"has not answered for .* --follow"):
        follow(cluster, patience_s=0.1)
    assert cluster.stopped == []


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            RuntimeError(f"Request failed with status code 404: Job {JOB} does not exist."),
            r"no longer knows this job: .*the same command continues",
        ),
        (AuthenticationError("Unauthorized: Invalid token"), r"refuses the token .*another one"),
    ],
)
def test_a_cluster_that_was_replaced_ends_the_following_at_once(
    answer: Exception, said: str
) -> None:
    class Replaced(Cluster):
        def get_job_info(self, job: str) -> JobDetails:
            raise answer

    cluster = Replaced([[LOG[:30], Away]], details(JobStatus.RUNNING))
    with pytest.raises(SubmitError, match=said):
        follow(cluster)


def test_a_proxy_that_finds_no_head_node_for_a_while_is_asked_again() -> None:
    class Behind(Cluster):
        def get_job_info(self, job: str) -> JobDetails:
            if self.unreachable:
                self.unreachable -= 1
                raise RuntimeError("Request failed with status code 404: 404 page not found.")
            return super().get_job_info(job)

    done = details(JobStatus.SUCCEEDED, 0)
    cluster = Behind([[LOG[:30], Away], [LOG, lambda: cluster.finish()]], done)
    cluster.unreachable = 1
    assert follow(cluster) == (LOG, done)


def test_what_the_log_said_before_can_be_left_out() -> None:
    cluster = Cluster(
        [[LOG, "end\n", lambda: cluster.finish()]], details(JobStatus.STOPPED), log=LOG
    )

    def ended() -> None:
        cluster.log = LOG + "end\n"
        cluster.finish()

    cluster.streams = [[LOG, "end\n", ended]]
    assert follow(cluster, skip_log=True)[0] == "end\n"


def test_ctrl_c_asks_the_job_to_stop_and_waits_for_its_checkpoint() -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    async def committed() -> None:
        while not cluster.stopped:
            await asyncio.sleep(0.01)
        cluster.finish()

    cluster = Cluster([[LOG[:30], interrupt, committed, LOG[30:]]], details(JobStatus.STOPPED))
    shown, ended = follow(cluster)
    assert shown == LOG
    assert cluster.stopped == [JOB]
    assert exit_status_of(ended) == 75


def test_sigterm_means_the_same() -> None:
    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    async def committed() -> None:
        while not cluster.stopped:
            await asyncio.sleep(0.01)
        cluster.finish()

    cluster = Cluster([[terminate, committed, LOG]], details(JobStatus.STOPPED))
    assert follow(cluster)[0] == LOG
    assert cluster.stopped == [JOB]


def test_a_second_ctrl_c_leaves_the_job_to_itself() -> None:
    async def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        await forever()

    cluster = Cluster([[LOG[:30], twice]], details(JobStatus.STOPPED))
    follower = Follower(cluster, JOB, write=lambda _: None, look_s=0.02)  # type: ignore[arg-type]
    assert follower.run() is None
    assert cluster.stopped == [JOB]


def test_a_second_ctrl_c_leaves_a_cluster_that_does_not_answer() -> None:
    answers = threading.Event()

    async def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        await forever()

    class Silent(Cluster):
        """A machine that is gone: requests wait for their time limit."""

        def stop_job(self, job: str) -> bool:
            answers.wait(30)
            raise ConnectionError("timed out")

        def get_job_info(self, job: str) -> JobDetails:
            answers.wait(30)
            raise ConnectionError("timed out")

    cluster = Silent([[LOG[:30], twice]], details(JobStatus.STOPPED))
    follower = Follower(cluster, JOB, write=lambda _: None, look_s=0.01)  # type: ignore[arg-type]
    began_s = time.monotonic()
    try:
        assert follower.run() is None
    finally:
        answers.set()
    assert time.monotonic() - began_s < 5


def test_a_job_that_never_had_a_process_says_why(caplog: pytest.LogCaptureFixture) -> None:
    message = "runtime_env setup failed for s3://key:hunter2@bucket/x"
    failed = details(JobStatus.FAILED, message=message)
    cluster = Cluster([[lambda: cluster.finish()]], failed, log="")
    assert exit_status_of(follow(cluster)[1]) == 1
    assert "runtime_env setup failed" in caplog.text
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, 75, 75),
        (JobStatus.FAILED, None, 1),
        (JobStatus.STOPPED, None, 75),
    ],
)
def test_the_exit_status_is_the_job_s_own(
    status: JobStatus, code: int | None, expected: int
) -> None:
    assert exit_status_of(details(status, code)) == expected


# --------------------------------------------------------------------------------------------- ids, code, environment


def pretraining(out: str) -> PretrainConfig:
    return PretrainConfig(data="s3://bucket/data", out=out)


def test_tries_of_a_run_are_counted_and_runs_told_apart() -> None:
    name = run_name("pretrain", pretraining("s3://key:hunter2@bucket/runs/first try/"))
    assert name.prefix.startswith("pretrain-first-try-")
    assert "hunter2" not in str(name)
    # The same place, so the same run, which must not be written twice.
    assert run_name("pretrain", pretraining("s3://key:hunter2@bucket/runs/first try")) == name
    other = run_name("pretrain", pretraining("s3://bucket/other/first try"))
    assert other.prefix != name.prefix
    over = [
        details(JobStatus.FAILED, 1, submission_id=f"{name.prefix}-{number}") for number in (1, 2)
    ]
    running = details(JobStatus.RUNNING, submission_id=f"{other.prefix}-7")
    assert next_submission_id(name, []) == f"{name.prefix}-1"
    assert (
        next_submission_id(name, [*over, running, details(JobStatus.RUNNING)]) == f"{name.prefix}-3"
    )
    with pytest.raises(
        ConfigError, match=rf"is being written by {other.prefix}-7 .*--stop {other.prefix}-7"
    ):
        next_submission_id(other, [*over, running])


def test_a_job_that_writes_nothing_has_a_new_name_each_time() -> None:
    names = {run_name("data", object()).prefix for _ in range(3)}
    assert len(names) == 3


def test_the_command_reaches_the_job_as_it_was_typed() -> None:
    overrides = ("out=s3://b/a b", "cluster.data_labels={role: data}", "x='quoted $HOME'")
    config = SubmitConfig(job="pretrain", overrides=overrides)
    command = entrypoint(config).removeprefix("python -m moleblend_ray ")
    shell = f"{shlex.quote(sys.executable)} -c 'import sys, json; print(json.dumps(sys.argv[1:]))' {command}"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["pretrain", *overrides]


def test_debug_messages_are_asked_of_the_job_as_well(
    capsys: pytest.CaptureFixture[str], no_token: Path
) -> None:
    words = ["submit", "data", "s3://b/d", "--address", "http://127.0.0.1:9", "--dry-run"]
    for option in ("--verbose", "-v"):
        assert cli.main([*words, option]) == 0
        command = "python -m moleblend_ray data data=s3://b/d --verbose\n"
        assert command in capsys.readouterr().out
    assert cli.main(words) == 0
    assert "--verbose" not in capsys.readouterr().out


def test_the_job_has_time_for_a_checkpoint_and_no_other_variable_of_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    config = SubmitConfig(job="data", env=("A=1",), stop_wait_s=200)
    assert runtime_env(config, None) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "200", "A": "1"}}


def test_what_is_sent_runs_by_itself_and_holds_nothing_else(tmp_path: Path) -> None:
    with staged_code(SubmitConfig(job="data")) as code:
        assert code is not None
        files = [file.relative_to(code) for file in Path(code).rglob("*") if file.is_file()]
        assert {file.parts[0] for file in files} == {"moleblend_ray"}
        assert {file.suffix for file in files} <= {".py", ".yaml", ".json", ".typed"}
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import moleblend_ray, sys\n"
                "from moleblend_ray.cli import main\n"
                "print(moleblend_ray.__file__)\n"
                "sys.exit(main(['pretrain', 'data=s3://b/d', 'out=s3://b/r', 'model=tiny', '--dry-run']))",
            ],
            cwd=code,
            env={**os.environ, "PYTHONPATH": code},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith(f"{code}/moleblend_ray")
        assert "num_layers" in done.stdout
    assert not Path(code).exists()
    with staged_code(SubmitConfig(job="data", code="image")) as code:
        assert code is None


def test_files_beyond_the_limit_are_not_sent_and_named(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(3000))
    (tmp_path / "small.py").write_bytes(bytes(10))
    check_size(tmp_path, 3010)
    with pytest.raises(
        ConfigError, match=r"at most .* largest: weights\.bin .*small\.py.*code=image"
    ):
        check_size(tmp_path, 3009)


def test_trials_of_a_sweep_are_not_described_with_the_keys_of_the_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
    keep_keys_from_trials()

    class Trainable:
        pass

    options = class_cache._ActorClassCache().get(Trainable)._default_options
    variables = options["runtime_env"]["env_vars"]
    assert variables["RAY_CHDIR_TO_TRIAL_DIR"] == "0"
    assert not [name for name in variables if name.startswith("AWS_")]


# ------------------------------------------------------------------------------------------------- tokens, addresses


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home without a token, and none in the environment; the home."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return tmp_path


def test_the_token_is_found_where_ray_keeps_it(
    no_token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_token() is None
    (no_token / ".ray").mkdir()
    (no_token / ".ray" / "auth_token").write_text("of-home\n")
    assert find_token() == "of-home"
    (no_token / "file").write_text("of-file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(no_token / "file"))
    assert find_token() == "of-file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-environment")
    assert find_token() == "of-environment"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert find_token() is None


def test_a_token_file_that_is_named_and_missing_is_an_error(
    no_token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/no/such/file")
    with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN_PATH: cannot read /no/such/file"):
        find_token()


class Refusing:
    """Ray's client at a cluster that lets nobody in."""

    error: Exception = AuthenticationError("Authentication required")
    headers: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, address: str, headers: dict[str, str]) -> None:
        Refusing.headers = headers
        raise self.error


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, r"asks for a token, and there is none here: set RAY_AUTH_TOKEN_PATH"),
        ({"RAY_AUTH_TOKEN": "hunter2"}, r"refuses the token: it belongs to another cluster"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "x"}, "RAY_AUTH_MODE=disabled keeps"),
    ],
)
def test_a_refused_token_is_an_error_that_says_what_to_do(
    no_token: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    message: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(submitting, "_Client", Refusing)
    with pytest.raises(ConfigError, match=message) as refused:
        connect(SubmitConfig(job="data", address="http://127.0.0.1:8265"))
    assert "hunter2" not in str(refused.value)
    token = environment.get("RAY_AUTH_TOKEN") if len(environment) == 1 else None
    assert Refusing.headers == ({"Authorization": f"Bearer {token}"} if token else {})


def test_a_token_over_an_open_network_is_warned_of(
    no_token: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2")
    monkeypatch.setattr(submitting, "_Client", Refusing)
    for address, is_warned in (
        ("http://127.0.0.1:8265", False),
        ("http://localhost:8265", False),
        ("http://[::1]:8265", False),
        ("http://127.0.0.1.example.org:8265", True),
        ("http://localhost.example.org", True),
        ("https://ray.example.org", False),
        ("http://ray.example.org", True),
    ):
        caplog.clear()
        with pytest.raises(ConfigError):
            connect(SubmitConfig(job="data", address=address))
        assert ("the token is sent over the network unencrypted" in caplog.text) is is_warned
        assert "hunter2" not in caplog.text


def test_a_dashboard_that_does_not_answer_is_named(no_token: Path) -> None:
    with pytest.raises(ConfigError, match=r"no Ray dashboard answers at http://127\.0\.0\.1:9 "):
        connect(SubmitConfig(job="data", address="http://127.0.0.1:9"))


def test_the_address_may_come_from_the_environment(
    no_token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"expected the URL .* RAY_API_SERVER_ADDRESS$"):
        connect(SubmitConfig(job="data"))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ConfigError, match=r"RAY_API_SERVER_ADDRESS, found 'auto'$"):
        connect(SubmitConfig(job="data"))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="no Ray dashboard answers"):
        connect(SubmitConfig(job="data"))


@pytest.mark.parametrize("name", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_an_address_that_is_given_counts_before_the_environment(
    no_token: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:7")
    asked: list[str] = []

    def request(_: object, method: str, url: str, **__: Any) -> None:
        asked.append(url)
        raise OSError("nobody there")

    monkeypatch.setattr("requests.Session.request", request)
    monkeypatch.setattr("requests.request", lambda *words, **more: request(None, *words, **more))
    with pytest.raises(ConfigError, match=r"no Ray dashboard answers at http://127\.0\.0\.1:9 "):
        connect(SubmitConfig(job="data", address="http://127.0.0.1:9"))
    assert asked
    assert all(url.startswith("http://127.0.0.1:9/") for url in asked)
    assert os.environ[name] == "http://127.0.0.1:7"
    assert len({"RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"} & os.environ.keys()) == 1


def test_a_port_forward_is_asked_without_the_proxy_for_other_hosts(
    no_token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"version": "4", "ray_version": ray.__version__}).encode())

        def log_message(self, format: str, *_: Any) -> None:
            pass

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            connect(SubmitConfig(job="data", address=f"http://127.0.0.1:{server.server_port}"))
        finally:
            server.shutdown()


# ------------------------------------------------------------------------------------------------------ the command


def test_the_command_checks_the_job_s_own_settings_before_it_asks_the_cluster(
    capsys: pytest.CaptureFixture[str], no_token: Path
) -> None:
    url = ["--address", "http://127.0.0.1:9"]
    assert (
        cli.main(["submit", "pretrain", "data=s3://b/d", "out=s3://b/r", "modle=tiny", *url]) == 2
    )
    assert "did you mean model" in capsys.readouterr().err
    assert cli.main(["submit", "pretrian", *url]) == 2
    assert "did you mean pretrain" in capsys.readouterr().err
    assert cli.main(["submit", "pretrain", "data=s3://b/d", "out=runs/here", *url]) == 2
    assert "out=runs/here: a path of this machine" in capsys.readouterr().err


def test_a_dry_run_shows_the_job_and_what_would_be_sent(
    capsys: pytest.CaptureFixture[str], no_token: Path
) -> None:
    words = ["submit", "data", "s3://b/d", "--verify", "--address", "http://127.0.0.1:9"]
    assert cli.main([*words, "--env", "A=1", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "verify: true" in shown
    assert "python -m moleblend_ray data data=s3://b/d verify=true" in shown
    assert "environment variables: A, RAY_JOB_STOP_WAIT_TIME_S" in shown
    assert "nothing was sent" in shown


def test_the_command_ends_with_the_status_of_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(config: SubmitConfig, job_config: object) -> submitting.SubmitSummary:
        assert isinstance(job_config, PretrainConfig)
        return submitting.SubmitSummary(
            submission_id=JOB, status="STOPPED", exit_status=75, seconds=1.0
        )

    monkeypatch.setattr(submitting, "submit", stopped)
    words = ["submit", "pretrain", "data=s3://b/d", "out=s3://b/r"]
    assert cli.main(words) == 75
    assert JOB in capsys.readouterr().out


def test_the_help_of_submit_explains_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "moleblend submit JOB [KEY=VALUE ...]" in shown
    assert "--stop: str or null = null" in shown
    assert cli.main(["--help"]) == 0
    assert "submit JOB" in capsys.readouterr().out
