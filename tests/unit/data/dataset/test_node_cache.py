"""Tables shared by the processes of a machine: made once, bounded, never incomplete, removed after the last use."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from moleblend_ray.data.dataset import node_cache
from moleblend_ray.data.dataset.node_cache import NodeCache, cache_parent

NUM_ROWS = 1000
TABLE_BYTES = 8 * NUM_ROWS


def table(value: int) -> pa.Table:
    return pa.table({"x": np.full(NUM_ROWS, value)})


def never() -> pa.Table:
    raise AssertionError("the table was made again")


def test_a_table_is_made_once_for_all_users_and_threads(tmp_path: Path) -> None:
    caches = [NodeCache("a", 1 << 20, tmp_path) for _ in range(2)]
    made: list[int] = []
    barrier = threading.Barrier(8)

    def ask(index: int) -> pa.Table:
        def make() -> pa.Table:
            made.append(index)
            return table(3)

        barrier.wait()
        return caches[index % 2].table("t", make)

    with ThreadPoolExecutor(8) as pool:
        assert all(found.equals(table(3)) for found in pool.map(ask, range(8)))
    assert len(made) == 1
    for cache in caches:
        cache.close()


def test_the_bound_is_kept_and_the_least_recently_used_table_goes_first(tmp_path: Path) -> None:
    cache = NodeCache("a", 8 * TABLE_BYTES, tmp_path)
    for index in range(40):
        cache.table(str(index), partial(table, index))
        os.utime(cache.folder / f"{index}.arrow", ns=(index, index))
        if index:
            os.utime(cache.folder / "0.arrow", ns=(1000, 1000))
        size = sum(file.stat().st_size for file in cache.folder.glob("*.arrow"))
        assert size <= 9 * TABLE_BYTES
    assert cache.table("0", never).equals(table(0))
    assert cache.table("39", never).equals(table(39))
    assert cache.table("1", lambda: table(-1)).equals(table(-1))
    cache.close()


def test_a_table_in_use_outlives_its_file(tmp_path: Path) -> None:
    cache = NodeCache("a", 1 << 20, tmp_path)
    cache.table("t", lambda: table(5))
    found = cache.table("t", never)
    cache.close()
    assert not cache.folder.exists()
    assert found.equals(table(5))


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    cache = NodeCache("a", 1 << 20, tmp_path)
    cache.table("t", lambda: table(5))
    file = cache.folder / "t.arrow"
    file.write_bytes(file.read_bytes()[:100])
    assert cache.table("t", lambda: table(6)).equals(table(6))
    cache.close()


def test_a_failure_to_make_a_table_is_raised_and_leaves_nothing(tmp_path: Path) -> None:
    cache = NodeCache("a", 1 << 20, tmp_path)
    with pytest.raises(AssertionError, match="made again"):
        cache.table("t", never)
    assert cache.table("t", lambda: table(1)).equals(table(1))
    cache.close()


def test_a_folder_that_cannot_be_written_costs_the_sharing_and_no_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = NodeCache("a", 1 << 20, tmp_path)
    (cache.folder / "users.lock").unlink()
    for file in cache.folder.iterdir():
        file.unlink()
    cache.folder.rmdir()
    assert cache.table("t", lambda: table(1)).equals(table(1))
    assert cache.table("t", lambda: table(2)).equals(table(2))
    assert caplog.text.count("no longer shared") == 1


def test_a_cache_that_cannot_be_joined_costs_the_sharing_and_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    other = NodeCache("a", 1 << 20, tmp_path)
    other.table("t", lambda: table(1))
    with monkeypatch.context() as context:
        context.setattr(Path, "mkdir", full)
        cache = NodeCache("a", 1 << 20, tmp_path)
    # Without the lock on the folder, its tables must not be used either.
    assert cache.table("t", lambda: table(2)).equals(table(2))
    assert "no longer shared" in caplog.text
    assert "No space left" in caplog.text
    cache.close()
    assert other.table("t", never).equals(table(1))
    other.close()


def _hold(parent: str, ready: multiprocessing.synchronize.Event) -> None:
    cache = NodeCache("a", 1 << 20, Path(parent))

    def die_later() -> pa.Table:
        ready.set()
        signal.pause()

    cache.table("t", die_later)


def test_a_killed_process_leaves_no_lock_and_its_folder_goes_with_the_next_user(
    tmp_path: Path,
) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), ready))
    process.start()
    assert ready.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / "a").exists()
    cache = NodeCache("a", 1 << 20, tmp_path)
    assert cache.table("t", lambda: table(1)).equals(table(1))
    cache.close()
    assert not cache.folder.exists()


def test_a_cache_is_in_shared_memory_where_there_is_room_or_it_is_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 1000
    monkeypatch.setattr(node_cache, "_SHARED_MEMORY", tmp_path / "shm")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "disk"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    in_memory, on_disk = node_cache._parents()
    assert cache_parent("a", 500) == on_disk  # there is no shared memory
    # What earlier runs leave there says nothing of the room for this one.
    in_memory.mkdir(parents=True)
    assert (cache_parent("a", 500), cache_parent("a", 501)) == (in_memory, on_disk)
    (in_memory / "a").mkdir()
    (on_disk / "b").mkdir(parents=True)
    assert (cache_parent("a", 501), cache_parent("b", 500)) == (in_memory, on_disk)
