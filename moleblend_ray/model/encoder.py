"""The encoder: embeddings, blended attention bias, and a stack of post-norm Transformer blocks.

Shape legend: B molecules, N atoms (padded), T = N + 1 tokens (graph token first), S real tokens packed,
A real atoms packed, H heads, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moleblend_ray.model.attention import HeadRows, attend_by_rows, attend_padded, head_rows
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.blending import AtomFeature, Blend, Relation
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.dropout import dropout
from moleblend_ray.model.embeddings import (
    MERGED_DISTANCE_SCALE,
    AtomEmbedding,
    GeometryBias,
    GeometryFeatures,
    TopologyBias,
)
from moleblend_ray.model.precision import precise


class Attention(nn.Module):
    """Multi-head self-attention of packed tokens with an additive bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(
        self, tokens: Tensor, bias: Tensor, batch: MoleculeBatch, rows: HeadRows | None
    ) -> Tensor:
        """``tokens`` (S, D), ``bias`` (B, H, T, T) with -inf in padding columns -> (S, D)."""
        qkv = self.qkv(tokens)
        probability = self.dropout if self.training else 0.0
        if rows is None:
            attended = attend_padded(qkv, bias, batch, probability)
        else:
            attended = attend_by_rows(qkv, bias, rows, probability)
        output: Tensor = self.out(attended)
        return output


class Block(nn.Module):
    """Attention and feed-forward, each with dropout, stochastic depth, residual sum and LayerNorm after it."""

    def __init__(self, config: ModelConfig, drop_path: float) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout
        self.drop_path = drop_path
        self.recompute = False
        """Keep only the input for the backward pass, and compute the rest again there."""

    def forward(
        self, tokens: Tensor, bias: Tensor, batch: MoleculeBatch, rows: HeadRows | None
    ) -> Tensor:
        """``tokens`` (S, D), ``bias`` (B, H, T, T) -> (S, D); ``rows`` on CPUs."""
        # In here and not around the block: FSDP's hooks then see one forward pass.
        if self.recompute and torch.is_grad_enabled():
            output: Tensor = checkpoint(
                self._compute, tokens, bias, batch, rows, use_reentrant=False
            )
            return output
        return self._compute(tokens, bias, batch, rows)

    def _compute(
        self, tokens: Tensor, bias: Tensor, batch: MoleculeBatch, rows: HeadRows | None
    ) -> Tensor:
        branch = self.attention(tokens, bias, batch, rows)
        tokens = self.attention_norm(tokens + self._thin(branch, batch))
        hidden = F.gelu(self.ffn_in(tokens))
        hidden = dropout(hidden, self.activation_dropout, training=self.training)
        branch = self.ffn_out(hidden)
        output: Tensor = self.ffn_norm(tokens + self._thin(branch, batch))
        return output

    def _thin(self, branch: Tensor, batch: MoleculeBatch) -> Tensor:
        """Dropout, then stochastic depth: a molecule keeps or loses the whole branch."""
        branch = dropout(branch, self.dropout, training=self.training)
        if not self.training or self.drop_path == 0.0:
            return branch
        kept = torch.rand(batch.num_molecules, device=branch.device) >= self.drop_path
        factor = kept.to(branch.dtype) / (1.0 - self.drop_path)
        return branch * factor[batch.token_molecule, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderOutput:
    """Token states, and what the denoising head needs besides them."""

    tokens: Tensor
    """(S, D) packed tokens; ``MoleculeBatch.pad_tokens`` makes a rectangle of them."""
    bias: Tensor
    """(B, H, T, T) float32 attention bias of every block, -inf in padding columns."""
    displacement: Tensor
    """(B, N, N, 3) float32, unit-like vectors from atom a to atom b of the positions the encoder saw."""


class Encoder(nn.Module):
    """From a batch and the choice of visible relations to token states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.atoms = AtomEmbedding(config)
        self.topology = TopologyBias(config)
        self.geometry = GeometryBias(config)
        self.input_norm = nn.LayerNorm(config.dim)
        self.dropout = config.dropout
        depth = max(config.num_layers - 1, 1)
        self.layers = nn.ModuleList(
            Block(config, config.drop_path * layer / depth) for layer in range(config.num_layers)
        )

    def recompute_blocks(self, *, enabled: bool) -> None:
        """Let the blocks keep only their inputs for the backward pass, or everything, as they do at first."""
        for layer in self.layers:
            assert isinstance(layer, Block)
            layer.recompute = enabled

    def forward(self, batch: MoleculeBatch, blend: Blend | None) -> EncoderOutput:
        """Encode; without ``blend`` every relation of every pair is visible and positions carry no noise."""
        positions = batch.positions if blend is None else batch.positions + blend.noise
        geometry: GeometryFeatures = self.geometry(batch, positions)
        bias = self.attention_bias(batch, blend, geometry)
        tokens = self.input_norm(self.embed(batch, blend, geometry))
        tokens = dropout(tokens, self.dropout, training=self.training)
        rows = head_rows(batch, bias.shape[1]) if bias.device.type == "cpu" else None
        for layer in self.layers:
            tokens = layer(tokens, bias, batch, rows)
        return EncoderOutput(tokens=tokens, bias=bias, displacement=geometry.displacement)

    def embed(
        self, batch: MoleculeBatch, blend: Blend | None, geometry: GeometryFeatures
    ) -> Tensor:
        """(S, D) tokens before the first LayerNorm: categories plus the visible feature of each atom."""
        categories, degree = self.atoms(batch)
        merged = batch.pack_atoms(geometry.merged) * MERGED_DISTANCE_SCALE
        if blend is None:
            atoms = categories + degree + merged
        else:
            shows_degree = batch.pack_atoms(blend.atom_choice)[:, None] == AtomFeature.DEGREE
            atoms = categories + torch.where(shows_degree, degree, merged.to(degree.dtype))
        graph = self.atoms.graph_token.to(atoms.dtype).expand(batch.num_molecules, -1)
        tokens: Tensor = atoms.new_zeros(len(batch.token_index), atoms.shape[1])
        tokens = tokens.index_copy(0, batch.graph_token, graph)
        return tokens.index_copy(0, batch.atom_token, atoms)

    def attention_bias(
        self, batch: MoleculeBatch, blend: Blend | None, geometry: GeometryFeatures
    ) -> Tensor:
        """(B, H, T, T) float32: visible relations between atoms, the virtual distance on the graph token's links."""
        spd, edge = precise(self.topology.spd_bias(batch)), precise(self.topology.edge_bias(batch))
        if blend is None:
            pairs = spd + edge + precise(geometry.bias)
        else:
            choice = blend.pair_choice[..., None]
            graph = torch.where(choice == Relation.SPD, spd, edge)
            pairs = torch.where(choice == Relation.GEOMETRY, precise(geometry.bias), graph)
        bias: Tensor = F.pad(pairs, (0, 0, 1, 0, 1, 0))
        T = bias.shape[1]
        token = torch.arange(T, device=bias.device)
        border = (token[:, None] == 0) | (token[None, :] == 0)
        bias = bias + border[..., None] * precise(self.topology.virtual_distance)
        padding_column = token > batch.num_atoms[:, None]
        bias = bias.masked_fill(padding_column[:, None, :, None], float("-inf"))
        return bias.permute(0, 3, 1, 2).contiguous()
