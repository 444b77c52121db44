"""The head that predicts the noise on coordinates.

Shape legend: B molecules, N atoms (padded), A real atoms packed, T = N + 1 tokens, H heads, D width, d = D / H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moleblend_ray.model.attention import LARGEST_SEED, SharedBias
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.dropout import dropout
from moleblend_ray.model.precision import at_least_float32


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
        self,
        atoms: Tensor,
        bias: Tensor,
        displacement: Tensor,
        batch: MoleculeBatch,
        shared: SharedBias | None = None,
    ) -> Tensor:
        """``atoms`` (A, D), ``bias`` (B, H, T, T), ``displacement`` (B, N, N, 3) -> (B, N, 3) float32.

        Axis x of atom a is ``axes_x . concat_h sum_b attention[h, a, b] displacement_x[a, b] value[h, b]``. The
        projection is moved inside the sum, so that only one number for each head, atom and axis is summed. With the
        bias ``shared`` among kernels, a kernel computes it.
        """
        if shared is not None and not displacement.requires_grad:
            moved = batch.pad_atoms(self._by_kernel(atoms, displacement, batch, shared))
        else:
            moved = self._by_products(atoms, bias[:, :, 1:, 1:], displacement, batch)
        return moved + at_least_float32(self.axes.bias)

    def _by_kernel(
        self, atoms: Tensor, displacement: Tensor, batch: MoleculeBatch, shared: SharedBias
    ) -> Tensor:
        """(A, 3) float32, without the bias of the axes."""
        value_weight, value_bias = self._projected_values()
        # One matrix product instead of three: atoms are read once, and their gradient is written once.
        weight = torch.cat([self.query.weight, self.key.weight, value_weight])
        bias = torch.cat([self.query.bias, self.key.bias, value_bias])
        probability = self.dropout if self.training else 0.0
        moved: Tensor = _NoiseByKernel.apply(  # type: ignore[no-untyped-call]
            F.linear(atoms, weight, bias), shared.values, shared, displacement, batch, probability
        )
        return moved

    def _by_products(
        self, atoms: Tensor, bias: Tensor, displacement: Tensor, batch: MoleculeBatch
    ) -> Tensor:
        """(B, N, 3) float32, without the bias of the axes; ``bias`` (B, H, N, N)."""
        mapped = self.query(atoms), self.key(atoms), F.linear(atoms, *self._projected_values())
        query, key, per_axis = (
            _split_heads(batch.pad_atoms(one), self.num_heads) for one in mapped
        )
        score = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * query.shape[-1] ** -0.5
        attention = torch.softmax(at_least_float32(score) + at_least_float32(bias), dim=-1)
        attention = dropout(attention, self.dropout, training=self.training)
        with torch.autocast(atoms.device.type, enabled=False):
            # (B, N, N, 3): contribution of atom b to atom a, summed over heads.
            contribution = torch.einsum("bhij,bjhx->bijx", attention, at_least_float32(per_axis))
            return (contribution * displacement).sum(dim=2)

    def _projected_values(self) -> tuple[Tensor, Tensor]:
        """Weight (H * 3, D) and bias (H * 3,): each head's value vector times the weights of each axis, as one map."""
        H, D = self.num_heads, self.value.in_features
        # In bfloat16 the product of the two maps would be rounded once more than each of them.
        with torch.autocast(self.value.weight.device.type, enabled=False):
            axes = at_least_float32(self.axes.weight).view(3, H, -1).transpose(0, 1)
            weight = axes @ at_least_float32(self.value.weight).view(H, -1, D)
            bias = axes @ at_least_float32(self.value.bias).view(H, -1, 1)
            dtype = self.value.weight.dtype
            return weight.flatten(0, 1).to(dtype), bias.flatten().to(dtype)


def _split_heads(features: Tensor, num_heads: int) -> Tensor:
    return features.view(*features.shape[:-1], num_heads, -1)


class _NoiseByKernel(torch.autograd.Function):
    """The sums over atoms by Triton kernels; the gradient of the pair bias goes to the tensor that the blocks share."""

    @staticmethod
    def forward(
        ctx: Any,
        mapped: Tensor,
        bias: Tensor,
        shared: SharedBias,
        displacement: Tensor,
        batch: MoleculeBatch,
        probability: float,
    ) -> Tensor:
        from moleblend_ray.model.denoising_kernels import denoising_forward

        seed = torch.randint(LARGEST_SEED, (1,), device=mapped.device)
        molecules = batch.graph_token, batch.num_atoms
        ctx.save_for_backward(mapped, bias, displacement, *molecules, seed)
        ctx.shared, ctx.groups, ctx.probability = shared, batch.size_groups, probability
        return denoising_forward(
            mapped, bias, displacement, *molecules, batch.size_groups, seed, probability
        )

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        from moleblend_ray.model.denoising_kernels import denoising_backward

        mapped, bias, displacement, first_token, num_atoms, seed = ctx.saved_tensors
        grad_mapped = denoising_backward(
            grad_output.contiguous(),
            mapped,
            bias,
            displacement,
            first_token,
            num_atoms,
            ctx.groups,
            seed,
            ctx.probability,
            ctx.shared.accumulator(),
        )
        return grad_mapped, None, None, None, None, None
