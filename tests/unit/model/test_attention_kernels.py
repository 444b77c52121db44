"""Triton kernels of attention against PyTorch's own on padded rectangles; without GPU in Triton's interpreter."""

from __future__ import annotations

import functools

import molecule_zoo as zoo
import pytest
import torch
from kernel_device import (
    DEVICE,
    SMALL_MODEL,
    skip_if_not_interpreted,
    use_bfloat16_as_a_gpu_does,
)
from torch import Tensor

from moleblend_ray.model import attention
from moleblend_ray.model.attention import SharedBias, attend_packed, attend_padded
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.fused import PathScale
from moleblend_ray.model.moleblend import MoleBlendModel

pytest.importorskip("triton", reason="Triton comes with GPU builds of PyTorch, or by itself")

SMALL = [zoo.single_atom(), zoo.chain(2), zoo.ring(6), zoo.ring(5, tail=3), zoo.chain(2)]
LARGE = [zoo.chain(20), zoo.single_atom(), zoo.ring(6, tail=30)]


@pytest.fixture(autouse=True)
def interpreted() -> None:
    from moleblend_ray.model import attention_kernels

    skip_if_not_interpreted(attention_kernels._forward)


def inputs(batch: MoleculeBatch, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    B, T = batch.num_molecules, batch.max_atoms + 1
    qkv = torch.randn(len(batch.token_index), 3 * width)
    bias = torch.randn(B, heads, T, T)
    padding = torch.arange(T) > batch.num_atoms[:, None].cpu()
    bias = bias.masked_fill(padding[:, None, None, :], float("-inf"))
    given = qkv, torch.randn(3 * width), bias
    qkv, linear_bias, bias = (values.to(DEVICE).requires_grad_() for values in given)
    return qkv, linear_bias, bias


def no_seed() -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize(
    ("molecules", "heads", "width"), [(SMALL, 4, 96), (LARGE, 2, 64), (SMALL[:1], 1, 8)]
)
def test_two_blocks_give_what_padded_attention_gives_and_the_same_gradients(
    molecules: list[zoo.ZooMolecule], heads: int, width: int
) -> None:
    batch = zoo.batch(molecules, device=DEVICE)
    upstream = torch.randn(2, len(batch.token_index), width, device=DEVICE)
    found = []
    for packed in (True, False):
        qkv, linear_bias, bias = inputs(batch, heads, width)
        shared = SharedBias(bias) if packed else None
        first, second = (
            attend_padded(part + linear_bias, bias, batch)
            if shared is None
            else attend_packed(part + linear_bias.detach(), linear_bias, shared, batch, no_seed())
            for part in (qkv, 2.0 * qkv)
        )
        # The bias has another reader, as the denoising head is.
        read = bias.masked_fill(bias.isinf(), 0.0).square().sum()
        ((first * upstream[0]).sum() + (second * upstream[1]).sum() + read).backward()
        found.append((first.detach(), second.detach(), qkv.grad, linear_bias.grad, bias.grad))
    for ours, expected in zip(*found, strict=True):
        assert ours is not None
        assert expected is not None
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_the_path_scale_multiplies_the_result_and_its_gradient(rate: float) -> None:
    batch = zoo.batch(SMALL, device=DEVICE)
    factor = torch.tensor([0.0, 1.0, 1.25, 2.0, 1.0], device=DEVICE)
    upstream = torch.randn(len(batch.token_index), 96, device=DEVICE)
    found = []
    for path in (PathScale(factor, batch.token_molecule), None):
        qkv, linear_bias, bias = inputs(batch, 4, 96)
        output = attend_packed(qkv, linear_bias, SharedBias(bias), batch, no_seed(), rate, path)
        if path is None:
            output = output * factor[batch.token_molecule, None]
        (output * upstream).sum().backward()
        found.append((output.detach(), qkv.grad, linear_bias.grad, bias.grad))
    for ours, expected in zip(*found, strict=True):
        assert ours is not None
        assert expected is not None
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


def test_what_follows_a_row_of_the_bias_changes_nothing() -> None:
    batch = zoo.batch(SMALL, device=DEVICE)
    T = batch.max_atoms + 1
    found = []
    for filler in (0.0, float("nan"), float("inf")):
        qkv, linear_bias, bias = inputs(batch, 4, 96)
        shared = SharedBias(bias)
        assert shared.values.shape[-1] > T
        with torch.no_grad():
            shared.values[..., T:] = filler
        output = attend_packed(qkv, linear_bias, shared, batch, no_seed())
        output.square().sum().backward()
        assert bias.grad is not None
        assert bias.grad.shape == bias.shape
        found.append((output.detach(), qkv.grad, bias.grad))
    for other in found[1:]:
        for ours, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_in_bfloat16_the_rounding_is_all_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    use_bfloat16_as_a_gpu_does(monkeypatch)
    batch = zoo.batch(SMALL, device=DEVICE)
    width = 96
    upstream = torch.randn(len(batch.token_index), width, device=DEVICE)
    found = []
    for packed in (True, False):
        qkv, linear_bias, bias = inputs(batch, 4, width)
        given = qkv.bfloat16()
        if packed:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                shared = SharedBias(bias)
            output = attend_packed(given, linear_bias.bfloat16(), shared, batch, no_seed())
            assert output.dtype == torch.bfloat16
        else:
            output = attend_padded(given.float(), bias.bfloat16().float(), batch)
        (output.float() * upstream).sum().backward()
        found.append((output.detach().float(), qkv.grad, bias.grad))
    for ours, expected in zip(*found, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, expected, rtol=3e-2, atol=3e-2)


def test_a_second_backward_pass_begins_anew() -> None:
    batch = zoo.batch(SMALL, device=DEVICE)
    qkv, linear_bias, bias = inputs(batch, 4, 96)
    shared = SharedBias(bias)
    total = attend_packed(qkv, linear_bias, shared, batch, no_seed()).square().sum()
    (once,) = torch.autograd.grad(total, bias, retain_graph=True)
    (again,) = torch.autograd.grad(total, bias)
    torch.testing.assert_close(again, once, rtol=0, atol=0)


def test_dropout_keeps_the_mean_removes_the_share_and_its_gradient_is_that_of_the_masked_function() -> (
    None
):
    batch = zoo.batch([zoo.chain(20, seed=k) for k in range(40)], device=DEVICE)
    heads, width, rate = 2, 32, 0.25
    S, T = len(batch.token_index), batch.max_atoms + 1
    # Equal scores and values of 1: an output is the share of kept weights, times 1 / (1 - rate).
    qkv = torch.cat([torch.zeros(S, 2 * width), torch.ones(S, width)], 1)
    qkv = qkv.to(DEVICE).requires_grad_()
    bias = torch.zeros(batch.num_molecules, heads, T, T, device=DEVICE, requires_grad=True)
    seed = torch.tensor([7], device=DEVICE)
    linear_bias = torch.zeros(3 * width, device=DEVICE)
    output = attend_packed(qkv, linear_bias, SharedBias(bias), batch, seed, rate)
    left = output[:, :: width // heads] * T * (1 - rate)
    torch.testing.assert_close(left, left.round(), rtol=0, atol=1e-2)
    assert left.mean().item() / T == pytest.approx(1 - rate, abs=0.02)
    other = attend_packed(qkv, linear_bias, SharedBias(bias), batch, seed + 1, rate)
    assert not torch.equal(other, output)

    # The masked function is linear in the values: gradient times values sums up to the sum of the output.
    (grad_qkv,) = torch.autograd.grad(output.sum(), qkv)
    values = grad_qkv[:, 2 * width :]
    torch.testing.assert_close((values * qkv[:, 2 * width :]).sum(), output.sum())
    # A small change of the bias changes the output as the gradient predicts.
    mixed = torch.randn(S, 3 * width, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weight = torch.randn(S, width, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    direction = torch.randn(bias.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)

    def total(bias: Tensor) -> Tensor:
        return (
            attend_packed(mixed, linear_bias, SharedBias(bias), batch, seed, rate) * weight
        ).sum()

    (slope,) = torch.autograd.grad(total(bias), bias)
    step = 1e-2
    with torch.no_grad():
        difference = (total(bias + step * direction) - total(bias - step * direction)) / (2 * step)
    torch.testing.assert_close((slope * direction).sum(), difference, rtol=2e-2, atol=0.05)


def test_a_molecule_that_is_not_finite_stays_alone() -> None:
    batch = zoo.batch([zoo.chain(2), zoo.chain(2), zoo.ring(6)], device=DEVICE)
    qkv, linear_bias, bias = inputs(batch, 4, 96)
    with torch.no_grad():
        qkv[0] = float("nan")
        output = attend_packed(qkv, linear_bias, SharedBias(bias), batch, no_seed())
    assert {int(i) for i in batch.token_molecule[output.isnan().any(1)]} == {0}


def test_the_whole_model_gives_the_same_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = MoleBlendModel(SMALL_MODEL).to(DEVICE)
    batch = zoo.batch(SMALL, device=DEVICE)

    def weight_of(tokens: Tensor) -> Tensor:
        return torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1)).to(tokens)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        output = model(batch)
        # Not their squares: those of normalised tokens have a constant sum, whose gradient is rounding alone.
        (weight_of(output.tokens).mul(output.tokens).sum() + output.noise.square().sum()).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = gradients()
    pair_heads = ("spd_head.", "edge_head.", "direction_head.")
    others = [name for name, _ in model.named_parameters() if not name.startswith(pair_heads)]
    assert len(expected) == len(others)

    def by_kernels(
        bias: Tensor, shared: SharedBias | None, batch: MoleculeBatch, num_blocks: int
    ) -> list[attention.Attend]:
        shared = SharedBias(bias)
        return [functools.partial(attention._packed, shared, batch, no_seed())] * num_blocks

    monkeypatch.setattr("moleblend_ray.model.encoder.attention_of_blocks", by_kernels)
    for recompute in (False, True):
        model.encoder.recompute_blocks(enabled=recompute)
        for ours, theirs in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9
