"""One command at a time works on a data set; one that was killed holds up no other for long."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from moleblend_ray.data.dataset import lease as module
from moleblend_ray.data.dataset.dataset_files import LEASES_DIR, MANIFEST_NAME, listed
from moleblend_ray.data.dataset.lease import InUseError, command_at_work, leased
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.scratch import scratch_path
from moleblend_ray.errors import DataError

HOLDER = """
import sys, time
from moleblend_ray.data.dataset.lease import leased
with leased(sys.argv[1]):
    print("holds", flush=True)
    time.sleep(600)
"""

EXPIRY_S = 1.2


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3_uri")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are on machines of their own, and leases expire soon."""
    monkeypatch.setattr(module, "is_held", lambda _: None)
    monkeypatch.setattr(module, "_EXPIRY_S", EXPIRY_S)
    monkeypatch.setattr(module, "_RENEW_S", EXPIRY_S / 12)


def leave_as_killed(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease that nobody renews or ends."""
    with monkeypatch.context() as patch:
        patch.setattr(module.Lease, "_live", lambda _: None)
        with leased(out):
            pass


def enter(out: str) -> None:
    with leased(out):
        pass


def work_until_told(lease: module.Lease) -> None:
    for _ in range(100):
        lease.require()
        time.sleep(EXPIRY_S / 12)


def seconds(call: Callable[[], None]) -> float:
    start_s = time.monotonic()
    call()
    return time.monotonic() - start_s


@pytest.fixture
def no_waiting(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No command waits to see whether another one lives."""
    with caplog.at_level(logging.INFO):
        yield
    # After the test, `caplog.text` is that of the fixtures' ends.
    messages = [record.getMessage() for record in caplog.get_records("call")]
    assert not [message for message in messages if "looking for up to" in message]


@pytest.mark.usefixtures("no_waiting")
def test_a_second_command_is_told_at_once_who_works_there(out: str) -> None:
    with leased(out):
        before = listed(out)
        with pytest.raises(
            InUseError, match=r"another command works on .* \(process \d+ on .*started 2"
        ) as error:
            enter(out)
        assert out in str(error.value)
        assert listed(out) == before


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_results_that_are_damaged_do_not_keep_a_lease_from_ending(tmp_path: Path) -> None:
    def is_finished(out: str) -> bool:
        raise DataError(f"{out}/results.json is damaged")

    out = str(tmp_path / "out")
    with leased(out, is_finished):
        assert command_at_work(out)
    assert command_at_work(out) is None
    (lease,) = (tmp_path / "out" / LEASES_DIR).iterdir()
    assert storage.read_object(str(lease), {"ended": bool})["ended"]


@pytest.mark.usefixtures("no_waiting")
def test_a_command_that_ended_holds_up_no_other_however_it_ended(out: str) -> None:
    def fail() -> None:
        with leased(out):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    enter(out)
    assert [storage.name_of(uri) for uri in listed(out)] == ["000001.json", "000002.json"]


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("age_s", [0, 3600])
def test_a_killed_command_of_this_machine_holds_up_no_other(tmp_path: Path, age_s: int) -> None:
    out = str(tmp_path)
    command = [sys.executable, "-c", HOLDER, out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        with pytest.raises(InUseError, match=f"process {process.pid} on"):
            enter(out)
        process.kill()
        process.wait()
    (lease,) = listed(out)
    lock = scratch_path("lease", storage.read_json(lease)["token"])
    began = time.time() - age_s
    os.utime(lock, (began, began))
    # Another command of this machine removes what killed ones left behind.
    enter(str(tmp_path / "other"))
    assert command_at_work(out) is None
    enter(out)


def test_a_look_tells_which_command_works_there(out: str) -> None:
    assert command_at_work(out) is None
    with leased(out):
        assert f"process {os.getpid()} on" in str(command_at_work(out))
    assert command_at_work(out) is None


@pytest.mark.usefixtures("elsewhere")
def test_a_look_finds_a_command_of_another_machine_while_it_renews_its_lease(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with leased(out):
        time.sleep(1.5 * EXPIRY_S)
        # On a busy machine a renewal may come late: without any, none of the looks would find it.
        assert any(command_at_work(out) is not None for _ in range(50))
    leave_as_killed(out, monkeypatch)
    time.sleep(EXPIRY_S)
    assert command_at_work(out) is None


@pytest.mark.usefixtures("elsewhere")
def test_a_killed_command_of_another_machine_holds_up_no_other_for_long(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_as_killed(out, monkeypatch)
    assert EXPIRY_S <= seconds(lambda: enter(out)) < EXPIRY_S + 5


def test_a_command_whose_storage_is_out_of_reach_does_not_wait_long_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = threading.Event()
    monkeypatch.setattr(module, "_END_S", 0.2)

    def work() -> None:
        with leased(str(tmp_path), is_finished=lambda _: reached.wait(60)):
            pass

    assert seconds(work) < 5
    reached.set()


@pytest.mark.usefixtures("elsewhere")
def test_a_living_command_of_another_machine_keeps_its_lease(out: str) -> None:
    with leased(out) as lease:
        with pytest.raises(InUseError, match="another command works on"):
            enter(out)
        lease.confirm()


@pytest.mark.usefixtures("elsewhere")
def test_of_many_commands_that_find_a_killed_one_one_goes_on(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_as_killed(out, monkeypatch)
    # On a slow storage four commands renew and look less often.
    monkeypatch.setattr(module, "_EXPIRY_S", 3 * EXPIRY_S)
    refused = threading.Semaphore(0)

    def outcome(_: int) -> str:
        with ExitStack() as stack:
            try:
                lease = stack.enter_context(leased(out))
                # In a store whose conditional writes are not atomic, the first of two learns of the second a moment later.
                time.sleep(EXPIRY_S)
                lease.confirm()
            except InUseError:
                refused.release()
                return "in use"
            # Whoever looks after the end of the work may do some, too.
            for _ in range(3):
                refused.acquire(timeout=30)
            return "worked"

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(outcome, range(4)))
    assert sorted(outcomes) == ["in use", "in use", "in use", "worked"]


def test_a_suspended_command_learns_that_another_took_over_and_leaves_it_alone(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with leased(out) as first:
        first.require()
        monkeypatch.setattr(module, "is_held", lambda _: False)
        with leased(out) as second:
            with pytest.raises(InUseError, match=r"Another command \(process .*\) has taken over"):
                first.confirm()
            with pytest.raises(InUseError, match="has taken over"):
                first.require()
            first.end()
            second.confirm()


@pytest.mark.usefixtures("elsewhere")
def test_the_thread_that_renews_finds_out_that_another_took_over(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with leased(out) as first:
        monkeypatch.setattr(module, "is_held", lambda _: False)
        with leased(out), pytest.raises(InUseError, match="has taken over"):
            work_until_told(first)


def test_a_finished_data_set_has_no_leases_and_late_commands_learn_that_it_is_finished(
    out: str,
) -> None:
    with leased(out) as lease:
        storage.write_json(storage.join(out, MANIFEST_NAME), {})
        storage.delete_tree(storage.join(out, "leases"))  # as the command that finished it does
        with pytest.raises(InUseError, match=r"has finished .* meanwhile"):
            lease.confirm()
    assert [storage.name_of(uri) for uri in listed(out)] == [MANIFEST_NAME]
    enter(out)
    assert [storage.name_of(uri) for uri in listed(out)] == [MANIFEST_NAME]


def test_a_data_set_that_is_deleted_meanwhile_is_told(out: str) -> None:
    with leased(out) as lease:
        storage.delete_tree(out)
        with pytest.raises(InUseError, match="was deleted while this command worked on it"):
            lease.confirm()


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("content", ["[]", "no JSON", '{"token": "../../x"}'])
def test_a_file_that_is_no_lease_holds_up_as_one_of_a_killed_command(
    tmp_path: Path, content: str
) -> None:
    storage.write_bytes(str(tmp_path / "leases" / "000007.json"), content.encode())
    enter(str(tmp_path))
    assert (tmp_path / "leases" / "000008.json").exists()
