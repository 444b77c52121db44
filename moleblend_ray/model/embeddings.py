"""The inputs of the encoder: token embeddings, and one additive attention bias for each relation.

Shape legend: B molecules, N atoms (padded), A real atoms packed, H heads, D width, K Gaussian kernels, L hops.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.device import on_gpu
from moleblend_ray.model.fused import kernels_fit
from moleblend_ray.model.initialization import draw_normal, draw_uniform, new_embedding
from moleblend_ray.model.lookup import sum_of_rows
from moleblend_ray.model.precision import at_least_float32, product_type
from moleblend_ray.vocabulary import ATOM_VOCAB_SIZES, BOND_VOCAB_SIZES, NUM_BOND_CODES, NUM_HOPS

NUM_DEGREES = 16
"""Rows of the degree table; atoms with more neighbours share the last one."""

NUM_SPD_CODES = 256
"""Rows of the shortest-path table: 0 to 254 bonds, 255 unreachable."""

MERGED_DISTANCE_SCALE = 0.01
"""Factor of the 3D atom feature in the token embedding (official code)."""

DISPLACEMENT_EPSILON = 1e-5
"""Angstrom added to a distance before dividing by it (official code)."""

GAUSSIAN_NORM = (2 * 3.14159) ** 0.5
"""As in the official code, with its rounded pi: its weights were trained with it."""

MIN_GAUSSIAN_WIDTH = 1e-2
"""Angstrom added to the learned width of a kernel (official code)."""


class AtomEmbedding(nn.Module):
    """Sum of the nine category embeddings of an atom, its degree embedding, and the graph token."""

    embedding_tables: ClassVar[tuple[str, ...]] = ("graph_token",)
    """Parameters that are looked up by a code, beside those in modules of embeddings: weight decay leaves them out."""

    offsets: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.categories = new_embedding(sum(ATOM_VOCAB_SIZES), config.dim)
        self.degree = new_embedding(NUM_DEGREES, config.dim)
        self.graph_token = nn.Parameter(torch.empty(1, config.dim))
        self.register_buffer(
            "offsets", torch.empty(len(ATOM_VOCAB_SIZES), dtype=torch.int64), persistent=False
        )
        self.reset_parameters()
        if self.offsets.device.type != "meta":
            self.fill_constants()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for weight in (self.categories.weight, self.degree.weight, self.graph_token):
            draw_normal(weight)

    def fill_constants(self) -> None:
        """Number of the first row of each category."""
        sizes = torch.tensor((0, *ATOM_VOCAB_SIZES[:-1]), device=self.offsets.device)
        self.offsets.copy_(sizes.cumsum(0))

    def forward(self, batch: MoleculeBatch) -> tuple[Tensor, Tensor]:
        """Category sums and degree embeddings of the real atoms: two (A, D)."""
        codes = batch.pack_atoms(batch.atom_features).long() + self.offsets
        degrees = batch.pack_atoms(batch.degrees).long().clamp(max=NUM_DEGREES - 1)
        return (
            sum_of_rows(codes, self.categories.weight),
            sum_of_rows(degrees[:, None], self.degree.weight),
        )


class TopologyBias(nn.Module):
    """Attention biases of the two graph relations, and of the graph token's links to the atoms.

    A hop's bias is ``mean(type, stereo, conjugated embedding) @ matrix of that hop``. There are only 60 bond codes, so
    each forward pass computes both for all of them, as one table of L x 61 rows, and a pair costs L look-ups.
    """

    bond_rows: Tensor
    no_hop: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H = config.num_heads
        self.spd = new_embedding(NUM_SPD_CODES, H)
        self.bonds = new_embedding(sum(BOND_VOCAB_SIZES), H)
        self.hop_matrices = nn.Parameter(torch.empty(NUM_HOPS, H, H))
        self.virtual_distance = nn.Parameter(torch.empty(H))
        # The row of the official edge table for "no such hop". It is initialised to 0 and never trained, but some
        # parameter files have other values there.
        self.register_buffer("no_hop", torch.empty(H))
        self.register_buffer(
            "bond_rows",
            torch.empty(NUM_BOND_CODES - 1, len(BOND_VOCAB_SIZES), dtype=torch.int64),
            persistent=False,
        )
        self.reset_parameters()
        if self.bond_rows.device.type != "meta":
            self.fill_constants()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        weights = (self.spd.weight, self.bonds.weight, self.hop_matrices, self.virtual_distance)
        for weight in weights:
            draw_normal(weight)
        nn.init.zeros_(self.no_hop)

    def fill_constants(self) -> None:
        """Rows of the type, stereo and conjugation of each bond code."""
        types, stereo, _ = BOND_VOCAB_SIZES
        parts = [torch.arange(size, device=self.bond_rows.device) for size in BOND_VOCAB_SIZES]
        rows = torch.cartesian_prod(parts[0], parts[1] + types, parts[2] + types + stereo)
        self.bond_rows.copy_(rows)

    def spd_bias(self, batch: MoleculeBatch) -> Tensor:
        """(B, N, N, H) bias of the shortest-path distance."""
        if not on_gpu(batch.spd):
            return F.embedding(batch.spd.int(), self.spd.weight)
        bias = sum_of_rows(batch.spd.long().view(-1, 1), self.spd.weight)
        return bias.view(*batch.spd.shape, -1)

    def hop_table(self, num_hops: int) -> Tensor:
        """(num_hops * 61, H): bias of each bond code in each hop."""
        bonds = self.bonds(self.bond_rows).mean(1)
        codes = torch.cat([self.no_hop.to(bonds.dtype)[None], bonds])
        return (codes @ self.hop_matrices[:num_hops]).flatten(0, 1)

    def edge_bias(self, batch: MoleculeBatch) -> Tensor:
        """(B, N, N, H) sum over hops, divided by the path length in bonds, limited to 1 to 5 (unreachable: 5)."""
        B, N, _, L = batch.path_codes.shape
        table = self.hop_table(L)
        first_row = torch.arange(L, device=table.device) * NUM_BOND_CODES
        rows = (batch.path_codes.long() + first_row).reshape(-1, L)
        total = sum_of_rows(rows, table).view(B, N, N, -1)
        return total / batch.spd.clamp(1, NUM_HOPS)[..., None]


class GaussianDistance(nn.Module):
    """K Gaussian kernels of a distance, which is first scaled and shifted for the pair of elements."""

    embedding_tables: ClassVar[tuple[str, ...]] = ("scale", "shift")

    def __init__(self, num_kernels: int) -> None:
        super().__init__()
        num_elements = ATOM_VOCAB_SIZES[0]
        self.means = nn.Parameter(torch.empty(num_kernels))
        self.widths = nn.Parameter(torch.empty(num_kernels))
        self.scale = nn.Parameter(torch.empty(2, num_elements))
        self.shift = nn.Parameter(torch.empty(2, num_elements))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1, shift 0, means and widths uniform from 0 to 3 angstrom.

        This is what the official code intends; there a later global initialisation overwrites it with values near 0.
        """
        draw_uniform(self.means, 0.0, 3.0)
        draw_uniform(self.widths, 0.0, 3.0)
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.shift)

    def forward(self, distance: Tensor, element: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """``distance`` (B, N, N) float32, angstrom; ``element`` (B, N) int64 code; ``known`` (B, N, N) bool
        -> (B, N, N, K), 0 where not known, and their sums (B, N, K) float32 over the second atom.

        The kernels have the type of the weights, on GPUs that of matrix products.
        """
        dtype = product_type(self.means)
        # Kernels can be as narrow as 0.01 angstrom: bfloat16 is too coarse for distances.
        with torch.autocast(distance.device.type, enabled=False):
            scale = self._by_element(self.scale, element)
            shift = self._by_element(self.shift, element)
            value = (scale[0][:, :, None] + scale[1][:, None, :]) * distance
            value = value + (shift[0][:, :, None] + shift[1][:, None, :])
            width = at_least_float32(self.widths).abs() + MIN_GAUSSIAN_WIDTH
            arguments = value, at_least_float32(self.means), width, known
            if kernels_fit(value):
                with_sums: tuple[Tensor, Tensor] = _GaussiansAndSums.apply(  # type: ignore[no-untyped-call]
                    *arguments, dtype
                )
                return with_sums
            kernels: Tensor = _Gaussians.apply(*arguments)  # type: ignore[no-untyped-call]
            return kernels.to(self.means.dtype), kernels.sum(dim=2)

    @staticmethod
    def _by_element(table: Tensor, element: Tensor) -> Tensor:
        """``table`` (2, 119) and ``element`` (B, N) -> (2, B, N)."""
        if not on_gpu(table):
            return at_least_float32(table)[:, element]
        found = sum_of_rows(element.reshape(-1, 1), at_least_float32(table).t().contiguous())
        return found.t().view(2, *element.shape)


class _Gaussians(torch.autograd.Function):
    """Normal densities of each value for K means and widths, with a backward pass written by hand.

    Autograd would keep five tensors of the size of the result and pass over each of them.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, mean: Tensor, width: Tensor, known: Tensor) -> Tensor:
        standardized = (value[..., None] - mean).div_(width)
        density = standardized.square().mul_(-0.5).exp_().div_(GAUSSIAN_NORM * width)
        density.masked_fill_(~known[..., None], 0.0)
        ctx.save_for_backward(standardized, density, width)
        return density

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        standardized, density, width = ctx.saved_tensors
        # d density / d mean = density * standardized / width, and the others follow from it.
        scaled = (grad_output * density).div_(width)
        grad_width = -_per_kernel(scaled)
        scaled.mul_(standardized)
        grad_mean = _per_kernel(scaled)
        grad_value = -scaled.sum(-1)
        grad_width += _per_kernel(scaled.mul_(standardized))
        return grad_value, grad_mean, grad_width, None


class _GaussiansAndSums(torch.autograd.Function):
    """The same by Triton kernels, together with the sums over the second atom of each pair."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        mean: Tensor,
        width: Tensor,
        known: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        from moleblend_ray.model.geometry_kernels import gaussians_forward

        B, N, _ = value.shape
        value, known = value.reshape(B * N, N), known.reshape(B * N, N)
        ctx.save_for_backward(value, known, mean, width)
        density, sums = gaussians_forward(value, known, mean, width, GAUSSIAN_NORM, dtype)
        return density.view(B, N, N, -1), sums.view(B, N, -1)

    @staticmethod
    def backward(
        ctx: Any, grad_density: Tensor, grad_sums: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        from moleblend_ray.model.geometry_kernels import gaussians_backward

        value, known, mean, width = ctx.saved_tensors
        gradients = grad_density.contiguous(), grad_sums.contiguous()
        grad_value, grad_mean, grad_width = gaussians_backward(
            *gradients, value, known, mean, width, GAUSSIAN_NORM
        )
        B, N, _, _ = grad_density.shape
        return grad_value.view(B, N, N), grad_mean, grad_width, None, None


def _per_kernel(values: Tensor) -> Tensor:
    """Sums over all but the last dimension: (..., K) -> (K,)."""
    return values.flatten(0, -2).sum(0)


class GeometryFeatures(NamedTuple):
    """The 3D relation of the pairs and atoms of a batch."""

    bias: Tensor
    """(B, N, N, H), 0 where a pair takes no part."""
    atoms: Tensor
    """(B, N) bool, atoms that take part."""
    merged: Tensor
    """(A, D), the 3D feature of each atom before scaling, undefined where an atom takes no part."""
    displacement: Tensor
    """(B, N, N, 3) float32, (position b - position a) / (distance + 1e-5) at [a, b], 0 where no part."""


class GeometryBias(nn.Module):
    """Attention bias and atom feature of the 3D relation, from Gaussian kernels of the pair distances."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        K = config.num_kernels
        self.missing_positions = config.missing_positions
        self.gaussian = GaussianDistance(K)
        self.bias_in = nn.Linear(K, K)
        self.bias_out = nn.Linear(K, config.num_heads)
        self.merge = nn.Linear(K, config.dim)

    def forward(self, batch: MoleculeBatch, positions: Tensor) -> GeometryFeatures:
        """``positions`` (B, N, 3) float32, angstrom: those of the batch, with or without noise; 0 where unknown."""
        atoms, pairs = batch.position_mask, batch.pair_position_mask
        if self.missing_positions == "origin":
            atoms, pairs = batch.atom_mask, batch.pair_mask
        delta = positions[:, None, :, :] - positions[:, :, None, :]
        distance = delta.norm(dim=-1)
        displacement = delta / (distance + DISPLACEMENT_EPSILON)[..., None]
        element = batch.atom_features[:, :, 0].long()
        kernels, sums = self.gaussian(distance, element, pairs)
        hidden = F.gelu(self.bias_in(kernels))
        bias = self.bias_out(hidden).masked_fill(~pairs[..., None], 0.0)
        return GeometryFeatures(
            bias=bias,
            atoms=atoms,
            merged=self.merge(batch.pack_atoms(sums.to(self.merge.weight.dtype))),
            displacement=displacement.masked_fill(~pairs[..., None], 0.0),
        )
