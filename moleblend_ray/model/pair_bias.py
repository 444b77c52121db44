"""The attention bias of all blocks: that of the visible relations of each atom pair, and of the graph token's links.

Shape legend: B molecules, N atoms (padded), T = N + 1 tokens (graph token first), H heads, L hops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.blending import Blend, Relation
from moleblend_ray.model.embeddings import TopologyBias
from moleblend_ray.model.fused import kernels_fit
from moleblend_ray.model.precision import at_least_float32


def pair_bias_kernel_fits(geometry: Tensor) -> bool:
    """True if the Triton kernels can compute the bias from ``geometry`` (B, N, N, H)."""
    if not kernels_fit(geometry):
        return False
    # Needs Triton, which CPU builds of PyTorch lack.
    from moleblend_ray.model.pair_bias_kernels import MAX_HEADS

    return geometry.shape[-1] <= MAX_HEADS


def attention_bias(
    batch: MoleculeBatch, blend: Blend | None, topology: TopologyBias, geometry: Tensor
) -> Tensor:
    """(B, H, T, T) float32 attention bias, -inf in padding columns.

    For atom pairs it is the sum of ``geometry`` (B, N, N, H) and the biases of ``topology``, each where ``blend`` shows
    it (None: everywhere); for the graph token's links it is the virtual distance.
    """
    if pair_bias_kernel_fits(geometry):
        output: Tensor = _PairBias.apply(  # type: ignore[no-untyped-call]
            topology.spd.weight,
            topology.hop_table(batch.path_codes.shape[-1]),
            geometry,
            topology.virtual_distance,
            batch,
            None if blend is None else blend.shown_relations(),
        )
        return output
    pairs = _blended(batch, blend, topology, at_least_float32(geometry))
    bias: Tensor = F.pad(pairs, (0, 0, 1, 0, 1, 0))
    T = bias.shape[1]
    token = torch.arange(T, device=bias.device)
    border = (token[:, None] == 0) | (token[None, :] == 0)
    bias = bias + border[..., None] * at_least_float32(topology.virtual_distance)
    padding_column = token > batch.num_atoms[:, None]
    bias = bias.masked_fill(padding_column[:, None, :, None], float("-inf"))
    return bias.permute(0, 3, 1, 2).contiguous()


def _blended(
    batch: MoleculeBatch, blend: Blend | None, topology: TopologyBias, geometry: Tensor
) -> Tensor:
    """(B, N, N, H) float32 bias of the atom pairs."""
    spd, edge = (
        at_least_float32(topology.spd_bias(batch)),
        at_least_float32(topology.edge_bias(batch)),
    )
    if blend is None:
        return spd + edge + geometry
    if blend.view is None:
        choice = blend.pair_choice[..., None]
        graph = torch.where(choice == Relation.SPD, spd, edge)
        return torch.where(choice == Relation.GEOMETRY, geometry, graph)
    shown = [blend.shows_pair(relation)[..., None] for relation in Relation]
    return spd * shown[0] + edge * shown[1] + geometry * shown[2]


class _PairBias(torch.autograd.Function):
    """The same by Triton kernels: each pair is read once and written once, in the layout that the blocks read.

    PyTorch's operations would pass a dozen times over tensors of this size.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spd_table: Tensor,
        hop_table: Tensor,
        geometry: Tensor,
        virtual: Tensor,
        batch: MoleculeBatch,
        shown: Tensor | None,
    ) -> Tensor:
        from moleblend_ray.model.pair_bias_kernels import pair_bias_forward

        relations = batch.spd, batch.path_codes, shown, batch.num_atoms
        ctx.save_for_backward(*relations)
        given = spd_table, hop_table, geometry, virtual
        ctx.kinds = [(values.shape, values.dtype) for values in given]
        return pair_bias_forward(*relations, spd_table, hop_table, geometry.contiguous(), virtual)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        from moleblend_ray.model.pair_bias_kernels import pair_bias_backward

        shapes, dtypes = zip(*ctx.kinds, strict=True)
        found = pair_bias_backward(
            grad_output,
            *ctx.saved_tensors,
            num_rows=(shapes[0][0], shapes[1][0]),
            dtype=dtypes[2],
        )
        gradients = (gradient.to(dtype) for gradient, dtype in zip(found, dtypes, strict=True))
        return *gradients, None, None
