"""Floating-point operations of a model by formula, for real atoms and pairs only, without padding.

Matrix products are counted, with two operations for each multiply-add, as by ``torch.utils.flop_counter``; embeddings,
normalisations, activations and softmaxes are not. A backward pass costs twice a forward pass: one product for the
gradient of each factor. Model FLOPs utilisation (MFU) is this number over time and the device's peak rate
(Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B).

Shape legend: n atoms of a molecule, t = n + 1 tokens, D width, H heads, K kernels, P pair width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.vocabulary import NUM_DESCRIPTORS, NUM_HOPS

if TYPE_CHECKING:
    from moleblend_ray.model.config import ModelConfig

TRAINING_FACTOR: Final = 3
"""Ratio of a forward and backward pass to a forward pass alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardFlops:
    """Operations of a forward pass: ``constant + linear * n + quadratic * n**2`` for a molecule of n atoms."""

    constant: float
    linear: float
    quadratic: float

    def of(self, num_atoms: NDArray[np.integer]) -> NDArray[np.float64]:
        """Operations for each molecule; ``num_atoms`` (B,) -> (B,)."""
        n = np.asarray(num_atoms, np.float64)
        return self.constant + self.linear * n + self.quadratic * n**2

    def __add__(self, other: ForwardFlops) -> ForwardFlops:
        return ForwardFlops(
            constant=self.constant + other.constant,
            linear=self.linear + other.linear,
            quadratic=self.quadratic + other.quadratic,
        )


def encoder_flops(config: ModelConfig) -> ForwardFlops:
    """Blocks on n atoms and the graph token, and the 3D bias of n**2 pairs."""
    D, H, K = config.dim, config.num_heads, config.num_kernels
    token = config.num_layers * (8 * D**2 + 4 * D * config.ffn_dim)
    square = config.num_layers * 4 * D  # queries times keys, attention times values
    return ForwardFlops(
        constant=token + square,
        linear=token + 2 * square + 2 * K * D,
        quadratic=square + 2 * K * (K + H),
    )


def pair_head_flops(config: ModelConfig, num_outputs: int) -> ForwardFlops:
    """One bilinear pair head: row and column vectors, columns times the weight, rows times the result."""
    D, P = config.dim, config.pair_dim
    return ForwardFlops(
        constant=0.0,
        linear=4 * D * P + 2 * P * P * num_outputs,
        quadratic=2 * P * num_outputs,
    )


def denoising_head_flops(config: ModelConfig) -> ForwardFlops:
    """Maps to queries, keys and three numbers for each head instead of a value vector, scores, and sums of these numbers.

    The product of the maps to values and axes, once for each batch, is not counted.
    """
    D, H = config.dim, config.num_heads
    return ForwardFlops(constant=0.0, linear=4 * D**2 + 2 * 3 * D * H, quadratic=2 * D + 2 * 3 * H)


def pretraining_flops(config: ModelConfig) -> ForwardFlops:
    """A forward pass of :class:`~moleblend_ray.model.moleblend.MoleBlendModel` with all its heads."""
    outputs = [config.num_spd_classes, NUM_HOPS * config.num_edge_classes]
    outputs += [3] if config.direction_head else []
    outputs += [1] if config.distance_head else []
    targets = config.environment_bins + NUM_DESCRIPTORS * config.descriptor_head
    total = ForwardFlops(constant=2 * config.dim * targets, linear=0.0, quadratic=0.0)
    total = total + encoder_flops(config) + denoising_head_flops(config)
    for num_outputs in outputs:
        total = total + pair_head_flops(config, num_outputs)
    return total
