"""The encoder: embeddings, blended attention bias, and a stack of post-norm Transformer blocks.

Shape legend: B molecules, N atoms (padded), T = N + 1 tokens (graph token first), S real tokens packed,
A real atoms packed, H heads, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moleblend_ray.model.attention import (
    LARGEST_SEED,
    Attend,
    SharedBias,
    attention_of_blocks,
    share_bias,
)
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.blending import Blend
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.device import on_gpu
from moleblend_ray.model.dropout import dropout
from moleblend_ray.model.embeddings import (
    AtomEmbedding,
    GeometryBias,
    GeometryFeatures,
    TopologyBias,
)
from moleblend_ray.model.fused import PathScale, add_and_norm, gelu_and_dropout, kernels_fit
from moleblend_ray.model.pair_bias import attention_bias
from moleblend_ray.model.token_embedding import embed_tokens


class Draws(NamedTuple):
    """The random draws of one block."""

    path_scales: Tensor | None
    """(2, B), factor of each residual branch of each molecule: 0 or 1 / (1 - rate); None: all are 1."""
    seeds: Tensor | None
    """(3,) int64, seed of each dropout on a GPU; None on a CPU, where PyTorch's generator decides."""

    def paths(self, molecule: Tensor) -> tuple[PathScale | None, PathScale | None]:
        """The scales of the branches of attention and feed-forward, for tokens of the given ``molecule`` (S,)."""
        if self.path_scales is None:
            return None, None
        attention, ffn = self.path_scales.unbind(0)
        return PathScale(attention, molecule), PathScale(ffn, molecule)


class Attention(nn.Module):
    """The linear maps of multi-head self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)


class Block(nn.Module):
    """Attention and feed-forward, each followed by dropout, stochastic depth, residual sum and LayerNorm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout
        self.recompute = False
        """Keep only the input for the backward pass, and recompute the rest there."""
        self.compiled: Callable[..., Tensor] | None = None
        """Compiled :meth:`after_attention`, used if set; see :meth:`Encoder.compile_blocks`."""

    def forward(self, tokens: Tensor, attend: Attend, molecule: Tensor, draws: Draws) -> Tensor:
        """``tokens`` (S, D), the ``molecule`` (S,) of each -> (S, D)."""
        # Inside the block, not around it, so that FSDP's hooks see one forward pass.
        if self.recompute and torch.is_grad_enabled():
            output: Tensor = checkpoint(
                self.compute, tokens, attend, molecule, draws, use_reentrant=False
            )
            return output
        return self.compute(tokens, attend, molecule, draws)

    def compute(self, tokens: Tensor, attend: Attend, molecule: Tensor, draws: Draws) -> Tensor:
        """The block itself, with the arguments of :meth:`forward`."""
        probability = self.attention.dropout if self.training else 0.0
        path = None
        if self.compiled is None and kernels_fit(tokens):
            # What follows expects its input already multiplied with it, see PathScale.
            path, _ = draws.paths(molecule)
        attended, tokens = attend(tokens, self.attention.qkv, probability, path)
        after_attention = self.compiled or self.after_attention
        return after_attention(tokens, attended, molecule, draws)

    def after_attention(
        self, tokens: Tensor, attended: Tensor, molecule: Tensor, draws: Draws
    ) -> Tensor:
        """The block after attention: the last linear map of ``attended`` (S, D), and the feed-forward branch."""
        attention_path, ffn_path = draws.paths(molecule)
        first, second, third = (
            (None,) * 3 if draws.seeds is None else draws.seeds[:, None].unbind(0)
        )
        rate, activation_rate = (
            (self.dropout, self.activation_dropout) if self.training else (0.0, 0.0)
        )
        add_branch = functools.partial(add_and_norm, probability=rate)
        tokens = add_branch(
            tokens,
            attended,
            self.attention.out,
            self.attention_norm,
            path=attention_path,
            seed=first,
        )
        hidden, tokens = gelu_and_dropout(
            tokens, self.ffn_in, path=ffn_path, probability=activation_rate, seed=second
        )
        return add_branch(tokens, hidden, self.ffn_out, self.ffn_norm, path=ffn_path, seed=third)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderOutput:
    """Token states, and what else the denoising head needs."""

    tokens: Tensor
    """(S, D) packed tokens; ``MoleculeBatch.pad_tokens`` makes a rectangle of them."""
    bias: Tensor
    """(B, H, T, T) float32 attention bias of every block, -inf in padding columns."""
    shared_bias: SharedBias | None
    """The same for kernels, with one gradient for all of them; None where there are no kernels."""
    displacement: Tensor
    """(B, N, N, 3) float32, nearly unit vectors from atom a to atom b at [a, b], of the positions the encoder saw."""


