"""Which code tensors take: that for GPUs or that for CPUs."""

from __future__ import annotations

from torch import Tensor

GPU_TYPES = frozenset({"cuda"})
"""Types of devices that take the code for GPUs. With "cpu" among them, tests run that code where there is no GPU."""


def on_gpu(values: Tensor) -> bool:
    """True if ``values`` lie on a GPU, where other code is faster than on a CPU."""
    return values.device.type in GPU_TYPES
