"""The jobs on a cluster that is simulated on this machine: what `make cluster-test` runs.

    python jobs/cluster_test.py [--molecules 400] [--steps 100] [--quick]
    python jobs/cluster_test.py --without-token

The cluster is a head without CPUs that asks for a token, and two nodes, one for data and one for models, each started
by `ray start`. Only the nodes have the keys of an S3 server (that of AWS_ENDPOINT_URL, else moto's, which the tests
require). The jobs samples, prepare, pretrain, sweep and embed are submitted with `moleblend submit` from an empty
folder. In the middle of pretraining, `ray job stop` ends it, and it is submitted again. Then the script checks the
content of the bucket (counts, every step once, results, one vector per molecule), on which nodes the work ran, and that
no key or token can be read in the dashboard. Any difference is an error. One JSON line comes last. With --without-token
there is only a head that accepts everybody, and jobs that need no nodes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from moleblend_ray.config.tools import SamplesConfig
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.files import storage
from moleblend_ray.orchestration.samples import samples as write_samples
from moleblend_ray.training.commits import FINISHED_NAME, committed_steps
from moleblend_ray.training.metrics import read_records

LIMIT_S: Final = 600.0
"""Time limit of a job, and of the wait for the moment to stop it. On two busy cores a job starts in half a minute."""
STOPPED: Final = 75
BIN: Final = Path(sys.executable).parent
LABELS: Final = (
    "cluster.data_labels={moleblend-role: data}",
    "cluster.worker_labels={moleblend-role: train}",
)
PLACES: Final = {
    "_Converter": "data",
    "_BlockBuilder": "data",
    "try_settings": "data",
    "fit_seed": "data",
    "RayTrainWorker": "train",
    "train_seed": "train",
    "PartActor": "train",
}
"""Part of the name of an actor's class or a task -> label of the nodes on which it must run."""


class FailedError(Exception):
    """A check failed."""


def check(holds: bool, what: str) -> None:
    if not holds:
        raise FailedError(what)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# ----------------------------------------------------------------------------------------------------- the cluster


