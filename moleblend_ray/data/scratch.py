"""Temporary folders that do not stay for ever if their process is killed.

A folder is locked while its process lives. Whoever makes another one on the same machine first removes those of the same user that
nobody holds: runs that survive many losses of workers would fill the disk with what each of them left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
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

_PREFIX: Final = "moleblend-scratch-"

_SETTLED_S: Final = 60.0
"""Age from which a folder that is not locked counts as left behind: it is made a moment before it is locked."""


@contextlib.contextmanager
def scratch_folder(purpose: str, *, token: str | None = None) -> Iterator[Path]:
    """A new local folder for this user alone, which is removed at the end.

    ``token`` is the end of its name where other processes of this machine must find it (:func:`scratch_path`); by default random.
    An OSError if it cannot be made.
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
    """Where :func:`scratch_folder` makes its folder."""
    return Path(tempfile.gettempdir()) / f"{_PREFIX}{purpose}-{token}"


def remove_abandoned() -> None:
    """Remove this user's scratch folders that no process of this machine holds."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # gone by now, or not ours to touch
            stat = folder.lstat()
            if stat.st_uid != os.getuid() or time.time() - stat.st_mtime < _SETTLED_S:
                continue
            with _locked(folder):
                shutil.rmtree(folder)
                logger.info("removed %s, which a killed process left behind", folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``; a BlockingIOError if another process holds it. The kernel drops it with the process."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
