"""The figures that plans start from, each with its benchmark, date and hardware.

They are in ``rates.json`` beside this file. ``result`` names a file in ``benchmarks/results/`` and ``path`` the number
in that file; a test compares the two. Peak rates of GPUs are the vendors' figures; this project has not measured them.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Final

import numpy as np

from moleblend_ray.errors import ConfigError
from moleblend_ray.planning.figures import Figure, computed, measured
from moleblend_ray.training.config import Precision

HARDWARE: Final = {
    "2026-11-25": "2 vCPU of an AMD EPYC server (AVX2)",
    "prepare-2026-11-26": "2 vCPU of an AMD EPYC server (AVX2)",
    "relations-2026-11-26": "2 vCPU of an AMD EPYC server (AVX2)",
    "scaling-2026-11-26": "2 vCPU of an Intel Xeon server (AVX-512, AMX)",
    "train_step-gpu-2026-11-26": "an NVIDIA H200 and 8 vCPU of its host",
    "plan-2026-11-27": "2 vCPU of an Intel Xeon server (AVX-512, AMX)",
    "2026-11-28": "2 vCPU of an AMD EPYC server (AVX-512 with bfloat16)",
}
"""Name of a result, or a date for all results of that day -> the machine, as the file of the result names it."""

ATOM_SHARES: Final = {
    8: 2, 9: 7, 10: 18, 11: 32, 12: 60, 13: 104, 14: 170, 15: 173, 16: 230, 17: 181, 18: 22,
}  # fmt: skip
"""Atoms without hydrogens -> number of molecules among 1,000 of PCQM4Mv2, for which the bundled figures hold."""
ATOMS_PER_MOLECULE: Final = 14.87
"""Mean number of atoms, without hydrogens, in all of PCQM4Mv2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU according to its data sheet."""

    name: str
    bf16_tflops: float
    """10^12 operations per second in dense bfloat16 matrix products."""
    fp32_tflops: float
    """10^12 operations per second in float32 outside tensor cores, which ``train.precision=fp32`` uses."""
    memory_gb: float
    source: str

    def peak(self, precision: Precision) -> float:
        """Operations per second at most."""
        return 1e12 * (self.bf16_tflops if precision == "bf16" else self.fp32_tflops)


def bundled(name: str) -> Figure:
    """The measured figure with this name."""
    entry = _document()["figures"][name]
    result = entry["result"].removesuffix(".json")
    date = result[-len("2026-01-01") :]
    hardware = HARDWARE.get(result) or HARDWARE[date]
    return measured(
        float(entry["value"]),
        entry["unit"],
        f"{entry['what']} ({entry['result']}, {hardware})",
    )


def gpu(name: str) -> Gpu:
    """The GPU with this short name. Raises a ConfigError that lists the known names."""
    known = _document()["gpus"]
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"gpu: expected one of {', '.join(known)}, found {name!r}{hint}. For other GPUs give rate=, the molecules/s "
            "that you measured on it"
        )
    return Gpu(**known[name])


_CPU_GFLOP: Final = {"tiny": 0.0526, "mini": 0.1350, "small": 0.3537, "base": 4.2987}
"""Preset -> 10^9 operations per molecule in a training step, for the molecules of the benchmark."""


def cpu_efficiency(gflop: float) -> Figure:
    """Operations per second of a core, relative to the base preset, for a model with ``gflop`` 10^9 operations per
    molecule.

    Small matrices use a core badly. Between presets the logarithms are interpolated; beyond them the nearest preset
    counts.
    """
    times = {name: bundled(f"cpu_{name}_s") for name in _CPU_GFLOP}
    speeds = {name: _CPU_GFLOP[name] / times[name].value for name in _CPU_GFLOP}
    value = np.interp(
        math.log(gflop),
        [math.log(known) for known in _CPU_GFLOP.values()],
        [math.log(speed / speeds["base"]) for speed in speeds.values()],
    )
    source = "interpolated between presets (plan-2026-11-27.json)"
    return computed(float(np.exp(value)), "", source, *times.values())


@cache
def _document() -> Any:
    text = resources.files("moleblend_ray.planning").joinpath("rates.json").read_text("utf-8")
    return json.loads(text)