@contextlib.contextmanager
def object_store() -> Iterator[dict[str, str]]:
    """For the body, the environment of those who may use the S3 server."""
    if os.environ.get("AWS_ENDPOINT_URL"):
        yield {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        return
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # It logs a line for each request.
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": f"id{secrets.token_hex(8)}",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.stop()


@dataclass(kw_only=True)
class SimulatedCluster:
    """`ray start` for a head and nodes on this machine, until :meth:`stop`."""

    environment: Mapping[str, str]
    """Environment of its processes: the token, and the keys of the object store."""
    folder: Path
    """Folder of its session, with a short path, as it holds sockets."""
    gcs_port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        """URL of the dashboard."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    def start_head(self) -> None:
        self._start(
            "--head",
            f"--port={self.gcs_port}",
            "--include-dashboard=true",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard_port}",
            f"--ray-client-server-port={free_port()}",
            "--num-cpus=0",
        )
        self._wait(lambda: self._count_nodes() == 1, "head")
        expected = 401 if self.environment["RAY_AUTH_MODE"] == "token" else 200
        try:
            status = urllib.request.urlopen(f"{self.url}/api/version", timeout=5).status
        except urllib.error.HTTPError as error:
            status = error.code
        check(status == expected, f"{status} instead of {expected} without a token")

    def add_node(self, role: str, cpus: int) -> None:
        self._start(
            f"--address=127.0.0.1:{self.gcs_port}",
            f"--num-cpus={cpus}",
            f"--labels=moleblend-role={role}",
        )
        # One after the other: Ray confuses nodes that start at the same time on one address.
        self._wait(lambda: self._count_nodes() == len(self.nodes), f"node for {role}")

    def asked(self, path: str) -> Any:
        """The answer of the dashboard."""
        token = self.environment["RAY_AUTH_TOKEN"]
        request = urllib.request.Request(
            self.url + path, headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def listed(self, what: str) -> list[dict[str, Any]]:
        """`ray list WHAT`, details included."""
        answer = self.asked(f"/api/v0/{what}?detail=1&limit=10000")
        found: list[dict[str, Any]] = answer["data"]["result"]["result"]
        return found

    def stop(self) -> None:
        for process in reversed(self.nodes):
            process.send_signal(signal.SIGTERM)
        for process in self.nodes:
            try:
                # A head that has run jobs waits half a minute for its own processes, and nobody needs what they would write.
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _start(self, *options: str) -> None:
        shared = (
            "--block",
            # Each node unpacks the sources of a job, and would delete them for the others in a shared folder.
            f"--temp-dir={self.folder / str(len(self.nodes))}",
            f"--object-store-memory={200 * 2**20}",
            # Several nodes share the ports of this machine.
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--dashboard-agent-listen-port=0",
            "--disable-usage-stats",
        )
        with (self.folder / f"start-{len(self.nodes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [BIN / "ray", "start", *options, *shared],
                env=dict(self.environment),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.nodes.append(process)

    def _count_nodes(self) -> int:
        try:
            return sum(node["state"] == "ALIVE" for node in self.listed("nodes"))
        except OSError:
            return 0

    def _wait(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 120
        while not holds():
            has_ended = any(process.poll() is not None for process in self.nodes)
            if has_ended or time.monotonic() > deadline:
                logs = "\n".join(file.read_text() for file in self.folder.glob("start-*.log"))
                raise FailedError(f"no {what}:\n{logs[-3000:]}")
            time.sleep(0.5)


# -------------------------------------------------------------------------------------------------------- the jobs


@dataclass(kw_only=True)
class Submitter:
    """A user with a token and this package, and nothing else."""

    url: str
    environment: Mapping[str, str]
    folder: Path
    """Empty folder in which the commands are run."""
    options: Sequence[str] = ()
    """Environment of each command."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Job -> seconds from the command to its end."""
    shown: list[str] = field(default_factory=list)
    """Output of each command."""

    def start(self, job: str, *words: str, **environment: str) -> subprocess.Popen[str]:
        say(f"$ moleblend submit {job} {shlex.join(words)}")
        return subprocess.Popen(
            [BIN / "moleblend", "submit", job, *words, "--address", self.url, *self.options],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str], expected: int = 0) -> str:
        """Wait for the end of a command, which must have the status ``expected``; returns its output."""
        try:
            shown, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            shown = f"not over after {LIMIT_S:.0f} s:\n{process.communicate()[0]}"
        check(
            process.returncode == expected,
            f"status {process.returncode} instead of {expected}:\n{shown[-6000:]}",
        )
        self.shown.append(shown)
        return shown

    def run(self, job: str, *words: str) -> str:
        """Submit a job and follow it until it has succeeded."""
        began_s = time.monotonic()
        shown = self.finish(self.start(job, *words))
        self.ended(job, began_s)
        return shown

    def ended(self, job: str, began_s: float) -> None:
        """Keep and say how long the job took."""
        self.seconds[job] = round(time.monotonic() - began_s, 1)
        say(f"{job} succeeded after {self.seconds[job]:.0f} s")


def check_refusals(submitter: Submitter, data: str) -> int:
    """Try what must be refused: no token, a wrong one, a secret, a local path; returns the number of tries."""
    say("four commands that must be refused: no token, a wrong token, a secret, a local path")
    data = f"data={data}"
    cases: list[tuple[str, Sequence[str], dict[str, str]]] = [
        ("asks for a token, and there is none here", (data,), {"RAY_AUTH_TOKEN": ""}),
        ("refuses the token", (data,), {"RAY_AUTH_TOKEN": secrets.token_hex(32)}),
        ("looks like a secret", (data, "--env", "AWS_SECRET_ACCESS_KEY=x"), {}),
        ("a path of this machine", ("data=some/folder",), {}),
    ]
    # At the same time, as most of the time is the start of processes.
    processes = [submitter.start("data", *words, **environment) for _, words, environment in cases]
    for (expected, *_), process in zip(cases, processes, strict=True):
        shown = submitter.finish(process, expected=2)
        check(expected in " ".join(shown.split()), f"expected {expected!r} in: {shown}")
        say(f"refused with these words: {expected}")
    return len(cases)


