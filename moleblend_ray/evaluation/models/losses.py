"""The losses of fine-tuning: over labels of which some are missing, and some are known by a bound only.

Shape legend: M molecules, B molecules of a batch, T properties, K classes of one column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moleblend_ray.data.sources.classes import Exclusive, in_groups
from moleblend_ray.evaluation.molecules.censoring import LabelBounds
from moleblend_ray.evaluation.tasks import TaskKind

_REGRESSION_LOSSES: Final = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.smooth_l1_loss,
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Targets:
    """What a model should give for all molecules, on the scale of its outputs."""

    at_least: Tensor
    """(M, T) float32, the least value that is right: the label, a lower bound, -inf; NaN where nothing is known."""
    at_most: Tensor
    """(M, T) float32, the greatest one: the label, an upper bound, inf; NaN likewise."""
    exclusive: Exclusive = ()
    """Columns of which one is 1."""

    @classmethod
    def of(
        cls, labels: NDArray[np.float64], bounds: LabelBounds | None, exclusive: Exclusive = ()
    ) -> Targets:
        """From (M, T) labels on this scale, NaN where missing, and their bounds."""
        exact = torch.from_numpy(labels.astype(np.float32))
        if bounds is None:
            return cls(at_least=exact, at_most=exact, exclusive=exclusive)
        known = torch.from_numpy(bounds.known)
        least, most = (
            torch.from_numpy(np.nan_to_num(side.astype(np.float32), nan=none))
            for side, none in ((bounds.at_least, -np.inf), (bounds.at_most, np.inf))
        )
        return cls(
            at_least=torch.where(known, least, exact),
            at_most=torch.where(known, most, exact),
            exclusive=exclusive,
        )

    def num_known(self, rows: NDArray[np.int64]) -> int:
        """Number of labels of the molecules ``rows`` that a number or a bound tells something of; the class of a molecule in a
        column counts once."""
        known = ~torch.isnan(self.at_least[torch.from_numpy(rows)])
        others = _others(self.exclusive, known.shape[1])
        classes = sum(int(known[:, places].any(dim=1).sum()) for places in self.exclusive)
        return int(known[:, others].sum()) + classes

    def for_outputs(self, outputs: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """(B, T) targets of the molecules ``rows`` (B,), on the device of ``outputs`` (B, T); NaN where nothing is known.

        A target is the right value nearest to the output: the label, or for a bound the output itself or the bound. So any loss
        of the difference is that of the distance to what is right, and so is its gradient.
        """
        chosen = torch.from_numpy(rows)
        least, most = (side[chosen].to(outputs.device) for side in (self.at_least, self.at_most))
        # An output of NaN gets a target, so that its loss is NaN and not that of an unknown label.
        nearest = torch.fmin(torch.fmax(outputs.detach(), least), most)
        return torch.where(torch.isnan(least), least, nearest)


def masked_loss(
    kind: TaskKind,
    outputs: Tensor,
    targets: Tensor,
    *,
    positive_weight: Tensor | None = None,
    regression_loss: str = "mse",
    exclusive: Exclusive = (),
) -> Tensor:
    """Sum over the known labels of BCE (of logits), cross entropy of ``exclusive`` columns, or the regression loss; (B, T) both,
    NaN targets do not count.

    ``positive_weight`` (T,) is the weight of the positive labels of each column.
    """
    if exclusive:
        weights = torch.ones_like(outputs[0]) if positive_weight is None else positive_weight
        others = _others(exclusive, outputs.shape[1])
        total = masked_loss(
            kind, outputs[:, others], targets[:, others], positive_weight=weights[others]
        )
        for own in map(list, exclusive):
            total = total + _cross_entropy(outputs[:, own], targets[:, own], weights[own])
        return total
    known = ~torch.isnan(targets)
    # As NaN times zero is NaN, unknown labels are replaced before the loss, not masked after it.
    targets = torch.where(known, targets, 0.0)
    if kind is TaskKind.CLASSIFICATION:
        losses = F.binary_cross_entropy_with_logits(
            outputs, targets, reduction="none", pos_weight=positive_weight
        )
    else:
        losses = _REGRESSION_LOSSES[regression_loss](outputs, targets, reduction="none")
    return torch.where(known, losses, 0.0).sum()


def _cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Sum over molecules of -log of the probability, the softmax of (B, K) ``logits``, of the class whose label is 1, times the
    ``weight`` (K,) of this class.

    Of repeats that contradict each other some labels may be missing and the others 0: the class is then one of those missing.
    Where all are missing, or none can be 1, nothing is told.
    """
    is_class = labels == 1
    possible = torch.where(is_class.any(dim=1, keepdim=True), is_class, labels.isnan())
    possible = possible | ~possible.any(dim=1, keepdim=True)
    losses = logits.logsumexp(dim=1) - logits.masked_fill(~possible, -torch.inf).logsumexp(dim=1)
    return (losses * (possible * weight).sum(dim=1) / possible.sum(dim=1)).sum()


def positive_weights(labels: NDArray[np.float64], exclusive: Exclusive = ()) -> NDArray[np.float64]:
    """(T,) negatives per positive in (M, T) labels; 1 for a column with one class or without labels.

    Of ``exclusive`` columns those that give each class the same weight in all, and a molecule a mean weight of 1.
    """
    positives, negatives = (labels == 1).sum(axis=0), (labels == 0).sum(axis=0)
    weights = np.where((positives > 0) & (negatives > 0), negatives / np.maximum(positives, 1), 1.0)
    for places in exclusive:
        counts = positives[places]
        mean = counts.sum() / np.count_nonzero(counts) if counts.any() else 1.0
        weights[places] = np.where(counts > 0, mean / np.maximum(counts, 1), 1.0)
    return weights


def _others(exclusive: Exclusive, num_columns: int) -> list[int]:
    """The columns that are in no group."""
    grouped = in_groups(exclusive)
    return [place for place in range(num_columns) if place not in grouped]
