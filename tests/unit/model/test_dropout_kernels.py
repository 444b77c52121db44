"""What dropout keeps in a tile looks random along every bit of place, tile and seed."""

from __future__ import annotations

import pytest
import torch
from kernel_device import DEVICE, skip_if_not_interpreted
from torch import Tensor

triton = pytest.importorskip(
    "triton", reason="Triton comes with GPU builds of PyTorch, or by itself"
)
import triton.language as tl  # noqa: E402

from moleblend_ray.model.dropout_kernels import kept_in_tile  # noqa: E402

TILES, PLACES = 256, 1024


@triton.jit  # type: ignore[untyped-decorator]
def _mask(seed, output, probability, PLACES: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, PLACES)
    survives = kept_in_tile(tl.load(seed), tl.program_id(0), place, probability)
    tl.store(output + tl.program_id(0) * PLACES + place, survives.to(tl.int8))


def mask(seed: int, probability: float = 0.5) -> Tensor:
    """(TILES, PLACES) bool."""
    output = torch.empty(TILES, PLACES, dtype=torch.int8, device=DEVICE)
    _mask[(TILES,)](torch.tensor([seed], device=DEVICE), output, probability, PLACES=PLACES)
    return output.bool().cpu()


@pytest.fixture(autouse=True)
def interpreted() -> None:
    skip_if_not_interpreted(_mask)


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_the_share_is_as_asked_in_every_tile_and_at_every_place(probability: float) -> None:
    found = mask(7, probability).float()
    assert found.mean().item() == pytest.approx(1 - probability, abs=0.005)
    # Five standard deviations of independent draws.
    spread = 5 * (probability * (1 - probability)) ** 0.5
    assert (found.mean(1) - (1 - probability)).abs().max() < spread / PLACES**0.5
    assert (found.mean(0) - (1 - probability)).abs().max() < spread / TILES**0.5


def test_neighbours_in_place_tile_and_seed_agree_by_chance_alone() -> None:
    first = mask(12345)
    place, tile = torch.arange(PLACES), torch.arange(TILES)
    for bit in range(10):
        agree = (first == first[:, place ^ (1 << bit)]).float().mean().item()
        assert agree == pytest.approx(0.5, abs=0.01), bit
    for bit in range(8):
        agree = (first == first[tile ^ (1 << bit)]).float().mean().item()
        assert agree == pytest.approx(0.5, abs=0.01), bit
    for bit in (0, 1, 15, 31, 32, 33, 45, 61):
        agree = (first == mask(12345 ^ (1 << bit))).float().mean().item()
        assert agree == pytest.approx(0.5, abs=0.01), bit
