"""Attention with a bias for each pair: ways to compute the same numbers, forward and backward.

    python benchmarks/attention.py [--batch 64] [--device cpu|cuda] [--dtype fp32|bf16]

Inputs are packed queries, keys and values (S, 3 * D), at the width of the preset ``base``, and a bias (B, H, T, T) with
a gradient; outputs (S, D) are packed, too.

- ``gathered_rows``: rows of each head gathered from the packed tokens, batched products, derivative written by hand:
  what `model/attention.py` does on a CPU.
- ``packed_kernels``: one Triton program for each head of a molecule, from packed tokens to packed outputs, with the
  gradients of the bias of all blocks added up in place: what it does on a GPU (GPU only).
- ``padded_fused``: `scaled_dot_product_attention` on the rectangle.
- ``padded_products``: batched products and a softmax on the rectangle.
- ``by_size``: the fused call for molecules of one size at a time, without padding.
- ``packed_block_mask``: one sequence of all tokens, other molecules masked out.
- ``flex``: FlexAttention, compiled (GPU only).

All ways are first checked against each other. Molecules are synthetic, with the sizes of PCQM4Mv2. The last line of the
output is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from synthetic_molecules import synthetic_block
from torch import Tensor

from moleblend_ray.data.batches.batch import build_micro_batches
from moleblend_ray.model.attention import (
    HeadRows,
    SharedBias,
    attend_by_rows,
    attend_fused,
    attend_packed,
    attend_padded,
    head_rows,
)
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.training.host_memory import keep_freed_memory
from moleblend_ray.training.throughput import MATRIX_TYPES, seconds_of

REPEATS = 15
CHOSEN = {"cpu": "gathered_rows", "cuda": "packed_kernels"}
ON_GPU = ("flex", "packed_kernels")


@dataclass(frozen=True, kw_only=True)
class Case:
    """The input of attention."""

    qkv: Tensor
    """(S, 3 * D)."""
    bias: Tensor
    """(B, H, T, T), -inf in padding columns."""
    batch: MoleculeBatch
    rows: HeadRows
    num_heads: int

    def split(self, padded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, 3 * D) -> three (B, H, T, D / H)."""
        parts = padded.view(*padded.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return parts[0], parts[1], parts[2]

    def pack(self, attended: Tensor) -> Tensor:
        return self.batch.pack_tokens(attended.transpose(1, 2).flatten(2))


Way = Callable[[Case], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=list(MATRIX_TYPES), default="fp32")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        keep_freed_memory()  # as the trainer does
    torch.manual_seed(0)
    case = new_case(arguments.batch, device, MATRIX_TYPES[arguments.dtype])
    ways = {name: way for name, way in WAYS.items() if name not in ON_GPU or device.type == "cuda"}
    check(case, ways)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    # In turn, so that a slow moment of the machine affects all of them.
    for _ in range(REPEATS):
        for name, way in ways.items():
            seconds[name].append(seconds_of(partial(both_passes, way, case), device))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    chosen = CHOSEN[device.type]
    print(
        json.dumps(
            {
                "benchmark": "attention",
                "batch": arguments.batch,
                "tokens": len(case.qkv),
                "padded_tokens": case.bias.shape[0] * case.bias.shape[2],
                "device": arguments.device,
                "dtype": arguments.dtype,
                "ways": {
                    name: {
                        "ms": round(1e3 * median, 2),
                        "times_chosen": round(median / medians[chosen], 2),
                    }
                    for name, median in medians.items()
                },
                "chosen": chosen,
            }
        )
    )


def new_case(num_molecules: int, device: torch.device, dtype: torch.dtype) -> Case:
    config = ModelConfig()
    (micro,) = build_micro_batches(synthetic_block(num_molecules), 0, 0, num_molecules)
    batch = MoleculeBatch.from_micro_batch(micro, device)
    T = batch.max_atoms + 1
    bias = torch.randn(num_molecules, config.num_heads, T, T, device=device)
    padding = torch.arange(T, device=device) > batch.num_atoms[:, None]
    return Case(
        qkv=torch.randn(len(batch.token_index), 3 * config.dim, device=device, dtype=dtype),
        bias=bias.masked_fill(padding[:, None, None, :], -math.inf),
        batch=batch,
        rows=head_rows(batch, config.num_heads),
        num_heads=config.num_heads,
    )


def gathered_rows(case: Case) -> Tensor:
    return attend_by_rows(case.qkv, case.bias, case.rows)


def packed_kernels(case: Case) -> Tensor:
    with torch.autocast(case.qkv.device.type, dtype=case.qkv.dtype):
        shared = SharedBias(case.bias)
    seed = torch.zeros(1, dtype=torch.int64, device=case.qkv.device)
    linear_bias = torch.zeros(case.qkv.shape[1], device=case.qkv.device)
    return attend_packed(case.qkv, linear_bias, shared, case.batch, seed)


def padded_fused(case: Case) -> Tensor:
    return attend_padded(case.qkv, case.bias, case.batch)


def padded_products(case: Case) -> Tensor:
    query, key, value = (part.flatten(0, 1) for part in case.split(case.batch.pad_tokens(case.qkv)))
    bias = case.bias.to(query.dtype)
    score = torch.baddbmm(
        bias.flatten(0, 1), query, key.transpose(1, 2), alpha=query.shape[-1] ** -0.5
    )
    attended = torch.bmm(torch.softmax(score, -1), value)
    return case.pack(attended.view(*bias.shape[:3], -1))


def by_size(case: Case) -> Tensor:
    # Molecules are ordered by size, so those of one size are neighbours.
    sizes, counts = torch.unique_consecutive(case.batch.num_atoms.cpu(), return_counts=True)
    outputs = []
    begin = first = 0
    for tokens, count in zip((sizes + 1).tolist(), counts.tolist(), strict=True):
        part = case.qkv[begin : begin + tokens * count].view(count, tokens, -1)
        query, key, value = case.split(part)
        mask = case.bias[first : first + count, :, :tokens, :tokens].to(query.dtype)
        attended = attend_fused(query, key, value, mask)
        outputs.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
        begin, first = begin + tokens * count, first + count
    return torch.cat(outputs)


def packed_block_mask(case: Case) -> Tensor:
    batch, T = case.batch, case.bias.shape[-1]
    molecule = batch.token_molecule
    place = batch.token_index - molecule * T
    same = molecule[:, None] == molecule[None, :]
    bias = case.bias[molecule[:, None], :, place[:, None], place[None, :]].permute(2, 0, 1)
    mask = bias.masked_fill(~same, -math.inf).to(case.qkv.dtype)
    query, key, value = case.split(case.qkv[None])
    attended = attend_fused(query, key, value, mask[None])
    return attended[0].transpose(0, 1).flatten(1)


def flex(case: Case) -> Tensor:
    query, key, value = case.split(case.batch.pad_tokens(case.qkv))
    bias = case.bias

    def add_bias(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + bias[b, h, q, k]

    return case.pack(compiled_flex()(query, key, value, score_mod=add_bias))


@lru_cache
def compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


WAYS: dict[str, Way] = {
    "gathered_rows": gathered_rows,
    "packed_kernels": packed_kernels,
    "padded_fused": padded_fused,
    "padded_products": padded_products,
    "by_size": by_size,
    "packed_block_mask": packed_block_mask,
    "flex": flex,
}


def check(case: Case, ways: dict[str, Way]) -> None:
    expected = padded_fused(case)
    for name, way in ways.items():
        found = way(case)
        if not torch.allclose(found, expected, rtol=3e-2, atol=3e-2):
            raise AssertionError(f"{name} differs by {(found - expected).abs().max()}")


def both_passes(way: Way, case: Case) -> None:
    case.qkv.requires_grad_()
    case.bias.requires_grad_()
    torch.autograd.backward(way(case).sum())
    case.qkv.grad = case.bias.grad = None


if __name__ == "__main__":
    main()
