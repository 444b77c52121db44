"""The encoder: embeddings, blended attention bias, and a stack of post-norm Transformer blocks.

Shape legend: B molecules, N atoms (padded), T = N + 1 tokens (graph token first), S real tokens packed,
A real atoms packed, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        """Keep only the input for the backward pass, and compute the rest again there."""
        self.compiled: Callable[..., Tensor] | None = None
        """What a forward pass runs instead of the plain code, see :meth:`Encoder.compile_blocks`."""

    def forward(
        self,
        tokens: Tensor,
        bias: Tensor,
        batch: MoleculeBatch,
        rows: HeadRows | None,
        factors: Tensor | None,
    ) -> Tensor:
        """``tokens`` (S, D), ``bias`` (B, H, T, T) -> (S, D); ``rows`` on CPUs with gradients; ``factors`` (2, B) of the branches."""
        compute = self.compiled or self.compute
        # In here and not around the block: FSDP's hooks then see one forward pass.
        if self.recompute and torch.is_grad_enabled():
            output: Tensor = checkpoint(
                compute, tokens, bias, batch, rows, factors, use_reentrant=False
            )
            return output
        return compute(tokens, bias, batch, rows, factors)

    def compute(
        self,
        tokens: Tensor,
        bias: Tensor,
        batch: MoleculeBatch,
        rows: HeadRows | None,
        factors: Tensor | None,
    ) -> Tensor:
        """The block itself, with the arguments of :meth:`forward`."""
        of_attention, of_ffn = (None, None) if factors is None else factors.unbind(0)
        branch = self.attention(tokens, bias, batch, rows)
        tokens = self.attention_norm(tokens + self._thin(branch, batch, of_attention))
        hidden = F.gelu(self.ffn_in(tokens))
        hidden = dropout(hidden, self.activation_dropout, training=self.training)
        branch = self.ffn_out(hidden)
        output: Tensor = self.ffn_norm(tokens + self._thin(branch, batch, of_ffn))
        return output

    def _thin(self, branch: Tensor, batch: MoleculeBatch, factor: Tensor | None) -> Tensor:
        """Dropout, then stochastic depth: ``factor`` (B,) keeps or removes the whole branch of a molecule."""
        branch = dropout(branch, self.dropout, training=self.training)
        return branch if factor is None else branch * factor[batch.token_molecule, None]


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
        self.drop_path = config.drop_path
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def recompute_blocks(self, *, enabled: bool) -> None:
        """Let the blocks keep only their inputs for the backward pass, or everything, as they do at first."""
        for layer in self.layers:
            assert isinstance(layer, Block)
            layer.recompute = enabled

    def compile_blocks(self) -> None:
        """Let ``torch.compile`` fuse what is inside a block, once for all blocks and sizes of micro-batches."""
        for layer in self.layers:
            assert isinstance(layer, Block)
            layer.compiled = torch.compile(layer.compute, dynamic=True)

    def forward(self, batch: MoleculeBatch, blend: Blend | None) -> EncoderOutput:
        """Encode; without ``blend`` every relation of every pair is visible and positions carry no noise."""
        positions = batch.positions if blend is None else batch.positions + blend.noise
        geometry: GeometryFeatures = self.geometry(batch, positions)
        bias = self.attention_bias(batch, blend, geometry)
        tokens = self.input_norm(self.embed(batch, blend, geometry))
        tokens = dropout(tokens, self.dropout, training=self.training)
        # Without a gradient a CPU has a fused kernel as well, 2.6 times faster than the gathered rows.
        by_rows = bias.device.type == "cpu" and torch.is_grad_enabled()
        rows = head_rows(batch, bias.shape[1]) if by_rows else None
        factors = self._branch_factors(batch)
        for layer, factor in zip(self.layers, factors, strict=True):
            tokens = layer(tokens, bias, batch, rows, factor)
        return EncoderOutput(tokens=tokens, bias=bias, displacement=geometry.displacement)

    def _branch_factors(self, batch: MoleculeBatch) -> Sequence[Tensor | None]:
        """Stochastic depth, linear in depth from 0 to ``drop_path``: for each block (2, B) what to multiply the two branches
        of a molecule with, 0 or 1 / (1 - rate)."""
        num_layers = len(self.layers)
        if not self.training or self.drop_path == 0.0:
            return [None] * num_layers
        device = batch.token_molecule.device
        # All in one draw, and as data: a rate in the code of a block would make it another program to compile.
        rate = torch.arange(num_layers, device=device) * (self.drop_path / max(num_layers - 1, 1))
        rate = rate[:, None, None]
        kept = torch.rand(num_layers, 2, batch.num_molecules, device=device) >= rate
        return (kept / (1.0 - rate)).unbind(0)

    def embed(
        self, batch: MoleculeBatch, blend: Blend | None, geometry: GeometryFeatures
    ) -> Tensor:
        """(S, D) tokens before the first LayerNorm: categories plus the visible feature of each atom."""
        categories, degree = self.atoms(batch)
        merged = batch.pack_atoms(geometry.merged) * MERGED_DISTANCE_SCALE
        if blend is None:
            atoms = categories + degree + merged
        elif blend.view is None:
            shows_degree = batch.pack_atoms(blend.atom_choice)[:, None] == AtomFeature.DEGREE
            atoms = categories + torch.where(shows_degree, degree, merged.to(degree.dtype))
        else:
            shown = [
                batch.pack_atoms(blend.shows_atom(feature))[:, None] for feature in AtomFeature
            ]
            atoms = categories + degree * shown[0] + (merged * shown[1]).to(degree.dtype)
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
        elif blend.view is None:
            choice = blend.pair_choice[..., None]
            graph = torch.where(choice == Relation.SPD, spd, edge)
            pairs = torch.where(choice == Relation.GEOMETRY, precise(geometry.bias), graph)
        else:
            shown = [blend.shows_pair(relation)[..., None] for relation in Relation]
            pairs = spd * shown[0] + edge * shown[1] + precise(geometry.bias) * shown[2]
        bias: Tensor = F.pad(pairs, (0, 0, 1, 0, 1, 0))
        T = bias.shape[1]
        token = torch.arange(T, device=bias.device)
        border = (token[:, None] == 0) | (token[None, :] == 0)
        bias = bias + border[..., None] * precise(self.topology.virtual_distance)
        padding_column = token > batch.num_atoms[:, None]
        bias = bias.masked_fill(padding_column[:, None, :, None], float("-inf"))
        return bias.permute(0, 3, 1, 2).contiguous()
