"""Pretraining losses as sums and counts, so that means can be taken over any set of micro-batches and ranks.

Shape legend: B molecules, N atoms (padded), L = 5 hops.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from moleblend_ray.errors import ConfigError
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.blending import AtomFeature, Blend, Relation
from moleblend_ray.model.config import (
    LOSS_NAMES,
    NUM_PAPER_EDGE_CLASSES,
    PAPER_EDGE_VOCAB,
    LossConfig,
)
from moleblend_ray.model.environments import environment_counts
from moleblend_ray.model.heads import PairForm
from moleblend_ray.model.moleblend import MoleBlendOutput
from moleblend_ray.model.precision import at_least_float32
from moleblend_ray.vocabulary import BOND_VOCAB_SIZES, UNREACHABLE

__all__ = [
    "IGNORE",
    "LOSS_NAMES",
    "LossConfig",
    "count_other_bonds",
    "edge_targets",
    "has_direction",
    "has_path",
    "loss_counts",
    "loss_means",
    "noised_atoms",
    "pair_displacement",
    "pretraining_loss_sums",
    "spd_targets",
    "total_loss",
    "weighted_cross_entropy",
]

IGNORE: Final = -100
"""Class of entries without a target, as in torch.nn.functional.cross_entropy."""


def spd_targets(batch: MoleculeBatch, num_classes: int) -> Tensor:
    """(B, N, N) int64: bonds - 1, at most num_classes - 1; IGNORE for self, unreachable and padding."""
    target = (batch.spd.long() - 1).clamp(max=num_classes - 1)
    return target.masked_fill(~has_path(batch), IGNORE)


def has_path(batch: MoleculeBatch) -> Tensor:
    """(B, N, N) bool: pairs of two atoms that are joined by bonds."""
    return (batch.spd > 0) & (batch.spd != UNREACHABLE) & batch.pair_mask


def edge_targets(batch: MoleculeBatch, config: LossConfig) -> Tensor:
    """(B, N, N, L) int64: 6 type + 2 stereo + conjugated, 24 for other bonds; IGNORE where there is no hop."""
    table = _edge_classes(batch.path_codes.device)
    if config.ignore_other_bonds:
        table = table.masked_fill(table == NUM_PAPER_EDGE_CLASSES, IGNORE)
    return table[batch.path_codes.int()]


def pair_displacement(batch: MoleculeBatch) -> Tensor:
    """(B, N, N, 3) float32, angstrom: clean position b - position a at [a, b]."""
    return batch.positions[:, None, :, :] - batch.positions[:, :, None, :]


def has_direction(batch: MoleculeBatch) -> Tensor:
    """(B, N, N) bool: pairs of two known, different positions."""
    return batch.pair_position_mask & (pair_displacement(batch) != 0.0).any(-1)


def noised_atoms(batch: MoleculeBatch, blend: Blend, config: LossConfig) -> Tensor:
    """(B, N) bool: atoms with a position that show their 3D feature; the denoising loss is a mean over them."""
    noised = batch.position_mask & blend.shows_atom(AtomFeature.GEOMETRY)
    if config.denoise_lone_atoms:
        return noised
    return noised & (batch.position_mask.sum(1, keepdim=True) > 1)


def count_other_bonds(batch: MoleculeBatch) -> Tensor:
    """() int64: hops outside the paper's 24 classes, which ``ignore_other_bonds`` leaves out."""
    table = _edge_classes(batch.path_codes.device)
    return (table[batch.path_codes.int()] == NUM_PAPER_EDGE_CLASSES).sum()


def loss_counts(batch: MoleculeBatch, blend: Blend, config: LossConfig) -> Tensor:
    """(7,) float64: divisor of each sum of ``pretraining_loss_sums``; needs no forward pass."""
    spd = _pair_weight(has_path(batch), blend, config, Relation.SPD)
    edge = _pair_weight(batch.pair_mask, blend, config, Relation.EDGE)[..., None] * (
        edge_targets(batch, config) != IGNORE
    )
    molecules = _pair_weight(has_direction(batch), blend, config, Relation.GEOMETRY).sum((1, 2)) > 0
    atoms = noised_atoms(batch, blend, config)
    described = ~batch.descriptors.isnan()
    counts = (spd, edge, molecules, molecules, atoms, batch.num_atoms > 0, described)
    return torch.stack([count.sum(dtype=torch.float64) for count in counts])


