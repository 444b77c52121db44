"""Temporary folders that are removed even if their process is killed.

A folder is locked while its process is alive. Making a new one first removes the folders of the same user on this
machine that no process holds: otherwise a run that survives many losses of workers would fill the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

_SETTLED_S: Final = 60.0
"""Age from which an unlocked folder counts as left behind, as a folder is locked a moment after it is made."""

LEASE: Final = "lease"
"""Purpose of folders that hold nothing but their lock, which tells whether a process lives: without the folder, nobody knows that
it was killed."""

_TOLD_S: Final = 86_400.0
"""Age from which this matters no more."""


@contextlib.contextmanager
def scratch_folder(purpose: str, *, token: str | None = None) -> Iterator[Path]:
    """A new local folder that only this user can read, and that is removed at the end of the block.

    ``token`` is the end of its name, by which other processes of this machine can find it (:func:`scratch_path`);
    random by default. OSError if the folder cannot be made.
    """
    remove_abandoned()
    folder = scratch_path(purpose, token or uuid.uuid4().hex[:12])
    folder.mkdir(mode=0o700)
    try:
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scratch_path(purpose: str, token: str) -> Path:
    """The path at which :func:`scratch_folder` makes its folder."""
    return Path(tempfile.gettempdir()) / f"{_prefix()}{purpose}-{token}"


def is_held(folder: Path) -> bool | None:
    """Whether the process that made a scratch folder lives; None if the folder is not on this machine."""
    try:
        with _locked(folder):
            return False
    except BlockingIOError:
        return True
    except OSError:
        return None


def remove_abandoned() -> None:
    """Remove this user's scratch folders that no process of this machine holds."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_prefix()}*"):
        with contextlib.suppress(OSError):  # removed by another process, or in use
            stat = folder.lstat()
            kept_s = _TOLD_S if folder.name.startswith(f"{_prefix()}{LEASE}-") else _SETTLED_S
            if stat.st_uid != os.getuid() or time.time() - stat.st_mtime < kept_s:
                continue
            with _locked(folder):
                shutil.rmtree(folder)
                logger.info("removed %s, which a killed process left behind", folder)


@functools.cache
def _prefix() -> str:
    """Of the folders of this machine: a lock says nothing to other machines that share the file system. The containers of one
    machine share its kernel, and so its locks."""
    try:
        machine = _BOOT_ID.read_text().replace("-", "")[:12]
    except OSError:  # not Linux
        machine = f"{uuid.getnode():x}"
    return f"moleblend-scratch-{machine.strip()}-"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``; BlockingIOError if another process holds it. It ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
