"""Triton kernels on pairs, Philox and gradients of look-ups against plain code; without GPU in Triton's interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import molecule_zoo as zoo
import pytest
import torch
from kernel_device import DEVICE, SMALL_MODEL, skip_if_not_interpreted
from torch import Tensor

from moleblend_ray.model import embeddings, losses, pair_bias
from moleblend_ray.model.blending import BlendConfig, draw_blend, philox
from moleblend_ray.model.config import LOSS_NAMES, LossConfig
from moleblend_ray.model.lookup import _SumOfRows
from moleblend_ray.model.losses import loss_counts, pretraining_loss_sums, total_loss
from moleblend_ray.model.moleblend import MoleBlendModel

pytest.importorskip("triton", reason="Triton comes with GPU builds of PyTorch, or by itself")


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    from moleblend_ray.model import loss_kernels

    skip_if_not_interpreted(loss_kernels._cross_entropy)

    def switch(chosen: bool) -> None:
        for module in (embeddings, losses, pair_bias):
            monkeypatch.setattr(module, "kernels_fit", lambda values: chosen)

    return switch


def gradients_of(loss: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("kernels", [128, 5])
def test_gaussians_of_known_pairs_their_sums_and_gradients(
    by_kernels: Callable[[bool], None], kernels: int
) -> None:
    torch.manual_seed(0)
    layer = embeddings.GaussianDistance(kernels).to(DEVICE)
    B, N = 3, 19
    distance = (torch.rand(B, N, N) * 6).to(DEVICE).requires_grad_()
    element = torch.randint(0, 100, (B, N)).to(DEVICE)
    known = (torch.rand(B, N, N) < 0.7).to(DEVICE)
    parts = torch.randn(B, N, N, kernels), torch.randn(B, N, kernels)
    found = []
    for chosen in (True, False):
        by_kernels(chosen)
        density, sums = layer(distance, element, known)
        assert (density[~known] == 0).all()
        loss = (density * parts[0].to(DEVICE)).sum() + (sums * parts[1].to(DEVICE)).sum()
        found.append([density, sums, *gradients_of(loss, [distance, *layer.parameters()])])
    assert len(found[0]) == 2 + 5
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("blend", "heads", "dtype"),
    [
        (None, 4, torch.float32),
        (BlendConfig(), 24, torch.float32),
        (BlendConfig(view_probabilities=(0.4, 0.2, 0.2, 0.2)), 4, torch.float32),
        # On a GPU other instructions multiply here than in float32.
        (BlendConfig(per_batch=True), 32, torch.bfloat16),
    ],
)
def test_the_bias_of_pairs_and_its_gradients(
    by_kernels: Callable[[bool], None],
    blend: BlendConfig | None,
    heads: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("moleblend_ray.model.pair_bias_kernels._COLUMNS", 16)
    config = dataclasses.replace(SMALL_MODEL, dim=4 * heads, num_heads=heads)
    topology = embeddings.TopologyBias(config).to(DEVICE)
    torch.nn.init.normal_(topology.no_hop)
    # More tokens than a tile has columns, other sizes, a single atom, and two fragments.
    molecules = [zoo.single_atom(), zoo.chain(17), zoo.ring(6, tail=2), zoo.salt()]
    batch = zoo.batch(molecules, device=DEVICE)
    shown = None if blend is None else draw_blend(batch, blend, 3)
    geometry = torch.randn(*batch.spd.shape, heads, device=DEVICE, dtype=dtype, requires_grad=True)
    real = torch.arange(batch.max_atoms + 1, device=DEVICE) <= batch.num_atoms[:, None]
    real = (real[:, None, :, None] & real[:, None, None, :]).expand(-1, heads, -1, -1)
    upstream = torch.randn(real.shape, device=DEVICE)
    found = []
    for chosen in (True, False):
        by_kernels(chosen)
        bias = pair_bias.attention_bias(batch, shown, topology, geometry)
        assert not bias.isnan().any()
        assert (bias.transpose(2, 3)[~real & real[:, :, :1]] == -torch.inf).all()
        loss = torch.where(real, bias * upstream, 0.0).sum()
        found.append([bias[real], *gradients_of(loss, [geometry, *topology.parameters()])])
    assert len(found[0]) == 6
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_cross_entropy_leaves_out_what_has_no_target_even_if_it_is_infinite(
    by_kernels: Callable[[bool], None],
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(70, 25, device=DEVICE) * 3
    target = torch.randint(0, 25, (70,), device=DEVICE)
    target[::3] = losses.IGNORE
    weight = torch.rand(70, device=DEVICE)
    found = []
    for chosen in (True, False):
        by_kernels(chosen)
        given = logits.clone().requires_grad_()
        loss = losses._weighted_cross_entropy(given, target, weight)
        found.append([loss, *gradients_of(2.0 * loss, [given])])
    assert len(found[0]) == 2
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    by_kernels(True)
    broken = logits.clone()
    broken[0] = float("inf")
    broken.requires_grad_()
    (gradient,) = gradients_of(losses._weighted_cross_entropy(broken, target, weight), [broken])
    assert torch.isfinite(gradient).all()


def test_losses_and_gradients_of_the_whole_model(by_kernels: Callable[[bool], None]) -> None:
    torch.manual_seed(0)
    model = MoleBlendModel(SMALL_MODEL).to(DEVICE)
    batch = zoo.batch([zoo.single_atom(), zoo.chain(4), zoo.ring(6, tail=2)], device=DEVICE)
    blend, weights = draw_blend(batch, BlendConfig(), 0), LossConfig()
    counts = loss_counts(batch, blend, weights)
    found = []
    for chosen in (True, False):
        by_kernels(chosen)
        sums = pretraining_loss_sums(model(batch, blend), batch, blend, weights)
        loss = total_loss(sums, counts, weights)
        found.append([*sums.values(), *gradients_of(loss, list(model.parameters()))])
    assert len(found[0]) == len(LOSS_NAMES) + len(list(model.parameters()))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 12345678901234567, (1 << 64) - 1])
def test_philox_gives_the_words_of_plain_code(seed: int) -> None:
    from moleblend_ray.model.philox_kernels import philox_words

    generator = torch.Generator().manual_seed(0)
    counter = tuple(
        torch.randint(0, 1 << 32, shape, generator=generator)
        for shape in ((7, 1), (1, 300), (1, 1), (7, 300))
    )
    found = philox_words(tuple(word.to(DEVICE) for word in counter), seed)
    for ours, expected in zip(found, philox(counter, seed), strict=True):
        assert torch.equal(ours.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_a_table_adds_up_all_its_readers(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moleblend_ray.model.lookup._CHUNK", 64)
    torch.manual_seed(0)
    rows = torch.stack([torch.randint(0, 9, (1000,)) + 9 * hop for hop in range(5)], 1)
    upstream = torch.randn(1000, 6, dtype=dtype)
    found = []
    for function in (
        _SumOfRows.apply,
        lambda r, t: torch.nn.functional.embedding_bag(r, t, mode="sum"),
    ):
        table = torch.arange(45 * 6, dtype=dtype).view(45, 6).requires_grad_()
        output = function(rows, table)
        output.backward(upstream)
        found.append((output.detach(), table.grad))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)
