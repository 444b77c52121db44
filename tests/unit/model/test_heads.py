from __future__ import annotations

import dataclasses
from typing import TypeVar

import molecule_zoo as zoo
import torch
from torch import nn
from torch.nn import functional as F

from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.denoising import DenoisingHead
from moleblend_ray.model.heads import PairHead, PropertyHead, map_together

CONFIG = ModelConfig(
    num_layers=1, dim=12, ffn_dim=12, num_heads=3, num_kernels=4, pair_dim=6, attention_dropout=0.0
)


Module = TypeVar("Module", bound=nn.Module)


def drawn(module: Module) -> Module:
    module = module.double()
    zoo.spread_weights(module)
    return module


def test_pair_head_equals_a_linear_map_of_the_outer_product_and_so_do_its_gradients() -> None:
    batch = zoo.batch([zoo.chain(3), zoo.ring(5)])
    head = drawn(PairHead(CONFIG, (7,)))
    atoms = torch.randn(8, 12, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(2, 5, 5, 7, dtype=torch.float64) * batch.pair_mask[..., None]

    bilinear = head(*map_together(atoms, [head.row, head.column]), batch)
    gradients = torch.autograd.grad((bilinear * probe).sum(), [atoms, *head.parameters()])

    padded = batch.pad_atoms(atoms)
    row = head.row_norm(F.gelu(head.row(padded)))
    column = head.column_norm(F.gelu(head.column(padded)))
    outer = (row[:, :, None, :, None] * column[:, None, :, None, :]).flatten(3)
    dense = F.linear(outer, head.weight.flatten(1), head.bias)
    expected = torch.autograd.grad((dense * probe).sum(), [atoms, *head.parameters()])

    mask = batch.pair_mask
    torch.testing.assert_close(bilinear[mask], dense[mask], rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_pair_head_passes_the_numerical_gradient_check() -> None:
    batch = zoo.batch([zoo.chain(2), zoo.chain(3)])
    head = drawn(PairHead(CONFIG, (2,)))
    atoms = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)

    def predictions(atoms: torch.Tensor) -> torch.Tensor:
        padded: torch.Tensor = head(head.row(atoms), head.column(atoms), batch)
        return padded[batch.pair_mask]

    assert torch.autograd.gradcheck(predictions, atoms)


def test_denoising_head_equals_the_attention_over_displaced_values() -> None:
    batch = zoo.batch([zoo.chain(3), zoo.ring(5)])
    head = drawn(DenoisingHead(CONFIG))
    atoms = torch.randn(8, 12, dtype=torch.float64, requires_grad=True)
    links_too = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    bias = links_too[:, :, 1:, 1:]
    bias.masked_fill_(~batch.atom_mask[:, None, None, :], float("-inf"))
    displacement = torch.randn(2, 5, 5, 3, dtype=torch.float64)
    ours = head(atoms, links_too, displacement, batch)[batch.atom_mask]

    def heads(linear: nn.Linear) -> torch.Tensor:
        mapped: torch.Tensor = linear(batch.pad_atoms(atoms))
        return mapped.view(2, 5, 3, 4).transpose(1, 2)

    score = heads(head.query) @ heads(head.key).transpose(2, 3) / 4**0.5 + bias
    moved = score.softmax(-1)[..., None] * displacement[:, None]
    values = torch.einsum("bhijx,bhjd->bixhd", moved, heads(head.value)).flatten(3)
    dense = (values * head.axes.weight).sum(-1) + head.axes.bias
    dense = dense[batch.atom_mask]
    torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-12)
    weights = [atoms, *head.parameters()]
    probe = torch.randn_like(ours)
    for got, expected in zip(
        torch.autograd.grad((ours * probe).sum(), weights),
        torch.autograd.grad((dense * probe).sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_under_bfloat16_the_denoising_head_adds_up_in_float32() -> None:
    batch = zoo.batch([zoo.chain(6)])
    head = DenoisingHead(CONFIG)
    with torch.no_grad():
        for linear in (head.query, head.key, head.value, head.axes):
            linear.weight.zero_()
            linear.bias.zero_()
        head.value.bias.fill_(1.0)
        # In each head the values project to 1 / 512; in bfloat16 the two weights would cancel.
        head.axes.weight[:, 0::4] = 1.0 + 2**-9
        head.axes.weight[:, 1::4] = -1.0
    bias, displacement = torch.randn(1, 3, 7, 7), torch.randn(1, 6, 6, 3)
    weight = bias[0, :, 1:, 1:].double().softmax(-1).sum(0)
    expected = (weight[..., None] * displacement[0].double()).sum(1) / 512
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(torch.randn(6, 12), bias, displacement, batch)[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-8)


def test_attention_of_the_denoising_head_is_dropped_in_training_alone() -> None:
    batch = zoo.batch([zoo.ring(6)])
    head = drawn(DenoisingHead(dataclasses.replace(CONFIG, attention_dropout=0.5)))
    atoms = torch.randn(6, 12, dtype=torch.float64)
    bias = torch.zeros(1, 3, 7, 7, dtype=torch.float64)
    displacement = torch.randn(1, 6, 6, 3, dtype=torch.float64)
    one, other = (head(atoms, bias, displacement, batch) for _ in range(2))
    assert not torch.equal(one, other)
    head.eval()
    one, other = (head(atoms, bias, displacement, batch) for _ in range(2))
    assert torch.equal(one, other)


def test_the_property_head_drops_its_inputs_and_its_hidden_values_in_training_alone() -> None:
    torch.manual_seed(0)
    head = PropertyHead(64, 1, dropout=0.25)
    features = torch.randn(500, 64, requires_grad=True)
    with torch.no_grad():
        for linear in (head.hidden, head.out):
            linear.weight.fill_(1 / 64)
            linear.bias.fill_(1.0)
    # An input that was dropped has no gradient.
    (gradient,) = torch.autograd.grad(head(features).sum(), features)
    assert abs((gradient == 0).float().mean().item() - 0.25) < 0.02
    # All hidden values are equal, so outputs show how many of them are left.
    with torch.no_grad():
        head.hidden.weight.zero_()
        left = (head(features) - 1.0) / F.gelu(torch.tensor(1.0)) * 0.75
        assert abs(left.mean().item() - 0.75) < 0.01
        assert left.std().item() > 0.03
        head.eval()
        assert head(features).std().item() < 1e-6
