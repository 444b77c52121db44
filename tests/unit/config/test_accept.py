"""Whoever calls a function with the settings of another is told so at once, and which function takes them."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moleblend_ray as mb
from moleblend_ray.config.accept import FUNCTIONS


def functions_of_settings() -> dict[str, tuple[Callable[[Any], Any], tuple[type, ...]]]:
    """Every public function that takes the settings of a command: name -> function, classes that it takes."""
    found: dict[str, tuple[Callable[[Any], Any], tuple[type, ...]]] = {}
    for name in mb.__all__:
        function = getattr(mb, name)
        if inspect.isfunction(function) and "config" in inspect.signature(function).parameters:
            taken = typing.get_type_hints(function)["config"]
            found[name] = (function, typing.get_args(taken) or (taken,))
    return found


TAKING = functions_of_settings()


def test_the_functions_of_all_settings_are_known() -> None:
    assert len(TAKING) == 19
    takes: dict[str, set[str]] = {}
    for name, (_, classes) in TAKING.items():
        for settings in classes:
            takes.setdefault(settings.__name__, set()).add(f"mb.{name}")
    assert takes.keys() == FUNCTIONS.keys()
    for settings_name, names in takes.items():
        assert set(re.findall(r"mb\.\w+", FUNCTIONS[settings_name])) == names


@pytest.mark.parametrize("name", TAKING)
def test_settings_of_another_function_are_told_from_its_own(tmp_path: Path, name: str) -> None:
    function, (settings, *_) = TAKING[name]
    out = str(tmp_path / "out")
    other: object = mb.EmbedConfig(checkpoint="/m", source="/a.csv", out=out)
    told = r"EmbedConfig\(\.\.\.\), which mb\.embed takes"
    if settings is mb.EmbedConfig:
        other = mb.PrepareConfig(source="/a.csv", out=out)
        told = r"PrepareConfig\(\.\.\.\), which mb\.prepare takes"
    expected = rf"^expected settings, such as mb\.{settings.__name__}\(\.\.\.\), found "
    for wrong, found in (
        (other, told),
        (mb.TaskConfig(name="esol", source="/a.csv"), r"TaskConfig\(\.\.\.\)$"),
        (settings, f"the class {settings.__name__}; call it with settings"),
        ({"source": "/a.csv"}, r"a mapping; unpack it: \(\*\*settings\)"),
        ("s3://key:secret@bucket/a.csv", r"'s3://\*\*\*@bucket/a.csv'"),
        (None, "None"),
    ):
        with pytest.raises(mb.ConfigError, match=expected + found):
            function(wrong)
    assert not Path(out).exists()
