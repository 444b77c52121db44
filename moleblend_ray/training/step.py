"""One update of a model from the micro-batches of a step: read :func:`train_step` first."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moleblend_ray.data.batches.batch import MicroBatch, StepBatch
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.blending import Blend
from moleblend_ray.model.device import seed_generators
from moleblend_ray.model.flops import TRAINING_FACTOR, pretraining_flops
from moleblend_ray.model.losses import LOSS_NAMES, count_other_bonds
from moleblend_ray.training.anomalies import Anomaly, NotFiniteError, finite
from moleblend_ray.training.distributed import gradient_sync
from moleblend_ray.training.learner import Learner, named_losses
from moleblend_ray.training.metrics import Record, is_loss
from moleblend_ray.training.mixed_precision import autocast
from moleblend_ray.training.optim import (
    clip_gradients,
    gradient_norm,
    learning_rate,
    set_learning_rate,
)
from moleblend_ray.training.prefetch import DeviceStep
from moleblend_ray.training.ranks import Ranks, gather_from_ranks, sum_over_ranks

_GOLDEN_RATIO: Final = np.uint64(0x9E3779B97F4A7C15)

_TOTAL: Final = 0
"""Place of the loss of the step among its numbers."""

_SIZES: Final = 7
"""Numbers of :func:`_sizes`."""


def train_step(learner: Learner, step: DeviceStep, *, stop: bool = False) -> tuple[Record, bool]:
    """One update from this rank's micro-batches; the step's numbers, and whether any rank has asked to ``stop``.

    A loss or gradient that is not finite raises on all ranks, and nothing is changed: the update skips itself. It is
    queued before the host reads the step's numbers, as a GPU would wait for it otherwise.
    """
    batch = step.batch
    parts = list(zip(step.molecules, step.blends, strict=True))
    # A copy: the sum is made in place, and who takes the same step again must find this rank's counts.
    counts = sum_over_ranks(step.counts.clone())
    losses = [
        _backward(learner, micro, part, counts, is_last=index == len(parts) - 1)
        for index, (micro, part) in enumerate(zip(batch.micro_batches, parts, strict=True))
    ]
    sizes = _sizes(learner, batch, [part[0] for part in parts], stop=stop)
    totals = sum_over_ranks(torch.cat([_sum_of(losses), sizes]))
    parameters = list(learner.model.parameters())
    norm = gradient_norm(parameters)
    bad = ~(totals[_TOTAL].isfinite() & norm.isfinite())
    read = _start_reading(torch.cat([totals, counts, norm.double().view(1), bad.double().view(1)]))
    clip_gradients(parameters, norm, learner.optim.clip_norm)
    set_learning_rate(
        learner.optimizer, learning_rate(batch.step, learner.optim, learner.train.num_steps)
    )
    learner.optimizer.step(skip=bad.float())
    learner.optimizer.zero_grad()
    record, stop, is_bad = _record(learner, batch.step, read())
    if is_bad:
        _raise_not_finite(learner, batch, losses, record, stop=stop)
    return record, stop


def _backward(
    learner: Learner,
    micro: MicroBatch,
    part: tuple[MoleculeBatch, Blend],
    counts: Tensor,
    *,
    is_last: bool,
) -> Tensor:
    """Add this micro-batch's gradient; (8,) float64 its part of the loss of the step, and its loss sums, detached."""
    # Dropout belongs to the micro-batch, wherever and whenever it is computed.
    seed_generators(dropout_seed(learner.seed, micro), learner.ranks.device)
    reshard = learner.train.fsdp_reshard
    with gradient_sync(learner.objective, enabled=is_last, reshard=reshard):
        with autocast(learner.train.precision, learner.ranks.device):
            loss, sums = learner.objective(*part, counts)
        loss.backward()
    return torch.cat([loss.detach().double().view(1), sums])


def dropout_seed(seed: int, micro: MicroBatch) -> int:
    """Seed of torch's generator for one micro-batch, the same at any world size and after any restart."""
    key = f"{seed}/{micro.step}/{micro.stream}/{micro.index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def _sum_of(tensors: list[Tensor]) -> Tensor:
    """Elementwise sum of tensors of one shape."""
    return torch.stack(tensors).sum(0)