def pretrain_in_two(
    submitter: Submitter,
    cluster: SimulatedCluster,
    run: str,
    words: Sequence[str],
    first: int,
    total: int,
) -> int:
    """Submit pretraining of ``total`` steps, stop it after the checkpoint of step ``first`` and submit it again.

    Returns the step at which it stopped.
    """
    began_s = time.monotonic()
    process = submitter.start("pretrain", *words)
    while first not in committed_steps(run):
        if process.poll() is not None:
            raise FailedError(f"no checkpoint of step {first}:\n{process.communicate()[0][-6000:]}")
        check(time.monotonic() - began_s < LIMIT_S, "no checkpoint in time")
        time.sleep(0.1)
    (job,) = (job for job in cluster.asked("/api/jobs/") if job["status"] == "RUNNING")
    say(f"$ ray job stop {job['submission_id']}")
    subprocess.run(
        [BIN / "ray", "job", "stop", f"--address={cluster.url}", job["submission_id"]],
        env={**submitter.environment, "RAY_AUTH_MODE": "token"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    shown = submitter.finish(process, expected=STOPPED)
    check("committing the current step" in shown, f"no word of the stop:\n{shown[-3000:]}")
    stopped_at = max(committed_steps(run))
    steps = [record["step"] for record in read_records(run)]
    check(steps == list(range(stopped_at)), f"committed step {stopped_at}, records of {steps}")
    shown_steps = [int(step) for step in re.findall(rf"pretrain: (\d+)/{total} steps", shown)]
    check(max(shown_steps, default=0) <= stopped_at, f"steps up to {shown_steps[-1:]} are lost")
    say(f"stopped at step {stopped_at}; the command's status was {STOPPED}")
    submitter.finish(submitter.start("pretrain", *words))
    submitter.ended("pretrain", began_s)
    return stopped_at


def submit_without_token(submitter: Submitter) -> int:
    """Check that a head without a token accepts jobs from users with and without one; returns their number."""
    words = ("molecules=1e6", "gpus=8", "format=json")
    alone = {name: value for name, value in submitter.environment.items() if "TOKEN" not in name}
    ray_command = [str(BIN / "ray"), "job", "submit", f"--address={submitter.url}"]
    # At the same time, as most of the time is the start of processes.
    processes = [
        submitter.start("plan", *words),
        submitter.start("plan", *words, RAY_AUTH_TOKEN=""),
        subprocess.Popen(
            [*ray_command, "--", "python", "-m", "moleblend_ray", "plan", *words],
            cwd=submitter.folder,
            env=alone,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ),
    ]
    for process in processes:
        shown = submitter.finish(process)
        check('"molecules": 1000000' in shown, f"no plan in what was shown:\n{shown[-3000:]}")
    return len(processes)


# ------------------------------------------------------------------------------------------------------ the checks


def check_prepared(data: str, molecules: int) -> dict[str, Any]:
    counts = load_manifest(data).counts
    check(counts.rows_in == molecules, f"{counts.rows_in} rows of {molecules}")
    check(counts.rows_in == counts.rows_out + counts.rows_quarantined, f"rows are lost: {counts}")
    return {"rows_in": counts.rows_in, "rows_out": counts.rows_out}


def check_run(run: str, steps: int, stopped_at: int, first: int) -> dict[str, Any]:
    finished = storage.read_json(storage.join(run, FINISHED_NAME))
    check(finished["finished"] and finished["steps"] == steps, f"unfinished: {finished}")
    check(finished["resumed_from"] == stopped_at, f"not resumed at {stopped_at}: {finished}")
    check(first < stopped_at < steps, f"stopped at {stopped_at}: not in the middle")
    seen = [record["step"] for record in read_records(run)]
    check(seen == list(range(steps)), f"steps are missing or repeated: {seen}")
    first_loss, last_loss = finished["loss_first"]["loss"], finished["loss_last"]["loss"]
    check(last_loss < first_loss, f"the loss did not fall: {first_loss} -> {last_loss}")
    return {"steps": steps, "stopped_at": stopped_at, "loss_first": first_loss, "loss": last_loss}


def check_sweep(out: str, trials: int) -> dict[str, Any]:
    results = storage.read_json(storage.join(out, "results.json"))
    done = [trial for trial in results["trials"] if trial["valid_score"] is not None]
    check(len(done) == trials, f"{len(done)} of {trials} trials: {results['trials']}")
    check(len(results["final"]["seeds"]) == 1, f"one final seed, found {results['final']}")
    return {"trials": trials}


def check_embedded(out: str, molecules: int) -> dict[str, Any]:
    summary = storage.read_json(storage.join(out, "embeddings.json"))
    check(summary["embeddings"] == molecules, f"of {molecules} molecules: {summary}")
    return {"embeddings": summary["embeddings"]}


def check_places(cluster: SimulatedCluster, expected: Mapping[str, str]) -> dict[str, Any]:
    """Check that every actor and task of ours ran where it belongs, and that each kind was seen."""
    roles = {
        node["node_id"]: node["labels"].get("moleblend-role", "head")
        for node in cluster.listed("nodes")
    }
    ran = [(actor["class_name"], actor["node_id"]) for actor in cluster.listed("actors")]
    ran += [
        (task["name"], task["node_id"])
        for task in cluster.listed("tasks")
        if task["type"] == "NORMAL_TASK"
    ]
    seen: dict[str, set[str]] = {}
    for name, node in ran:
        if node:
            seen.setdefault(name, set()).add(roles[node])
    for part, role in expected.items():
        found = {place for name, places in seen.items() if part in name for place in places}
        check(found == {role}, f"{part} ran on {found or 'no node'}, not on {role}: {seen}")
    return {"placed": len(expected)}


def check_secrets(cluster: SimulatedCluster, submitter: Submitter) -> dict[str, Any]:
    """Check that neither the dashboard nor any output shows a key or a token."""
    names = ("RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID")
    hidden = [cluster.environment[name] for name in names]
    jobs = cluster.asked("/api/jobs/")
    told = [
        jobs,
        *(cluster.listed(what) for what in ("actors", "tasks", "workers", "runtime_envs")),
    ]
    text = json.dumps(told) + "\n".join(submitter.shown)
    check(not any(value in text for value in hidden), "a key or the token can be read")
    submitted = [job for job in jobs if job["type"] == "SUBMISSION"]
    sent = {job["runtime_env"].get("working_dir") for job in submitted} - {None}
    check(len(sent) >= 1, "no job was sent with its sources")
    # There are several only if the sources were changed meanwhile.
    return {"jobs": len(submitted), "packages_sent": len(sent)}


# -------------------------------------------------------------------------------------------------------- the whole


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--molecules", type=int, default=400, help="sample molecules")
    parser.add_argument("--steps", type=int, default=100, help="pretraining steps")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only prepare and pretrain, and only prepare brings its code: no kernel of pretrain is compiled anew",
    )
    parser.add_argument(
        "--without-token", action="store_true", help="only jobs on a head that asks for no token"
    )
    options = parser.parse_args(arguments)
    # Whatever was started must end with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    began_s = time.monotonic()
    with contextlib.ExitStack() as last:
        try:
            report = (run_open if options.without_token else run_all)(last, options)
        except FailedError as error:
            say(f"FAILED: {error}")
            return 1
        except KeyboardInterrupt:
            say("interrupted")
            return 128 + signal.SIGINT
    say("all checks hold")
    print(json.dumps({**report, "seconds": round(time.monotonic() - began_s, 1)}))
    return 0


def run_all(last: contextlib.ExitStack, options: argparse.Namespace) -> dict[str, Any]:
    store = last.enter_context(object_store())
    folder = Path(last.enter_context(tempfile.TemporaryDirectory(prefix="mb-", dir="/tmp")))
    cluster, submitter = set_up(folder, store)
    last.callback(cluster.stop)
    cluster.start_head()
    cluster.add_node("data", cpus=3)
    cluster.add_node("train", cpus=3)
    say(f"a head behind a token at {cluster.url}, a node for data, a node for models")
    os.environ.update(store)
    base = make_bucket()
    samples, data, run = f"{base}/samples.parquet", f"{base}/data", f"{base}/run"
    if options.quick:
        write_samples(SamplesConfig(out=samples, num_molecules=options.molecules))
    else:
        submitter.run("samples", f"out={samples}", f"num_molecules={options.molecules}")
    refused = check_refusals(submitter, data)
    submitter.run("prepare", f"source={samples}", f"out={data}", "rows_per_chunk=128", *LABELS)
    submitter.options = ("--code", "image") if options.quick else ()
    first = max(options.steps // 10, 2)
    words = pretrain_words(data, run, options.steps, first)
    stopped_at = pretrain_in_two(submitter, cluster, run, words, first, options.steps)
    report = {
        **check_prepared(data, options.molecules),
        **check_run(run, options.steps, stopped_at, first),
        "refused": refused,
    }
    expected = dict(PLACES)
    if options.quick:
        expected = {
            name: PLACES[name] for name in ("_Converter", "_BlockBuilder", "RayTrainWorker")
        }
    else:
        submitter.run("sweep", *sweep_words(data, run, f"{base}/sweep"))
        vectors = f"{base}/vectors"
        submitter.run("embed", f"checkpoint={run}", f"source={samples}", f"out={vectors}", *LABELS)
        report |= check_sweep(f"{base}/sweep", trials=2)
        report |= check_embedded(vectors, options.molecules)
    report |= check_places(cluster, expected)
    report |= check_secrets(cluster, submitter)
    return {**report, "seconds_of_jobs": submitter.seconds}


def run_open(last: contextlib.ExitStack, _: argparse.Namespace) -> dict[str, Any]:
    folder = Path(last.enter_context(tempfile.TemporaryDirectory(prefix="mb-", dir="/tmp")))
    cluster, submitter = set_up(folder, {}, auth_mode="disabled")
    submitter.options = ("--code", "image")
    last.callback(cluster.stop)
    cluster.start_head()
    say(f"a head without a token at {cluster.url}")
    return {"jobs": submit_without_token(submitter)}


def set_up(
    folder: Path, store: Mapping[str, str], *, auth_mode: str = "token"
) -> tuple[SimulatedCluster, Submitter]:
    """A cluster whose nodes have the keys of the object store, and a user who does not have them."""
    empty = folder / "empty"
    empty.mkdir()
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "AWS_", "PYTHON"))
    }
    plain = {
        **kept,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HOME": str(empty),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    cluster = SimulatedCluster(
        environment={**plain, **store, "RAY_AUTH_MODE": auth_mode}, folder=folder
    )
    return cluster, Submitter(url=cluster.url, environment=plain, folder=empty)


