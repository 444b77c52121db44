"""Submit a job to a Ray cluster elsewhere, follow it, and end with its exit status.

The job needs nothing else of this machine: it gets the sources of this installation (or uses those of the nodes), its
inputs from storage, and secrets from the nodes. All that continues a run is under its `out`, so the same command
submits the next try.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import logging
import os
import re
import shlex
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import moleblend_ray
from moleblend_ray.config.compose import config_dir
from moleblend_ray.config.submit import SubmitConfig, check_job, environment, losses
from moleblend_ray.data.files.scratch import scratch_folder
from moleblend_ray.errors import ConfigError, without_credentials
from moleblend_ray.orchestration.follow import (
    RUNNING,
    Follower,
    SubmitError,
    first_line,
    is_unknown,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

STOP_WAIT_VARIABLE: Final = "RAY_JOB_STOP_WAIT_TIME_S"
"""Environment variable of the job: seconds that Ray waits between SIGTERM and SIGKILL; without it 3."""

ADDRESS_VARIABLE: Final = "RAY_API_SERVER_ADDRESS"
"""Environment variable with the URL of the cluster's dashboard."""

EXIT_FAILED, EXIT_STOPPED, EXIT_LEFT = 1, 75, 130
"""The job failed without an exit status; it was stopped, and the same command continues it; it still runs."""

MAX_CODE_BYTES: Final = 16 * 2**20
"""Most bytes sent with a job. Ray accepts 512 MiB, keeps them in the memory of the head and copies them to every
node."""

_REQUEST_S: Final = 60.0
_NO_PROXY: Final = {"http": "", "https": "", "all": ""}


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitSummary:
    """What became of a job."""

    submission_id: str
    """Its id on the cluster."""
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    exit_status: int
    """Exit status of the job's process; 75 if it was stopped, 130 if it still runs, 1 if it failed without a
    process."""
    seconds: float
    """Wall time of this call."""


def submit(config: SubmitConfig, job_config: object = None) -> SubmitSummary:
    """Submit ``config.job`` with its own configuration ``job_config`` and follow it, or follow or stop a submitted job.

    Raises ConfigError for settings that the cluster or the job would refuse, SubmitError if the cluster is out of
    reach.
    """
    began_s = time.monotonic()
    if config.job is not None:
        check_job(config, job_config)
        for line in losses(job_config):
            logger.warning("%s", line)
    client = connect(config)
    submission_id = _submit(client, config, job_config) if config.job else _found(client, config)
    if config.detach:
        _tell_how_to_go_on(client, submission_id)
        status, exit_status = _asked(client.get_job_info, submission_id).status, 0
    else:
        status, exit_status = _follow(client, config, submission_id)
    return SubmitSummary(
        submission_id=submission_id,
        status=str(status),
        exit_status=exit_status,
        seconds=time.monotonic() - began_s,
    )


def _found(client: JobSubmissionClient, config: SubmitConfig) -> str:
    """The id of a job that was submitted before; ``config.stop`` asks it to stop."""
    submission_id = config.follow or config.stop
    assert submission_id is not None  # The configuration has checked this.
    details = _asked(client.get_job_info, submission_id)
    if config.stop is not None and details.status in RUNNING:
        _asked(client.stop_job, submission_id)
    return submission_id


def _follow(
    client: JobSubmissionClient, config: SubmitConfig, submission_id: str
) -> tuple[JobStatus, int]:
    """The status in which the job ended or was left, and the exit status of this command."""
    follower = Follower(client, submission_id, skip_log=config.stop is not None)
    details = follower.run()
    if details is None:
        _tell_how_to_go_on(client, submission_id)
        return JobStatus.RUNNING, EXIT_LEFT
    if config.stop is not None and details.status == JobStatus.STOPPED:
        return details.status, 0  # This is what was asked for.
    return details.status, exit_status_of(details)


# ------------------------------------------------------------------------------------------------- the cluster


