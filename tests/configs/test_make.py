"""What `make`, CI and the benchmarks ask of pytest is something that it knows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CALLERS = ("Makefile", ".ci/run", "benchmarks/gpu.py")


def test_markers_that_tests_are_chosen_by_are_registered() -> None:
    """Of any other name in `-m`, pytest says that it is unknown, and runs nothing."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    registered = {
        line.partition(":")[0] for line in settings["tool"]["pytest"]["ini_options"]["markers"]
    }
    asked = set()
    for caller in CALLERS:
        # `-m 'EXPRESSION'` and `-m NAME` of a shell, `"-m", "EXPRESSION"` of Python; `-m pytest` is a module.
        for line in (REPOSITORY / caller).read_text().splitlines():
            _, found, rest = line.partition("pytest")
            if found:
                for quoted, plain in re.findall(r"""-m(?: |", )(?:['"]([^'"]+)['"]|(\w+))""", rest):
                    asked |= set(re.findall(r"\w+", quoted or plain)) - {"not", "and", "or"}
    assert "ray" in asked
    assert asked <= registered
