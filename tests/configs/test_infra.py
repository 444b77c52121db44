"""The image recipe agrees with the package and the manifests; what the pods run before they go does what it says."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus

from infra.checks.house import package_version
from infra.checks.jobs import HOME
from moleblend_ray.orchestration.follow import SubmitError

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKER = REPOSITORY / "infra" / "docker"
RECIPE = (DOCKER / "Dockerfile").read_text()


def stages() -> dict[str, str]:
    """The text of each stage of the recipe by its name."""
    parts = re.split(r"^FROM (\S+) AS (\S+)$", RECIPE, flags=re.M)
    return {
        name: f"{base}\n{text}" for base, name, text in zip(*[iter(parts[1:])] * 3, strict=True)
    }


def lineage(name: str) -> str:
    """The text of a stage and of those it begins with."""
    text = stages()[name]
    base = text.split("\n", 1)[0]
    return lineage(base) + text if base in stages() else text


def test_the_recipe_copies_only_what_exists_and_is_not_ignored() -> None:
    sources = {
        source
        for line in re.findall(r"^COPY (?!--)(.+)$", RECIPE, re.M)
        for source in line.split()[:-1]
    }
    assert {
        "jobs",
        "constraints.txt",
        "infra/docker/leave.py",
        "infra/docker/submitter.py",
    } <= sources
    assert {source for source in sources if not (REPOSITORY / source).exists()} == set()
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[1] == "*"
    assert sources == {line[1:] for line in ignore if line.startswith("!")}


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_runs_as_nobody_special_with_the_pinned_versions(target: str) -> None:
    text = lineage(target)
    # By number, or Kubernetes cannot tell that it is not root.
    assert re.findall(r"^USER (.+)$", text, re.M) == ["1000:1000"]
    assert "useradd --create-home --uid 1000" in text
    installs = re.findall(r"^(?:RUN |    )?.*pip install (.+)$", text, re.M)
    assert len(installs) == 3
    pinned = ("constraints.txt", "--no-deps --no-index")
    assert all(any(how in install for how in pinned) for install in installs), installs
    label = re.search(r'image\.version="(.+)"', text)
    assert label is not None
    assert label[1] == package_version()
    for key in ("title", "description", "licenses", "revision"):
        assert f"org.opencontainers.image.{key}=" in text
    assert re.search(rf"^WORKDIR {HOME}$", text, re.M)


def test_the_image_with_cuda_finds_the_driver_where_gke_mounts_it() -> None:
    settings = dict(
        re.findall(r"([A-Z_]+)=(\S+)", "".join(re.findall(r"^ENV .+", stages()["torch-gpu"], re.M)))
    )
    assert settings["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    assert settings["PATH"].split(":") == ["$PATH", "/usr/local/nvidia/bin"]
    assert settings["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert "nvidia" not in lineage("cpu")


def test_the_recipe_names_no_package_index_and_pins_its_base() -> None:
    assert "://" not in RECIPE
    assert re.search(r"^ARG TORCH_INDEX$", RECIPE, re.M)
    assert re.search(r"^ARG BASE=python:3\.11\.\d+-slim-bookworm$", RECIPE, re.M)
    assert {text.split("\n", 1)[0] for text in stages().values()} == {
        "${BASE}", "base", "torch-cpu", "torch-gpu",
    }  # fmt: skip


def test_the_heavy_layers_come_before_those_that_change() -> None:
    for target in ("cpu", "gpu"):
        text = lineage(target)
        order = [
            "apt-get install",
            "^torch==",
            "-r /requirements.txt",
            "--no-deps --no-index",
            "COPY jobs",
            "LABEL",
        ]
        places = [text.index(what) for what in order]
        assert places == sorted(places)
        # Code that changes with every commit would make everything below it anew.
        assert "COPY moleblend_ray" not in text


def test_the_documentation_builds_both_images_under_the_names_of_the_manifests() -> None:
    page = (REPOSITORY / "infra" / "README.md").read_text()
    for target in ("cpu", "gpu"):
        assert re.search(
            rf"docker build -f infra/docker/Dockerfile --target {target}\b.*moleblend-ray:{package_version()}-{target} \.",
            page.replace("\\\n", " "),
        )


def script(name: str) -> ModuleType:
    """A script of the images as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCKER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def leave() -> ModuleType:
    return script("leave")


