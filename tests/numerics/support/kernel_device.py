"""Device for tests of Triton kernels: a GPU, or the CPU with Triton's interpreter (see tests/conftest.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moleblend_ray.model.config import ModelConfig

SMALL_MODEL = ModelConfig(
    num_layers=2,
    dim=32,
    ffn_dim=32,
    num_heads=4,
    num_kernels=8,
    pair_dim=8,
    attention_dropout=0.0,
    activation_dropout=0.0,
    drop_path=0.0,
)
"""Without dropout, so that kernels and plain code can be compared."""

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def skip_if_not_interpreted(kernel: Any) -> None:
    """Skip the test on a CPU if Triton was imported before its interpreter was switched on."""
    if DEVICE.type == "cpu" and type(kernel).__name__ == "JITFunction":
        pytest.skip("Triton was imported before its interpreter was chosen")
