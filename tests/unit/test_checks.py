from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from moleblend_ray.checks import above, at_least, below_one, check_all, locations, within
from moleblend_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Settings:
    number: float = 1.0
    perhaps: float | None = None
    out: str = "runs/a"
    models: str | tuple[str, ...] = ("a", "b")


@pytest.mark.parametrize(
    ("check", "good", "bad", "message"),
    [
        (lambda s: at_least(s, 1, "number"), 1.0, 0.5, "number: expected at least 1, found 0.5"),
        (lambda s: above(s, 0, "number"), 0.1, 0.0, "number: expected more than 0, found 0.0"),
        (lambda s: within(s, 0, 255, "number"), 255, 256, "number: expected 0 to 255, found 256"),
        (lambda s: below_one(s, "number"), 0.0, 1.0, "number: expected at least 0 and below 1, found 1.0"),
    ],
)  # fmt: skip
def test_a_number_outside_is_named_with_what_was_expected_and_found(
    check: object, good: float, bad: float, message: str
) -> None:
    assert callable(check)
    check_all(*check(Settings(number=good)))
    for value in (bad, math.nan):
        with pytest.raises(ConfigError, match=message.split(", found")[0]) as caught:
            check_all(*check(Settings(number=value)))
        if value == bad:
            assert str(caught.value) == message


def test_infinity_is_refused_as_no_file_of_a_run_could_hold_it() -> None:
    for check in (at_least, above):
        with pytest.raises(ConfigError, match=r"number: expected a finite number of .*, found inf"):
            check_all(*check(Settings(number=math.inf), 0, "number"))


def test_null_passes_where_a_field_may_be_null_and_the_message_says_so() -> None:
    check_all(*at_least(Settings(), 1, "perhaps"))
    with pytest.raises(ConfigError, match="perhaps: expected null or at least 1, found 0"):
        check_all(*at_least(Settings(perhaps=0), 1, "perhaps"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(out=""), "out: expected a path or URI, found an empty string"),
        (Settings(models=()), r"models: expected a path or URI, found \(\)"),
        (Settings(models=("a", "")), r"models: expected a path or URI, found \('a', ''\)"),
    ],
)
def test_an_empty_location_is_refused(settings: Settings, message: str) -> None:
    check_all(*locations(Settings(), "out", "models"))
    with pytest.raises(ConfigError, match=message):
        check_all(*locations(settings, "out", "models"))


def test_all_that_is_wrong_is_told_at_once() -> None:
    wrong = Settings(number=-1.0, out="")
    with pytest.raises(ConfigError, match=r"number: .*\nout: "):
        check_all(*at_least(wrong, 0, "number"), *locations(wrong, "out"), (True, "never seen"))
