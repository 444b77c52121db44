"""Without padding the formula gives what PyTorch's own counter counts."""

from __future__ import annotations

import dataclasses

import molecule_zoo as zoo
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moleblend_ray.model.blending import BlendConfig, draw_blend
from moleblend_ray.model.config import LossConfig, ModelConfig
from moleblend_ray.model.flops import TRAINING_FACTOR, pretraining_flops
from moleblend_ray.model.losses import loss_counts, pretraining_loss_sums, total_loss
from moleblend_ray.model.moleblend import MoleBlendModel
from moleblend_ray.vocabulary import NUM_DESCRIPTORS

CONFIG = ModelConfig(
    num_layers=2,
    dim=64,
    ffn_dim=96,
    num_heads=4,
    num_kernels=16,
    pair_dim=8,
    attention_dropout=0.0,
    activation_dropout=0.0,
    drop_path=0.0,
)
CONFIGS = {
    "paper": CONFIG,
    "distance": dataclasses.replace(CONFIG, direction_head=False, distance_head=True),
    "deep": dataclasses.replace(CONFIG, num_layers=5, dim=32, num_heads=2),
    "graph": dataclasses.replace(CONFIG, environment_bins=24, descriptor_head=True),
}


def counted(config: ModelConfig, num_atoms: int, *, train: bool) -> int:
    """What PyTorch counts for three molecules of ``num_atoms`` atoms."""
    torch.manual_seed(0)
    model = MoleBlendModel(config).train(train)
    batch = zoo.batch([zoo.ring(num_atoms, seed=seed) for seed in range(3)])
    batch = dataclasses.replace(batch, descriptors=torch.zeros(3, NUM_DESCRIPTORS).half())
    blend = draw_blend(batch, BlendConfig(), seed=0)
    loss = LossConfig(
        direction_weight=float(config.direction_head),
        distance_weight=float(config.distance_head),
        environment_weight=float(config.environment_head),
        descriptor_weight=float(config.descriptor_head),
    )
    counts = loss_counts(batch, blend, loss)
    # Always with gradients: without them attention uses a fused kernel that the counter does not know.
    with FlopCounterMode(display=False) as counter:
        sums = pretraining_loss_sums(model(batch, blend), batch, blend, loss)
        if train:
            total_loss(sums, counts, loss).backward()
    # The denoising head's maps to values and axes are multiplied once for the whole batch.
    product_of_maps = 2 * 3 * config.dim**2 * (TRAINING_FACTOR if train else 1)
    return int(counter.get_total_flops()) - product_of_maps


@pytest.mark.parametrize("num_atoms", [4, 11])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_forward_pass_is_the_formula(name: str, num_atoms: int) -> None:
    config = CONFIGS[name]
    expected = pretraining_flops(config).of(np.full(3, num_atoms)).sum()
    assert counted(config, num_atoms, train=False) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_training_costs_three_forward_passes(name: str) -> None:
    config = CONFIGS[name]
    expected = TRAINING_FACTOR * pretraining_flops(config).of(np.full(3, 11)).sum()
    assert counted(config, 11, train=True) == pytest.approx(expected, rel=0.02)


def test_padding_is_not_counted() -> None:
    """PyTorch's counter, in contrast, sees padded rectangles."""
    flops = pretraining_flops(CONFIG)
    assert flops.of(np.array([3, 30])).sum() == flops.of(np.array([3])) + flops.of(np.array([30]))
    assert flops.of(np.array([3, 30])).sum() < flops.of(np.array([30, 30])).sum()
