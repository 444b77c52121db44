"""Where reduced precision must stop."""

from __future__ import annotations

import torch
from torch import Tensor


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float32; float64 stays, so that models can also be checked in float64."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()
