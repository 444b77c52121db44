"""The tokens that enter the first block: the sum of what each atom shows, then LayerNorm.

Shape legend: B molecules, N atoms (padded), A real atoms packed, S = A + B real tokens packed, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.blending import AtomFeature, Blend
from moleblend_ray.model.embeddings import (
    MERGED_DISTANCE_SCALE,
    AtomEmbedding,
    GeometryFeatures,
)
from moleblend_ray.model.fused import kernels_fit
from moleblend_ray.model.precision import product_type


def embed_tokens(
    batch: MoleculeBatch,
    blend: Blend | None,
    embedding: AtomEmbedding,
    geometry: GeometryFeatures,
    norm: nn.LayerNorm,
) -> Tensor:
    """(S, D) tokens: LayerNorm of the categories of each atom plus the features that ``blend`` shows (None: both).

    On a GPU they have the type of matrix products.
    """
    shown = {
        AtomFeature.DEGREE: batch.atom_mask,
        AtomFeature.GEOMETRY: geometry.atoms,
    }
    if blend is not None:
        shown = {feature: mask & blend.shows_atom(feature) for feature, mask in shown.items()}
    if kernels_fit(geometry.merged):
        bits = sum(mask.to(torch.uint8) << feature for feature, mask in shown.items())
        by_kernel: Tensor = _EmbedTokens.apply(  # type: ignore[no-untyped-call]
            embedding.categories.weight,
            embedding.degree.weight,
            embedding.graph_token,
            geometry.merged,
            norm.weight,
            norm.bias,
            norm.eps,
            batch,
            embedding.offsets,
            bits,
        )
        return by_kernel
    categories, degree = embedding(batch)
    merged = (geometry.merged * MERGED_DISTANCE_SCALE).to(degree.dtype)
    parts = {AtomFeature.DEGREE: degree, AtomFeature.GEOMETRY: merged}
    atoms = categories
    for feature, mask in shown.items():
        atoms = atoms + torch.where(batch.pack_atoms(mask)[:, None], parts[feature], 0.0)
    graph = embedding.graph_token.to(atoms.dtype).expand(batch.num_molecules, -1)
    tokens: Tensor = atoms.new_zeros(len(batch.token_index), atoms.shape[1])
    tokens = tokens.index_copy(0, batch.graph_token, graph).index_copy(0, batch.atom_token, atoms)
    normalized: Tensor = norm(tokens)
    return normalized


class _EmbedTokens(torch.autograd.Function):
    """The same by Triton kernels: tables are read once for each token, and tokens are written once."""

    @staticmethod
    def forward(
        ctx: Any,
        categories: Tensor,
        degree: Tensor,
        graph_token: Tensor,
        merged: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        epsilon: float,
        batch: MoleculeBatch,
        offsets: Tensor,
        shown: Tensor,
    ) -> Tensor:
        from moleblend_ray.model.token_embedding_kernels import TokenRelations, embed_forward

        relations = TokenRelations(
            features=batch.atom_features,
            degrees=batch.degrees,
            shown=shown,
            molecule=batch.token_molecule,
            first_token=batch.graph_token,
            offsets=offsets,
        )
        output, embedded, statistics = embed_forward(
            categories,
            degree,
            graph_token,
            merged,
            norm_weight,
            norm_bias,
            epsilon,
            MERGED_DISTANCE_SCALE,
            relations,
            product_type(merged),
        )
        ctx.save_for_backward(*relations, embedded, norm_weight, statistics)
        given = categories, degree, graph_token, merged, norm_weight, norm_bias
        ctx.kinds = [(values.shape, values.dtype) for values in given]
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        from moleblend_ray.model.token_embedding_kernels import TokenRelations, embed_backward

        *relations, embedded, norm_weight, statistics = ctx.saved_tensors
        shapes, dtypes = zip(*ctx.kinds, strict=True)
        found = embed_backward(
            grad_output.contiguous(),
            embedded,
            norm_weight,
            statistics,
            MERGED_DISTANCE_SCALE,
            TokenRelations(*relations),
            num_rows=(shapes[0][0], shapes[1][0]),
            merged_type=dtypes[3],
        )
        gradients = (
            gradient.view(shape).to(dtype)
            for gradient, shape, dtype in zip(found, shapes, dtypes, strict=True)
        )
        return *gradients, None, None, None, None
