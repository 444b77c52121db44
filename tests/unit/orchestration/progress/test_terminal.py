"""What commands print: amounts in words, tables, JSON."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass

import pytest
from rich.console import Console, RenderableType

from moleblend_ray.orchestration.progress import terminal
from moleblend_ray.orchestration.progress.terminal import (
    ExplainedTable,
    facts_table,
    headed_table,
    json_text,
    progress_bar,
    stacked,
)
from moleblend_ray.quantities import bytes_text, duration_text, number_text


def lines_of(shown: RenderableType, width: int = 60) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(shown)
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_540_000, "1.54 MB"),
        (19e9, "19 GB"),
        (2.5e12, "2.5 TB"),
        (7e18, "7,000 PB"),
    ],
)
def test_bytes_have_a_decimal_unit(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (1, "1 s"),
        (89.94, "89.9 s"),
        (90, "1 min 30 s"),
        (500, "8 min 20 s"),
        (540, "9 min"),
        (599.9, "10 min"),
        (1500, "25 min"),
        (90 * 60, "1 h 30 min"),
        (7200, "2 h"),
        (12_000, "3 h 20 min"),
        (48 * 3600, "2 d"),
        (75 * 3600, "3 d 3 h"),
    ],
)
def test_lengths_of_time_have_one_or_two_units(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_a_length_of_time_that_is_not_known_or_endless_is_said_in_words() -> None:
    assert [duration_text(None), duration_text(math.inf)] == ["unknown"] * 2
    assert duration_text(math.inf, "never") == "never"


def test_no_length_of_time_is_shown_as_longer_than_a_longer_one() -> None:
    factors = {"ms": 1e-3, "s": 1, "min": 60, "h": 3600, "d": 86_400}

    def read(text: str) -> float:
        words = text.split()
        return sum(
            float(number) * factors[unit]
            for number, unit in zip(words[::2], words[1::2], strict=True)
        )

    times = [1.01**power for power in range(-500, 1500)]
    shown = [read(duration_text(seconds)) for seconds in times]
    assert shown == sorted(shown)
    assert shown == pytest.approx(times, rel=0.05)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.01234, "0.0123"),
        (999, "999"),
        (1234.5, "1,234"),
        (2_340_000, "2.34 million"),
        (5e9, "5 billion"),
        (math.inf, "no limit"),
    ],
)
def test_numbers_have_three_digits_or_whole_thousands(value: float, text: str) -> None:
    assert number_text(value) == text


def test_what_is_just_below_a_unit_is_written_without_exponent() -> None:
    for power in range(-1, 8):
        amount = 0.9997 * 1000.0**power
        assert "e+" not in bytes_text(amount) + number_text(amount) + duration_text(amount)
    assert [bytes_text(999_700), bytes_text(999.7e15)] == ["1 MB", "1,000 PB"]
    assert [number_text(999_700), number_text(999.7e6)] == ["999,700", "1 billion"]
    assert duration_text(0.9997) == "1 s"


def test_tables_align_numbers_and_fold_what_is_too_long() -> None:
    table = headed_table("name", "count", numbers=(1,), title="atoms")
    table.add_row("C", "7")
    table.add_row("Si", "1,234")
    assert lines_of(table) == ["atoms", "name  count", "C         7", "Si    1,234"]
    facts = facts_table()
    facts.add_row("run", "s3://bucket/" + 12 * "x")
    assert lines_of(facts, width=20) == ["run  s3://bucket/xxx", "     xxxxxxxxx"]


def test_parts_are_below_each_other_with_one_line_between() -> None:
    assert lines_of(stacked("a", "b")) == ["a", "", "b"]
    assert lines_of(stacked("a")) == ["a"]


@dataclass(frozen=True)
class _Report:
    uri: str
    eta_s: float


def test_json_hides_secrets_and_has_no_number_that_is_not_finite() -> None:
    found = json_text(_Report(uri="s3://user:secret@bucket/x", eta_s=math.inf))
    assert json.loads(found) == {"uri": "s3://***@bucket/x", "eta_s": None}
    assert json.loads(json_text({"path": ["ä"]})) == {"path": ["ä"]}
    assert "ä" in json_text({"path": "ä"})


def explained() -> ExplainedTable:
    table = ExplainedTable("", "value", "how", title="stage")
    table.add_row("rate", "98,080 molecules/s", "64 cores, one actor on each of them, all day")
    table.add_row("bytes", "190 GB", "190 bytes per molecule")
    return table


def test_prose_stands_beside_its_row_where_there_is_room() -> None:
    assert lines_of(explained(), 100) == [
        "stage",
        "       value               how",
        "rate   98,080 molecules/s  64 cores, one actor on each of them, all day",
        "bytes  190 GB              190 bytes per molecule",
    ]


@pytest.mark.parametrize("width", [30, 40, 60])
def test_prose_stands_below_its_row_in_a_narrow_terminal_and_no_word_is_cut(width: int) -> None:
    lines = lines_of(explained(), width)
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for prose in ("64 cores, one actor on each of them, all day", "190 bytes per molecule"):
        assert prose in " ".join(words)
    rows = [index for index, line in enumerate(lines) if line.startswith(("rate", "bytes"))]
    assert len(rows) == 2
    assert lines[rows[0] + 1].startswith("    64 cores,")
    assert lines[rows[1] + 1].startswith("    190 bytes")


@pytest.mark.parametrize(
    ("every_s", "lines"),
    [(0.0, ["file: 1 kB of 9 kB", "file: 2 kB of ?"]), (3600.0, [])],
)
def test_progress_is_told_in_log_lines_where_there_is_no_terminal(
    every_s: float,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(terminal, "_LOG_EVERY_S", every_s)
    with (
        caplog.at_level("INFO", logger="moleblend_ray"),
        progress_bar("file", unit="B", show=bytes_text) as update,
    ):
        update(1000, 9000)
        update(2000, None)
    assert caplog.messages == lines
