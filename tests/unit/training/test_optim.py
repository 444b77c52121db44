"""Schedule, decay groups and clipping."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from moleblend_ray.errors import ConfigError
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.moleblend import MoleBlendModel, PropertyModel
from moleblend_ray.training.config import OptimConfig
from moleblend_ray.training.optim import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    learning_rate,
    split_by_decay,
)

CONFIG = OptimConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=10)


def test_the_learning_rate_warms_up_linearly_then_follows_a_cosine() -> None:
    rates = [learning_rate(step, CONFIG, 110) for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert rates[109] == pytest.approx(0.1, abs=1e-3)
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))


def test_a_run_shorter_than_its_warm_up_reaches_the_peak_at_its_end() -> None:
    assert learning_rate(4, CONFIG, 5) == pytest.approx(1.0)


def test_the_last_step_of_any_run_has_a_finite_positive_rate() -> None:
    for num_steps in (1, 2, 10, 11, 1000):
        rate = learning_rate(num_steps - 1, CONFIG, num_steps)
        assert math.isfinite(rate)
        assert rate > 0


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.linear = nn.Linear(3, 2)
        self.bilinear = nn.Parameter(torch.ones(2, 3, 3))


def test_only_matrices_decay() -> None:
    model = Small()
    decayed, kept = split_by_decay(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in decayed} == {"linear.weight", "bilinear"}
    assert {names[id(p)] for p in kept} == {
        "table.weight",
        "norm.weight",
        "norm.bias",
        "linear.bias",
    }


def test_what_is_looked_up_by_a_code_does_not_decay() -> None:
    config = ModelConfig(num_layers=1, dim=16, ffn_dim=16, num_heads=2, num_kernels=4, pair_dim=2)
    model = PropertyModel(MoleBlendModel(config), 1)
    _, kept = split_by_decay(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].removeprefix("encoder.") for p in kept if p.ndim >= 2} == {
        "atoms.categories.weight",
        "atoms.degree.weight",
        "atoms.graph_token",
        "topology.spd.weight",
        "topology.bonds.weight",
        "geometry.gaussian.scale",
        "geometry.gaussian.shift",
    }


def test_moments_exist_before_the_first_update_and_change_nothing_about_it() -> None:
    torch.manual_seed(0)
    ours, theirs = Small(), Small()
    theirs.load_state_dict(ours.state_dict())
    prepared = build_optimizer(ours, OptimConfig(learning_rate=1e-2))
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    assert len(prepared.state) == len(list(ours.parameters()))
    for model, optimizer in ((ours, prepared), (theirs, plain)):
        for step in range(3):
            model.linear(torch.full((4, 3), float(step))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_a_long_gradient_is_scaled_to_the_clip_norm_and_a_short_one_is_left() -> None:
    model = Small()
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    norm = gradient_norm(parameters)
    assert float(norm) == pytest.approx(2.0 * math.sqrt(sum(p.numel() for p in parameters)))
    clip_gradients(parameters, norm, 1.0)
    assert float(gradient_norm(parameters)) == pytest.approx(1.0, rel=1e-4)
    before = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    clip_gradients(parameters, gradient_norm(parameters), 5.0)
    for parameter, grad in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0)


def test_the_norm_does_not_depend_on_how_gradients_are_cut_into_shards() -> None:
    generator = torch.Generator().manual_seed(4)

    def with_gradient(gradient: torch.Tensor) -> nn.Parameter:
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient.clone()
        return parameter

    for shape in ((1000, 7), (5000,)):
        for _ in range(20):
            gradient = torch.randn(shape, generator=generator)
            whole = gradient_norm([with_gradient(gradient)])
            for size in (100, shape[0] // 4, shape[0] // 2):
                shards = [with_gradient(part) for part in gradient.split(size)]
                assert torch.equal(gradient_norm(shards), whole)


def test_settings_out_of_range_are_named_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        OptimConfig(learning_rate=-1.0, betas=(0.9, 1.0), clip_norm=0.0)
    message = str(caught.value)
    assert all(name in message for name in ("learning_rate", "betas", "clip_norm"))


def updated(cuts: list[slice], rows: int, *, steps: int = 6) -> torch.Tensor:
    """A tensor of ``rows`` rows of 3, after updates of its pieces by an optimizer for them all."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(rows, 3, generator=generator)
    model = nn.ParameterList([whole[cut].clone() for cut in cuts])
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1))
    for _ in range(steps):
        gradient = torch.randn(rows, 3, generator=generator) * 10 ** (
            -4 * torch.rand(rows, 3, generator=generator)
        )
        for parameter, cut in zip(model, cuts, strict=True):
            parameter.grad = gradient[cut].clone()
        optimizer.step()
    return torch.cat([parameter.detach() for parameter in model])


@pytest.mark.parametrize("rows", [3, 7, 11, 43])
def test_an_update_does_not_depend_on_where_a_tensor_is_cut(rows: int) -> None:
    whole = updated([slice(0, rows)], rows)
    for cut in range(1, rows):
        pieces = updated([slice(0, cut), slice(cut, rows)], rows)
        torch.testing.assert_close(pieces, whole, rtol=0, atol=0)


def test_an_update_does_not_depend_on_how_many_pieces_a_tensor_is_cut_into() -> None:
    # The kernel rounds about one update of 10,000 otherwise at the end of a tensor; these are 150,000.
    rows = 1600
    whole = updated([slice(0, rows)], rows, steps=30)
    pieces = updated([slice(row, row + 1) for row in range(rows)], rows, steps=30)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=0)


def test_updates_are_those_of_adamw() -> None:
    torch.manual_seed(2)
    ours, theirs = (nn.Sequential(nn.Linear(16, 5), nn.LayerNorm(5)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    config = OptimConfig(learning_rate=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-2)
    optimizer = build_optimizer(ours, config)
    decayed, kept = split_by_decay(theirs)
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.8, 0.95),
        eps=1e-2,
        foreach=False,
    )
    for step in range(5):
        for index, (parameter, other) in enumerate(
            zip(ours.parameters(), theirs.parameters(), strict=True)
        ):
            # One that has no gradient in some steps keeps its moments and its own count.
            has_gradient = (step + index) % 4 > 0
            parameter.grad = torch.randn_like(parameter) if has_gradient else None
            other.grad = parameter.grad.clone() if parameter.grad is not None else None
        optimizer.step()
        reference.step()
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-7)
        assert optimizer.state[parameter]["step"] == reference.state[other]["step"]
