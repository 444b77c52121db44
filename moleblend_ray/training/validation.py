"""Losses on the valid split: the same molecules and the same blends every time, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import torch

from moleblend_ray.data.batch import build_micro_batches
from moleblend_ray.data.block import block_from_table
from moleblend_ray.data.descriptors import DescriptorScaling, with_targets
from moleblend_ray.data.manifest import Manifest
from moleblend_ray.data.shard_reader import ShardReader
from moleblend_ray.data.shards import training_columns
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.blending import draw_blend
from moleblend_ray.model.losses import LOSS_NAMES, loss_counts
from moleblend_ray.training.distributed import evaluating
from moleblend_ray.training.learner import Learner, named_losses
from moleblend_ray.training.metrics import VALID_PREFIX, Record
from moleblend_ray.training.mixed_precision import autocast
from moleblend_ray.training.ranks import Ranks, sum_over_ranks

_STEP: Final = 2**32 - 1
"""Step that keys the blends of validation; no training step ever has this number."""


class _Share(NamedTuple):
    batch: MoleculeBatch
    counts: bool
    """False for a batch that is computed only because every rank must take part in the same collectives."""


def build_validation(
    data_uri: str,
    manifest: Manifest,
    learner: Learner,
    *,
    micro_batch_size: int,
) -> Callable[[], Record] | None:
    """A function that gives the validation losses (``valid_loss``, ``valid_loss_<head>``); None without valid molecules.

    The molecules are read once, here. They are cut into the same micro-batches at any world size.
    """
    total = min(learner.train.validation_molecules, manifest.num_molecules("valid"))
    if total == 0 or learner.train.validate_every == 0:
        return None
    reader = ShardReader(data_uri, manifest, "valid", columns=training_columns(manifest))
    shares = _shares(reader, total, micro_batch_size, learner.ranks, manifest.descriptor_scaling)

    def validate() -> Record:
        device = learner.ranks.device
        sums = torch.zeros(2, len(LOSS_NAMES), dtype=torch.float64, device=device)
        with evaluating(learner.objective):
            for share in shares:
                batch = share.batch.to(device)
                blend = draw_blend(batch, learner.blend, learner.seed)
                counts = loss_counts(batch, blend, learner.loss)
                with autocast(learner.train.precision, device):
                    _, losses = learner.objective(batch, blend, counts)
                if share.counts:
                    sums += torch.stack([losses, counts])
        total_sums, total_counts = sum_over_ranks(sums).cpu()
        losses = named_losses(learner, total_sums, total_counts)
        return {VALID_PREFIX + name: value for name, value in losses.items()}

    return validate


def _shares(
    reader: ShardReader,
    total: int,
    micro_batch_size: int,
    ranks: Ranks,
    scaling: DescriptorScaling | None,
) -> list[_Share]:
    """This rank's micro-batches. Every rank has the same number, the last ones perhaps only for company."""
    cuts = np.arange(0, total, micro_batch_size)
    rounds = -(-len(cuts) // ranks.world_size)
    shares = []
    for index in range(ranks.rank, rounds * ranks.world_size, ranks.world_size):
        counts = index < len(cuts)
        first = int(cuts[index]) if counts else 0
        positions = np.arange(first, min(first + micro_batch_size, total), dtype=np.int64)
        block = with_targets(block_from_table(reader.read(positions), positions), scaling)
        (micro,) = build_micro_batches(block, _STEP, 0, micro_batch_size)
        shares.append(_Share(MoleculeBatch.from_micro_batch(micro), counts))
    return shares
