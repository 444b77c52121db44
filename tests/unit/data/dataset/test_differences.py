"""Differences of nested settings are found at every depth, under dotted keys."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from moleblend_ray.data.dataset.differences import differences

SETTINGS = st.recursive(
    st.none() | st.integers(0, 2) | st.lists(st.integers(0, 1), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=12,
).filter(lambda value: isinstance(value, dict))


def test_each_setting_that_differs_is_named_with_both_values() -> None:
    old = {"seed": 1, "model": {"width": 8, "heads": 2}, "same": {"a": [1]}}
    new = {"seed": 2, "model": {"width": 8, "heads": 4}, "same": {"a": [1]}}
    assert differences(old, new) == {"model.heads": (2, 4), "seed": (1, 2)}


def test_keys_are_sorted_whatever_their_order_in_the_settings() -> None:
    assert list(differences({"b": 1, "a": {"y": 1, "x": 1}}, {})) == ["a.x", "a.y", "b"]


def test_an_absent_key_is_one_without_a_value() -> None:
    assert differences({"a": 1}, {"b": 2}) == {"a": (1, None), "b": (None, 2)}
    assert differences({"a": None, "b": {}}, {}) == {}
    assert differences({"a": 0}, {}) == {"a": (0, None)}


def test_settings_of_a_section_on_one_side_only_are_named_one_by_one() -> None:
    section = {"noise": {"std": 0.2, "kind": None}}
    assert differences(section, {}) == {"noise.std": (0.2, None)}
    assert differences({"noise": None}, section) == {"noise.std": (None, 0.2)}


def test_a_section_in_place_of_a_value_is_one_difference() -> None:
    assert differences({"a": 1}, {"a": {"b": 1}}) == {"a": (1, {"b": 1})}
    assert differences({"a": {}}, {"a": False}) == {"a": ({}, False)}


def test_tuples_and_lists_of_equal_values_are_equal() -> None:
    assert differences({"a": (1, (2, 3))}, {"a": [1, [2, 3]]}) == {}
    assert differences({"a": (1,)}, {"a": ()}) == {"a": ([1], [])}


@given(SETTINGS, SETTINGS)
def test_settings_read_back_from_json_do_not_differ_and_the_order_only_turns_the_values(
    old: dict[str, Any], new: dict[str, Any]
) -> None:
    assert differences(old, json.loads(json.dumps(old))) == {}
    turned = {key: (after, before) for key, (before, after) in differences(old, new).items()}
    assert differences(new, old) == turned