class _Client(JobSubmissionClient):
    """Ray's client with a time limit for requests: it would wait forever for a head whose machine is gone. A port forward is asked
    without the proxy that the environment names for other hosts."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        options.setdefault("timeout", _REQUEST_S)
        if _is_loopback(self._address):
            options.setdefault("proxies", _NO_PROXY)
        return super()._do_request(method, endpoint, **options)


def connect(config: SubmitConfig) -> JobSubmissionClient:
    """A client of the cluster at the configured address. Raises a ConfigError that says what to do if it does not
    connect."""
    address = _address(config)
    shown = without_credentials(address)
    token = find_token()
    if token and address.startswith("http://") and not _is_loopback(address):
        logger.warning(
            "%s: the token is sent over the network unencrypted. A port forward or https:// is safer",
            shown,
        )
    return open_client(address, token)


def open_client(address: str, token: str | None) -> JobSubmissionClient:
    """As :func:`connect`, of the dashboard at a URL; ``token``: None for one that asks for none."""
    shown = without_credentials(address)
    # These log a line for each connection and each upload.
    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    # Ray's client sends a token only with RAY_AUTH_MODE=token, which it reads once per process.
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with _address_in_environment(address):
            client = _Client(address, headers=headers)
    except AuthenticationError as error:
        raise ConfigError(_token_advice(shown, has_token=bool(token))) from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"address: no Ray dashboard answers at {shown} ({first_line(error)}). Is the head up, and started with its "
            "dashboard? On Kubernetes: kubectl port-forward service/NAME-head-svc 8265, then --address "
            "http://127.0.0.1:8265"
        ) from error
    theirs = client._server_ray_version
    if theirs != ray.__version__:
        logger.warning(
            "%s runs Ray %s, this is Ray %s: only the same version is tested",
            shown,
            theirs,
            ray.__version__,
        )
    return client


@contextlib.contextmanager
def _address_in_environment(address: str) -> Iterator[None]:
    """Within, RAY_API_SERVER_ADDRESS is ``address``: Ray's client takes what the environment says before what it is given, and
    would send job and token elsewhere."""
    before = os.environ.get(ADDRESS_VARIABLE)
    os.environ[ADDRESS_VARIABLE] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[ADDRESS_VARIABLE]
        else:
            os.environ[ADDRESS_VARIABLE] = before


def _address(config: SubmitConfig) -> str:
    named = {name: os.environ.get(name) for name in (ADDRESS_VARIABLE, "RAY_ADDRESS")}
    address = config.address or next((value for value in named.values() if value), None)
    if address is None or not address.startswith(("http://", "https://")):
        found = f", found {without_credentials(address)!r}" if address else ""
        raise ConfigError(
            "address: expected the URL of the cluster's dashboard, as --address http://127.0.0.1:8265 or in "
            f"{ADDRESS_VARIABLE}{found}"
        )
    return address.rstrip("/")


def _is_loopback(address: str) -> bool:
    """Whether what is sent to this URL stays on this machine."""
    try:
        host = urlsplit(address).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, such as 127.0.0.1.example.org, or no address at all
        return False


def find_token() -> str | None:
    """The token from where Ray keeps it: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token. None if
    there is none, or with RAY_AUTH_MODE=disabled."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return file.read_text().strip() or None
    except OSError as error:
        if named:
            raise ConfigError(
                f"RAY_AUTH_TOKEN_PATH: cannot read {file} ({error.strerror})"
            ) from error
        return None


def _token_advice(shown: str, *, has_token: bool) -> str:
    if has_token:
        return (
            f"{shown} refuses the token: it belongs to another cluster, or was changed. On Kubernetes: "
            "kubectl get secret NAME -o jsonpath='{.data.auth_token}' | base64 -d; put it into a file only you can "
            "read, and its path into RAY_AUTH_TOKEN_PATH"
        )
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return f"{shown} asks for a token, and RAY_AUTH_MODE=disabled keeps this side from sending one: unset it"
    return (
        f"{shown} asks for a token, and there is none here: set RAY_AUTH_TOKEN_PATH to a file that holds it (or "
        "RAY_AUTH_TOKEN), or write it to ~/.ray/auth_token"
    )


def _asked(call: Callable[[str], T], submission_id: str) -> T:
    """What the cluster says about a job. Raises ConfigError if it knows no job with this id."""
    try:
        return call(submission_id)
    except RuntimeError as error:
        if is_unknown(error):
            raise ConfigError(
                f"{submission_id}: the cluster knows no such job. `ray job list` shows those it has; a new cluster "
                "knows none of the one before"
            ) from error
        raise SubmitError(
            f"{submission_id}: the cluster answers with an error ({first_line(error)})"
        ) from error
    except OSError as error:
        raise SubmitError(
            f"{submission_id}: the cluster does not answer ({first_line(error)})"
        ) from error


# ----------------------------------------------------------------------------------------------------- the job


def plan(config: SubmitConfig) -> list[str]:
    """What :func:`submit` would do, in lines of text; nothing is sent or asked."""
    if config.job is None:
        what = f"follow {config.follow}" if config.follow else f"stop {config.stop}"
        return [f"# dry run: would {what} at {without_credentials(_address(config))}"]
    with staged_code(config) as code:
        files = [file for file in Path(code).rglob("*") if file.is_file()] if code else []
        size = sum(file.stat().st_size for file in files)
        sent = f"{len(files)} files, {size / 2**20:.1f} MiB" if code else "nothing; the nodes' own"
        names = sorted(runtime_env(config, code)["env_vars"])
    return [
        f"# dry run: would submit to {without_credentials(_address(config))}",
        f"#   command: {entrypoint(config)}",
        f"#   code: {sent}",
        f"#   environment variables: {', '.join(names)}",
        "# nothing was sent",
    ]


def entrypoint(config: SubmitConfig) -> str:
    """The command that the head runs, quoted for a shell."""
    verbose = ["--verbose"] if config.verbose else []
    command = ["python", "-m", "moleblend_ray", str(config.job), *config.overrides, *verbose]
    return shlex.join(command)


