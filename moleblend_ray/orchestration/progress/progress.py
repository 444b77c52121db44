"""Shows on the driver what work in other processes has done so far.

Workers report to a small actor, the same one for all that is shown in a session, as its start takes half a second of a core. A
thread of the driver shows the newest report, as a bar on a terminal or as log lines elsewhere, and publishes it as metrics. Log
records of the package are sent in the same way.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import ray
from tqdm import tqdm

from moleblend_ray.orchestration.progress import logs
from moleblend_ray.orchestration.progress.metrics import JobMetrics

logger = logging.getLogger(__name__)

_LOG_INTERVAL_S: Final = 10.0

_SILENT_S: Final = 60.0
"""Seconds without a first report after which this is told, then after twice as many, and so on."""

Values = Mapping[str, float | int | str]


class Snapshot(NamedTuple):
    """What the driver reads at one time."""

    values: dict[str, float | int | str]
    """Newest value of each name; "done" and "total" are the position of the bar."""
    counts: dict[str, int]
    """Number of events so far, by name; of "done", what processes have done, also of pieces that are not finished."""
    records: list[tuple[int, str, str, dict[str, Any]]]
    """(level, logger name, message, :func:`.logs.origin_of`) of every record that the driver has not confirmed."""
    board: str
    """Random name of the board; another one after it was lost with its node and started anew."""


class _Board:
    """Holds the newest report of all workers."""

    def __init__(self) -> None:
        self._values: dict[str, float | int | str] = {}
        self._counts: dict[str, int] = {}
        self._records: list[tuple[int, str, str, dict[str, Any]]] = []
        self._confirmed = 0
        self._name = uuid.uuid4().hex

    def update(self, values: Values) -> None:
        self._values.update(values)

    def count(self, name: str, number: int) -> None:
        self._counts[name] = self._counts.get(name, 0) + number

    def log(self, level: int, name: str, message: str, origin: dict[str, Any]) -> None:
        self._records.append((level, name, message, origin))

    def read(self, board: str, confirmed: int) -> Snapshot:
        """The driver has ``confirmed`` records of ``board``. Only these are dropped, as an answer may be lost."""
        if board == self._name:
            del self._records[: confirmed - self._confirmed]
            self._confirmed = confirmed
        return Snapshot(dict(self._values), dict(self._counts), list(self._records), self._name)


class _Boards:
    """Actor with a board for each :class:`Progress`, by its key."""

    def __init__(self) -> None:
        self._boards: dict[str, _Board] = {}
        self._closed: set[str] = set()

    def call(self, key: str, name: str, *arguments: Any) -> Any:
        """The result of this method of a board. What comes late, from processes that are not wanted any more, is dropped."""
        if key in self._closed:
            return None
        return getattr(self._boards.setdefault(key, _Board()), name)(*arguments)

    def close(self, key: str) -> None:
        self._closed.add(key)
        self._boards.pop(key, None)


class _Method(NamedTuple):
    """A method of a board, to be called as that of an actor."""

    actor: Any
    key: str
    name: str

    def remote(self, *arguments: Any) -> Any:
        return self.actor.call.remote(self.key, self.name, *arguments)


class _BoardHandle:
    """What processes have of a board in the actor."""

    def __init__(self, actor: Any, key: str) -> None:
        self._actor, self._key = actor, key
        self.update, self.count, self.log, self.read = (
            _Method(actor, key, name) for name in ("update", "count", "log", "read")
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _BoardHandle, (self._actor, self._key)

    def close(self) -> None:
        self._actor.close.remote(self._key)


_lock = threading.Lock()
_users = 0
"""Bodies of :func:`one_board_actor` in this process."""
_actor: Any = None
"""The actor that they share, once one of them needs it."""


@contextlib.contextmanager
def one_board_actor() -> Iterator[None]:
    """Whatever shows progress in the body uses the same actor, which ends with the last such body of this process."""
    global _users, _actor
    with _lock:
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users and _actor is not None:
                # A handle must not outlive its cluster: in the next one, the actor of the same number would get its end.
                actor, _actor = _actor, None
                if ray.is_initialized():
                    ray.kill(actor)


def _new_board() -> _BoardHandle:
    global _actor
    with _lock:
        if _actor is None:
            # Ray's type annotations do not have the methods of the actor.
            _actor = ray.remote(num_cpus=0, max_restarts=-1)(_Boards).remote()
        return _BoardHandle(_actor, uuid.uuid4().hex)


class Reporter:
    """A picklable callable for workers: `reporter({"done": 3, "total": 10, "loss": 1.2})`.

    A report does not wait for an answer, except the final one (done == total), which must arrive before the driver
    looks for the last time. Reports that come within `min_interval_s` after the last one are kept and sent with the
    next.
    """

    def __init__(
        self, board: Any, min_interval_s: float = 0.2, run: str = "", *, as_json: bool = False
    ) -> None:
        """``run`` and ``as_json`` are for the logs of the processes that get the reporter."""
        self._board = board
        self._min_interval_s = min_interval_s
        self._run = run
        self._as_json = as_json
        self._held: dict[str, float | int | str] = {}
        self._last_sent_s = 0.0

    def __call__(self, values: Values) -> None:
        """Send `values`, or keep them for the next call."""
        self._held.update(values)
        is_last = "total" in self._held and self._held.get("done") == self._held["total"]
        now_s = time.monotonic()
        if is_last or now_s - self._last_sent_s >= self._min_interval_s:
            sent = self._board.update.remote(self._held)
            self._held, self._last_sent_s = {}, now_s
            if is_last:
                _await_arrival(sent)

    def count(self, name: str, number: int = 1) -> None:
        """Report more events with this name; does not wait.

        Where a report comes only when a large piece is finished, processes count "done" meanwhile: the display takes the larger one.
        """
        self._board.count.remote(name, number)

    def forward_logs(self, prefix: str = "", level: int = logging.WARNING) -> None:
        """Show the package's log records of this process, from `level` up, on the driver, with `prefix`.

        If logs are JSON, all records from INFO up are also written to a file among the logs of Ray's session.
        """
        # Ray reuses processes: what was set for earlier work is no longer true.
        logs.set_context(run=self._run or None, rank=None, step=None)
        if self._as_json:
            logs.log_to_file(_session_logs() / f"moleblend-{os.getpid()}.jsonl")
        package_logger = logging.getLogger("moleblend_ray")
        # Its handler must not stay either, as its board is gone.
        for handler in list(package_logger.handlers):
            if isinstance(handler, _Forwarder):
                package_logger.removeHandler(handler)
        package_logger.addHandler(_Forwarder(self._board, prefix, level))

    def __reduce__(self) -> tuple[Any, ...]:
        # What this process holds back is not for another one.
        return partial(
            Reporter, self._board, self._min_interval_s, self._run, as_json=self._as_json
        ), ()


def _session_logs() -> Path:
    """Folder of this node's logs, where Ray's dashboard and log collectors look for them."""
    node = ray._private.worker.global_worker.node
    assert node is not None
    return Path(node.get_logs_dir_path())


def _await_arrival(sent: Any) -> None:
    # Calls of one process arrive in order: when this one is there, all earlier ones are.
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(sent, timeout=10.0)


class _Forwarder(logging.Handler):
    def __init__(self, board: Any, prefix: str, level: int) -> None:
        super().__init__(level)
        self._board = board
        self._prefix = prefix
        # Here: the driver does not know the secrets in the environment of this node.
        self._redacted = logs.Redactor()

    def emit(self, record: logging.LogRecord) -> None:
        message = self._redacted(self._prefix + record.getMessage())
        origin = {
            name: self._redacted(value) if isinstance(value, str) else value
            for name, value in logs.origin_of(record, self._prefix).items()
        }
        self._board.log.remote(record.levelno, record.name, message, origin)


class Progress:
    """Shows reports while the body runs: `with Progress("pretrain", unit="step") as progress: ...`.

    `progress.reporter` is for the workers. `total` may also be reported later, as the value "total". `out` is the URI
    that the job writes to; it gives the name of the run in metrics and JSON logs (None: the name stays as it is).
    """

    def __init__(
        self,
        description: str,
        *,
        unit: str,
        total: int | None = None,
        out: str | None = None,
    ) -> None:
        run = logs.run_name(out) if out else str(logs.context().get("run", ""))
        logs.set_context(run=run or None)
        self.metrics = JobMetrics(run, description)
        self._last = contextlib.ExitStack()
        self._last.enter_context(one_board_actor())
        self._board = _new_board()
        self.reporter = Reporter(self._board, run=run, as_json=logs.log_format() == "json")
        is_terminal = sys.stderr.isatty()
        self._display: _Bar | _Lines = (
            _Bar(description, unit, total) if is_terminal else _Lines(description, unit, total)
        )
        self._poll_interval_s = 0.5 if is_terminal else 1.0
        self._seen = ("", 0)
        self._silence = _Silence(description, time.monotonic())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self.metrics.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=10.0)
        self._show_newest(is_last=True)
        self.metrics.__exit__(kind, error, trace)
        self._display.close()
        self._board.close()
        self._last.close()

    def _watch(self) -> None:
        while not self._stop.wait(self._poll_interval_s):
            self._show_newest()

    def _show_newest(self, *, is_last: bool = False) -> None:
        # Short work may end before the process of the board has started, so the last look waits for it.
        timeout_s = 30.0 if is_last else 5.0
        try:
            read = self._board.read.remote(*self._seen)
            snapshot: Snapshot | None = ray.get(read, timeout=timeout_s)
        except (ray.exceptions.RayError, TimeoutError):
            # The cluster is busy or ends. This is only a display; the work itself raises errors.
            return
        if snapshot is None:  # It was closed before this look arrived.
            return
        board, seen = self._seen
        before = seen if board == snapshot.board else 0
        self._seen = (snapshot.board, before + len(snapshot.records))
        for level, name, message, origin in snapshot.records:
            # As an argument, as a message may contain characters that have a meaning in a format string.
            logging.getLogger(name).log(level, "%s", message, extra={"origin": origin})
        values, counts = _with_unfinished(snapshot)
        self._silence.observe(time.monotonic(), is_silent=not (values or counts))
        self.metrics.show(values, counts)
        if isinstance(self._display, _Bar):
            self._display.show(values)
        else:
            self._display.show(values, is_last=is_last)


class _Silence:
    """Tells that nothing has been reported so far. Processes that cannot start, or wait for room on a cluster, say nothing themselves."""

    def __init__(self, description: str, began_s: float) -> None:
        self._description = description
        self._began_s = began_s
        self._told_at_s = _SILENT_S
        self._is_over = False

    def observe(self, now_s: float, *, is_silent: bool) -> None:
        self._is_over |= not is_silent
        waited_s = now_s - self._began_s
        if self._is_over or waited_s < self._told_at_s:
            return
        self._told_at_s = 2 * waited_s
        logger.info(
            "%s: nothing done after %.0f s: its processes start, wait for room on the cluster, or work on the first part",
            self._description,
            waited_s,
        )


def _with_unfinished(
    snapshot: Snapshot,
) -> tuple[dict[str, float | int | str], dict[str, int]]:
    """Values with what processes have counted as done, and the other counts."""
    values, counts = dict(snapshot.values), dict(snapshot.counts)
    counted = counts.pop("done", 0)
    if "total" in values:  # A piece that was begun again is counted again.
        counted = min(counted, int(values["total"]))
    if counted > int(values.get("done", 0)):
        values["done"] = counted
    return values, counts


class _Bar:
    """A tqdm bar on a terminal."""

    def __init__(self, description: str, unit: str, total: int | None) -> None:
        self._bar = tqdm(
            desc=description, unit=unit, total=total, dynamic_ncols=True, smoothing=0.1
        )

    def show(self, values: Values) -> None:
        if "total" in values:
            self._bar.total = int(values["total"])
        done = int(values.get("done", 0))
        if self._bar.n == 0 < done:
            # A resumed run starts in the middle; its speed is measured from there.
            self._bar.initial = done
        self._bar.n = done
        self._bar.set_postfix_str(_format(values), refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """A log line every ten seconds and one at the end, if there is no terminal for a bar."""

    def __init__(self, description: str, unit: str, total: int | None) -> None:
        self._description = description
        self._unit = unit
        self._total = total
        self._last_s = time.monotonic()
        self._shown: dict[str, float | int | str] = {}

    def show(self, values: Values, *, is_last: bool) -> None:
        is_due = time.monotonic() - self._last_s >= _LOG_INTERVAL_S
        if not values or dict(values) == self._shown or not (is_due or is_last):
            return
        self._last_s, self._shown = time.monotonic(), dict(values)
        total = values.get("total", self._total)
        of_total = f"/{total}" if total is not None else ""
        done = f"{values.get('done', 0)}{of_total} {self._unit}s"
        step = {"step": values["done"]} if self._unit == "step" and "done" in values else {}
        logger.info("%s: %s %s", self._description, done, _format(values), extra=step)

    def close(self) -> None:
        pass


def _format(values: Values) -> str:
    shown = {name: value for name, value in values.items() if name not in ("done", "total")}
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in shown.items()
    )
