"""Ways to compute a pair head: time of forward and backward pass, and memory that each keeps for the backward pass.

    python benchmarks/heads.py [--batch 64] [--outputs 125] [--device cpu|cuda] [--dtype fp32|bf16]

- ``bilinear``: what `PairHead.combine` does: the weight times the column vectors, then row vectors times the result; on a GPU
  the row vectors first.
- ``by_size``: the same for molecules of one size at a time, without padding.
- ``outer_product``: the (B, N, N, P * P) product of both vectors, then one linear map, as in the paper's formula.
- ``factor_by_output``: one matrix product for each output between row vectors and weighted column vectors.

All ways are first checked against each other. ``saved_mib`` is what autograd keeps for the backward pass. On a GPU,
``edge_loss_ms`` is the time of the head of bonds with its cross entropy: by the kernels that write no logits (``form``), which
training uses there, and by logits. Molecules are synthetic, with the sizes of PCQM4Mv2. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial

import torch
from synthetic_molecules import synthetic_block
from torch import Tensor

from moleblend_ray.data.batches.batch import build_micro_batches
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.config import LossConfig, ModelConfig
from moleblend_ray.model.heads import PairForm, PairHead, predict_classes
from moleblend_ray.model.losses import edge_targets, weighted_cross_entropy
from moleblend_ray.training.host_memory import keep_freed_memory
from moleblend_ray.training.throughput import MATRIX_TYPES, seconds_of
from moleblend_ray.vocabulary import NUM_HOPS

REPEATS = 15

Way = Callable[[PairHead, Tensor, Tensor, MoleculeBatch], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--outputs", type=int, default=125)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=list(MATRIX_TYPES), default="fp32")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), MATRIX_TYPES[arguments.dtype]
    if device.type == "cpu":
        keep_freed_memory()  # as the trainer does
    torch.manual_seed(0)
    (micro,) = build_micro_batches(synthetic_block(arguments.batch), 0, 0, arguments.batch)
    batch = MoleculeBatch.from_micro_batch(micro, device)
    head = PairHead(ModelConfig(), (arguments.outputs,)).to(device, dtype)
    row, column = (
        torch.randn(len(batch.atom_index), head.weight.shape[1], device=device, dtype=dtype)
        for _ in range(2)
    )
    check(head, row, column, batch)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    # In turn, so that a slow moment of the machine affects all of them.
    for _ in range(REPEATS):
        for name, way in WAYS.items():
            seconds[name].append(
                seconds_of(partial(both_passes, way, head, row, column, batch), device)
            )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = medians["bilinear"]
    print(
        json.dumps(
            {
                "benchmark": "heads",
                "batch": arguments.batch,
                "outputs": arguments.outputs,
                "device": arguments.device,
                "dtype": arguments.dtype,
                "ways": {
                    name: {
                        "ms": round(1e3 * medians[name], 2),
                        "times_chosen": round(medians[name] / fastest, 2),
                        "saved_mib": round(saved_bytes(way, head, row, column, batch) / 2**20, 1),
                    }
                    for name, way in WAYS.items()
                },
                "chosen": "bilinear",
                "edge_loss_ms": edge_loss_ms(batch, device, dtype),
            }
        )
    )


def edge_loss_ms(
    batch: MoleculeBatch, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Milliseconds of both passes of the head of bonds and its loss; empty where there are no kernels for them."""
    config = ModelConfig()
    head = PairHead(config, (NUM_HOPS, config.num_edge_classes)).to(device, dtype)
    maps = torch.randn(2, len(batch.atom_index), config.pair_dim, device=device, dtype=dtype)
    if not isinstance(predict_classes(head, maps[0], maps[1], batch), PairForm):
        return {}
    target, weight = edge_targets(batch, LossConfig()), batch.pair_mask.float()

    def run(predict: Callable[..., Tensor | PairForm]) -> None:
        row, column = (one.detach().requires_grad_() for one in maps)
        torch.autograd.backward(weighted_cross_entropy(predict(row, column, batch), target, weight))
        head.zero_grad()

    ways = {"form": partial(run, head.form), "logits": partial(run, head)}
    for way in ways.values():
        way()  # kernels are compiled
    seconds = {
        name: [seconds_of(way, device) for _ in range(REPEATS)] for name, way in ways.items()
    }
    return {name: round(1e3 * statistics.median(values), 2) for name, values in seconds.items()}


def bilinear(head: PairHead, row: Tensor, column: Tensor, batch: MoleculeBatch) -> Tensor:
    return head.combine(row, column, batch)


def by_size(head: PairHead, row: Tensor, column: Tensor, batch: MoleculeBatch) -> Tensor:
    C, P, _ = head.weight.shape
    B, N = batch.num_molecules, batch.max_atoms
    contracted = column @ head.weight.permute(2, 1, 0).flatten(1)
    output = row.new_zeros(B, N, N, C)
    begin = first = 0
    # Molecules are ordered by size, so those of one size are neighbours.
    sizes, counts = torch.unique_consecutive(batch.num_atoms.cpu(), return_counts=True)
    for n, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        atoms = slice(begin, begin + n * count)
        left = row[atoms].view(count, n, P)
        right = contracted[atoms].view(count, n, P, C).transpose(1, 2).flatten(2)
        output[first : first + count, :n, :n] = torch.bmm(left, right).view(count, n, n, C)
        begin, first = begin + n * count, first + count
    return output + head.bias


def outer_product(head: PairHead, row: Tensor, column: Tensor, batch: MoleculeBatch) -> Tensor:
    rows, columns = batch.pad_atoms(row), batch.pad_atoms(column)
    products = (rows[:, :, None, :, None] * columns[:, None, :, None, :]).flatten(3)
    return products @ head.weight.flatten(1).T + head.bias


def factor_by_output(head: PairHead, row: Tensor, column: Tensor, batch: MoleculeBatch) -> Tensor:
    rows, columns = batch.pad_atoms(row), batch.pad_atoms(column)
    weighted = torch.einsum("crp,bnp->bcnr", head.weight, columns)
    return (rows[:, None] @ weighted.transpose(2, 3)).permute(0, 2, 3, 1) + head.bias


WAYS: dict[str, Way] = {
    "bilinear": bilinear,
    "by_size": by_size,
    "outer_product": outer_product,
    "factor_by_output": factor_by_output,
}


def check(head: PairHead, row: Tensor, column: Tensor, batch: MoleculeBatch) -> None:
    expected = bilinear(head, row, column, batch)[batch.pair_mask]
    for name, way in WAYS.items():
        found = way(head, row, column, batch)[batch.pair_mask]
        if not torch.allclose(found, expected, rtol=3e-2, atol=3e-2):
            raise AssertionError(f"{name} differs by {(found - expected).abs().max()}")


def both_passes(
    way: Way, head: PairHead, row: Tensor, column: Tensor, batch: MoleculeBatch
) -> None:
    row, column = row.detach().requires_grad_(), column.detach().requires_grad_()
    torch.autograd.backward(way(head, row, column, batch).sum())
    head.zero_grad()


def saved_bytes(way: Way, head: PairHead, row: Tensor, column: Tensor, batch: MoleculeBatch) -> int:
    """Bytes of the distinct memory that autograd keeps."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held.append(way(head, row.detach().requires_grad_(), column.detach(), batch))
    return sum(kept.values())


if __name__ == "__main__":
    main()
