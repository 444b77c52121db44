"""Tables that the processes of one machine share: each is made once, by the process that first asks for it.

A table is an Arrow IPC file that readers map into memory, so it is in memory once for all processes. Files appear by
rename; the process that makes one holds a lock, which the kernel releases when the process dies. Every process that
uses the cache holds a shared lock on its folder. The last one to leave removes the folder; after a crash,
:func:`remove_unused` does.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pyarrow as pa

logger = logging.getLogger(__name__)

_SHARED_MEMORY: Final = Path("/dev/shm")
_USERS: Final = "users.lock"
_SUFFIX: Final = ".arrow"
_TEMPORARY: Final = ".part"
_NUM_LOCKS: Final = 64
_SCANS_PER_BOUND: Final = 16
_STALE_PART_S: Final = 600.0


class NodeCache:
    """Tables by name in a folder of this machine: about ``max_bytes`` at most, the least recently used are removed."""

    def __init__(self, name: str, max_bytes: int, parent: Path | None = None) -> None:
        """Join the cache ``name`` (letters, digits, ``-``) of this user in ``parent`` (None: :func:`cache_parent`).

        If that is not possible (a full disk, a folder of another user), this is logged, and nothing is shared.
        """
        self._max_bytes = max_bytes
        self._unscanned_bytes = max_bytes  # there may already be tables of other processes
        self._guard = threading.Lock()
        self._works = True
        self._folder, self._users = Path(name), -1
        try:
            self._folder = (parent or cache_parent(name, max_bytes)) / name
            self._users = _join(self._folder)
        except OSError as error:
            self._give_up(error)

    @property
    def folder(self) -> Path:
        """The folder with the tables."""
        return self._folder

    def table(self, name: str, make: Callable[[], pa.Table]) -> pa.Table:
        """The table ``name`` from the cache; if it is not there, the result of ``make``, which is added to the cache.

        If several callers ask at the same time, one makes the table and the others wait. If the cache cannot be
        written (a full disk), this is logged once, and only ``make`` is used from then on.
        """
        if self._users < 0:
            return make()
        path = self._folder / (name + _SUFFIX)
        found = self._open(path)
        if found is not None or not self._works:
            return make() if found is None else found
        with self._lock(name):
            found = self._open(path)
            if found is not None:
                return found
            table = make()
            try:
                self._write(path, table)
            except OSError as error:
                self._give_up(error)
                return table
        found = self._open(path)
        return table if found is None else found

    def has(self, name: str) -> bool:
        """Whether the table ``name`` is in the cache at this moment."""
        return self._users >= 0 and (self._folder / (name + _SUFFIX)).exists()

    def close(self) -> None:
        """Leave the cache; the last process to leave removes it. Tables that were read stay readable."""
        if self._users >= 0:
            os.close(self._users)
            self._users = -1
            _remove_if_unused(self._folder)

    def _open(self, path: Path) -> pa.Table | None:
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
            os.utime(path)
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError) as error:
            logger.warning("%s cannot be used and is made again: %s", path, error)
            path.unlink(missing_ok=True)
            return None
        return table

    def _write(self, path: Path, table: pa.Table) -> None:
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}{_TEMPORARY}")
        try:
            # Not through a writable mapping, where a full file system would be a signal instead of an error.
            with pa.OSFile(str(temporary), "wb") as sink:
                with pa.ipc.new_file(sink, table.schema) as writer:
                    writer.write_table(table)
                size = sink.tell()
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._count(size)

    def _count(self, size: int) -> None:
        """Limit the folder's size after every so many bytes, as this takes a system call per file."""
        with self._guard:
            self._unscanned_bytes += size
            if self._unscanned_bytes * _SCANS_PER_BOUND < self._max_bytes:
                return
            self._unscanned_bytes = 0
        _drop_oldest(self._folder, self._max_bytes)

    def _give_up(self, error: OSError) -> None:
        if self._works:
            self._works = False
            logger.warning(
                "row groups are no longer shared by the processes of this machine: %s", error
            )

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Exclude other threads and processes. Names share a few lock files, which need not be removed."""
        number = zlib.crc32(name.encode()) % _NUM_LOCKS
        try:
            descriptor = os.open(self._folder / f"{number}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            self._give_up(error)
            yield
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def cache_parent(name: str, max_bytes: int) -> Path:
    """This user's folder of caches for the cache ``name``: where other processes have it, or else in shared memory if twice
    ``max_bytes`` are free there, otherwise on disk."""
    in_memory, on_disk = _parents()
    for parent in (in_memory, on_disk):
        if (parent / name).is_dir():
            return parent
    has_room = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free >= 2 * max_bytes
    return in_memory if has_room else on_disk


def remove_unused() -> None:
    """Remove the caches that killed processes of this user have left on this machine."""
    for parent in _parents():
        for folder in parent.glob("*/"):
            _remove_if_unused(folder)


def _parents() -> tuple[Path, Path]:
    name = f"moleblend-row-groups-{os.getuid()}"
    return _SHARED_MEMORY / name, Path(tempfile.gettempdir()) / name


def _join(folder: Path) -> int:
    """The descriptor of the shared lock on the folder, which is created if necessary."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.parent.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder.parent} belongs to another user")
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            users = os.open(folder / _USERS, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # another process has just removed the folder
            continue
        fcntl.flock(users, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(users), os.stat(folder / _USERS)):
                return users
        os.close(users)  # the last user has removed the folder while we waited for the lock


def _remove_if_unused(folder: Path) -> None:
    try:
        users = os.open(folder / _USERS, os.O_RDWR)
    except OSError:
        return
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(users)


def _drop_oldest(folder: Path, max_bytes: int) -> None:
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                if entry.name.endswith(_SUFFIX):
                    files.append((status.st_mtime_ns, status.st_size, entry.path))
                age_s = time.time() - status.st_mtime
                if entry.name.endswith(_TEMPORARY) and age_s > _STALE_PART_S:
                    os.unlink(entry.path)  # its writer was killed
    excess = sum(size for _, size, _ in files) - max_bytes
    for _, size, path in sorted(files):
        if excess <= 0:
            return
        Path(path).unlink(missing_ok=True)
        excess -= size
