"""Triton kernels between the matrix products of a block against plain code; without GPU in Triton's interpreter."""

from __future__ import annotations

import copy
import functools
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from kernel_device import DEVICE, skip_if_not_interpreted
from torch import Tensor
from torch.nn import functional as F

from moleblend_ray.model import fused

pytest.importorskip("triton", reason="Triton comes with GPU builds of PyTorch, or by itself")

ROWS, WIDTH, MOLECULES = 37, 24, 5


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from moleblend_ray.model import block_kernels

    skip_if_not_interpreted(block_kernels._gelu)
    monkeypatch.setattr(fused, "kernels_fit", lambda values: True)


def seed(number: int) -> Tensor:
    return torch.tensor([(number << 33) + 17], device=DEVICE)


def linear(width: int = WIDTH) -> torch.nn.Linear:
    """A linear map whose matrix product is its input, with a bias."""
    layer = torch.nn.Linear(width, width, device=DEVICE)
    torch.nn.init.eye_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    return layer


def inputs() -> tuple[Tensor, Tensor, torch.nn.Linear, torch.nn.LayerNorm, fused.PathScale]:
    torch.manual_seed(0)
    tokens, branch = torch.randn(2, ROWS, WIDTH, device=DEVICE) * 2 + 0.5
    norm = torch.nn.LayerNorm(WIDTH, device=DEVICE)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    molecule = torch.arange(ROWS, device=DEVICE) * MOLECULES // ROWS
    path_scale = torch.tensor([0.0, 1.0, 1.25, 0.0, 2.0], device=DEVICE)
    both = tokens.requires_grad_(), branch.detach().requires_grad_()
    return *both, linear(), norm, fused.PathScale(path_scale, molecule)


@pytest.mark.parametrize("scaled", [True, False])
def test_sum_and_norm_give_what_plain_code_gives_and_the_same_gradients(scaled: bool) -> None:
    found = []
    for plain in (False, True):
        tokens, branch, layer, norm, path = inputs()
        if plain:
            added = layer(branch)
            output = norm(tokens + (added * path.of_tokens() if scaled else added))
        else:
            output = fused.add_and_norm(
                tokens,
                branch * path.of_tokens() if scaled else branch,
                layer,
                norm,
                path=path if scaled else None,
                probability=0.0,
                seed=None,
            )
        upstream = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
        output.backward(upstream.to(DEVICE))
        gradients = [p.grad for p in (*layer.parameters(), *norm.parameters())]
        found.append((output.detach(), tokens.grad, branch.grad, *gradients))
    for ours, expected in zip(*found, strict=True):
        assert expected is not None
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_branch_in_bfloat16_gives_a_result_in_bfloat16_computed_in_float32() -> None:
    tokens, branch, layer, norm, path = inputs()
    half, in_half = branch.detach().bfloat16(), copy.deepcopy(layer).bfloat16()
    output = fused.add_and_norm(
        tokens,
        half,
        in_half,
        norm,
        path=path,
        probability=0.0,
        seed=None,
    )
    assert output.dtype == torch.bfloat16
    added = half.float() + in_half.bias.float() * path.of_tokens()
    expected = norm(tokens + added).bfloat16()
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)
    output.float().square().sum().backward()
    assert in_half.bias.grad is not None
    assert in_half.bias.grad.dtype == torch.bfloat16


