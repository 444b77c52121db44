"""Decoded tables that the processes of one machine share: each is made once, whoever asks first.

A table is an Arrow IPC file that readers map into memory, so ten processes hold it once. Files appear by rename;
who makes one holds a lock that the kernel takes back when the process dies. The folder belongs to its users: each
holds a shared lock on it, and the last one to leave, or the next to come after a crash, removes it.
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
    """Tables by name in a folder of this machine, at most about ``max_bytes`` of them, least recently used ones go first."""

    def __init__(self, name: str, max_bytes: int, parent: Path | None = None) -> None:
        """Join the cache ``name`` (letters, digits, ``-``) of this user; None: in shared memory if that has room."""
        self._folder, self._users = _join(parent or cache_parent(max_bytes), name)
        self._max_bytes = max_bytes
        self._unscanned_bytes = max_bytes  # an unknown number of bytes may be there already
        self._guard = threading.Lock()
        self._works = True

    @property
    def folder(self) -> Path:
        """Where the tables are."""
        return self._folder

    def table(self, name: str, make: Callable[[], pa.Table]) -> pa.Table:
        """The table ``name``, mapped from the cache, or what ``make`` gives, which is then in the cache.

        Several callers at once wait for one. Where the cache cannot be written (a full disk), ``make`` is used
        alone, and said once.
        """
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

    def close(self) -> None:
        """Leave the cache; the last one to leave removes it. Tables that were read stay readable."""
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
            # Not through a writable mapping: a full file system is an error here, and would be a signal there.
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
        """Look at the folder's size now and then: a look costs a system call a file."""
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
        """Exclusive among threads and processes. Names share few lock files, which never need to be removed."""
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


def cache_parent(max_bytes: int) -> Path:
    """This user's folder of caches: in shared memory if twice ``max_bytes`` are free there, else on disk."""
    in_memory, on_disk = _parents()
    if in_memory.is_dir():
        return in_memory
    memory = in_memory.parent
    has_room = memory.is_dir() and shutil.disk_usage(memory).free >= 2 * max_bytes
    return in_memory if has_room else on_disk


def remove_unused() -> None:
    """Remove what processes of this user left behind on this machine when they were killed."""
    for parent in _parents():
        for folder in parent.glob("*/"):
            _remove_if_unused(folder)


def _parents() -> tuple[Path, Path]:
    name = f"moleblend-row-groups-{os.getuid()}"
    return _SHARED_MEMORY / name, Path(tempfile.gettempdir()) / name


def _join(parent: Path, name: str) -> tuple[Path, int]:
    """The folder, made if it is not there, and the descriptor that holds it."""
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if parent.stat().st_uid != os.getuid():
        raise PermissionError(f"{parent} belongs to another user")
    folder = parent / name
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            users = os.open(folder / _USERS, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # removed just now
            continue
        fcntl.flock(users, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(users), os.stat(folder / _USERS)):
                return folder, users
        os.close(users)  # its last user left while we waited: that folder is gone


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
