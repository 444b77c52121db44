"""A child process that works on one request at a time and can be stopped whatever it is doing.

RDKit's C++ code cannot be interrupted from Python: no signal handler, thread or exception ends an embedding that hangs.
A process can be killed. The child is a new interpreter, not a fork of a process with threads. Requests and answers go
through pipes, in frames of 8 bytes for the length (little endian) and a pickle. Uses the standard library only.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any, Final, NoReturn

from moleblend_ray.errors import MoleBlendError

START_TIMEOUT_S: Final = 60.0
"""Seconds that a child may take to start and import what it needs, on a loaded machine."""

_LENGTH: Final = struct.Struct("<Q")
_READY: Final = b"ready"
_ATTEMPTS: Final = 2
_READ_BYTES: Final = 1 << 16


class WorkerStartError(MoleBlendError):
    """The child process cannot be started, which is a fault of the installation and not of a request."""


class WorkerTimeoutError(Exception):
    """The time for a request was over; the child has been killed."""


class WorkerCrashedError(Exception):
    """The child died twice while working on a request; the argument says how, such as ``SIGSEGV``."""


class KillableWorker:
    """A child process that is started at the first request, and again after it died or was killed.

    It is the leader of its own process group, and ends when this process ends, in whatever way. It works on one request
    at a time: threads wait for each other.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        """``arguments`` are those of a Python interpreter that runs a program which ends in :func:`serve`."""
        self._arguments = tuple(arguments)
        self._child: _Child | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The process id of the child; None if there is no child."""
        return self._child.process.pid if self._child is not None else None

    def call(self, request: Any, timeout_s: float) -> Any:
        """The child's answer to ``request``, a picklable value.

        The ``timeout_s`` seconds do not include the start of the child. A child that dies is replaced, and asked once
        more with the full time: it may have been killed because of other processes (out of memory).

        Raises:
            WorkerTimeoutError: the time is over.
            WorkerCrashedError: the child died twice while working on this request.
            WorkerStartError: no child can be started.
        """
        frame = _frame(pickle.dumps(request))
        with self._lock:
            for attempt in range(1, _ATTEMPTS + 1):
                if self._child is None or self._child.process.poll() is not None:
                    self._end()
                    self._child = _start(self._arguments)
                try:
                    return pickle.loads(self._child.exchange(frame, time.monotonic() + timeout_s))
                except EOFError:
                    how = _how_it_ended(self._end())
                    if attempt == _ATTEMPTS:
                        raise WorkerCrashedError(how) from None
                except BaseException:
                    self._end()  # also after an interrupt: its answer would be taken for that of the next request
                    raise
        raise AssertionError("unreachable")

    def close(self) -> None:
        """End the child; a later request starts another."""
        with self._lock:
            self._end()

    def _end(self) -> int:
        """Kill the child; returns its return code, or 0 if there was no child."""
        if self._child is None:
            return 0
        child, self._child = self._child, None
        child.finalizer()
        return child.process.returncode or 0


_shared: Final[dict[tuple[int, tuple[str, ...]], KillableWorker]] = {}


def shared_worker(*arguments: str) -> KillableWorker:
    """The one child of this process with these arguments, which ends with this process."""
    # A forked process has inherited the pipes of its parent's child, and must not use them.
    key = (os.getpid(), arguments)
    if key not in _shared:
        _shared[key] = KillableWorker(arguments)
        atexit.register(_shared[key].close)
    return _shared[key]


class _Child:
    """A running child and the ends of its pipes."""

    def __init__(self, arguments: Sequence[str]) -> None:
        lifeline, ours = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                pass_fds=(lifeline,),
                start_new_session=True,
                env=_environment(lifeline),
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(lifeline)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._stdin: IO[bytes] = self.process.stdin
        self._stdout: IO[bytes] = self.process.stdout
        self.finalizer = weakref.finalize(self, _kill, self.process, ours)
        os.set_blocking(self._stdin.fileno(), False)
        os.set_blocking(self._stdout.fileno(), False)

    def exchange(self, frame: bytes, deadline: float) -> bytes:
        """Send a frame (or nothing) and wait for one; EOFError if the child dies, WorkerTimeoutError at ``deadline``.

        Neither pipe blocks, so a stopped child does not stop its parent.
        """
        unsent, received = memoryview(frame), bytearray()
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN)
        if unsent:
            poll.register(self._stdin, select.POLLOUT)
        while len(received) < _LENGTH.size or len(received) < _frame_size(received):
            seconds_left = deadline - time.monotonic()
            if seconds_left <= 0:
                raise WorkerTimeoutError
            ready = {fd for fd, _ in poll.poll(seconds_left * 1000)}
            if self._stdin.fileno() in ready:
                unsent = unsent[self._send(unsent) :]
                if not unsent:
                    poll.unregister(self._stdin)
            if self._stdout.fileno() in ready:
                part = os.read(self._stdout.fileno(), _READ_BYTES)
                if not part:
                    raise EOFError
                received += part
        return bytes(received[_LENGTH.size :])

    def _send(self, unsent: memoryview) -> int:
        try:
            return os.write(self._stdin.fileno(), unsent)
        except BrokenPipeError:
            raise EOFError from None
        except BlockingIOError:
            return 0


def _start(arguments: Sequence[str]) -> _Child:
    command = " ".join((sys.executable, *arguments))
    try:
        child = _Child(arguments)
    except OSError as error:
        raise WorkerStartError(
            f"`{command}` cannot be run: {error}. Is the machine out of memory or processes?"
        ) from error
    try:
        child.exchange(b"", time.monotonic() + START_TIMEOUT_S)
    except (EOFError, WorkerTimeoutError) as error:
        child.finalizer()
        found = (
            f"ended: {_how_it_ended(child.process.returncode)}"
            if isinstance(error, EOFError)
            else f"was not ready after {START_TIMEOUT_S:g} s"
        )
        raise WorkerStartError(
            f"`{command}` {found}, expected it to wait for requests. What it printed stands in the log of "
            "this process; RDKit and NumPy must be importable, and memory for another process must be free."
        ) from error
    return child


_LIFELINE: Final = "MOLEBLEND_LIFELINE_FD"


def _environment(lifeline: int) -> dict[str, str]:
    """The child's environment, with which it finds the same modules as this process, also if ``sys.path`` changed."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, _LIFELINE: str(lifeline)}


