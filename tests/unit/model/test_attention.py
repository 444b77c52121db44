"""Attention by gathered rows compared with PyTorch's own on padded rectangles."""

from __future__ import annotations

import molecule_zoo as zoo
import pytest
import torch
from torch import Tensor

from moleblend_ray.model.attention import attend_by_rows, attend_padded, head_rows
from moleblend_ray.model.batch import MoleculeBatch

H, D = 4, 24
MOLECULES = [zoo.single_atom(), zoo.chain(2), zoo.ring(6), zoo.ring(5, tail=3), zoo.chain(2)]


def inputs(batch: MoleculeBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packed queries, keys and values, and a bias that hides padding."""
    torch.manual_seed(0)
    B, T = batch.num_molecules, batch.max_atoms + 1
    qkv = torch.randn(len(batch.token_index), 3 * D, dtype=dtype)
    bias = torch.randn(B, H, T, T, dtype=torch.float32 if dtype is torch.bfloat16 else dtype)
    padding = torch.arange(T) > batch.num_atoms[:, None]
    bias = bias.masked_fill(padding[:, None, None, :], float("-inf"))
    return qkv.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)],
)
def test_rows_give_what_padded_attention_gives_and_the_same_gradients(
    dtype: torch.dtype, tolerance: float
) -> None:
    batch = zoo.batch(MOLECULES)
    upstream = torch.randn(len(batch.token_index), D, dtype=dtype)
    found = []
    for by_rows in (True, False):
        qkv, bias = inputs(batch, dtype)
        output = (
            attend_by_rows(qkv, bias, head_rows(batch, H))
            if by_rows
            else attend_padded(qkv, bias, batch)
        )
        output.backward(upstream)
        found.append((output.detach(), qkv.grad, bias.grad))
    for ours, expected in zip(*found, strict=True):
        assert ours is not None
        assert expected is not None
        torch.testing.assert_close(ours.double(), expected.double(), rtol=tolerance, atol=tolerance)


def test_a_molecule_that_is_not_finite_stays_alone() -> None:
    batch = zoo.batch([zoo.chain(2), zoo.chain(2), zoo.ring(6)])
    qkv, bias = inputs(batch, torch.float32)
    with torch.no_grad():
        qkv[0] = float("nan")
        output = attend_by_rows(qkv, bias, head_rows(batch, H))
    broken = {int(i) for i in batch.token_molecule[output.isnan().any(1)]}
    assert broken == {0}


def test_the_gradient_under_dropout_is_that_of_the_masked_function() -> None:
    batch = zoo.batch([zoo.chain(3), zoo.single_atom()])
    rows = head_rows(batch, H)
    qkv, bias = inputs(batch, torch.float64)
    hidden = torch.isinf(bias.detach())

    def attend(qkv: Tensor, finite: Tensor) -> Tensor:
        torch.manual_seed(5)  # the same mask in each call
        return attend_by_rows(qkv, finite.masked_fill(hidden, float("-inf")), rows, 0.4)

    finite = bias.detach().masked_fill(hidden, 0.0).requires_grad_()
    torch.autograd.gradcheck(attend, (qkv, finite))
    assert not torch.equal(attend(qkv, finite), attend_by_rows(qkv, bias, rows))


@pytest.mark.parametrize("by_rows", [True, False])
def test_weights_of_attention_are_dropped_as_often_as_asked(by_rows: bool) -> None:
    batch = zoo.batch([zoo.chain(20, seed=k) for k in range(60)])
    S, T = len(batch.token_index), batch.max_atoms + 1
    # Equal scores and values of 1: an output is the share of kept weights, times 1 / (1 - 0.25).
    qkv = torch.cat([torch.zeros(S, 2 * D), torch.ones(S, D)], 1)
    bias = torch.zeros(batch.num_molecules, H, T, T)
    torch.manual_seed(0)
    output = (
        attend_by_rows(qkv, bias, head_rows(batch, H), 0.25)
        if by_rows
        else attend_padded(qkv, bias, batch, 0.25)
    )
    assert output.mean().item() == pytest.approx(1.0, abs=0.02)
    left = output[:, :: D // H] * T * 0.75
    torch.testing.assert_close(left, left.round(), rtol=0, atol=1e-2)
    assert left.mean().item() / T == pytest.approx(0.75, abs=0.015)
