"""The types of JSON documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from moleblend_ray.data.files.documents import lack, member, require_types


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str | None
    share: float
    counts: dict[str, int]
    items: tuple[Inner, ...]
    anything: Any = None


def outer(**changes: Any) -> Outer:
    whole = {"name": "a", "share": 1, "counts": {"x": 1}, "items": (Inner(size=1),)}
    return Outer(**{**whole, **changes})


def test_a_record_of_the_annotated_types_passes() -> None:
    require_types(outer())
    require_types(outer(name=None, share=0.5, counts={}, items=[], anything=object()))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"name": 7}, r"name: expected str or null, found 7 \(int\)"),
        ({"share": "1"}, "share: expected float, found '1'"),
        ({"share": True}, "share: expected float, found True"),
        ({"counts": []}, "counts: expected mapping of str to int, found"),
        ({"counts": {"x": None}}, "counts.x: expected int, found null"),
        ({"items": "ab"}, "items: expected list of Inner, found 'ab'"),
        ({"items": (Inner(size=1), Inner(size=1.5))}, r"items\[1\].size: expected int, found 1.5"),  # type: ignore[arg-type]
        ({"items": (None,)}, r"items\[0\]: expected Inner, found null"),
    ],
)
def test_the_first_wrong_field_is_named_with_its_place(
    changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(TypeError, match=problem):
        require_types(outer(**changes))


def test_members_are_found_by_path_and_only_with_their_type() -> None:
    document = {"task": {"name": "esol", "sizes": [1, 2]}, "seed": 0}
    assert member(document, "task.name", str) == "esol"
    assert member(document, "seed", int) == 0
    assert member(document, "task.name", int) is None
    assert member(document, "task.name.first", str) is None
    assert member(7, "task", str) is None
    assert lack(document, {"task.sizes": list[int], "seed": float}) == ""
    assert lack(document, {"task.unit": str}) == "has no 'task.unit'"
    assert lack([], {}) == "holds no JSON object"
    wrong = lack(document, {"task.sizes": list[str]})
    assert wrong == "is wrong: task.sizes[0]: expected str, found 1 (int)"
    inside = lack(document, {"task.sizes": list[str] | None})
    assert inside == "is wrong: task.sizes[0]: expected str, found 1 (int)"