def make_bucket() -> str:
    """URI of a new bucket."""
    import s3fs

    bucket = f"cluster-test-{secrets.token_hex(4)}"
    s3fs.S3FileSystem(use_listings_cache=False).mkdir(bucket)
    return f"s3://{bucket}"


def pretrain_words(data: str, run: str, steps: int, every_steps: int) -> tuple[str, ...]:
    return (
        f"data={data}",
        f"out={run}",
        "model=tiny",
        "order.global_batch_size=32",
        "order.num_streams=2",
        "stream.max_actors=1",
        "optim.learning_rate=1e-3",
        "optim.warmup_steps=5",
        f"train.num_steps={steps}",
        "train.validate_every=0",
        f"checkpoint.every_steps={every_steps}",
        *LABELS,
    )


def sweep_words(data: str, run: str, out: str) -> tuple[str, ...]:
    return (
        f"checkpoint={run}",
        "task.name=logp",
        "task.columns=[logp]",
        "task.kind=regression",
        f"task.source={data}",
        f"out={out}",
        "num_trials=2",
        "grace_epochs=1",
        "search.epochs=[1,2]",
        "final_seeds=[0]",
        "baseline.kinds=[forest]",
        "baseline.num_trees=20",
        *LABELS,
    )


if __name__ == "__main__":
    sys.exit(main())
