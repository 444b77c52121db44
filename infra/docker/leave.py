"""The preStop hook of a pod, run before it terminates: ``leave.py head|worker [--seconds N]``.

Kubernetes removes pods without asking Ray: the end of a spot node, a drained node, a deleted RayJob, a retry, a job that Kueue
suspends. Between the notice and the kill, the pod has a grace period. This hook uses it:

- worker: tells Ray that the node will end. Ray Train then has its workers commit the current step and restart on other nodes.
  The hook waits until they have left this pod.
- head: sends SIGTERM to the jobs that run here, as `ray job stop` does, and waits for them. The operator does neither
  when it suspends or retries a RayJob, and does not wait when one is deleted.

The hook never prevents a pod's end: errors are written to stderr, and the exit status is 0. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

PROC: Final = Path("/proc")
_TRAINERS: Final = re.compile(r"ray::.*\bRayTrainWorker\b")
_SUPERVISORS: Final = re.compile(r"ray::.*\bJobSupervisor\b")
_WATCHER: Final = re.compile(r"/bin/sh -c while kill -s 0 \d+;")
"""The other child of a supervisor, which kills the rest of the job when the supervisor has ended."""
_SHELL: Final = re.compile(r"(/\S*/)?(ba|da)?sh -c ")
_NODE_ID: Final = re.compile(r"--node_id=([0-9a-f]+)")
_POLL_S: Final = 1.0
_DRAIN_S: Final = 20.0
"""`ray drain-node` imports Ray, which takes seconds, and waits for a head node that may no longer exist."""


class Process(NamedTuple):
    """A process of this pod."""

    pid: int
    parent: int
    title: str
    """Its command line, or what the process made of it."""


def processes(proc: Path = PROC) -> Iterator[Process]:
    """The visible processes; one that ends in the meantime is skipped."""
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            # The name in brackets may itself contain spaces and brackets.
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if after_name and after_name[0] != "Z":
            yield Process(int(folder.name), int(after_name[1]), title.strip())


def node_id(found: Sequence[Process]) -> str | None:
    """Ray's id of this pod's node, from the command line of its raylet."""
    for process in found:
        match = _NODE_ID.search(process.title)
        if match and "raylet" in process.title.split(" ", 1)[0]:
            return match[1]
    return None


def trainers(found: Sequence[Process]) -> list[Process]:
    """Workers of Ray Train."""
    return [process for process in found if _TRAINERS.match(process.title)]


def jobs(found: Sequence[Process]) -> list[Process]:
    """The processes of the submitted jobs: the descendants of Ray's job supervisors."""
    family = {process.pid for process in found if _SUPERVISORS.match(process.title)}
    members: list[Process] = []
    while True:
        children = [
            process
            for process in found
            if process.parent in family
            and process.pid not in family
            and not _WATCHER.match(process.title)
        ]
        if not children:
            return members
        members += children
        family |= {process.pid for process in children}


def programs(found: Sequence[Process]) -> list[Process]:
    """The processes of the jobs, without the shells that run them.

    A shell would end at once while its program still needs time, and then its supervisor would kill the program.
    """
    return [process for process in jobs(found) if not _SHELL.match(process.title)]


def drain(seconds: float) -> None:
    """Tell Ray that this node will end in ``seconds``."""
    node = node_id(list(processes()))
    if node is None:
        _say("no raylet here: nothing to tell Ray")
        return
    command = [
        "ray", "drain-node", "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message", "the pod is being terminated", "--deadline-remaining-seconds", str(int(seconds)),
    ]  # fmt: skip
    try:
        ended = subprocess.run(
            command, timeout=min(_DRAIN_S, seconds), capture_output=True, text=True, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        _say(f"Ray was not told: {error}")
        return
    if ended.returncode:
        _say(f"Ray was not told: {(ended.stderr or ended.stdout).strip()[-500:]}")
    else:
        _say(f"Ray knows that node {node} is going")


def stop_jobs() -> None:
    """Ask the jobs of this head to stop."""
    for process in programs(list(processes())):
        try:
            os.kill(process.pid, signal.SIGTERM)
            _say(f"SIGTERM to {process.pid}: {process.title[:200]}")
        except OSError as error:
            _say(f"process {process.pid} was not asked to stop: {error}")


def wait_until_gone(find: Callable[[Sequence[Process]], list[Process]], deadline_s: float) -> None:
    """Return when ``find`` finds nothing more, or at the deadline (of the monotonic clock)."""
    while remaining := find(list(processes())):
        if time.monotonic() >= deadline_s:
            _say(f"still there at the end: {', '.join(str(p.pid) for p in remaining)}")
            return
        time.sleep(_POLL_S)
    _say("nothing left to wait for")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the hook; always 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("role", choices=["head", "worker"])
    parser.add_argument("--seconds", type=float, default=120.0, help="longest wait")
    options = parser.parse_args(arguments)
    deadline_s = time.monotonic() + options.seconds
    if options.role == "head":
        stop_jobs()
        wait_until_gone(jobs, deadline_s)
    else:
        drain(options.seconds)
        wait_until_gone(trainers, deadline_s)
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"leave: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