class Encoder(nn.Module):
    """Computes token states from a batch and the choice of visible relations."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.atoms = AtomEmbedding(config)
        self.topology = TopologyBias(config)
        self.geometry = GeometryBias(config)
        self.input_norm = nn.LayerNorm(config.dim)
        self.dropout = config.dropout
        self.drop_path = config.drop_path
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def recompute_blocks(self, *, enabled: bool) -> None:
        """Let the blocks keep only their inputs for the backward pass, or everything, which is the default."""
        for layer in self.layers:
            assert isinstance(layer, Block)
            layer.recompute = enabled

    def compile_blocks(self) -> None:
        """Compile what follows on attention with ``torch.compile``, once for all blocks and sizes of micro-batches."""
        for layer in self.layers:
            assert isinstance(layer, Block)
            layer.compiled = torch.compile(layer.after_attention, dynamic=True)

    def forward(self, batch: MoleculeBatch, blend: Blend | None) -> EncoderOutput:
        """Encode ``batch``; without ``blend`` every relation of every pair is visible and positions have no noise."""
        positions = batch.positions if blend is None else batch.positions + blend.noise
        geometry: GeometryFeatures = self.geometry(batch, positions)
        bias = attention_bias(batch, blend, self.topology, geometry.bias)
        tokens = embed_tokens(batch, blend, self.atoms, geometry, self.input_norm)
        tokens = dropout(tokens, self.dropout, training=self.training)
        shared_bias = share_bias(bias)
        ways = attention_of_blocks(bias, shared_bias, batch, len(self.layers))
        draws = self._draws(batch)
        for layer, attend, draw in zip(self.layers, ways, draws, strict=True):
            tokens = layer(tokens, attend, batch.token_molecule, draw)
        return EncoderOutput(
            tokens=tokens,
            bias=bias,
            shared_bias=shared_bias,
            displacement=geometry.displacement,
        )

    def _draws(self, batch: MoleculeBatch) -> list[Draws]:
        num_layers, device = len(self.layers), batch.token_molecule.device
        seeds: Sequence[Tensor | None] = [None] * num_layers
        if self.training and on_gpu(batch.token_molecule):
            seeds = torch.randint(LARGEST_SEED, (num_layers, 3), device=device).unbind(0)
        path_scales = self._path_scales(batch)
        return [
            Draws(path_scale, seed) for path_scale, seed in zip(path_scales, seeds, strict=True)
        ]

    def _path_scales(self, batch: MoleculeBatch) -> Sequence[Tensor | None]:
        """``Draws.path_scales`` of each block: stochastic depth with rates from 0 to ``drop_path``, linear in depth."""
        num_layers = len(self.layers)
        if not self.training or self.drop_path == 0.0:
            return [None] * num_layers
        device = batch.token_molecule.device
        # One draw for all blocks, and rates as tensors: as constants, each rate would have to be compiled separately.
        rate = torch.arange(num_layers, device=device) * (self.drop_path / max(num_layers - 1, 1))
        rate = rate[:, None, None]
        kept = torch.rand(num_layers, 2, batch.num_molecules, device=device) >= rate
        return (kept / (1.0 - rate)).unbind(0)
