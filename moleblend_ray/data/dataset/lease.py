"""The lease of unfinished work, a data set or other results: only one command at a time works on it, on any storage.

A lease is a small file that its command writes anew every few seconds. A command that finds another's lease waits until
it sees it renewed, and then gives up, or until it has seen it unchanged for a minute: that command was killed. What is
compared is the content, so the clocks of machines do not matter. Of a command on the same machine a lock tells at once
whether it lives.

Leases are numbered, and the highest number counts. Taking over is creating the next number, in which one command
succeeds. One that was taken over (it was suspended, or cut off from the storage) finds the higher number and ends. What
it writes of a data set until then are the bytes that the other one writes, unless a molecule meets its time limit in one of
them only.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from moleblend_ray.data.dataset.dataset_files import LEASES_DIR, is_prepared, listed
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.scratch import LEASE, is_held, scratch_folder, scratch_path
from moleblend_ray.errors import ConfigError, DataError, StorageError, without_credentials

logger = logging.getLogger(__name__)

_RENEW_S: Final = 10.0
"""Seconds between two renewals."""
_EXPIRY_S: Final = 60.0
"""A lease that is not renewed for so long is that of a killed command."""
_END_S: Final = 10.0
"""Most seconds that a command waits at its end until the storage knows of it."""
_NAME: Final = re.compile(r"(\d{6})\.json")
_TOKEN: Final = re.compile(r"[0-9a-f]{12}")


class InUseError(DataError):
    """Another command works on the same data set or results."""


class _Found(NamedTuple):
    """The newest lease."""

    number: int
    content: dict[str, Any]

    @property
    def who(self) -> str:
        """Its command, for messages."""
        known = {"host": "?", "process": "?", "started": "?"} | self.content
        return f"process {known['process']} on {known['host']}, started {known['started']}"

    @property
    def age_s(self) -> float:
        """Seconds since the last renewal, if the clocks of both machines agree."""
        try:
            renewed = datetime.fromisoformat(str(self.content.get("renewed")))
            return (datetime.now(UTC) - renewed).total_seconds()
        except (ValueError, TypeError):  # not written by this program
            return math.inf


class Lease:
    """The right to work on ``out``, while it is renewed by a thread of this process."""

    def __init__(
        self, out: str, number: int, content: dict[str, Any], is_finished: Callable[[str], bool]
    ) -> None:
        self._out = out
        self._is_finished = is_finished
        self._number = number
        self._content = content
        self._is_over = threading.Event()
        self._is_lost = threading.Event()
        self._thread = threading.Thread(target=self._live, name="lease", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """InUseError if another command has taken over, as far as was known at the last renewal."""
        if self._is_lost.is_set():
            self._raise_lost()

    def confirm(self) -> None:
        """InUseError if another command has taken over, as the storage says now."""
        if not self._is_newest():
            self._is_lost.set()
        self.require()

    def end(self) -> None:
        """Leave the work to the next command, which need not wait; if it is finished, remove the leases."""
        self._is_over.set()
        # Where the storage is out of reach, which may be why the work ended, the lease expires.
        self._thread.join(_END_S)

    def _live(self) -> None:
        self._renew()
        with contextlib.suppress(StorageError):
            if self._is_done():
                storage.delete_tree(storage.join(self._out, LEASES_DIR))
            elif not self._is_lost.is_set():
                storage.write_json(_uri(self._out, self._number), self._content | {"ended": True})

    def _renew(self) -> None:
        while not self._is_over.wait(_RENEW_S):
            try:
                if not self._is_newest():
                    self._is_lost.set()
                    return
                content = self._content | {"renewed": _now()}
                storage.write_json(_uri(self._out, self._number), content)
            except StorageError as error:
                logger.warning(
                    "cannot renew the lease of %s: %s", without_credentials(self._out), error
                )

    def _is_newest(self) -> bool:
        found = _newest(self._out)
        # Numbers begin anew where the work was finished or deleted.
        return found is not None and found.content.get("token") == self._content["token"]

    def _is_done(self) -> bool:
        try:
            return self._is_finished(self._out)
        except (DataError, ConfigError):  # damaged, or of another release: the next command tells
            return False

    def _raise_lost(self) -> None:
        if self._is_done():
            raise InUseError(
                f"Another command has finished {self._out} meanwhile: the same command says what it holds."
            )
        found = _newest(self._out)
        if found is None:
            raise InUseError(f"{self._out} was deleted while this command worked on it.")
        raise InUseError(
            f"Another command ({found.who}) has taken over the work on {self._out}, as this one gave no sign of "
            f"life for {_EXPIRY_S:.0f} s: it was suspended, or could not write there. That one keeps what is done."
        )


@contextlib.contextmanager
def leased(out: str, is_finished: Callable[[str], bool] = is_prepared) -> Iterator[Lease]:
    """Hold the lease of ``out`` within the block; ``is_finished`` tells whether all work there is done.

    InUseError if another command works on it. If one was killed on another machine, this takes a minute to find out.
    """
    token = uuid.uuid4().hex[:12]
    content = {
        "token": token,
        "host": platform.node(),
        "process": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "renewed": _now(),
    }
    with scratch_folder(LEASE, token=token):
        lease = Lease(out, _acquire(out, content), content, is_finished)
        try:
            yield lease
        finally:
            lease.end()


def command_at_work(out: str) -> str | None:
    """The command that works on ``out``, for messages; None if none seems to.

    On this machine its lock tells. Of other machines a renewal within the last minute does, so their clocks matter here.
    """
    found = _newest(out)
    if found is None or found.content.get("ended"):
        return None
    is_alive = _is_alive_here(found)
    if is_alive is None:
        is_alive = found.age_s < _EXPIRY_S
    return found.who if is_alive else None


def was_leased(out: str) -> bool:
    """Whether a command has begun work on ``out`` that is not finished, be it at work or not."""
    return bool(_numbers(out))


def _acquire(out: str, content: dict[str, Any]) -> int:
    """The number of a new lease with this content, once nobody else holds one."""
    while True:
        found = _newest(out)
        if found is not None and not found.content.get("ended"):
            _await_expiry(out, found)
        number = found.number + 1 if found is not None else 1
        if storage.create_json(_uri(out, number), content):
            return number


def _await_expiry(out: str, found: _Found) -> None:
    """Return when the lease is that of a killed command or is gone; InUseError if its command lives."""
    is_alive = _is_alive_here(found)
    deadline_s = time.monotonic() + _EXPIRY_S
    if is_alive is None:
        logger.info(
            "%s: an earlier command (%s) has not ended its work; looking for up to %.0f s whether it goes on",
            without_credentials(out),
            found.who,
            _EXPIRY_S,
        )
    while is_alive is None and time.monotonic() < deadline_s:
        time.sleep(_RENEW_S / 4)
        now = _newest(out)
        if now is None or now.content.get("ended"):
            return
        is_alive = True if now != found else None
    if is_alive:
        raise InUseError(
            f"out: another command works on {out} at this moment ({found.who}). Wait until it has ended: the same "
            "command then says what it made, or finishes it."
        )


def _is_alive_here(found: _Found) -> bool | None:
    """Whether its process lives, if it was started on this machine; else None."""
    token = str(found.content.get("token"))
    return is_held(scratch_path(LEASE, token)) if _TOKEN.fullmatch(token) else None


def _now() -> str:
    """To the microsecond, so that every renewal changes the content."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _newest(out: str) -> _Found | None:
    number = max(_numbers(out), default=0)
    if not number:
        return None
    try:
        content = storage.read_json(_uri(out, number))
    except storage.NotFoundError:  # its command has just finished the work
        return None
    except DataError:  # not written by this program
        content = {}
    return _Found(number, content if isinstance(content, dict) else {})


def _numbers(out: str) -> list[int]:
    names = (_NAME.fullmatch(storage.name_of(uri)) for uri in listed(out, LEASES_DIR))
    return [int(name[1]) for name in names if name is not None]


def _uri(out: str, number: int) -> str:
    return storage.join(out, LEASES_DIR, f"{number:06d}.json")
