"""Triton kernels on pairs, Philox and gradients of look-ups against plain code; without GPU in Triton's interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import molecule_zoo as zoo
import pytest
import torch
from kernel_device import DEVICE, SMALL_MODEL, skip_if_not_interpreted
from torch import Tensor

from moleblend_ray.model import embeddings, heads, losses, pair_bias
from moleblend_ray.model.blending import BlendConfig, draw_blend, philox
from moleblend_ray.model.config import LOSS_NAMES, LossConfig
from moleblend_ray.model.lookup import _SumOfRows
from moleblend_ray.model.losses import loss_counts, pretraining_loss_sums, total_loss
from moleblend_ray.model.moleblend import MoleBlendModel

pytest.importorskip("triton", reason="Triton comes with GPU builds of PyTorch, or by itself")


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    from moleblend_ray.model import pair_loss_kernels

    skip_if_not_interpreted(pair_loss_kernels._forward)

    def switch(chosen: bool) -> None:
        for module in (embeddings, heads, pair_bias):
            monkeypatch.setattr(module, "kernels_fit", lambda values: chosen)

    return switch


def gradients_of(loss: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    # Of unused parameters there is None.
    found: Sequence[Tensor | None] = torch.autograd.grad(loss, parameters, allow_unused=True)
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


@pytest.mark.parametrize(
    ("output_shape", "molecules"),
    [
        ((11,), [zoo.single_atom(), zoo.chain(17), zoo.ring(6, tail=2), zoo.salt()]),
        # Fewer hops than the head has, and the largest molecule in a tile of its own.
        ((5, 25), [zoo.chain(2), zoo.chain(4), zoo.ring(6, tail=30)]),
    ],
)
def test_losses_of_forms_are_those_of_their_logits(
    by_kernels: Callable[[bool], None],
    output_shape: tuple[int, ...],
    molecules: list[zoo.ZooMolecule],
) -> None:
    torch.manual_seed(0)
    batch = zoo.batch(molecules, device=DEVICE)
    head = heads.PairHead(SMALL_MODEL, output_shape).to(DEVICE)
    torch.nn.init.normal_(head.bias)
    row, column = torch.randn(2, len(batch.atom_index), SMALL_MODEL.pair_dim, device=DEVICE)
    B, N, _ = batch.pair_mask.shape
    hops = (3,) if len(output_shape) == 2 else ()
    target = torch.randint(0, output_shape[-1], (B, N, N, *hops), device=DEVICE)
    target[torch.rand(target.shape, device=DEVICE) < 0.3] = losses.IGNORE
    target[~batch.pair_mask] = losses.IGNORE
    weight = torch.rand(B, N, N, device=DEVICE) * batch.pair_mask
    found = []
    for chosen in (True, False):
        by_kernels(chosen)
        given = row.clone().requires_grad_(), column.clone().requires_grad_()
        predicted = heads.predict_classes(head, *given, batch)
        assert isinstance(predicted, heads.PairForm) is chosen
        loss = losses.weighted_cross_entropy(predicted, target, weight)
        logits = predicted.logits() if isinstance(predicted, heads.PairForm) else predicted
        gradients = gradients_of(2.0 * loss, [*given, *head.parameters()])
        found.append([logits[batch.pair_mask], loss, *gradients])
    assert len(found[0]) == 2 + 2 + len([*head.row_norm.parameters()]) * 2 + 2
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_the_pairs_of_a_molecule_that_is_not_finite_leave_others_alone(
    by_kernels: Callable[[bool], None],
) -> None:
    batch = zoo.batch([zoo.chain(3), zoo.ring(6, tail=12), zoo.chain(4)], device=DEVICE)
    torch.manual_seed(0)
    head = heads.PairHead(SMALL_MODEL, (11,)).to(DEVICE)
    row, column = torch.randn(2, len(batch.atom_index), SMALL_MODEL.pair_dim, device=DEVICE)
    by_kernels(True)
    found = []
    for broken in (False, True):
        given = row.clone(), column.clone()
        if broken:
            given[0][4] = float("inf")
            given[1][5] = float("nan")
        rows, columns = (values.requires_grad_() for values in given)
        form = head.form(rows, columns, batch)
        target = losses.spd_targets(batch, 11)
        loss = losses.weighted_cross_entropy(form, target, batch.pair_mask.float())
        found.append(torch.cat(gradients_of(loss, [rows, columns]), 1))
    assert found[1].isnan().any()
    others = [0, 1, 2, -1, -2, -3, -4]
    torch.testing.assert_close(found[1][others], found[0][others], rtol=0, atol=0)


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
