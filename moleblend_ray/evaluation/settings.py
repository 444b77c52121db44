"""Hyper-parameters of fine-tuning, and what predictions are asked for by default. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from moleblend_ray.checks import above, at_least, below_one, check_all
from moleblend_ray.evaluation.tasks import TaskKind
from moleblend_ray.settings import typed
from moleblend_ray.training.config import Precision

COVERAGE: Final = 0.9
"""Share of labels inside the intervals of predictions, unless another one is asked for."""

FEWEST_FOLDS: Final = 3
"""Folds of a cross-validation: one to test on, one to choose by, one to train on."""

MOST_FOLDS: Final = 1000
"""Each is a training, with a folder of its own."""


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSettings:
    """How one fine-tuning run trains. A sweep may search every number and every choice."""

    learning_rate: float = 1e-4
    """Peak learning rate of Adam with decoupled weight decay."""
    head_learning_rate: float | None = None
    """Peak learning rate of the new property head; null: `learning_rate`."""
    layer_decay: float = 1.0
    """Layer-wise decay: learning rate of each block, divided by that of the block above it; the embeddings count as the
    lowest block. 1: the same rate for all."""
    frozen_blocks: int | None = None
    """Do not train the embeddings and this many of the lowest blocks; 0: only the embeddings; null: train
    everything."""
    fresh_blocks: int = 0
    """Draw new weights for this many of the highest blocks. These serve the relation heads of pretraining, while
    properties need what lower blocks give (Zhang et al., "Revisiting Few-sample BERT Fine-tuning", ICLR 2021)."""
    head_warmup_epochs: int = 0
    """First epochs in which only the property head is trained."""
    weight_decay: float = 1e-6
    """Decoupled weight decay, except on biases and normalisation."""
    batch_size: int = 32
    """Molecules per optimizer step."""
    epochs: int = 40
    """Largest number of passes over the training molecules."""
    patience: int = 10
    """The run stops after this number of epochs without a better validation score."""
    warmup_fraction: float = 0.06
    """Share of all steps in which the learning rate rises linearly; it then falls to 0 along a cosine."""
    relations: Literal["2d+3d", "2d", "3d"] = "2d+3d"
    """What the encoder sees of a molecule. 2d: no coordinates; 3d: distances, but no paths, bonds or degrees;
    only for molecules with coordinates."""
    readout: Literal["token", "mean", "token+mean", "sum"] = "token"
    """What the property head reads. token: the graph token; mean: the mean of the atoms; token+mean: both; sum: each
    atom, with outputs added, for properties that grow with the molecule."""
    descriptors: bool = False
    """Predict the mean of the encoder and a linear model of RDKit's 2D descriptors, which are scaled by the training part."""
    head_dropout: float = 0.1
    """Dropout in the property head."""
    attention_dropout: float | None = None
    """Dropout of attention weights; null: as in pretraining."""
    activation_dropout: float | None = None
    """Dropout inside the feed-forward parts of the encoder; null: as in pretraining."""
    drop_path: float | None = None
    """Probability that a molecule skips a residual branch of the last block; null: as in pretraining."""
    atom_reference: bool = False
    """Regression: fit the training labels by the counts of elements (with hydrogens), and learn only the difference.
    For energies and other properties that grow with the molecule."""
    regression_loss: Literal["mse", "l1", "huber"] = "mse"
    """Loss of regression on standardised labels: squared error, absolute error, or squared below 1 and absolute
    above."""
    class_weights: Literal["none", "balanced"] = "none"
    """Classification. balanced: in each column all positives together have the weight of all negatives (training
    part), and predicted probabilities are those of as many positives as negatives."""
    precision: Precision = "fp32"
    """Arithmetic of training: bf16 computes matrix products in bfloat16. Validation and test are always float32."""
    clip_norm: float = 5.0
    """Largest gradient norm."""
    micro_batch_size: int = 32
    """Molecules computed at once. It changes memory and speed, and which random numbers dropout gets."""

    def steps_per_epoch(self, num_molecules: int) -> int:
        """Optimizer steps of an epoch on so many training molecules."""
        return -(-num_molecules // self.batch_size)

    def num_steps(self, num_molecules: int) -> int:
        """Most optimizer steps of a training on so many molecules; ``patience`` may end it earlier."""
        return self.epochs * self.steps_per_epoch(num_molecules)

    def require_fitting(self, kind: TaskKind, num_blocks: int) -> None:
        """Raise ConfigError for what means nothing for labels of this ``kind``, or for a model of so many blocks."""
        check_all(
            (
                kind is TaskKind.REGRESSION or not self.atom_reference,
                f"finetune.atom_reference: expected for regression only, found with {kind.value}",
            ),
            *(
                (
                    (value or 0) <= num_blocks,
                    f"finetune.{name}: expected at most {num_blocks}, the blocks of the model, found {value}",
                )
                for name, value in (
                    ("frozen_blocks", self.frozen_blocks),
                    ("fresh_blocks", self.fresh_blocks),
                )
            ),
        )

    def __post_init__(self) -> None:
        dropouts = ("head_dropout", "attention_dropout", "activation_dropout", "drop_path")
        check_all(
            *above(self, 0, "learning_rate", "head_learning_rate", "clip_norm"),
            *at_least(self, 1, "batch_size", "epochs", "patience", "micro_batch_size"),
            *at_least(
                self, 0, "weight_decay", "frozen_blocks", "fresh_blocks", "head_warmup_epochs"
            ),
            *below_one(self, "warmup_fraction", *dropouts),
            (
                0 < self.layer_decay <= 1,
                f"layer_decay: expected more than 0 and at most 1, found {self.layer_decay}",
            ),
        )
