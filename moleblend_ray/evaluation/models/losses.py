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

    @classmethod
    def of(cls, labels: NDArray[np.float64], bounds: LabelBounds | None) -> Targets:
        """From (M, T) labels on this scale, NaN where missing, and their bounds."""
        exact = torch.from_numpy(labels.astype(np.float32))
        if bounds is None:
            return cls(at_least=exact, at_most=exact)
        known = torch.from_numpy(bounds.known)
        least, most = (
            torch.from_numpy(np.nan_to_num(side.astype(np.float32), nan=none))
            for side, none in ((bounds.at_least, -np.inf), (bounds.at_most, np.inf))
        )
        return cls(
            at_least=torch.where(known, least, exact), at_most=torch.where(known, most, exact)
        )

    def num_known(self, rows: NDArray[np.int64]) -> int:
        """Number of labels of the molecules ``rows`` that a number or a bound tells something of."""
        return int((~torch.isnan(self.at_least[torch.from_numpy(rows)])).sum())

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