def runtime_env(config: SubmitConfig, code: str | None) -> dict[str, Any]:
    """Ray's description of the job's environment; ``code``: the folder to send, or None to use what the nodes have."""
    variables = {STOP_WAIT_VARIABLE: str(config.stop_wait_s), **environment(config, os.environ)}
    return {"env_vars": variables, **({"working_dir": code} if code else {})}


@contextlib.contextmanager
def staged_code(config: SubmitConfig) -> Iterator[str | None]:
    """For the body, a folder with only the sources of this installation; None if those of the nodes are used."""
    if config.code == "image":
        yield None
        return
    with scratch_folder("submit") as folder:
        package = Path(moleblend_ray.__file__).parent
        leave_out = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", ".*")
        shutil.copytree(package, folder / package.name, ignore=leave_out)
        # In a checkout it is beside the package, in a wheel inside.
        conf = folder / package.name / "conf"
        if not conf.exists():
            shutil.copytree(config_dir(), conf, ignore=leave_out)
        check_size(folder)
        yield str(folder)


def check_size(folder: Path, limit: int = MAX_CODE_BYTES) -> None:
    """Refuse a folder that is too large to send with a job."""
    sizes = {
        file.relative_to(folder): file.stat().st_size
        for file in folder.rglob("*")
        if file.is_file()
    }
    if sum(sizes.values()) <= limit:
        return
    largest = sorted(sizes, key=lambda file: -sizes[file])[:3]
    raise ConfigError(
        f"code: the sources are {sum(sizes.values()) / 2**20:.1f} MiB, at most {limit / 2**20:g} are sent. The largest: "
        + ", ".join(f"{file} ({sizes[file] / 2**20:.1f} MiB)" for file in largest)
        + ". Data belongs in storage; code=image uses what is installed on the nodes"
    )


class RunName(NamedTuple):
    """What all submissions of one run have in common."""

    prefix: str
    """Prefix of their ids."""
    out: str | None
    """URI of the run; None for a job that writes nothing."""


def run_name(job: str, job_config: object) -> RunName:
    """The name of the job's run, derived from its output: the same in each try, different for every other output."""
    out = getattr(job_config, "out", None) or getattr(job_config, "run", None)
    if not isinstance(out, str):
        return RunName(f"{job}-{uuid.uuid4().hex[:8]}", None)
    out = out.rstrip("/")  # with and without it is the same place
    last = re.sub(r"[^A-Za-z0-9]+", "-", out.rpartition("/")[2]).strip("-")[:30]
    digest = hashlib.sha256(f"{job} {out}".encode()).hexdigest()[:8]
    return RunName(f"{job}-{last or 'run'}-{digest}", without_credentials(out))


def next_submission_id(name: RunName, jobs: list[JobDetails]) -> str:
    """The id of the next try of a run: PREFIX-1, PREFIX-2 and so on.

    If two users submit the same run, both get the same id, and Ray accepts one of them. Raises ConfigError if an
    earlier try is still running.
    """
    tries = {
        int(found[1]): job
        for job in jobs
        if (found := re.fullmatch(rf"{re.escape(name.prefix)}-(\d+)", job.submission_id or ""))
    }
    for job in tries.values():
        if job.status in RUNNING:
            raise ConfigError(
                f"{name.out} is being written by {job.submission_id} ({job.status}). Follow it with --follow "
                f"{job.submission_id}, or end it with --stop {job.submission_id}"
            )
    return f"{name.prefix}-{max(tries, default=0) + 1}"


def _submit(client: JobSubmissionClient, config: SubmitConfig, job_config: object) -> str:
    assert config.job is not None
    name = run_name(config.job, job_config)
    metadata = {"moleblend_job": config.job, "moleblend_version": moleblend_ray.__version__}
    if name.out:
        metadata["moleblend_out"] = name.out
    try:
        submission_id = next_submission_id(name, client.list_jobs())
        with staged_code(config) as code:
            client.submit_job(
                entrypoint=entrypoint(config),
                submission_id=submission_id,
                runtime_env=runtime_env(config, code),
                metadata=metadata,
            )
    except (OSError, RuntimeError) as error:
        raise SubmitError(f"the cluster did not accept the job: {first_line(error)}") from error
    logger.info("submitted as %s", submission_id)
    return submission_id


def exit_status_of(details: JobDetails) -> int:
    """The exit status that the job's command would have had here."""
    if details.status == JobStatus.STOPPED:
        return EXIT_STOPPED
    if details.status == JobStatus.SUCCEEDED:
        return 0
    return details.driver_exit_code or EXIT_FAILED


def _tell_how_to_go_on(client: JobSubmissionClient, submission_id: str) -> None:
    address = without_credentials(client.get_address())
    for what, option in (("follow it", "--follow"), ("stop it", "--stop")):
        logger.info("%s: moleblend submit %s %s --address %s", what, option, submission_id, address)
