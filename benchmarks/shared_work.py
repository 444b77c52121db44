"""Jobs that processes share: each leaves one JSON file, and the same command again does what is missing.

Imports nothing heavy: what a job needs is imported by the module of the function that does it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from moleblend_ray.data.files import storage
from moleblend_ray.errors import ConfigError

Work = Callable[[Any], dict[str, Any]]
"""From a job's payload to what its file holds; a function of a module, so that processes find it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One piece of work."""

    name: str
    """Of its file, without ending."""
    labels: Mapping[str, Any]
    """What its file begins with."""
    identity: Mapping[str, Any]
    """What a result depends on besides; a file with another one is of other settings."""
    cost: float
    """How long it takes, in any unit: the longest begin first."""
    payload: Any
    """What the function is called with; goes to another process."""


def run_jobs(
    jobs: Sequence[Job],
    work: Work,
    out: Path,
    *,
    workers: int = 1,
    report: Callable[[int, dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """The document of each job, in their order: of a file in ``out``, or made now by one of ``workers`` processes.

    A job that fails has ``error`` in its document, stops no other, and is tried again by the next command.
    ``report`` gets how many jobs have a document, and the newest. ConfigError if ``out`` holds results of other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = {job.name: document for job in jobs if (document := finished(job, out)) is not None}
    missing = [job for job in jobs if job.name not in found]
    # Stable: jobs of equal cost, such as those of one data set, stay together.
    missing.sort(key=lambda job: -job.cost)
    with contextlib.closing(_outcomes(missing, work, workers)) as outcomes:
        for job, outcome in outcomes:
            document = {**job.labels, **outcome, "identity": dict(job.identity)}
            storage.write_json(str(out / f"{job.name}.json"), document)
            found[job.name] = document
            report(len(found), document)
    return [found[job.name] for job in jobs]


def finished(job: Job, out: Path) -> dict[str, Any] | None:
    """The result that an earlier command left of ``job``, unless it failed."""
    file = out / f"{job.name}.json"
    if not file.exists():
        return None
    document: dict[str, Any] = json.loads(file.read_text())
    if "error" in document:
        return None
    then, now = document.get("identity", {}), json.loads(json.dumps(job.identity))
    if then != now:
        different = sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
        raise ConfigError(
            f"{file} is a result of other settings ({', '.join(different)} differ); give another --out, or move it away"
        )
    return document


def share_cores(threads: int, workers: int) -> int:
    """Threads of each process: as given, else OMP_NUM_THREADS, else its share of the cores. Later processes obey it."""
    given = threads or int(os.environ.get("OMP_NUM_THREADS", "0"))
    threads = given or max(1, len(os.sched_getaffinity(0)) // workers)
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(threads)
    return threads


def _outcomes(
    jobs: Sequence[Job], work: Work, num_workers: int
) -> Generator[tuple[Job, dict[str, Any]]]:
    """Each job with what came of it, as they end."""
    if num_workers == 1:
        for job in jobs:
            yield job, _attempt(work, job.payload)
        return
    waiting = deque(jobs)
    workers = [_Worker(work) for _ in range(min(num_workers, len(jobs)))]
    running: dict[Connection, tuple[_Worker, Job]] = {}
    try:
        for worker in workers:
            running[worker.connection] = worker, worker.begin(waiting.popleft())
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                worker, job = running.pop(connection)
                outcome = worker.outcome()
                if waiting:
                    if "error" in outcome:
                        # Its process may be gone, or of no use: a failed kernel spoils every later CUDA call.
                        worker.stop()
                        workers.remove(worker)
                        worker = _Worker(work)
                        workers.append(worker)
                    running[worker.connection] = worker, worker.begin(waiting.popleft())
                yield job, outcome
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that does one job at a time."""

    def __init__(self, work: Work) -> None:
        # CUDA cannot be used in a forked process.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, work))
        self._process.start()
        # Only the process holds its end now: when it dies, reading ends.
        theirs.close()

    def begin(self, job: Job) -> Job:
        with contextlib.suppress(BrokenPipeError):  # it died: outcome() says so
            self.connection.send(job.payload)
        return job

    def outcome(self) -> dict[str, Any]:
        try:
            outcome: dict[str, Any] = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            return {"error": f"its process ended with exit code {self._process.exitcode}"}
        return outcome

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, work: Work) -> None:
    with contextlib.suppress(EOFError):  # the command was killed
        while True:
            connection.send(_attempt(work, connection.recv()))


def _attempt(work: Work, payload: Any) -> dict[str, Any]:
    began = time.monotonic()
    try:
        outcome = work(payload)
        json.dumps(outcome, allow_nan=False)  # what cannot be written is the job's failure, too
    # Whatever it is, it is the job's result and not the end of the others.
    except Exception as error:
        outcome = {
            "error": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
        }
    return {**outcome, "seconds": round(time.monotonic() - began, 1)}