def pretraining_loss_sums(
    output: MoleBlendOutput, batch: MoleculeBatch, blend: Blend, config: LossConfig
) -> dict[str, Tensor]:
    """The numerator of each loss of LOSS_NAMES, () float32; 0 for heads that the model does not have."""
    nothing = output.noise.new_zeros((), dtype=torch.float32)
    with torch.autocast(output.noise.device.type, enabled=False):
        return {
            "spd": _spd_sum(output, batch, blend, config),
            "edge": _edge_sum(output, batch, blend, config),
            "direction": nothing
            if output.direction is None
            else _direction_sum(output.direction, batch, blend, config),
            "distance": nothing
            if output.distance is None
            else _distance_sum(output.distance, batch, blend, config),
            "denoise": _denoise_sum(output.noise, batch, blend, config),
            "environment": nothing
            if output.environments is None
            else _environment_sum(output.environments, batch),
            "descriptor": nothing
            if output.descriptors is None
            else _descriptor_sum(output.descriptors, batch),
        }


def total_loss(sums: Mapping[str, Tensor], global_counts: Tensor, config: LossConfig) -> Tensor:
    """() float32: this micro-batch's part of the loss of the step, the sum of ``weight * sum / count`` over the losses.

    ``global_counts`` (7,) are those of the whole step, over all micro-batches and ranks; a loss whose count is 0
    contributes 0.
    """
    means = loss_means(sums, global_counts)
    return torch.stack([config.weight(name) * means[name] for name in LOSS_NAMES]).sum()


def loss_means(sums: Mapping[str, Tensor], counts: Tensor) -> dict[str, Tensor]:
    """Each sum divided by its count; 0 where the count is 0."""
    means = {}
    for name, count in zip(LOSS_NAMES, counts, strict=True):
        mean = sums[name].double() / torch.where(count > 0, count, 1.0)
        means[name] = torch.where(count > 0, mean, 0.0).to(sums[name].dtype)
    return means


@lru_cache
def _edge_classes(device: torch.device) -> Tensor:
    """(61,) int64: class of each path code. Cached for each device: a copy to the device would make the host wait."""
    types, stereos, conjugated = PAPER_EDGE_VOCAB
    classes = [IGNORE]
    for kind, stereo, flag in itertools.product(*(range(size) for size in BOND_VOCAB_SIZES)):
        inside = kind < types and stereo < stereos
        index = (kind * stereos + stereo) * conjugated + flag
        classes.append(index if inside else NUM_PAPER_EDGE_CLASSES)
    return torch.tensor(classes, device=device)


def _pair_weight(mask: Tensor, blend: Blend, config: LossConfig, relation: Relation) -> Tensor:
    """Weight of each pair of ``mask`` (B, N, N) in the loss of ``relation``, float32; 0 outside the mask."""
    weight = mask.float()
    if config.visible_pair_weight == 1.0:
        return weight
    return torch.where(blend.shows_pair(relation), weight * config.visible_pair_weight, weight)


def _spd_sum(
    output: MoleBlendOutput, batch: MoleculeBatch, blend: Blend, config: LossConfig
) -> Tensor:
    classes = (
        output.spd.output_shape[-1] if isinstance(output.spd, PairForm) else output.spd.shape[-1]
    )
    target = spd_targets(batch, classes)
    weight = _pair_weight(batch.pair_mask, blend, config, Relation.SPD)
    return weighted_cross_entropy(output.spd, target, weight)


def _edge_sum(
    output: MoleBlendOutput, batch: MoleculeBatch, blend: Blend, config: LossConfig
) -> Tensor:
    target = edge_targets(batch, config)
    weight = _pair_weight(batch.pair_mask, blend, config, Relation.EDGE)
    return weighted_cross_entropy(output.edge, target, weight)


