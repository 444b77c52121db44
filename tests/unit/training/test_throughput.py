"""Rates of a step, and peak memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from moleblend_ray.training import throughput
from moleblend_ray.training.config import Precision
from moleblend_ray.training.throughput import Meter, matrix_rate

CPU = torch.device("cpu")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def test_rates_are_those_of_all_ranks_over_their_devices() -> None:
    meter = Meter(device=CPU, matrix_rate=2 * 5e9)
    record = {"molecules": 10, "atoms": 150, "model_flops": 1e9}
    rates = meter.rates(record, step_s=0.5)
    assert rates["molecules_per_s"] == 20
    assert rates["atoms_per_s"] == 300
    assert rates["mfu"] == pytest.approx(0.2)


def test_the_rate_counts_the_devices_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_first_rate", lambda *_: 3e9)
    assert Meter.of_device(CPU, "fp32", world_size=4).matrix_rate == 12e9


def test_the_rate_of_a_device_is_measured_once_in_a_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[Precision] = []

    def measure(_: torch.device, precision: Precision) -> float:
        measured.append(precision)
        return 1e9 * len(measured)

    monkeypatch.setattr(throughput, "matrix_rate", measure)
    throughput._first_rate.cache_clear()
    try:
        asked: list[Precision] = ["fp32", "bf16", "fp32"]
        rates = [Meter.of_device(CPU, precision, world_size=1).matrix_rate for precision in asked]
    finally:
        throughput._first_rate.cache_clear()
    assert measured == ["fp32", "bf16"]
    assert rates == [1e9, 2e9, 1e9]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("rate", "size"), [(1e9, 256), (3e10, 512), (2e11, 1024), (1e15, 2048)])
def test_the_rate_is_that_of_the_first_size_that_takes_long_enough(
    precision: Precision, rate: float, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def seconds_at_rate(product: Any, _: torch.device) -> float:
        (left, right), out = product.args, product.keywords["out"]
        assert left.dtype == right.dtype == out.dtype == TYPES[precision]
        sizes.append(len(out))
        return 2 * len(out) ** 3 / rate

    monkeypatch.setattr(throughput, "seconds_of", seconds_at_rate)
    assert matrix_rate(CPU, precision) == pytest.approx(rate)
    assert sizes[-1] == size


def test_peak_memory_stays_after_memory_was_freed() -> None:
    program = """
import numpy as np, torch
from moleblend_ray.training.throughput import peak_memory_bytes
before = peak_memory_bytes(torch.device("cpu"))
np.ones(200 << 20, np.uint8)
print(peak_memory_bytes(torch.device("cpu")) - before)
"""
    grown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert 100 << 20 < int(grown.stdout) < 300 << 20
