"""Settings of the model, of blending and of the losses. Does not import torch, so that configurations load fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from moleblend_ray.checks import at_least, below_one, check_all
from moleblend_ray.settings import typed

PAPER_EDGE_VOCAB: Final = (4, 3, 2)
"""Bond types, stereo codes and conjugation codes that the paper's edge classes cover."""

NUM_PAPER_EDGE_CLASSES: Final = 24
"""Product of PAPER_EDGE_VOCAB."""

LOSS_NAMES: Final = (
    "spd",
    "edge",
    "direction",
    "distance",
    "denoise",
    "environment",
    "descriptor",
)
"""The pretraining losses, in the order of ``losses.loss_counts``."""


@typed
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
    """Width of the row and column vectors whose products a pair head sees (P)."""
    num_spd_classes: int = 11
    """Classes of the shortest-path head: 1, 2, ... bonds; the last holds all longer paths."""
    edge_other_class: bool = True
    """Give bonds outside the paper's 24 (type, stereo, conjugated) classes a class of their own. If off,
    ``loss.ignore_other_bonds`` must be on."""
    direction_head: bool = True
    """Predict the displacement direction of each atom pair, in the frame of the coordinates."""
    distance_head: bool = False
    """Predict the distance of each atom pair, which is invariant to rotations."""
    environment_bins: int = 0
    """Number of bins into which circular atom environments (radius 0 to 2) are folded; their counts are predicted from
    the graph token. 0: no such head."""
    descriptor_head: bool = False
    """Predict RDKit's descriptors of the molecule from the graph token, for data sets prepared with
    ``featurize.descriptors``. Without this and ``environment_bins`` the graph token, which no other loss reads, only
    passes information among the atoms."""
    missing_positions: Literal["mask", "origin"] = "mask"
    """``mask``: atoms without coordinates take no part in 3D relations. ``origin``: they take part as if at (0, 0, 0),
    as in the official code."""
    dropout: float = 0.0
    """Dropout probability of the embedded tokens and of the residual branches."""
    attention_dropout: float = 0.1
    """Dropout probability of attention weights, the denoising head's included."""
    activation_dropout: float = 0.1
    """Dropout probability inside the feed-forward parts."""
    drop_path: float = 0.1
    """Stochastic depth: probability that a molecule skips a residual branch of the last block. It grows linearly from 0
    in the first block."""

    def __post_init__(self) -> None:
        sizes = ("num_layers", "dim", "ffn_dim", "num_heads", "num_kernels", "pair_dim")
        rates = ("dropout", "attention_dropout", "activation_dropout", "drop_path")
        check_all(
            *at_least(self, 1, *sizes),
            *at_least(self, 2, "num_spd_classes"),
            *at_least(self, 0, "environment_bins"),
            *below_one(self, *rates),
            (
                self.num_heads < 1 or self.dim % self.num_heads == 0,
                f"num_heads: expected a divisor of dim = {self.dim}, found {self.num_heads}",
            ),
            (
                self.missing_positions in ("mask", "origin"),
                f"missing_positions: expected mask or origin, found {self.missing_positions!r}",
            ),
        )

    @property
    def environment_head(self) -> bool:
        """Whether the graph token predicts atom environments."""
        return self.environment_bins > 0

    @property
    def num_edge_classes(self) -> int:
        """Classes of the edge head for each hop."""
        return NUM_PAPER_EDGE_CLASSES + int(self.edge_other_class)


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class BlendConfig:
    """Probabilities of the relations and size of the coordinate noise."""

    pair_probabilities: tuple[float, float, float] = (0.2, 0.2, 0.6)
    """Probability that an ordered atom pair shows its shortest-path distance, bond path, 3D distance.
    For pairs without coordinates the last one is divided among the first two by their ratio."""
    atom_probabilities: tuple[float, float] = (0.4, 0.6)
    """Probability that an atom shows its degree, its 3D feature. Without coordinates it always shows its degree."""
    view_probabilities: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0)
    """Probability that a molecule is blended; that it shows only its 2D relations; only its 3D relations; all of them.
    Fine-tuning shows molecules in one of the last three ways, which blended molecules do not prepare for. A molecule
    that lacks the coordinates of an atom shows 2D instead of 3D."""
    noise_std_angstrom: float = 0.2
    """Standard deviation of the Gaussian noise added to each coordinate."""
    per_batch: bool = False
    """Draw one map of pair choices for each step and use it for all molecules, as the official code does. Pairs without
    coordinates then show nothing where the map says 3D."""

    def __post_init__(self) -> None:
        check_all(
            _distribution("pair_probabilities", self.pair_probabilities, 3),
            _distribution("atom_probabilities", self.atom_probabilities, 2),
            _distribution("view_probabilities", self.view_probabilities, 4),
            *at_least(self, 0, "noise_std_angstrom"),
        )


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Weights of the losses. A loss of weight 0 is not part of the sum, but still reported."""

    spd_weight: float = 0.1
    """Shortest-path distance: cross-entropy, mean over atom pairs."""
    edge_weight: float = 0.1
    """Bonds along the path: cross-entropy, mean over hops."""
    direction_weight: float = 0.5
    """Pair direction: 1 - cosine, mean over the pairs of a molecule, then over molecules."""
    distance_weight: float = 0.0
    """Pair distance: absolute error in angstrom, mean as for the direction. Needs ``model.distance_head``."""
    denoise_weight: float = 6.0
    """Coordinate noise: 1 - cosine, mean over the atoms that show their 3D feature."""
    environment_weight: float = 0.0
    """Atom environments: squared error of log(1 + count), sum over bins, mean over molecules. Needs
    ``model.environment_bins``."""
    descriptor_weight: float = 0.0
    """RDKit's descriptors: squared error in standard deviations of the data set, mean over all known ones. Needs
    ``model.descriptor_head``."""
    visible_pair_weight: float = 1.0
    """Weight in each pair loss of the pairs whose relation the encoder was shown; the weight of the others is 1."""
    ignore_other_bonds: bool = False
    """Leave bonds outside the paper's 24 edge classes out of the edge loss."""
    denoise_lone_atoms: bool = False
    """Denoise also atoms that are the only ones of their molecule with coordinates, as the official code does. Their
    noise cannot be predicted: the prediction is a constant near 0, where the gradient of a cosine is huge."""

    def __post_init__(self) -> None:
        weights = (f"{loss}_weight" for loss in LOSS_NAMES)
        check_all(*at_least(self, 0, *weights, "visible_pair_weight"))

    def weight(self, name: str) -> float:
        """Weight of the loss ``name``, one of LOSS_NAMES."""
        value: float = getattr(self, f"{name}_weight")
        return value


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class ReadoutConfig:
    """From token states to properties: which relations the encoder sees, and what the head reads."""

    relations: Literal["2d+3d", "2d", "3d"] = "2d+3d"
    """Relations that every pair shows. ``2d``: coordinates are hidden. ``3d``: only distances, no shortest paths, bonds
    or degrees (an atom's own categories are always visible)."""
    readout: Literal["token", "mean", "token+mean", "sum"] = "token"
    """What the head reads: the graph token; the mean of the atoms; both, concatenated; or each atom, with the outputs
    added up, for properties that grow with the molecule."""
    dropout: float = 0.1
    """Dropout probability inside the head."""

    def __post_init__(self) -> None:
        check_all(
            (
                self.relations in ("2d+3d", "2d", "3d"),
                f"relations: expected 2d+3d, 2d or 3d, found {self.relations!r}",
            ),
            (
                self.readout in ("token", "mean", "token+mean", "sum"),
                f"readout: expected token, mean, token+mean or sum, found {self.readout!r}",
            ),
            *below_one(self, "dropout"),
        )


def check_objective(model: ModelConfig, loss: LossConfig) -> None:
    """Raise a ConfigError if the losses need heads or classes that the model does not have."""
    check_all(
        *(
            (
                loss.weight(name) <= 0.0 or getattr(model, f"{name}_head"),
                f"loss.{name}_weight: expected 0 while model.{name}_head is off, "
                f"found {loss.weight(name):g}",
            )
            for name in ("direction", "distance", "descriptor")
        ),
        (
            loss.environment_weight <= 0.0 or model.environment_head,
            f"loss.environment_weight: expected 0 while model.environment_bins is 0, found {loss.environment_weight:g}",
        ),
        (
            model.edge_other_class or loss.ignore_other_bonds,
            "loss.ignore_other_bonds: expected true while model.edge_other_class is off, found false "
            "(bonds outside the 24 classes have no class)",
        ),
    )


def _distribution(name: str, values: Sequence[float], length: int) -> tuple[bool, str]:
    total = math.fsum(values)
    return (
        len(values) == length and min(values) >= 0.0 and abs(total - 1.0) <= 1e-6,
        f"{name}: expected {length} numbers of at least 0 that sum to 1, "
        f"found {list(values)} with sum {total:g}",
    )
