"""The heads: one for each pair relation, one for coordinate noise, one for properties.

Shape legend: B molecules, N atoms (padded), A real atoms packed, T = N + 1 tokens, H heads, D width,
P width of a pair head's row and column vectors, C outputs of a pair head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.dropout import dropout
from moleblend_ray.model.initialization import draw_normal
from moleblend_ray.model.precision import at_least_float32

_ALIGNED = 8
"""16-bit numbers that a tensor core loads at once."""

PAIR_NORM_EPSILON = 1e-12
"""LayerNorm epsilon of the pair heads (official code)."""


class PairHead(nn.Module):
    """C outputs for each atom pair: a linear map of the outer product of a row and a column vector.

    It is computed as a bilinear form, columns first, so that no (B, N, N, P * P) tensor is needed.
    """

    def __init__(self, config: ModelConfig, output_shape: tuple[int, ...]) -> None:
        super().__init__()
        P, num_outputs = config.pair_dim, math.prod(output_shape)
        self.output_shape = output_shape
        self.row = nn.Linear(config.dim, P)
        self.row_norm = nn.LayerNorm(P, eps=PAIR_NORM_EPSILON)
        self.column = nn.Linear(config.dim, P)
        self.column_norm = nn.LayerNorm(P, eps=PAIR_NORM_EPSILON)
        self.weight = nn.Parameter(torch.empty(num_outputs, P, P))
        self.bias = nn.Parameter(torch.empty(num_outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights of the bilinear form."""
        draw_normal(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, atoms: Tensor, batch: MoleculeBatch) -> Tensor:
        """``atoms`` (A, D) -> (B, N, N, *output_shape): ``sum_rc row[a, r] column[b, c] weight[:, r, c] + bias``."""
        row = self.row_norm(F.gelu(self.row(atoms)))
        column = self.column_norm(F.gelu(self.column(atoms)))
        return self.combine(row, column, batch)

    def combine(self, row: Tensor, column: Tensor, batch: MoleculeBatch) -> Tensor:
        """The bilinear form of packed ``row`` and ``column`` vectors, both (A, P) -> (B, N, N, *output_shape)."""
        C, P, _ = self.weight.shape
        rows = batch.pad_atoms(row)
        weight: Tensor = self.weight
        if rows.device.type == "cuda":
            # Rows of the product must begin at multiples of 16 bytes, else tensor cores read them slowly.
            weight = F.pad(weight, (0, 0, 0, 0, 0, -C % _ALIGNED))
        padded = len(weight)
        # (P columns, C * P rows): the large result then has its final layout and needs no copy.
        weight = weight.permute(2, 1, 0).flatten(1)
        contracted = batch.pad_atoms(column @ weight.to(column.dtype))
        N = contracted.shape[1]
        contracted = contracted.view(-1, N, P, padded).transpose(1, 2).flatten(2)
        pairs = torch.bmm(rows, contracted.to(rows.dtype)).view(-1, N, N, padded)
        bias = self.bias if pairs.device.type == "cpu" else self.bias.to(pairs.dtype)
        output: Tensor = pairs[..., :C] + bias
        return output.view(-1, N, N, *self.output_shape)


class DenoisingHead(nn.Module):
    """Predicts the noise on each atom as an attention-weighted sum of its displacements to the other atoms."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.query = nn.Linear(config.dim, config.dim)
        self.key = nn.Linear(config.dim, config.dim)
        self.value = nn.Linear(config.dim, config.dim)
        self.axes = nn.Linear(config.dim, 3)

    def forward(
        self, atoms: Tensor, bias: Tensor, displacement: Tensor, batch: MoleculeBatch
    ) -> Tensor:
        """``atoms`` (A, D), ``bias`` (B, H, N, N), ``displacement`` (B, N, N, 3) -> (B, N, 3) float32.

        Axis x of atom a is ``axes_x . concat_h sum_b attention[h, a, b] displacement_x[a, b] value[h, b]``. The
        projection is moved inside the sum, so that only one number for each head, atom and axis is summed.
        """
        query, key = (
            _split_heads(batch.pad_atoms(linear(atoms)), self.num_heads).transpose(1, 2)
            for linear in (self.query, self.key)
        )
        score = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        attention = torch.softmax(at_least_float32(score) + at_least_float32(bias), dim=-1)
        attention = dropout(attention, self.dropout, training=self.training)
        per_axis = self._projected_values(atoms, batch)
        with torch.autocast(atoms.device.type, enabled=False):
            # (B, N, N, 3): contribution of atom b to atom a, summed over heads.
            contribution = torch.einsum("bhij,bjhx->bijx", attention, at_least_float32(per_axis))
            moved = (contribution * displacement).sum(dim=2)
            return moved + at_least_float32(self.axes.bias)

    def _projected_values(self, atoms: Tensor, batch: MoleculeBatch) -> Tensor:
        """(B, N, H, 3): each head's value vector times the weights of each axis."""
        value = _split_heads(self.value(atoms), self.num_heads)
        axes = _split_heads(self.axes.weight, self.num_heads)
        return batch.pad_atoms(torch.einsum("ahd,xhd->ahx", value, axes.to(value.dtype)))


def _split_heads(features: Tensor, num_heads: int) -> Tensor:
    return features.view(*features.shape[:-1], num_heads, -1)


class PropertyHead(nn.Module):
    """Two linear layers, with dropout before each and GELU between them, on features of molecules or of atoms.

    ``ReadoutConfig.readout`` decides what it reads: graph tokens, means over atoms, both concatenated, or single atoms.
    """

    def __init__(self, dim: int, num_targets: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.hidden = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, num_targets)

    def forward(self, features: Tensor) -> Tensor:
        """``features`` (B, dim) of molecules -> (B, num_targets), or (A, dim) of atoms -> (A, num_targets)."""
        features = dropout(features, self.dropout, training=self.training)
        hidden = dropout(F.gelu(self.hidden(features)), self.dropout, training=self.training)
        output: Tensor = self.out(hidden)
        return output