def process(proc: Path, pid: int, parent: int, *words: str, name: str = "x") -> None:
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    (folder / "cmdline").write_bytes(b"\0".join(word.encode() for word in words))
    (folder / "stat").write_text(f"{pid} ({name}) S {parent} 0 0 0")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A head with one job and a worker with one trainer, as Ray names them."""
    proc = tmp_path / "proc"
    process(proc, 1, 0, "/bin/bash", "-c", "ray start --block")
    process(
        proc,
        20,
        1,
        "/opt/venv/ray/raylet/raylet",
        "--port=0",
        "--node_id=00ff12",
        name="raylet (1) x",
    )
    process(proc, 30, 20, "ray::_StatsActor")
    process(proc, 40, 20, "ray::JobSupervisor")
    process(proc, 41, 40, "/bin/sh", "-c", "python jobs/pretrain.py")
    process(proc, 42, 41, "python", "jobs/pretrain.py")
    process(proc, 43, 40, "/bin/sh", "-c", "while kill -s 0 40; do sleep 1; done; kill -9 -41")
    process(proc, 44, 43, "sleep", "1")
    process(proc, 50, 20, "ray::RayTrainWorker")
    process(proc, 60, 20, "python", "watch.py", "ray::RayTrainWorker", "--node_id=ee")
    (proc / "meminfo").write_text("")
    return proc


def test_the_hook_knows_whom_to_tell_and_whom_to_wait_for(leave: ModuleType, proc: Path) -> None:
    found = list(leave.processes(proc))
    assert {process.pid for process in found} == {1, 20, 30, 40, 41, 42, 43, 44, 50, 60}
    assert leave.node_id(found) == "00ff12"
    assert [process.pid for process in leave.jobs(found)] == [41, 42]
    assert [process.pid for process in leave.programs(found)] == [42]
    assert [process.pid for process in leave.trainers(found)] == [50]


def test_without_ray_the_hook_finds_nobody(leave: ModuleType, tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    process(proc, 1, 0, "sleep", "infinity")
    found = list(leave.processes(proc))
    assert leave.node_id(found) is None
    assert leave.jobs(found) == leave.trainers(found) == []


def command(folder: Path, text: str) -> None:
    """An executable `ray` that notes its arguments."""
    file = folder / "ray"
    file.write_text(textwrap.dedent(text))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def test_a_worker_is_drained_before_it_is_waited_for(
    leave: ModuleType,
    proc: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The trainer leaves once Ray was told.
    command(tmp_path, f'#!/bin/sh\necho "$@" > {tmp_path}/told\nrm -r {proc}/50\n')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    everything = leave.processes
    monkeypatch.setattr(leave, "processes", lambda: everything(proc))
    assert leave.main(["worker", "--seconds", "30"]) == 0
    assert (tmp_path / "told").read_text().split() == [
        "drain-node",
        "--node-id",
        "00ff12",
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "the",
        "pod",
        "is",
        "being",
        "terminated",
        "--deadline-remaining-seconds",
        "30",
    ]
    assert "nothing left to wait for" in capsys.readouterr().err


def test_a_head_that_is_gone_does_not_keep_a_worker(
    leave: ModuleType,
    proc: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command(tmp_path, "#!/bin/sh\necho no head >&2\nexit 1\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(leave, "_POLL_S", 0.05)
    everything = leave.processes
    monkeypatch.setattr(leave, "processes", lambda: everything(proc))
    assert leave.main(["worker", "--seconds", "0.5"]) == 0
    told = capsys.readouterr().err
    assert "Ray was not told: no head" in told
    assert "still there at the end: 50" in told


def test_the_jobs_of_a_head_get_sigterm_and_the_time_to_commit(
    leave: ModuleType, proc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = tmp_path / "committed"
    script = f"""
        import pathlib, signal, sys, time
        def stop(*_):
            time.sleep(1)
            pathlib.Path({str(done)!r}).write_text("1")
            sys.exit(75)
        signal.signal(signal.SIGTERM, stop)
        print("ready", flush=True)
        time.sleep(60)
    """
    job = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE)
    try:
        assert job.stdout is not None
        assert job.stdout.readline() == b"ready\n"

        def seen() -> list[object]:
            supervisor = leave.Process(-1, 0, "ray::JobSupervisor")
            running = [leave.Process(job.pid, -1, "python jobs/pretrain.py")]
            return [supervisor, *(running if job.poll() is None else [])]

        monkeypatch.setattr(leave, "processes", seen)
        assert leave.main(["head", "--seconds", "30"]) == 0
        assert done.is_file()
        assert job.wait(5) == 75
    finally:
        if job.poll() is None:
            job.send_signal(signal.SIGKILL)
            job.wait()


class Head:
    """Ray's client of a head node whose stream of the log ends in order, again and again, while the job runs."""

    def __init__(self, status: JobStatus, streams: int = 3, *, knows: bool = False) -> None:
        self.end, self.streams, self.knows = status, streams, knows
        self.sent: list[dict[str, Any]] = []
        self.stopped = False

    def submit_job(self, **job: Any) -> None:
        assert not self.knows
        self.sent.append(job)
        self.knows = True

    def stop_job(self, job: str) -> None:
        self.stopped = True

    def get_job_info(self, job: str) -> JobDetails:
        if not self.knows:
            raise RuntimeError(f"Request failed with status code 404: Job {job} does not exist.")
        status = JobStatus.RUNNING if self.streams else self.end
        return JobDetails(type="SUBMISSION", status=status, entrypoint="python", driver_exit_code=1)

    def get_job_logs(self, job: str) -> str:
        return "one\ntwo\n"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.streams -= 1
        yield "one\n"


