from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from moleblend_ray.data.files.scratch import remove_abandoned, scratch_folder, scratch_path

HOLDER = """
import sys, time
from moleblend_ray.data.files.scratch import scratch_folder
with scratch_folder("save") as folder:
    (folder / "shard").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def age(folder: Path) -> None:
    hour_ago = time.time() - 3600
    os.utime(folder, (hour_ago, hour_ago))


def test_a_folder_is_private_and_gone_at_the_end_whatever_happens() -> None:
    folders = []

    def use_and_fail() -> None:
        with scratch_folder("save") as folder:
            folders.append(folder)
            (folder / "shard").write_bytes(b"x")
            assert folder.stat().st_mode & 0o077 == 0
            raise RuntimeError("oops")

    with pytest.raises(RuntimeError, match="oops"):
        use_and_fail()
    assert not folders[0].exists()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_holds_is_kept(
    tmp_path: Path,
) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        killed, living = (
            Path(process.stdout.readline().strip()) for process in processes if process.stdout
        )
        for folder in (killed, living):
            assert folder.parent == tmp_path
            age(folder)
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        # Young, though nobody holds it: perhaps it is locked in a moment.
        young = scratch_path("save", "young")
        young.mkdir()
        with scratch_folder("load"):
            assert not killed.exists()
            assert (living / "shard").exists()
            assert young.exists()
        age(young)
        remove_abandoned()
        assert not young.exists()
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_link_with_such_a_name_is_not_followed(tmp_path: Path) -> None:
    valued = tmp_path / "valued"
    valued.mkdir()
    (valued / "file").write_text("x")
    link = scratch_path("save", "link")
    link.symlink_to(valued)
    hour_ago = time.time() - 3600
    os.utime(link, (hour_ago, hour_ago), follow_symlinks=False)
    remove_abandoned()
    assert (valued / "file").exists()