def weighted_cross_entropy(predicted: Tensor | PairForm, target: Tensor, weight: Tensor) -> Tensor:
    """Sum over pairs of their ``weight`` (B, N, N) times the cross entropies of ``target`` (B, N, N), or (B, N, N, hops) of
    the first hops that are ``predicted``."""
    if isinstance(predicted, PairForm):
        forms, columns, bias, batch, _ = predicted
        total: Tensor = _PairLoss.apply(forms, columns, bias, target, weight, batch)  # type: ignore[no-untyped-call]
        return total
    if target.dim() > weight.dim():
        predicted = predicted[..., : target.shape[-1], :]
        weight = weight[..., None].expand_as(target)
    loss = F.cross_entropy(
        at_least_float32(predicted).flatten(0, -2),
        target.flatten(),
        ignore_index=IGNORE,
        reduction="none",
    )
    return (loss * weight.flatten()).sum()


class _PairLoss(torch.autograd.Function):
    """The same by Triton kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        forms: Tensor,
        columns: Tensor,
        bias: Tensor,
        target: Tensor,
        weight: Tensor,
        batch: MoleculeBatch,
    ) -> Tensor:
        from moleblend_ray.model.pair_loss_kernels import pair_loss_forward

        ctx.groups = batch.size_groups
        given = forms, columns, bias, target.view(*weight.shape, -1), weight
        molecules = batch.graph_token, batch.num_atoms
        ctx.save_for_backward(*given, *molecules)
        return pair_loss_forward(*given, *molecules, ctx.groups)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        from moleblend_ray.model.pair_loss_kernels import pair_loss_backward

        forms, columns, bias, target, weight, first_token, num_atoms = ctx.saved_tensors
        gradients = pair_loss_backward(
            grad_output, forms, columns, bias, target, weight, first_token, num_atoms, ctx.groups
        )
        return *gradients, None, None, None


def _direction_sum(
    direction: Tensor, batch: MoleculeBatch, blend: Blend, config: LossConfig
) -> Tensor:
    weight = _pair_weight(has_direction(batch), blend, config, Relation.GEOMETRY)
    # Entries without a target are set to 0 first: otherwise the gradient of their cosine could overflow.
    predicted = at_least_float32(direction).masked_fill((weight == 0.0)[..., None], 0.0)
    return _mean_per_molecule(
        1.0 - F.cosine_similarity(predicted, pair_displacement(batch), dim=-1), weight
    )


def _distance_sum(
    distance: Tensor, batch: MoleculeBatch, blend: Blend, config: LossConfig
) -> Tensor:
    weight = _pair_weight(has_direction(batch), blend, config, Relation.GEOMETRY)
    return _mean_per_molecule(
        (at_least_float32(distance) - pair_displacement(batch).norm(dim=-1)).abs(), weight
    )


def _mean_per_molecule(loss: Tensor, weight: Tensor) -> Tensor:
    """Sum over molecules of the weighted mean of ``loss`` (B, N, N) over the pairs of each."""
    total = weight.sum((1, 2))
    return (
        (loss * weight).sum((1, 2)) / torch.where(total > 0, total, torch.ones_like(total))
    ).sum()


def _environment_sum(predicted: Tensor, batch: MoleculeBatch) -> Tensor:
    counts = environment_counts(batch, predicted.shape[-1])
    return (at_least_float32(predicted) - counts.log1p()).square().sum()


def _descriptor_sum(predicted: Tensor, batch: MoleculeBatch) -> Tensor:
    if not len(batch.descriptors):
        raise ConfigError(
            "the model predicts descriptors, and the molecules have none; prepare them with featurize.descriptors=true, or "
            "use a model with descriptor_head=false"
        )
    target = batch.descriptors.float()
    error = at_least_float32(predicted) - target.nan_to_num()
    return error.square().masked_fill(target.isnan(), 0.0).sum()


def _denoise_sum(
    predicted: Tensor, batch: MoleculeBatch, blend: Blend, config: LossConfig
) -> Tensor:
    kept = noised_atoms(batch, blend, config)
    predicted = at_least_float32(predicted).masked_fill(~kept[..., None], 0.0)
    loss = 1.0 - F.cosine_similarity(predicted, blend.noise, dim=-1)
    return loss.masked_fill(~kept, 0.0).sum()
