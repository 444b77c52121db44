"""JSON lines of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from moleblend_ray.data.files import storage
from moleblend_ray.errors import DataError
from moleblend_ray.training.metrics import (
    drop_records_from,
    iter_records,
    last_record,
    read_records,
    sum_up,
    write_records,
)


def records(first: int, end: int) -> list[dict[str, float | int]]:
    return [
        {"step": step, "loss": float(step), "loss_spd": 2.0 * step, "molecules": 8, "step_s": 0.5}
        for step in range(first, end)
    ]


def test_records_come_back_in_step_order(tmp_path: Path) -> None:
    run = str(tmp_path)
    assert read_records(run) == []
    write_records(run, records(2, 5), 2, 5)
    write_records(run, records(0, 2), 0, 2)
    assert read_records(run) == records(0, 5)
    assert (tmp_path / "metrics" / "steps-00000002-00000005.jsonl").is_file()


def test_steps_of_an_abandoned_attempt_are_dropped(tmp_path: Path) -> None:
    run = str(tmp_path)
    write_records(run, records(0, 2), 0, 2)
    write_records(run, records(2, 5), 2, 5)
    drop_records_from(run, 2)
    assert read_records(run) == records(0, 2)


def test_steps_that_a_failed_save_wrote_as_well_are_taken_once(tmp_path: Path) -> None:
    run = str(tmp_path)
    write_records(run, records(0, 2), 0, 2)
    write_records(run, records(2, 4), 2, 4)  # its marker failed
    write_records(run, records(2, 6), 2, 6)
    write_records(run, records(6, 8), 6, 8)
    assert read_records(run) == records(0, 8)
    assert [last_record(run, step).get("step") for step in (0, 2, 4, 6, 8)] == [None, 1, 3, 5, 7]


def test_a_restart_within_a_file_keeps_the_steps_before_it(tmp_path: Path) -> None:
    # The marker of step 4 was written after all, though the answer to the writer was lost; step 6 then never came.
    run = str(tmp_path)
    write_records(run, records(0, 2), 0, 2)
    write_records(run, records(2, 6), 2, 6)
    drop_records_from(run, 4)
    assert read_records(run) == records(0, 4)
    assert last_record(run, 4) == records(3, 4)[0]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    write_records(str(tmp_path), records(0, 2), 0, 2)
    (tmp_path / "metrics" / "steps-00000000-00000002.jsonl").write_text('{"step": 0')
    with pytest.raises(DataError, match=r"steps-00000000-00000002\.jsonl is damaged: .*delete it"):
        read_records(str(tmp_path))


def test_the_ends_of_a_run_are_means_over_a_tenth_of_it() -> None:
    totals = sum_up(records(0, 40))
    assert totals.loss_first == {"loss": 1.5, "loss_spd": 3.0}
    assert totals.loss_last == {"loss": 37.5, "loss_spd": 75.0}
    assert sum_up(records(0, 1)).loss_last == {"loss": 0.0, "loss_spd": 0.0}
    assert sum_up([]) == (0, 0, 0.0, {}, {})


def test_totals_are_of_all_steps_and_means_of_50_at_each_end_of_a_long_run() -> None:
    totals = sum_up(iter(records(0, 3000)))
    assert (totals.molecules, totals.seconds) == (24_000, 1500.0)
    assert totals.loss_first["loss"] == sum(range(50)) / 50
    assert totals.loss_last["loss"] == sum(range(2950, 3000)) / 50


def test_a_long_run_is_read_a_few_files_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(tmp_path)
    for first in range(0, 120, 2):
        write_records(run, records(first, first + 2), first, first + 2)
    read: list[str] = []
    read_bytes = storage.read_bytes

    def counted(uri: str) -> bytes:
        read.append(uri)
        return read_bytes(uri)

    monkeypatch.setattr(storage, "read_bytes", counted)
    found = iter_records(run)
    assert next(found) == records(0, 1)[0]
    assert len(read) <= 8
    assert [record["step"] for record in found] == list(range(1, 120))
    assert len(read) == 60


def test_a_head_without_targets_in_some_steps_is_averaged_over_the_others() -> None:
    step = {"loss": 1.0, "molecules": 8, "step_s": 0.5}
    totals = sum_up(step | ({"loss_spd": 4.0} if i == 1 else {}) for i in range(20))
    assert totals.loss_first == {"loss": 1.0, "loss_spd": 4.0}
