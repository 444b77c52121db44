"""The losses of fine-tuning: over labels of which some are missing, and some are known by a bound only.

Shape legend: M molecules, B molecules of a batch, T properties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moleblend_ray.evaluation.censoring import LabelBounds
from moleblend_ray.evaluation.tasks import TaskKind

_REGRESSION_LOSSES: Final = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.smooth_l1_loss,
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Targets:
    """What a model should give for all molecules, on the scale of its outputs."""

    values: Tensor
    """(M, T) float32; NaN where no number is known."""
    at_least: Tensor
    """(M, T) float32, lower bounds of what is not known as a number; -inf where there is none."""
    at_most: Tensor
    """(M, T) float32, upper bounds; inf where there is none."""
    known: Tensor
    """(M, T) bool, where a number or a bound is known."""

    @classmethod
    def of(cls, labels: NDArray[np.float64], bounds: LabelBounds | None) -> Targets:
        """From (M, T) labels on this scale, NaN where missing, and their bounds."""
        values = torch.from_numpy(labels.astype(np.float32))
        none = np.full(labels.shape, np.nan)
        bounds = bounds or LabelBounds(at_least=none, at_most=none)
        lowest, highest = bounds.at_least.astype(np.float32), bounds.at_most.astype(np.float32)
        return cls(
            values=values,
            at_least=torch.from_numpy(np.nan_to_num(lowest, nan=-np.inf)),
            at_most=torch.from_numpy(np.nan_to_num(highest, nan=np.inf)),
            known=~torch.isnan(values) | torch.from_numpy(bounds.known),
        )

    def num_known(self, rows: NDArray[np.int64]) -> int:
        """Number of labels of the molecules ``rows`` that a number or a bound tells something of."""
        return int(self.known[torch.from_numpy(rows)].sum())

    def for_outputs(self, outputs: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """(B, T) targets of the molecules ``rows`` (B,), on the device of ``outputs`` (B, T).

        Where only a bound is known, the target is the value nearest to the output that it allows. So any loss of the
        difference is that of the distance to what the bound allows, and so is its gradient.
        """
        chosen = torch.from_numpy(rows)
        values, lowest, highest, known = (
            part[chosen].to(outputs.device)
            for part in (self.values, self.at_least, self.at_most, self.known)
        )
        nearest = torch.minimum(torch.maximum(outputs.detach(), lowest), highest)
        return torch.where(torch.isnan(values) & known, nearest, values)


def masked_loss(
    kind: TaskKind,
    outputs: Tensor,
    targets: Tensor,
    *,
    positive_weight: Tensor | None = None,
    regression_loss: str = "mse",
) -> Tensor:
    """Sum over the known labels of BCE (of logits) or the regression loss; (B, T) both, NaN targets do not count.

    ``positive_weight`` (T,) is the weight of the positive labels of each column.
    """
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


def positive_weights(labels: NDArray[np.float64]) -> NDArray[np.float64]:
    """(T,) negatives per positive in (M, T) labels; 1 for a column with one class or without labels."""
    positives, negatives = (labels == 1).sum(axis=0), (labels == 0).sum(axis=0)
    return np.where((positives > 0) & (negatives > 0), negatives / np.maximum(positives, 1), 1.0)
