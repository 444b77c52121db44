"""Which code tensors take, that for GPUs or that for CPUs; and the seeds of a device's random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

GPU_TYPES = frozenset({"cuda"})
"""Types of devices that take the code for GPUs. With "cpu" among them, tests run that code where there is no GPU."""


def on_gpu(values: Tensor) -> bool:
    """True if ``values`` lie on a GPU, where other code is faster than on a CPU."""
    return values.device.type in GPU_TYPES


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed PyTorch's generators of the CPU and of the GPUs of this process if ``device`` is one.

    ``torch.manual_seed`` also keeps the seed for each kind of accelerator that is not in use, with a formatted stack,
    which takes far longer than seeding.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
