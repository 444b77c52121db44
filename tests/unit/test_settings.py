"""The strict builder: what it makes, what it refuses, and what it says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import moleblend_ray as mb
from moleblend_ray.checks import check_all
from moleblend_ray.errors import ConfigError
from moleblend_ray.settings import (
    build,
    field_types,
    nested_dataclass,
    run_checks,
    to_dict,
    type_name,
    typed,
)


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    rate: float = 0.5
    mode: Literal["keep", "reject"] = "keep"
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        check_all(
            (self.rate >= 0, f"rate: expected >= 0, found {self.rate}"),
            (bool(self.sizes), "sizes: expected at least one, found none"),
        )


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    name: str
    count: int = 3
    flag: bool = False
    limit: float | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    colour: Colour = Colour.RED
    extra: dict[str, int] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    place: str | tuple[str, ...] = ""
    names: tuple[str, ...] = ()


def problems_of(values: dict[str, object]) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        build(Outer, values)
    return [line.strip() for line in str(raised.value).splitlines()[1:]]


def test_nested_mappings_become_nested_dataclasses_with_their_defaults() -> None:
    built = build(Outer, {"name": "a", "inner": {"rate": 1, "sizes": [4]}, "colour": "blue"})
    assert built == Outer(name="a", inner=Inner(rate=1.0, sizes=(4,)), colour=Colour.BLUE)
    assert type(built.inner.rate) is float


def test_a_whole_number_may_be_written_as_1e4() -> None:
    built = build(Outer, {"name": "a", "count": 1e4})
    assert built.count == 10_000
    assert type(built.count) is int


@pytest.mark.parametrize(("value", "built"), [("a", "a"), (["a", "b"], ("a", "b")), ([], ())])
def test_a_setting_may_be_one_text_or_several(value: object, built: object) -> None:
    config = build(Outer, {"name": "n", "place": value})
    assert config.place == built
    assert build(Outer, to_dict(config)) == config


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "place: expected str or list of str, found 3 (int) (quote it"),
        (
            ["a", 3],
            "place[1]: expected str, found 3 (int) (quote it to make it text: 'place=[\"3\"]')",
        ),
        (
            True,
            "place: expected str or list of str, found True (bool) (quote it to make it text: 'place=\"true\"')",
        ),
        (None, "place: expected str or list of str, found null"),
    ],
)
def test_what_is_neither_one_text_nor_several_is_named(value: object, message: str) -> None:
    (problem,) = problems_of({"name": "n", "place": value})
    assert problem.startswith(message)


def test_to_dict_is_the_inverse_of_build() -> None:
    config = Outer(name="a", limit=2.5, extra={"k": 1}, maybe=Inner(mode="reject"))
    assert build(Outer, to_dict(config)) == config


def test_optional_values_may_be_null_or_a_section() -> None:
    assert build(Outer, {"name": "a", "maybe": None}).maybe is None
    assert build(Outer, {"name": "a", "maybe": {"rate": 2}}).maybe == Inner(rate=2.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 1.5}, "count: expected int, found 1.5 (float)"),
        ({"count": True}, "count: expected int, found True (bool)"),
        ({"count": 1e300}, "count: expected int, found 1e+300 (float)"),
        ({"limit": True}, "limit: expected float or null, found True (bool)"),
        (
            {"names": "ab"},
            "names: expected list of str, found 'ab' (str) (write a list: names=[a,b])",
        ),
        ({"pair": [1.0, 2.0, 3.0]}, "pair: expected list [float, float], found [1.0, 2.0, 3.0]"),
        ({"flag": 1}, "flag: expected bool, found 1 (int)"),
        ({"limit": "2"}, "limit: expected float or null, found '2' (str)"),
        ({"count": None}, "count: expected int, found null"),
        ({"pair": [1.0]}, "pair: expected list [float, float], found [1.0] (list)"),
        ({"pair": [1.0, "x"]}, "pair[1]: expected float, found 'x' (str)"),
        ({"colour": "green"}, "colour: expected one of red, blue, found 'green' (str)"),
        ({"extra": {"k": "v"}}, "extra.k: expected int, found 'v' (str)"),
        ({"inner": 3}, "inner: expected Inner, found 3 (int)"),
        ({"inner": {"mode": "kep"}}, "did you mean keep?"),
        ({"inner": {"rate": -1}}, "inner.rate: expected >= 0, found -1.0"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(
    values: dict[str, object], message: str
) -> None:
    (problem,) = problems_of({"name": "a", **values})
    assert message in problem


@pytest.mark.parametrize(
    ("values", "nearest"),
    [
        ({"cuont": 1}, "did you mean count?"),
        ({"inner": {"szies": [1]}}, "did you mean inner.sizes?"),
        ({"rate": 0.1}, "did you mean inner.rate?"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(
    values: dict[str, object], nearest: str
) -> None:
    (problem,) = problems_of({"name": "a", **values})
    assert "unknown key" in problem
    assert nearest in problem


def test_a_key_like_no_other_lists_the_valid_ones() -> None:
    (problem,) = problems_of({"name": "a", "inner": {"zzz": 1}})
    assert "valid keys: inner.rate, inner.mode, inner.sizes" in problem


def test_all_problems_are_told_at_once_even_those_a_section_finds_itself() -> None:
    found = problems_of(
        {"count": "x", "cuont": 1, "inner": {"rate": -1, "sizes": [], "mode": "kep"}}
    )
    assert len(found) == 6
    told = "\n".join(found)
    for part in (
        "name: required",
        "count: expected",
        "cuont: unknown",
        "inner.mode",
        "inner.rate",
        "inner.sizes",
    ):
        assert part in told


def test_the_place_a_value_came_from_is_named() -> None:
    with pytest.raises(ConfigError, match=r"found 'x' \(str\), from conf/job.yaml"):
        build(Outer, {"name": "a", "count": "x"}, origin=lambda path: f"conf/{'job'}.yaml")
    values = {"name": "a", "inner": {"rate": -1}}
    with pytest.raises(ConfigError, match=r"inner\.rate: .* found -1\.0, from inner\.rate in job"):
        build(Outer, values, origin=lambda path: f"{path} in job")


def test_the_messages_of_all_checks_are_raised_together() -> None:
    def fails(message: str) -> None:
        raise ConfigError(message)

    with pytest.raises(ConfigError, match=r"^one\ntwo$"):
        run_checks(lambda: fails("one"), lambda: None, lambda: fails("two"))


def test_type_names_read_as_words() -> None:
    assert type_name(tuple[int, ...] | None) == "list of int or null"
    assert type_name(Literal["a", "b"]) == "one of a, b"


def test_a_constructor_makes_of_values_what_their_types_say() -> None:
    given: dict[str, Any] = {"count": np.int64(2), "limit": np.float32(0.5), "colour": "blue"}
    made = Outer(name=np.str_("a"), names=["x"], **given)  # type: ignore[arg-type]
    assert made == Outer(name="a", names=("x",), count=2, limit=0.5, colour=Colour.BLUE)
    assert made.colour is Colour.BLUE
    assert [type(value) for value in (made.name, made.count, made.limit)] == [str, int, float]
    json.dumps(to_dict(made))


def test_truth_values_and_words_of_numpy_are_taken_as_its_numbers_are() -> None:
    given: dict[str, Any] = {"descriptors": np.bool_(True), "relations": np.str_("2d")}
    made = mb.FinetuneSettings(**given)
    found = to_dict(made)
    assert [type(found[name]) for name in given] == [bool, str]
    json.dumps(found)
    wrong: dict[str, Any] = {"epochs": np.bool_(True)}
    with pytest.raises(ConfigError, match=r"epochs: expected int, found True \(bool\)"):
        mb.FinetuneSettings(**wrong)


def test_arrays_and_names_of_columns_are_taken_as_lists_are() -> None:
    pd = pytest.importorskip("pandas")
    columns = pd.DataFrame(columns=["smiles", "a", "b"]).columns[1:]
    for names in (columns, np.array(["a", "b"]), columns.to_series()):
        made = Outer(name="a", names=names, inner={"sizes": np.arange(3)})  # type: ignore[arg-type]
        assert (made.names, made.inner.sizes) == (("a", "b"), (0, 1, 2))
        json.dumps(to_dict(made))
    for sizes in (np.array([0.5]), np.array(3), np.array([[1]])):
        with pytest.raises(ConfigError, match=r"sizes.*: expected (list of )?int, found"):
            Inner(sizes=sizes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sizes: expected list of int, found "):
        Inner(sizes=np.ndarray)  # type: ignore[arg-type]


def test_a_constructor_names_every_value_of_another_type_before_its_own_checks() -> None:
    with pytest.raises(ConfigError) as raised:
        Inner(rate="1", mode="kep", sizes=3)  # type: ignore[arg-type]
    assert str(raised.value).splitlines() == [
        "mode: expected one of keep, reject, found 'kep' (str); did you mean keep?",
        "rate: expected float, found '1' (str)",
        "sizes: expected list of int, found 3 (int)",
    ]
    with pytest.raises(
        ConfigError, match=r"name: expected str, .* \(give it as text: str\(path\)\)"
    ):
        Outer(name=Path("a"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"inner: expected Inner, found 'keep' \(str\)"):
        Outer(name="a", inner="keep")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'nam'"):
        Outer(nam="a")  # type: ignore[call-arg]


def classes_of_settings() -> Iterator[type]:
    """Every class of settings that a user can make, sections included."""
    others = {"MoleculeBatch", "MoleculeEncoder", "PropertyPredictor"}
    waiting: list[object] = [getattr(mb, name) for name in set(mb.__all__) - others]
    seen: set[type] = set()
    while waiting:
        cls = waiting.pop()
        if not isinstance(cls, type) or cls in seen or not dataclasses.is_dataclass(cls):
            continue
        seen.add(cls)
        waiting += filter(None, map(nested_dataclass, field_types(cls).values()))
    return iter(sorted(seen, key=lambda cls: cls.__name__))


@pytest.mark.parametrize("cls", classes_of_settings(), ids=lambda cls: cls.__name__)
def test_every_class_of_settings_checks_the_types_of_its_values(cls: type) -> None:
    for name in field_types(cls):
        with pytest.raises(ConfigError, match=rf"^{name}: expected "):
            cls(**{name: object()})
