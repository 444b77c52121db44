"""Triton kernels of the denoising head against matrix products on rectangles; without GPU in Triton's interpreter."""

from __future__ import annotations

import molecule_zoo as zoo
import pytest
import torch
from kernel_device import DEVICE, skip_if_not_interpreted
from torch import Tensor

from moleblend_ray.model import denoising
from moleblend_ray.model.attention import SharedBias
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.denoising import DenoisingHead

triton = pytest.importorskip(
    "triton", reason="Triton comes with GPU builds of PyTorch, or by itself"
)

SMALL = [zoo.single_atom(), zoo.chain(2), zoo.ring(6), zoo.ring(5, tail=3), zoo.chain(2)]
LARGE = [zoo.chain(20), zoo.single_atom(), zoo.ring(6, tail=30)]


@pytest.fixture(autouse=True)
def interpreted() -> None:
    from moleblend_ray.model import denoising_kernels

    skip_if_not_interpreted(denoising_kernels._forward)


def head_of(heads: int, width: int, dropout: float = 0.0) -> DenoisingHead:
    config = ModelConfig(num_heads=heads, dim=width, attention_dropout=dropout)
    head = DenoisingHead(config)
    zoo.spread_weights(head)
    return head.to(DEVICE)


def inputs(batch: MoleculeBatch, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Atoms, bias and displacements."""
    torch.manual_seed(0)
    B, N = batch.num_molecules, batch.max_atoms
    bias = torch.randn(B, heads, N + 1, N + 1)
    padding = torch.arange(N + 1) > batch.num_atoms[:, None].cpu()
    bias = bias.masked_fill(padding[:, None, None, :], float("-inf"))
    atoms, displacement = torch.randn(len(batch.atom_index), width), torch.randn(B, N, N, 3)
    atoms, bias = (values.to(DEVICE).requires_grad_() for values in (atoms, bias))
    return atoms, bias, displacement.to(DEVICE)


@pytest.mark.parametrize(
    ("molecules", "heads", "width"), [(SMALL, 4, 96), (LARGE, 2, 64), (SMALL[:1], 1, 8)]
)
def test_predictions_and_gradients_are_those_of_products(
    molecules: list[zoo.ZooMolecule], heads: int, width: int
) -> None:
    batch = zoo.batch(molecules, device=DEVICE)
    head = head_of(heads, width)
    upstream = torch.randn(batch.num_molecules, batch.max_atoms, 3, device=DEVICE)
    found = []
    for by_kernel in (True, False):
        atoms, bias, displacement = inputs(batch, heads, width)
        shared = SharedBias(bias) if by_kernel else None
        output = head(atoms, bias, displacement, batch, shared)[batch.atom_mask]
        gradients = torch.autograd.grad(
            (output * upstream[batch.atom_mask]).sum(), [atoms, bias, *head.parameters()]
        )
        found.append((output.detach(), *gradients))
    for ours, expected in zip(*found, strict=True):
        # What would be added to all scores of a row changes nothing: the gradient of the keys' bias is rounding alone.
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_displacements_that_need_a_gradient_get_one() -> None:
    batch = zoo.batch(SMALL, device=DEVICE)
    atoms, bias, displacement = inputs(batch, 4, 96)
    displacement.requires_grad_()
    head_of(4, 96)(atoms, bias, displacement, batch, SharedBias(bias)).sum().backward()
    assert displacement.grad is not None
    assert (displacement.grad != 0).any()


def test_a_molecule_that_is_not_finite_stays_alone() -> None:
    batch = zoo.batch([zoo.chain(2), zoo.chain(2), zoo.ring(6)], device=DEVICE)
    atoms, bias, displacement = inputs(batch, 4, 96)
    with torch.no_grad():
        atoms[0] = float("nan")
        output = head_of(4, 96)(atoms, bias, displacement, batch, SharedBias(bias))
    assert output.isnan().flatten(1).any(1).tolist() == [True, False, False]


def test_dropout_keeps_the_mean_and_its_gradient_is_that_of_the_masked_function() -> None:
    batch = zoo.batch([zoo.chain(20, seed=k) for k in range(30)], device=DEVICE)
    rate, A, N = 0.25, len(batch.atom_index), batch.max_atoms
    # Equal scores, and values and displacements of 1: an output is the share of kept weights, times 1 / (1 - rate).
    mapped = torch.cat([torch.zeros(A, 2 * 8), torch.ones(A, 2 * 3)], 1)
    mapped = mapped.to(DEVICE).requires_grad_()
    bias = torch.zeros(30, 2, N + 1, N + 1, device=DEVICE)
    displacement = torch.ones(30, N, N, 3, device=DEVICE)

    def noise(mapped: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        shared = SharedBias(bias)
        moved: Tensor = denoising._NoiseByKernel.apply(
            mapped, shared.values, shared, displacement, batch, rate
        )
        return moved

    output = noise(mapped, 1)
    left = output * N * (1 - rate)
    torch.testing.assert_close(left, left.round(), rtol=0, atol=1e-2)
    assert left.mean().item() / (2 * N) == pytest.approx(1 - rate, abs=0.02)
    assert not torch.equal(noise(mapped, 2), output)
    # The masked function is linear in the values: gradient times values sums up to the sum of the output.
    (gradient,) = torch.autograd.grad(output.sum(), mapped)
    torch.testing.assert_close((gradient * mapped)[:, 16:].sum(), output.sum())
    # A small change of the queries changes the output as the gradient predicts.
    torch.manual_seed(5)
    mixed = torch.randn(A, 22).to(DEVICE).requires_grad_()
    direction = torch.randn(A, 22).to(DEVICE)
    (slope,) = torch.autograd.grad(noise(mixed, 1).square().sum(), mixed)
    step = 1e-2
    with torch.no_grad():
        above, below = (noise(mixed + s * direction, 1).square().sum() for s in (step, -step))
    torch.testing.assert_close(
        (slope * direction).sum(), (above - below) / (2 * step), rtol=2e-2, atol=0.5
    )
