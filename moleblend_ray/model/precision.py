"""Where reduced precision must stop."""

from __future__ import annotations

import torch
from torch import Tensor


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float32; float64 stays, so that models can also be checked in float64."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def product_type(values: Tensor) -> torch.dtype:
    """Type in which matrix products of ``values`` are computed here: that of autocast where it is on."""
    kind = values.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else values.dtype
