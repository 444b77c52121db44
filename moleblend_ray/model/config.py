"""Sizes and regularisation of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moleblend_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of the encoder and its heads. The defaults are the paper's model, preset ``base``."""

    num_layers: int = 12
    """Transformer blocks."""
    dim: int = 768
    """Width of a token (D)."""
    ffn_dim: int = 768
    """Width of the hidden layer of a block's feed-forward part."""
    num_heads: int = 32
    """Attention heads (H); must divide dim."""
    num_kernels: int = 128
    """Gaussian kernels that describe a distance (K)."""
    pair_dim: int = 32
    """Width of the row and the column vector whose products a pair head sees."""
    num_spd_classes: int = 11
    """Classes of the shortest-path head: 1, 2, ... bonds; the last holds all longer paths."""
    edge_other_class: bool = True
    """Give bonds outside the paper's 24 (type, stereo, conjugated) classes a class of their own.
    Off (the paper's 24 classes), the loss ignores and counts them: ``LossConfig.ignore_other_bonds``."""
    direction_head: bool = True
    """Predict the displacement direction of each atom pair, in the frame of the coordinates."""
    distance_head: bool = False
    """Predict the distance of each atom pair, which rotations leave alone."""
    missing_positions: Literal["mask", "origin"] = "mask"
    """``mask``: atoms without coordinates take no part in 3D relations. ``origin``: they take part as if
    at (0, 0, 0), as in the official code."""
    dropout: float = 0.0
    """Dropout probability of the embedded tokens and of the residual branches."""
    attention_dropout: float = 0.1
    """Dropout probability of attention weights, the denoising head's included."""
    activation_dropout: float = 0.1
    """Dropout probability inside the feed-forward parts."""
    drop_path: float = 0.1
    """Probability that a molecule skips a residual branch of the last block; grows linearly from 0 at the first."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, expected at least 1"
            for name in ("num_layers", "dim", "ffn_dim", "num_heads", "num_kernels", "pair_dim")
            if getattr(self, name) < 1
        ]
        problems += [
            f"{name} is {getattr(self, name)}, expected at least 0 and below 1"
            for name in ("dropout", "attention_dropout", "activation_dropout", "drop_path")
            if not 0.0 <= getattr(self, name) < 1.0
        ]
        if self.num_spd_classes < 2:
            problems.append(f"num_spd_classes is {self.num_spd_classes}, expected at least 2")
        if self.num_heads >= 1 and self.dim % self.num_heads:
            problems.append(
                f"num_heads is {self.num_heads}, which does not divide dim = {self.dim}"
            )
        if self.missing_positions not in ("mask", "origin"):
            problems.append(
                f"missing_positions is {self.missing_positions!r}, expected mask or origin"
            )
        if problems:
            raise ConfigError("Model configuration: " + "; ".join(problems) + ".")

    @property
    def num_edge_classes(self) -> int:
        """Classes of the edge head for each hop."""
        return NUM_PAPER_EDGE_CLASSES + int(self.edge_other_class)


PAPER_EDGE_VOCAB: tuple[int, int, int] = (4, 3, 2)
"""Bond types, stereo codes and conjugation codes that the paper's edge classes cover."""

NUM_PAPER_EDGE_CLASSES = 24
"""Product of PAPER_EDGE_VOCAB."""
