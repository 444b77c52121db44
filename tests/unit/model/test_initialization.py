"""What initial weights depend on, and that no module is left without."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from kernel_device import SMALL_MODEL
from torch import nn

from moleblend_ray.model.initialization import INIT_STD, fill_constants, init_weights
from moleblend_ray.model.moleblend import MoleBlendModel, PropertyModel

FULL = dataclasses.replace(
    SMALL_MODEL, distance_head=True, environment_bins=8, descriptor_head=True
)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def drawn(seed: int, **changes: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return weights(MoleBlendModel(dataclasses.replace(FULL, **changes)))


def test_the_seed_decides_all_weights() -> None:
    one, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    varied = [name for name, value in one.items() if value.min() < value.max()]
    assert len(varied) > 20
    assert not any(torch.equal(one[name], other[name]) for name in varied)


def test_a_head_or_a_block_more_leaves_the_other_weights_as_they_are() -> None:
    all_heads = drawn(1)
    for changes in (
        {"distance_head": False},
        {"environment_bins": 0},
        {"descriptor_head": False},
        {"num_layers": 1},
    ):
        fewer = drawn(1, **changes)
        assert len(fewer) < len(all_heads)
        assert all(torch.equal(value, all_heads[name]) for name, value in fewer.items())


def test_modules_of_one_shape_have_different_weights() -> None:
    found = drawn(1)
    name = "encoder.layers.{}.ffn_in.weight"
    assert not torch.equal(found[name.format(0)], found[name.format(1)])


def test_nothing_keeps_what_was_in_its_memory() -> None:
    torch.manual_seed(5)
    usual = MoleBlendModel(FULL)
    with torch.device("meta"):
        late = MoleBlendModel(FULL)
    late.to_empty(device="cpu")
    with torch.no_grad():
        for value in (*late.parameters(), *late.buffers()):
            value.fill_(77)
    torch.manual_seed(5)
    late.init_weights()
    expected = dict((*usual.named_parameters(), *usual.named_buffers()))
    for name, value in (*late.named_parameters(), *late.named_buffers()):
        assert torch.equal(value, expected[name]), name


def test_a_model_without_weights_is_complete_once_they_are_loaded() -> None:
    usual = MoleBlendModel(FULL)
    loaded = MoleBlendModel.without_weights(FULL)
    loaded.load_state_dict(usual.state_dict())
    for (name, value), (_, expected) in zip(
        loaded.named_buffers(), usual.named_buffers(), strict=True
    ):
        assert torch.equal(value, expected), name


def test_a_model_takes_one_number_of_the_generator_whatever_its_size() -> None:
    states = []
    for layers in (1, 3):
        torch.manual_seed(9)
        MoleBlendModel(dataclasses.replace(FULL, num_layers=layers))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    torch.manual_seed(9)
    torch.randint(2**62, ())
    assert torch.equal(torch.get_rng_state(), states[0])


def test_linear_and_embedding_weights_have_the_standard_deviation_of_the_official_code() -> None:
    torch.manual_seed(0)
    model = MoleBlendModel(dataclasses.replace(FULL, dim=96, ffn_dim=384, num_heads=8))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.numel() > 5000:
            assert module.weight.std().item() == pytest.approx(INIT_STD, rel=0.05)
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert not module.bias.any()


def test_part_of_a_model_can_be_drawn_again() -> None:
    model = PropertyModel(MoleBlendModel(FULL), 2)
    before = weights(model)
    block = model.encoder.layers[-1]
    init_weights(block)
    fill_constants(block)
    changed = {
        name for name, value in weights(model).items() if not torch.equal(value, before[name])
    }
    assert changed
    assert all(name.startswith(f"encoder.layers.{FULL.num_layers - 1}.") for name in changed)
