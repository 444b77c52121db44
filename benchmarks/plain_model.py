"""The model as one would write it first: everything padded, attention in separate steps, pair heads by outer products.

For comparison only. It uses the parameters of a :class:`MoleBlendModel`, so both give the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.blending import Blend
from moleblend_ray.model.encoder import Block
from moleblend_ray.model.heads import PairHead
from moleblend_ray.model.moleblend import MoleBlendModel, MoleBlendOutput
from moleblend_ray.model.pair_bias import attention_bias
from moleblend_ray.model.token_embedding import embed_tokens


class PlainModel(nn.Module):
    """Has the parameters of ``model`` and makes the same predictions."""

    def __init__(self, model: MoleBlendModel) -> None:
        super().__init__()
        if model.config.dropout:
            raise ValueError("the plain model knows no dropout of tokens and branches")
        self.model = model

    def forward(self, batch: MoleculeBatch, blend: Blend) -> MoleBlendOutput:
        model, encoder = self.model, self.model.encoder
        geometry = encoder.geometry(batch, batch.positions + blend.noise)
        bias = attention_bias(batch, blend, encoder.topology, geometry.bias)
        tokens = batch.pad_tokens(
            embed_tokens(batch, blend, encoder.atoms, geometry, encoder.input_norm)
        )
        rates = torch.linspace(0.0, encoder.drop_path, len(encoder.layers)).tolist()
        for layer, rate in zip(encoder.layers, rates, strict=True):
            assert isinstance(layer, Block)
            tokens = plain_block(layer, tokens, bias, rate)
        padded = tokens[:, 1:]
        packed = batch.pack_atoms(padded)
        return MoleBlendOutput(
            tokens=batch.pack_tokens(tokens),
            spd=plain_head(model.spd_head, padded),
            edge=plain_head(model.edge_head, padded),
            direction=None
            if model.direction_head is None
            else plain_head(model.direction_head, padded),
            distance=None
            if model.distance_head is None
            else plain_head(model.distance_head, padded),
            noise=model.denoising_head(packed, bias, geometry.displacement, batch),
            environments=None
            if model.environment_head is None
            else model.environment_head(tokens[:, 0]),
            descriptors=None
            if model.descriptor_head is None
            else model.descriptor_head(tokens[:, 0]),
        )


def plain_block(layer: Block, tokens: Tensor, bias: Tensor, drop_path: float) -> Tensor:
    """(B, T, D) -> (B, T, D)."""
    branch = with_drop_path(plain_attention(layer, tokens, bias), drop_path, layer.training)
    tokens = layer.attention_norm(tokens + branch)
    hidden = F.gelu(layer.ffn_in(tokens))
    hidden = F.dropout(hidden, layer.activation_dropout, layer.training)
    output: Tensor = layer.ffn_norm(
        tokens + with_drop_path(layer.ffn_out(hidden), drop_path, layer.training)
    )
    return output


def plain_attention(layer: Block, tokens: Tensor, bias: Tensor) -> Tensor:
    attention = layer.attention
    B, T, _ = tokens.shape
    split = attention.qkv(tokens).view(B, T, 3, bias.shape[1], -1).permute(2, 0, 3, 1, 4)
    query, key, value = split
    score = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + bias
    weight = F.dropout(torch.softmax(score, -1), attention.dropout, layer.training)
    output: Tensor = attention.out((weight @ value).transpose(1, 2).flatten(2))
    return output


def with_drop_path(branch: Tensor, drop_path: float, training: bool) -> Tensor:
    if not training or drop_path == 0.0:
        return branch
    kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= drop_path
    return branch * kept / (1.0 - drop_path)


def plain_head(head: PairHead, atoms: Tensor) -> Tensor:
    """(B, N, D) -> (B, N, N, ...)."""
    row = head.row_norm(F.gelu(head.row(atoms)))
    column = head.column_norm(F.gelu(head.column(atoms)))
    products = (row[:, :, None, :, None] * column[:, None, :, None, :]).flatten(3)
    output = F.linear(products, head.weight.flatten(1), head.bias)
    return output.view(*output.shape[:3], *head.output_shape)