def test_dropout_of_a_branch_is_the_same_forward_and_backward_and_as_often_as_asked() -> None:
    rate, rows, width = 0.25, 400, 64
    tokens = torch.zeros(rows, width, device=DEVICE, requires_grad=True)
    branch = torch.zeros(rows, width, device=DEVICE, requires_grad=True)
    layer = linear(width)
    torch.nn.init.ones_(layer.bias)
    norm = torch.nn.LayerNorm(width, device=DEVICE)

    def run(number: int) -> Tensor:
        return fused.add_and_norm(
            tokens,
            branch,
            layer,
            norm,
            path=None,
            probability=rate,
            seed=seed(number),
        )

    output = run(1)
    # Kept elements lie above the mean of their row.
    kept = output > 0
    assert kept.float().mean().item() == pytest.approx(1 - rate, abs=0.01)
    assert torch.equal(run(1), output)
    assert not torch.equal(run(2), output)
    grad_branch, grad_linear_bias, grad_tokens = torch.autograd.grad(
        (output * torch.randn(rows, width, device=DEVICE)).sum(), (branch, layer.bias, tokens)
    )
    torch.testing.assert_close(grad_branch, torch.where(kept, grad_tokens / (1 - rate), 0.0))
    torch.testing.assert_close(grad_linear_bias, grad_branch.sum(0), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("width", [20, 300])
@pytest.mark.parametrize("scaled", [True, False])
def test_gelu_its_dropout_and_its_path_scale(width: int, scaled: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, width, device=DEVICE, requires_grad=True)
    layer = linear(width)
    molecule = torch.arange(300, device=DEVICE) // 60
    path = fused.PathScale(torch.tensor([0.0, 1.0, 1.25, 1.0, 2.0], device=DEVICE), molecule)
    run = functools.partial(fused.gelu_and_dropout, hidden, layer, path=path if scaled else None)
    plain = F.gelu(layer(hidden))
    if scaled:
        plain = plain * path.of_tokens()
    largest = path.factor.max().item() if scaled else 1.0
    without, _ = run(probability=0.0, seed=None)
    torch.testing.assert_close(without, plain, rtol=1e-5, atol=1e-6 * largest)
    rate = 0.4
    output, _ = run(probability=rate, seed=seed(3))
    seen = (path.of_tokens() != 0).expand_as(output) if scaled else output == output
    kept = output != 0
    assert kept[seen].float().mean().item() == pytest.approx(1 - rate, abs=0.02)
    assert not kept[~seen].any()
    torch.testing.assert_close(
        output, torch.where(kept, plain / (1 - rate), 0.0), rtol=1e-5, atol=1e-5
    )
    upstream = torch.randn(300, width, device=DEVICE)
    masked = torch.where(kept, upstream / (1 - rate), 0.0)
    ours = torch.autograd.grad(output, (hidden, layer.bias), upstream)
    expected = torch.autograd.grad(plain, (hidden, layer.bias), masked)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def test_what_is_kept_looks_random_along_every_bit_of_place_and_seed() -> None:
    hidden = torch.zeros(1, 1, device=DEVICE)
    layer = torch.nn.Linear(1, 1 << 16, device=DEVICE)
    torch.nn.init.constant_(layer.bias, 10.0)

    def kept(number: int) -> Tensor:
        output, _ = fused.gelu_and_dropout(
            hidden, layer, path=None, probability=0.5, seed=torch.tensor([number], device=DEVICE)
        )
        return (output[0] != 0).cpu()

    first = kept(12345)
    place = torch.arange(1 << 16)
    for bit in range(16):
        neighbours = (first == first[place ^ (1 << bit)]).float().mean().item()
        assert neighbours == pytest.approx(0.5, abs=0.01), bit
    for bit in (0, 1, 15, 31, 32, 33, 45, 61):
        agree = (first == kept(12345 ^ (1 << bit))).float().mean().item()
        assert agree == pytest.approx(0.5, abs=0.01), bit


@pytest.mark.parametrize("missing", ["compiler", "headers", "nothing"])
def test_without_what_triton_builds_with_there_are_no_kernels_and_one_warning(
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("CC", raising=False)
    found = None if missing == "compiler" else "/usr/bin/gcc"
    monkeypatch.setattr(shutil, "which", lambda name: found)
    if missing != "headers":
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    fused._triton_works.cache_clear()
    try:
        answers = [fused.uses_triton() for _ in range(3)]
    finally:
        fused._triton_works.cache_clear()
    assert answers == [missing == "nothing"] * 3
    assert len(caplog.records) == (missing != "nothing")


def test_plain_code_switches_kernels_off_and_on_again() -> None:
    before = fused.uses_triton()
    with fused.plain_code():
        assert not fused.uses_triton()
    assert fused.uses_triton() == before
