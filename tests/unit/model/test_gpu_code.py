"""A whole training step by the code for GPUs against the plain code; without GPU in Triton's interpreter."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Literal

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

from moleblend_ray.model import device
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.blending import BlendConfig, draw_blend
from moleblend_ray.model.config import LossConfig, ModelConfig
from moleblend_ray.model.encoder import Encoder
from moleblend_ray.model.fused import plain_code
from moleblend_ray.model.losses import loss_counts, pretraining_loss_sums, total_loss
from moleblend_ray.model.moleblend import MoleBlendModel
from moleblend_ray.vocabulary import NUM_DESCRIPTORS

pytest.importorskip("triton", reason="Triton comes with GPU builds of PyTorch, or by itself")

MOLECULES = [
    zoo.single_atom(),
    zoo.chain(2),
    zoo.ring(6, tail=2).without_positions([1, 3]),
    zoo.ring(5, tail=14),
    zoo.chain(4).without_positions(),
]
EVERY_HEAD = dataclasses.replace(
    SMALL_MODEL, distance_head=True, environment_bins=16, descriptor_head=True
)
VIEWS = BlendConfig(view_probabilities=(0.4, 0.2, 0.2, 0.2))


@pytest.fixture(autouse=True)
def interpreted() -> None:
    from moleblend_ray.model import denoising_kernels

    skip_if_not_interpreted(denoising_kernels._forward)


@pytest.fixture(autouse=True)
def same_stochastic_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both codes get the same path scales; they would draw other ones."""

    def path_scales(encoder: Encoder, batch: MoleculeBatch) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = len(encoder.layers), 2, batch.num_molecules
        kept = torch.rand(shape, generator=generator) >= 0.3
        return list((kept / 0.7).to(DEVICE))

    monkeypatch.setattr(Encoder, "_path_scales", path_scales)


def step(
    model: MoleBlendModel,
    molecules: list[zoo.ZooMolecule],
    blend: BlendConfig | None,
    dtype: torch.dtype,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, or without a blend the sum of weighted predictions, and the gradients of all parameters that have one."""
    batch = zoo.batch(molecules, device=DEVICE)
    targets = torch.linspace(-5, 5, len(molecules) * NUM_DESCRIPTORS, device=DEVICE).half()
    batch = dataclasses.replace(batch, descriptors=targets.view(len(molecules), -1))
    torch.manual_seed(3)
    model.zero_grad()
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        if blend is None:
            tokens = model(batch).tokens
            weight = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
            loss = (tokens.float() * weight.to(DEVICE)).sum()
        else:
            drawn = draw_blend(batch, blend, seed=5)
            settings = LossConfig(
                distance_weight=0.5, environment_weight=0.1, descriptor_weight=1.0
            )
            sums = pretraining_loss_sums(model(batch, drawn), batch, drawn, settings)
            loss = total_loss(sums, loss_counts(batch, drawn, settings), settings)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def both_codes(
    monkeypatch: pytest.MonkeyPatch,
    config: ModelConfig,
    blend: BlendConfig | None,
    dtype: torch.dtype,
    *,
    recompute: bool = False,
    more: Sequence[zoo.ZooMolecule] = (),
) -> tuple[tuple[Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]:
    """The same step by the code for GPUs, and by the plain code."""
    molecules = [*MOLECULES, *more]
    expected = by_plain_code(config, molecules, blend, dtype)
    model = new_model(config)
    model.encoder.recompute_blocks(enabled=recompute)
    with monkeypatch.context() as patch:
        patch.setattr(device, "GPU_TYPES", frozenset({"cpu", "cuda"}))
        return step(model, molecules, blend, dtype), expected


def by_plain_code(
    config: ModelConfig,
    molecules: list[zoo.ZooMolecule],
    blend: BlendConfig | None,
    dtype: torch.dtype,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The step of a new model without kernels."""
    with plain_code() if DEVICE.type == "cuda" else contextlib.nullcontext():
        return step(new_model(config), molecules, blend, dtype)


def new_model(config: ModelConfig) -> MoleBlendModel:
    """The same parameters each time."""
    torch.manual_seed(0)
    model = MoleBlendModel(config).to(DEVICE)
    zoo.spread_weights(model)
    return model


@pytest.mark.parametrize(
    ("blend", "missing_positions", "recompute"),
    [
        pytest.param(None, "mask", False, id="all relations"),
        pytest.param(BlendConfig(), "origin", False, id="blended pairs"),
        pytest.param(VIEWS, "mask", True, id="views, blocks recomputed"),
    ],
)
def test_the_loss_and_all_gradients_are_those_of_the_plain_code(
    monkeypatch: pytest.MonkeyPatch,
    blend: BlendConfig | None,
    missing_positions: Literal["mask", "origin"],
    recompute: bool,
) -> None:
    config = dataclasses.replace(EVERY_HEAD, missing_positions=missing_positions)
    ours, plain = both_codes(monkeypatch, config, blend, torch.float32, recompute=recompute)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-5, atol=1e-5)
    assert ours[1].keys() == plain[1].keys()
    for name, expected in plain[1].items():
        difference = (ours[1][name] - expected).norm()
        assert difference <= 1e-4 * expected.norm() + 1e-6, name


@pytest.mark.parametrize("blend", [None, VIEWS], ids=["shown", "blended"])
def test_in_bfloat16_gradients_are_as_exact_as_those_of_the_plain_code(
    monkeypatch: pytest.MonkeyPatch, blend: BlendConfig | None
) -> None:
    use_bfloat16_as_a_gpu_does(monkeypatch)
    more = [zoo.ring(6, tail=k, seed=k) for k in range(1, 6)]
    # Without the absolute errors of distances: their gradient is a sign, which rounding turns.
    config = dataclasses.replace(EVERY_HEAD, distance_head=False)
    ours, plain = both_codes(monkeypatch, config, blend, torch.bfloat16, more=more)
    exact = by_plain_code(config, [*MOLECULES, *more], blend, torch.float32)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-2, atol=1e-2)
    errors = []
    for name, expected in exact[1].items():
        # Both are rounded; the kernels must not lose more than PyTorch's operations do.
        lost, allowed = (gradients[1][name].float() - expected for gradients in (ours, plain))
        assert lost.norm() <= 2.0 * allowed.norm() + 0.02 * expected.norm() + 1e-6, name
        errors.append((lost.norm() / expected.norm(), allowed.norm() / expected.norm()))
    typical, allowed = torch.tensor(errors).median(0).values
    assert typical <= 1.3 * allowed


def test_molecules_without_an_atom_are_seen_as_by_the_plain_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = zoo.batch([one for one in MOLECULES if one.num_atoms < 10], device=DEVICE)
    sizes = batch.num_atoms.tolist()
    places = [(row, atom) for row, n in enumerate(sizes) if n > 1 for atom in range(n)]
    left = batch.without_atom(*torch.tensor(places).unbind(1))
    model = new_model(SMALL_MODEL).eval()
    with torch.no_grad():
        with plain_code():
            expected = model.embed(left)
        monkeypatch.setattr(device, "GPU_TYPES", frozenset({"cpu", "cuda"}))
        found = model.embed(left)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
