"""Hyper-parameters of fine-tuning. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moleblend_ray.errors import check_all
from moleblend_ray.training.config import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSettings:
    """How one fine-tuning run trains. Every field of a number, and every choice, may be searched by a sweep."""

    learning_rate: float = 1e-4
    """Peak learning rate of Adam with decoupled weight decay."""
    head_learning_rate: float | None = None
    """Peak learning rate of the new property head; null: `learning_rate`."""
    layer_decay: float = 1.0
    """Factor from each block's learning rate to that of the one below it (layer-wise decay; the embeddings count as the lowest
    block); 1 trains all alike."""
    frozen_blocks: int | None = None
    """Keep the embeddings and this many of the lowest blocks as they were pretrained; 0: the embeddings alone; null: all train."""
    fresh_blocks: int = 0
    """Draw this many of the highest blocks anew: they are made for the relation heads of pretraining, and what a property needs
    lies lower (Zhang et al., "Revisiting Few-sample BERT Fine-tuning", ICLR 2021)."""
    head_warmup_epochs: int = 0
    """First epochs in which the property head alone is trained."""
    weight_decay: float = 1e-6
    """Decoupled weight decay; none on biases and normalisation."""
    batch_size: int = 32
    """Molecules per optimizer step."""
    epochs: int = 40
    """Passes over the training molecules, at most."""
    patience: int = 10
    """Epochs without a better validation score after which the run stops."""
    warmup_fraction: float = 0.06
    """Share of all steps in which the learning rate rises linearly; it then falls to 0 along a cosine."""
    relations: Literal["2d+3d", "2d", "3d"] = "2d+3d"
    """What the encoder sees of a molecule. 2d: no coordinates; 3d: distances, but no paths, bonds or degrees."""
    readout: Literal["token", "mean", "token+mean", "sum"] = "token"
    """What the property head reads: the graph token, the mean of the atoms, both; or each atom, whose outputs are added, for
    properties that grow with the molecule."""
    head_dropout: float = 0.1
    """Dropout in the property head."""
    attention_dropout: float | None = None
    """Dropout of attention weights; null: as in pretraining."""
    activation_dropout: float | None = None
    """Dropout inside the feed-forward parts of the encoder; null: as in pretraining."""
    drop_path: float | None = None
    """Probability that a molecule skips a residual branch of the last block; null: as in pretraining."""
    atom_reference: bool = False
    """Regression: subtract from the labels what a linear fit of element counts (hydrogens included) to the training labels
    explains, and learn the rest; for energies and other properties that grow with the molecule."""
    regression_loss: Literal["mse", "l1", "huber"] = "mse"
    """Loss of regression on standardised labels: squared error, absolute error, or squared below 1 and absolute above."""
    class_weights: Literal["none", "balanced"] = "none"
    """Classification. balanced: positives of each column weigh as much together as its negatives in the training part."""
    precision: Precision = "fp32"
    """Arithmetic of training: bf16 computes matrix products in bfloat16. Validation and test are always float32."""
    clip_norm: float = 5.0
    """Largest gradient norm."""
    micro_batch_size: int = 32
    """Molecules computed at once: memory and speed; the result only through which dropout is drawn."""

    def __post_init__(self) -> None:
        check_all(
            *(
                (getattr(self, name) > 0, f"{name}: expected > 0, found {getattr(self, name)}")
                for name in ("learning_rate", "clip_norm")
            ),
            *(
                (getattr(self, name) >= 1, f"{name}: expected >= 1, found {getattr(self, name)}")
                for name in ("batch_size", "epochs", "patience", "micro_batch_size")
            ),
            *(
                (getattr(self, name) >= 0, f"{name}: expected >= 0, found {getattr(self, name)}")
                for name in ("weight_decay", "fresh_blocks", "head_warmup_epochs")
            ),
            *(
                (
                    getattr(self, name) is None or 0 <= getattr(self, name) < 1,
                    f"{name}: expected at least 0 and below 1, found {getattr(self, name)}",
                )
                for name in (
                    "warmup_fraction",
                    "head_dropout",
                    "attention_dropout",
                    "activation_dropout",
                    "drop_path",
                )
            ),
            (
                self.head_learning_rate is None or self.head_learning_rate > 0,
                f"head_learning_rate: expected null or > 0, found {self.head_learning_rate}",
            ),
            (
                0 < self.layer_decay <= 1,
                f"layer_decay: expected above 0 and at most 1, found {self.layer_decay}",
            ),
            (
                self.frozen_blocks is None or self.frozen_blocks >= 0,
                f"frozen_blocks: expected null or >= 0, found {self.frozen_blocks}",
            ),
        )