def _kill(process: subprocess.Popen[bytes], lifeline: int) -> None:
    """End the child and its own children, and reap it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    os.close(lifeline)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _how_it_ended(returncode: int) -> str:
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"


def _frame(content: bytes) -> bytes:
    return _LENGTH.pack(len(content)) + content


def _frame_size(received: bytearray) -> int:
    length: int = _LENGTH.unpack_from(received)[0]
    return _LENGTH.size + length


# -- in the child -------------------------------------------------------------------------------------


def serve(answer: Callable[[Any], Any]) -> NoReturn:
    """Answer requests until the parent closes the pipe; to be called after everything ``answer`` needs is imported."""
    _end_with_parent(int(os.environ.pop(_LIFELINE)))
    source, sink = os.dup(0), os.dup(1)
    # Output that a library prints must not get between the frames.
    os.dup2(2, 1)
    with open(source, "rb") as requests, open(sink, "wb") as answers:
        answers.write(_frame(_READY))
        answers.flush()
        while header := requests.read(_LENGTH.size):
            (length,) = _LENGTH.unpack(header)
            result = answer(pickle.loads(requests.read(length)))
            answers.write(_frame(pickle.dumps(result)))
            answers.flush()
    sys.exit(0)


def _end_with_parent(lifeline: int) -> None:
    """Let the kernel end this process (by an unhandled SIGIO) when the parent's end of the pipe closes.

    A thread in this process would not do, as it only runs when RDKit releases the interpreter lock. Nor would the
    kernel's parent-death signal, which is sent when the *thread* ends that started the child.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(lifeline, select.POLLHUP)
    if poll.poll(0):  # the parent ended before the calls above
        sys.exit(0)
