"""The heads of pair relations and of properties.

Shape legend: B molecules, N atoms (padded), A real atoms packed, D width, P width of a pair head's row and column
vectors, C outputs of a pair head (of a :class:`PairForm`, in each of its G groups).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.device import on_gpu
from moleblend_ray.model.dropout import dropout
from moleblend_ray.model.fused import kernels_fit
from moleblend_ray.model.initialization import draw_normal
from moleblend_ray.model.precision import product_type

_ALIGNED = 8
"""16-bit numbers that a tensor core loads at once."""

PAIR_NORM_EPSILON = 1e-12
"""LayerNorm epsilon of the pair heads (official code)."""


def map_together(atoms: Tensor, maps: Sequence[nn.Linear]) -> list[Tensor]:
    """(A, outputs) of each of the ``maps`` of ``atoms`` (A, D).

    On a GPU one matrix product computes all of them: ``atoms`` are read once, and their gradient is written once instead
    of being summed over the maps.
    """
    if not on_gpu(atoms):
        return [linear(atoms) for linear in maps]
    weight = torch.cat([linear.weight for linear in maps])
    bias = torch.cat([linear.bias for linear in maps])
    mapped = F.linear(atoms, weight, bias)
    return list(torch.split(mapped, [linear.out_features for linear in maps], dim=1))


class PairForm(NamedTuple):
    """The logits of G groups of C classes for each atom pair, as a bilinear form whose last sum is still to be done.

    The kernels of the loss do this sum where they need it. To write the logits and their gradient, and to read them again,
    was most of what the heads moved on a GPU.
    """

    forms: Tensor
    """(A, G, C, P), the weight times the row vector of each atom."""
    columns: Tensor
    """(A, P), the column vector of each atom."""
    bias: Tensor
    """(G, C)."""
    batch: MoleculeBatch
    output_shape: tuple[int, ...]
    """(C,) or (G, C)."""

    def logits(self) -> Tensor:
        """(B, N, N, *output_shape) logits."""
        forms = self.batch.pad_atoms(self.forms.flatten(1))
        B, N, _ = forms.shape
        columns = self.batch.pad_atoms(self.columns)[:, None].expand(B, N, N, -1).flatten(0, 1)
        pairs = torch.bmm(columns, forms.view(B * N, -1, columns.shape[-1]).transpose(1, 2))
        return (pairs + self.bias.flatten().to(pairs.dtype)).view(B, N, N, *self.output_shape)


class PairHead(nn.Module):
    """C outputs for each atom pair: a linear map of the outer product of a row and a column vector.

    It is computed as a bilinear form, so that no (B, N, N, P * P) tensor is needed.
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

    def forward(self, row: Tensor, column: Tensor, batch: MoleculeBatch) -> Tensor:
        """``row`` and ``column`` (A, P), the linear maps of that name of the atoms -> (B, N, N, *output_shape).

        For atoms a and b: ``sum_rc row[a, r] column[b, c] weight[:, r, c] + bias``.
        """
        return self.combine(self.row_norm(F.gelu(row)), self.column_norm(F.gelu(column)), batch)

    def form(self, row: Tensor, column: Tensor, batch: MoleculeBatch) -> PairForm:
        """The same for the kernels of the loss, which sum over the columns' vectors themselves."""
        P = self.weight.shape[1]
        dtype = product_type(row)
        row, column = self.row_norm(F.gelu(row)), self.column_norm(F.gelu(column))
        forms = row.to(dtype) @ self.weight.transpose(0, 1).flatten(1).to(dtype)
        groups = self.bias.view(-1, self.output_shape[-1])
        return PairForm(
            forms=forms.view(-1, *groups.shape, P),
            columns=column.to(dtype),
            bias=groups,
            batch=batch,
            output_shape=self.output_shape,
        )

    def combine(self, row: Tensor, column: Tensor, batch: MoleculeBatch) -> Tensor:
        """The bilinear form of packed ``row`` and ``column`` vectors, both (A, P) -> (B, N, N, *output_shape)."""
        if on_gpu(row):
            pairs = rows_first(row, column, self.weight, batch)
            # In the type of the product: otherwise the sum would be float32, twice as many bytes.
            output: Tensor = pairs + self.bias.to(pairs.dtype)
        else:
            pairs = columns_first(row, column, self.weight, batch)
            output = pairs + self.bias
        return output.view(*pairs.shape[:3], *self.output_shape)


def predict_classes(
    head: PairHead, row: Tensor, column: Tensor, batch: MoleculeBatch
) -> Tensor | PairForm:
    """What ``head`` predicts: a :class:`PairForm` if the kernels of the loss can take it, else its logits."""
    if kernels_fit(row):
        # The module imports Triton, which CPU builds of PyTorch lack.
        from moleblend_ray.model.pair_loss_kernels import MAX_ATOMS

        if batch.max_atoms <= MAX_ATOMS:
            return head.form(row, column, batch)
    logits: Tensor = head(row, column, batch)
    return logits


def columns_first(row: Tensor, column: Tensor, weight: Tensor, batch: MoleculeBatch) -> Tensor:
    """(B, N, N, C) bilinear form: ``weight`` (C, P, P) times the columns (A, P), then the rows (A, P) times the result.

    The fastest way on a CPU.
    """
    C, P, _ = weight.shape
    rows = batch.pad_atoms(row)
    # (P columns, C * P rows): the large result then has its final layout and needs no copy.
    weight = weight.permute(2, 1, 0).flatten(1)
    contracted = batch.pad_atoms(column @ weight.to(column.dtype))
    N = contracted.shape[1]
    contracted = contracted.view(-1, N, P, C).transpose(1, 2).flatten(2)
    return torch.bmm(rows, contracted.to(rows.dtype)).view(-1, N, N, C)


def rows_first(row: Tensor, column: Tensor, weight: Tensor, batch: MoleculeBatch) -> Tensor:
    """The same as :func:`columns_first`, for GPUs: a product for each row of pairs.

    The large tensors are written in the layout in which they are read. Only the columns are copied, once for each row.
    """
    C, P, _ = weight.shape
    # Rows of the products must begin at multiples of 16 bytes, else tensor cores read them slowly.
    weight = F.pad(weight, (0, 0, 0, 0, 0, -C % _ALIGNED))
    dtype = product_type(row)
    rows, columns = batch.pad_atoms(row.to(dtype)), batch.pad_atoms(column.to(dtype))
    B, N, _ = rows.shape
    contracted = rows.flatten(0, 1) @ weight.permute(1, 2, 0).flatten(1).to(dtype)
    repeated = columns[:, None].expand(B, N, N, P).reshape(B * N, N, P)
    pairs = torch.bmm(repeated, contracted.view(B * N, P, -1))
    return pairs.view(B, N, N, -1)[..., :C]


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
