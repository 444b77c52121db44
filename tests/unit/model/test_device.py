"""The seeds of a device's random numbers."""

from __future__ import annotations

import torch
from kernel_device import DEVICE

from moleblend_ray.model.device import seed_generators


def test_seeded_generators_draw_what_they_draw_after_pytorchs_own_function() -> None:
    def draws() -> list[float]:
        return [*torch.rand(3).tolist(), *torch.rand(3, device=DEVICE).tolist()]

    torch.manual_seed(2**63 - 1)
    expected = draws()
    assert draws() != expected
    seed_generators(2**63 - 1, DEVICE)
    assert draws() == expected
