"""In which types a forward pass computes."""

from __future__ import annotations

import torch

from moleblend_ray.training.config import Precision


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Context of the forward pass: matrix products in bfloat16 if asked for, the rest in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