def _sizes(learner: Learner, batch: StepBatch, parts: list[MoleculeBatch], *, stop: bool) -> Tensor:
    """(7,) float64: molecules, atoms, atom slots with padding, FLOPs, checksum, 1 if a stop is asked for, ignored bonds."""
    forward = pretraining_flops(learner.model.config)
    host = [
        sum(part.num_molecules for part in parts),
        sum(len(part.atom_index) for part in parts),
        sum(part.num_molecules * part.max_atoms for part in parts),
        TRAINING_FACTOR * sum(forward.of(m.num_atoms).sum() for m in batch.micro_batches),
        sum(molecules_checksum(micro.molecule_ids) for micro in batch.micro_batches),
        int(stop),
    ]
    sizes = _on_device([*host, 0], learner.ranks.device)
    if learner.loss.ignore_other_bonds:
        sizes[-1] = _sum_of([count_other_bonds(part) for part in parts])
    return sizes


def _on_device(values: list[float], device: torch.device) -> Tensor:
    """float64 tensor of numbers of the host, which does not wait for the device."""
    pinned = device.type == "cuda"
    return torch.tensor(values, dtype=torch.float64, pin_memory=pinned).to(
        device, non_blocking=True
    )


def molecules_checksum(molecule_ids: NDArray[np.int64]) -> int:
    """Sum of a 32-bit hash of each id: exact in float64 for batches up to 2 million, the same in any order."""
    hashes = (molecule_ids.astype(np.uint64) * _GOLDEN_RATIO) >> np.uint64(32)
    return int(hashes.sum())


def _start_reading(values: Tensor) -> Callable[[], Tensor]:
    """Begin to copy ``values`` to the host. The result waits for the copy, but not for what is queued behind it."""
    if values.device.type != "cuda":
        return lambda: values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait


def _record(learner: Learner, step: int, values: Tensor) -> tuple[Record, bool, bool]:
    """The step's numbers from sums over all ranks, whether a stop is asked for, and whether the update was skipped."""
    _, sums, sizes, counted, last = torch.split(
        values, [1, len(LOSS_NAMES), _SIZES, len(LOSS_NAMES), 2]
    )
    molecules, atoms, slots, flops, checksum, stops, ignored = sizes.tolist()
    grad_norm, bad = last.tolist()
    record: Record = {
        "step": step,
        **named_losses(learner, sums, counted),
        "learning_rate": learning_rate(step, learner.optim, learner.train.num_steps),
        "grad_norm": grad_norm,
        "molecules": int(molecules),
        "atoms": int(atoms),
        "molecules_checksum": int(checksum),
        "padding_share": 1.0 - atoms / slots,
        "model_flops": flops,
    }
    if learner.loss.ignore_other_bonds:
        record["other_bonds"] = int(ignored)
    return record, stops > 0, bad > 0


def _raise_not_finite(
    learner: Learner, batch: StepBatch, losses: list[Tensor], record: Record, *, stop: bool
) -> NoReturn:
    """Name the molecules whose loss is not finite, from all ranks; if there are none, the gradient alone broke."""
    broken = [not bool(torch.isfinite(sums).all()) for sums in losses]
    suspects = micro_batches_of_ranks(learner.ranks, batch, broken)
    found = [suspect["molecule_ids"] for suspect in suspects]
    where = (
        f"in the micro-batches with molecule ids {found}"
        if found
        else "though every micro-batch's loss is finite: the gradient overflowed"
    )
    heads = {name: value for name, value in record.items() if is_loss(name)}
    detail = (
        f"step {batch.step}: loss or gradient is not finite ({heads}, grad_norm {record['grad_norm']}) {where}. "
        "The model was not changed. Look at these molecules, lower optim.learning_rate, use train.precision=fp32, "
        "or leave such steps out with train.on_non_finite=skip."
    )
    anomaly = Anomaly(
        step=batch.step,
        reason="non_finite",
        detail=detail,
        record=finite(record),
        micro_batches=tuple(suspects or micro_batches_of_ranks(learner.ranks, batch)),
    )
    raise NotFiniteError(anomaly, stop)


def micro_batches_of_ranks(
    ranks: Ranks, batch: StepBatch, chosen: Sequence[bool] | None = None
) -> list[dict[str, Any]]:
    """The micro-batches of every rank, for an :class:`Anomaly`; all ranks call this. ``chosen``: which of this rank's count
    (None: all)."""
    here = [
        {
            "rank": ranks.rank,
            "stream": micro.stream,
            "index": micro.index,
            "molecule_ids": micro.molecule_ids.tolist(),
        }
        for index, micro in enumerate(batch.micro_batches)
        if chosen is None or chosen[index]
    ]
    return [micro for of_rank in gather_from_ranks(here) for micro in of_rank]
