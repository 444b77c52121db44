"""Kernels work where their machine code cannot be stored; that it is compiled again each time is told once."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest

from moleblend_ray import compilation
from moleblend_ray.compilation import kernel


def total(values: np.ndarray) -> float:
    result = 0.0
    for value in values:
        result += value
    return result


def from_nowhere(function: Callable[..., float]) -> Callable[..., float]:
    """As if its file were in no place that can be written to: Numba finds no folder for such a function either."""
    function.__code__ = function.__code__.replace(co_filename="/nowhere/module.py")
    return function


def test_without_a_place_for_compiled_code_it_is_compiled_for_this_process(
    caplog: pytest.LogCaptureFixture,
) -> None:
    compilation._warn_of_repeated_compilation.cache_clear()
    with caplog.at_level(logging.WARNING):
        both = [kernel(from_nowhere(total)) for _ in range(2)]
    for compiled in both:
        assert compiled(np.arange(4.0)) == 6.0
        assert compiled.nopython_signatures
    (warning,) = caplog.messages
    assert "set NUMBA_CACHE_DIR" in warning
