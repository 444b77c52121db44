"""Rates of a step, and peak memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from moleblend_ray.training.config import Precision
from moleblend_ray.training.throughput import Meter, matrix_rate

CPU = torch.device("cpu")


def test_rates_are_those_of_all_ranks_over_their_devices() -> None:
    meter = Meter(device=CPU, matrix_rate=2 * 5e9)
    record = {"molecules": 10, "atoms": 150, "model_flops": 1e9}
    rates = meter.rates(record, step_s=0.5)
    assert rates["molecules_per_s"] == 20
    assert rates["atoms_per_s"] == 300
    assert rates["mfu"] == pytest.approx(0.2)


def test_the_rate_counts_the_devices_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moleblend_ray.training.throughput.matrix_rate", lambda *_: 3e9)
    assert Meter.of_device(CPU, "fp32", world_size=4).matrix_rate == 12e9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_multiply_add_counts_as_two(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([0.5, 0.25, 0.5, 0.5, 0.5])
    monkeypatch.setattr(
        "moleblend_ray.training.throughput.seconds_of", lambda run, _: (run(), next(seconds))[1]
    )
    assert matrix_rate(CPU, precision, size=16) == 2 * 16**3 / 0.25


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
