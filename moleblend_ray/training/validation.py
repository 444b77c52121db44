"""Losses on the valid split: the same molecules and the same blends every time, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moleblend_ray.data.batches.batch import build_micro_batches
from moleblend_ray.data.dataset.block import block_from_table
from moleblend_ray.data.dataset.descriptors import DescriptorScaling, with_targets
from moleblend_ray.data.dataset.manifest import Manifest
from moleblend_ray.data.dataset.shard_reader import ShardReader
from moleblend_ray.data.dataset.shards import training_columns
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


_PLACES: Final = 32
"""Places of the valid split that the molecules come from. Each costs the read of a row group or two."""


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
    rows = validation_rows(learner.train.validation_molecules, manifest.num_molecules("valid"))
    if len(rows) == 0 or learner.train.validate_every == 0:
        return None
    reader = ShardReader(data_uri, manifest, "valid", columns=training_columns(manifest))
    shares = _shares(reader, rows, micro_batch_size, learner.ranks, manifest.descriptor_scaling)

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


def validation_rows(wanted: int, available: int) -> NDArray[np.int64]:
    """(min(wanted, available),) rows of a valid split of ``available`` molecules, in ascending order.

    They are runs of neighbours from 32 places, evenly spaced from the first row to the last: a source may be sorted, by size
    or by origin, so that its first molecules are unlike the others.
    """
    count = min(wanted, available)
    row = np.arange(count, dtype=np.int64)
    place = row * _PLACES // max(count, 1)
    return row + place * (available - count) // (_PLACES - 1)


def _shares(
    reader: ShardReader,
    rows: NDArray[np.int64],
    micro_batch_size: int,
    ranks: Ranks,
    scaling: DescriptorScaling | None,
) -> list[_Share]:
    """This rank's micro-batches. Every rank has the same number, the last ones perhaps only for company."""
    cuts = np.arange(0, len(rows), micro_batch_size)
    rounds = -(-len(cuts) // ranks.world_size)
    shares = []
    for index in range(ranks.rank, rounds * ranks.world_size, ranks.world_size):
        counts = index < len(cuts)
        first = int(cuts[index]) if counts else 0
        positions = rows[first : first + micro_batch_size]
        block = with_targets(block_from_table(reader.read(positions), positions), scaling)
        (micro,) = build_micro_batches(block, _STEP, 0, micro_batch_size)
        shares.append(_Share(MoleculeBatch.from_micro_batch(micro), counts))
    return shares