@pytest.fixture
def submitter(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script("submitter")
    monkeypatch.setattr(module, "Follower", partial(module.Follower, look_s=0.02, pause_s=0.01))
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)
    monkeypatch.setenv("RAY_JOB_SUBMISSION_ID", "moleblend-pretrain-base-1-x7k2p")
    monkeypatch.setenv("RAY_DASHBOARD_ADDRESS", "head-svc.moleblend.svc:8265")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token-of-the-cluster")
    return module


def submit(module: ModuleType, head: Head, monkeypatch: pytest.MonkeyPatch) -> int:
    """What the pod of the submitter ends with; the head answers at the third try."""
    refusals = iter([SubmitError("no answer"), SubmitError("no answer")])

    def connect(url: str, token: str) -> Head:
        assert (url, token) == ("http://head-svc.moleblend.svc:8265", "token-of-the-cluster")
        for refusal in refusals:
            raise refusal
        return head

    monkeypatch.setattr(module, "open_client", connect)
    environment = 'env_vars:\n  # Time to stop.\n  RAY_JOB_STOP_WAIT_TIME_S: "120"\n'
    status: int = module.main(["python jobs/pretrain.py data=s3://b/d", environment])
    return status


@pytest.mark.parametrize("status", [JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED])
def test_the_submitter_ends_with_the_job_and_not_with_the_stream_of_its_log(
    status: JobStatus,
    submitter: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    head = Head(status)
    # What became of the job, the operator asks itself: another status would have it submitted once more.
    assert submit(submitter, head, monkeypatch) == 0
    assert head.streams == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    assert head.sent == [
        {
            "entrypoint": "python jobs/pretrain.py data=s3://b/d",
            "submission_id": "moleblend-pretrain-base-1-x7k2p",
            "runtime_env": {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}},
        }
    ]


def test_a_second_pod_of_the_submitter_attaches_to_the_job(
    submitter: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = Head(JobStatus.SUCCEEDED, knows=True)
    assert submit(submitter, head, monkeypatch) == 0
    assert head.sent == []


def test_a_pod_of_the_submitter_that_is_evicted_leaves_the_job_alone(
    submitter: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Evicted(Head):
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            os.kill(os.getpid(), signal.SIGTERM)
            yield "one\n"

    head = Evicted(JobStatus.SUCCEEDED)
    assert submit(submitter, head, monkeypatch) == 1
    assert not head.stopped


def test_a_head_node_that_was_replaced_gets_the_job_from_the_next_pod(
    submitter: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Replaced(Head):
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            self.knows = False
            yield "one\n"

    head = Replaced(JobStatus.SUCCEEDED)
    assert submit(submitter, head, monkeypatch) == 1
    assert submit(submitter, head, monkeypatch) == 1
    assert len(head.sent) == 2
