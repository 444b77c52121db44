"""Which types computations run in under reduced precision."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32; float64 is left alone, so that models can also be checked in float64."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def product_type(values: Tensor) -> torch.dtype:
    """Type in which matrix products of ``values`` are computed: that of autocast where it is on."""
    device_type = values.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return values.dtype
