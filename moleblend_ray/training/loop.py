"""The training loop: read :func:`fit` first, then :func:`train_step`.

Everything random or ordered is a function of (seed, step, molecule or micro-batch), and the loss is normalised by counts
of the whole step. So a step gives the same numbers (up to rounding) at any number of ranks and after any restart.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moleblend_ray.data.batch import MicroBatch, StepBatch
from moleblend_ray.errors import TrainingError
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.blending import Blend, BlendConfig
from moleblend_ray.model.flops import TRAINING_FACTOR, pretraining_flops
from moleblend_ray.model.losses import (
    LOSS_NAMES,
    LossConfig,
    count_other_bonds,
    loss_means,
    pretraining_loss_sums,
    total_loss,
)
from moleblend_ray.model.moleblend import ModelConfig, MoleBlendModel
from moleblend_ray.training.anomalies import Anomaly, NotFiniteError, SpikeDetector, finite
from moleblend_ray.training.checkpoint import training_state
from moleblend_ray.training.config import OptimConfig, TrainConfig
from moleblend_ray.training.distributed import (
    Ranks,
    autocast,
    distribute,
    gather_from_ranks,
    gradient_sync,
    sum_over_ranks,
)
from moleblend_ray.training.host_memory import keep_freed_memory
from moleblend_ray.training.metrics import TOTAL_LOSS, Record, is_loss
from moleblend_ray.training.optim import (
    CutInvariantAdamW,
    build_optimizer,
    clip_gradients,
    gradient_norm,
    learning_rate,
    set_learning_rate,
)
from moleblend_ray.training.prefetch import DevicePrefetch, DeviceStep, prepare_step
from moleblend_ray.training.saving import CheckpointWriter
from moleblend_ray.training.throughput import Meter, compiled_graphs

logger = logging.getLogger(__name__)

_GOLDEN_RATIO: Final = np.uint64(0x9E3779B97F4A7C15)

_TOTAL: Final = 0
"""Place of the loss of the step among its numbers."""

_SIZES: Final = 7
"""Numbers of :func:`_sizes`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Learner:
    """A model in training, spread over the ranks, with all that decides its updates."""

    objective: nn.Module
    """Forward gives the losses; wrapped by FSDP or DDP."""
    model: MoleBlendModel
    """The model inside ``objective``."""
    optimizer: CutInvariantAdamW
    ranks: Ranks
    train: TrainConfig
    optim: OptimConfig
    blend: BlendConfig
    loss: LossConfig
    seed: int
    """Of initial weights, blends and dropout."""

    def prepare(self, batch: StepBatch) -> DeviceStep:
        """Copy a step to the device and make its random choices."""
        return prepare_step(
            batch, self.ranks.device, blend=self.blend, loss=self.loss, seed=self.seed
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """How far :func:`fit` came."""

    step: int
    """Steps done since the start of the run, all committed if there is a checkpoint writer."""
    stopped: bool
    """True if a stop was asked for before the last step."""


def ignore(*_: object) -> None:
    """What a hook does that is not given."""


def never() -> bool:
    """Ask for no stop."""
    return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """What :func:`fit` calls on the rank that gives them. Ranks may differ in their hooks."""

    report: Callable[[Record], None] = ignore
    """With the record of every ``log_every``-th step, of each validation and of the last step."""
    on_step: Callable[[Record], None] = ignore
    """With the record of every step."""
    after_step: Callable[[], None] = ignore
    """After each update, before it is validated or reported."""
    on_anomaly: Callable[[Anomaly], None] = ignore
    """With steps whose numbers are bad."""
    should_stop: Callable[[], bool] = never
    """Before each step; True on any rank makes this step the last of all ranks."""
    while_waiting: Callable[[float], None] = ignore
    """Each second while no step is ready, with the seconds so far; what it raises ends the run."""


class PretrainingObjective(nn.Module):
    """The model with its losses: one module, so that FSDP and DDP see plain tensors come out."""

    def __init__(self, model: MoleBlendModel, loss: LossConfig) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: MoleculeBatch, blend: Blend, counts: Tensor) -> tuple[Tensor, Tensor]:
        """() this micro-batch's part of the step's loss, and (7,) float64 its sums in order of LOSS_NAMES, detached."""
        sums = pretraining_loss_sums(self.model(batch, blend), batch, blend, self.loss)
        detached = torch.stack([sums[name].detach().double() for name in LOSS_NAMES])
        return total_loss(sums, counts, self.loss), detached


def build_learner(
    model: ModelConfig,
    *,
    train: TrainConfig,
    optim: OptimConfig,
    blend: BlendConfig,
    loss: LossConfig,
    seed: int,
    ranks: Ranks,
) -> Learner:
    """A new model, with the same weights at every world size, ready for its first step."""
    if ranks.device.type == "cpu":
        keep_freed_memory()
    with torch.device("meta"):
        new_model = MoleBlendModel(model)
    new_model.encoder.recompute_blocks(enabled=train.activation_checkpointing)
    if train.compile:
        new_model.encoder.compile_blocks()
    torch.manual_seed(seed)
    objective = distribute(
        PretrainingObjective(new_model, loss),
        new_model.encoder.layers,
        draw_weights=new_model.init_weights,
        strategy=train.strategy,
        precision=train.precision,
        ranks=ranks,
        replicas=train.fsdp_replicas,
        reshard=train.fsdp_reshard,
    )
    return Learner(
        objective=objective,
        model=new_model,
        optimizer=build_optimizer(new_model, optim),
        ranks=ranks,
        train=train,
        optim=optim,
        blend=blend,
        loss=loss,
        seed=seed,
    )


def fit(
    learner: Learner,
    steps: Iterator[StepBatch],
    *,
    start_step: int = 0,
    skipped_before: int = 0,
    checkpoints: CheckpointWriter | None = None,
    validate: Callable[[], Record] | None = None,
    hooks: Hooks = Hooks(),
) -> FitResult:
    """Train from ``start_step`` to the end of the run, or until a stop is asked for on any rank, which is committed too.

    ``steps`` yields this rank's share of each global batch. All ranks call this with the same settings. Records are
    committed with the checkpoints, and kept in memory no longer; ``checkpoints`` is closed at the end. ``data_wait_s`` of
    a record is the time in which no step was ready on the device. ``skipped_before`` steps count as skipped already.
    """
    num_steps = learner.train.num_steps
    uncommitted: list[Record] = []
    learner.objective.train()
    watch = _Watch(learner, hooks.on_anomaly, skipped_before)
    meter = Meter.of_device(learner.ranks.device, learner.train.precision, learner.ranks.world_size)
    ahead = DevicePrefetch(
        islice(steps, num_steps - start_step),
        learner.prepare,
        learner.ranks.device,
        learner.train.prefetch_steps,
        while_waiting=hooks.while_waiting,
    )
    with checkpoints or contextlib.nullcontext(), ahead:
        for step in range(start_step, num_steps):
            began_s = time.perf_counter()
            batch = _next_step(ahead, step, num_steps)
            data_wait_s = time.perf_counter() - began_s
            record, stop = watch.train_step(batch, hooks.should_stop())
            step_s = time.perf_counter() - began_s
            record |= {"step_s": step_s, "data_wait_s": data_wait_s, **meter.rates(record, step_s)}
            if learner.train.compile:
                record["compiled_graphs"] = compiled_graphs()
            hooks.after_step()
            done = step + 1
            is_last = done == num_steps
            # A stop is urgent; but after the last step no later command makes up for the validation.
            is_validated = validate is not None and (
                is_last or (_is_due(done, learner) and not stop)
            )
            if validate is not None and is_validated:
                record |= validate()
            hooks.on_step(record)
            if is_last or stop or is_validated or done % learner.train.log_every == 0:
                hooks.report(record)
            if checkpoints is not None:
                uncommitted.append(record)
                if is_last or stop or checkpoints.is_due(done):
                    state = training_state(learner.model, learner.optimizer)
                    checkpoints.commit(done, state, uncommitted)
                    uncommitted = []
            if stop and not is_last:
                logger.info("stopped after step %d of %d, as asked", done, num_steps)
                return FitResult(step=done, stopped=True)
    return FitResult(step=num_steps, stopped=False)


class _Watch:
    """Runs steps, leaves bad ones out if the settings say so, and tells of those and of losses out of line."""

    def __init__(self, learner: Learner, tell: Callable[[Anomaly], None], skipped: int) -> None:
        self._learner = learner
        self._tell = tell
        self._skipped = skipped
        self._spikes = SpikeDetector(learner.train.spike_deviations)

    def train_step(self, step: DeviceStep, stop: bool) -> tuple[Record, bool]:
        """As :func:`train_step`; a step that is left out has ``skipped_steps`` one higher, and lacks what was not finite."""
        learner = self._learner
        skips = learner.train.on_non_finite == "skip"
        try:
            record, stop = train_step(learner, step, stop=stop)
        except NotFiniteError as error:
            self._report(error.anomaly)
            if not skips:
                raise
            allowed = learner.train.max_skipped_steps
            if self._skipped >= allowed:
                detail = (
                    f"step {step.batch.step}: not finite again, and {self._skipped} steps were skipped already; "
                    f"train.max_skipped_steps allows {allowed}. Look at their molecules in anomalies/, lower "
                    "optim.learning_rate, or use train.precision=fp32."
                )
                raise NotFiniteError(replace(error.anomaly, detail=detail)) from error
            self._skipped += 1
            record, stop = dict(error.anomaly.record), error.stop
        else:
            if problem := self._spikes.update(float(record[TOTAL_LOSS])):
                self._report(self._spike(step.batch, record, problem))
        if skips or self._skipped:
            record["skipped_steps"] = self._skipped
        return record, stop

    def _spike(self, batch: StepBatch, record: Record, problem: str) -> Anomaly:
        # Every rank has the same losses, so all come here together.
        everything = [True] * len(batch.micro_batches)
        return Anomaly(
            step=batch.step,
            reason="spike",
            detail=f"step {batch.step}: {problem}",
            record=record,
            micro_batches=tuple(_on_all_ranks(self._learner, batch, everything)),
        )

    def _report(self, anomaly: Anomaly) -> None:
        if self._learner.ranks.is_first:
            logger.warning("%s", anomaly.detail)
        self._tell(anomaly)


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
    totals = sum_over_ranks(torch.cat([sum_of(losses), sizes]))
    parameters = list(learner.model.parameters())
    norm = gradient_norm(parameters)
    bad = ~(totals[_TOTAL].isfinite() & norm.isfinite())
    read = start_reading(torch.cat([totals, counts, norm.double().view(1), bad.double().view(1)]))
    clip_gradients(parameters, norm, learner.optim.clip_norm)
    set_learning_rate(
        learner.optimizer, learning_rate(batch.step, learner.optim, learner.train.num_steps)
    )
    learner.optimizer.step(skip=bad.float())
    learner.optimizer.zero_grad(set_to_none=True)
    record, stop, is_bad = _record(learner, batch.step, read())
    if is_bad:
        _raise_not_finite(learner, batch, losses, record, stop=stop)
    return record, stop


def _next_step(steps: Iterator[DeviceStep], step: int, num_steps: int) -> DeviceStep:
    found = next(steps, None)
    if found is None:
        raise TrainingError(f"the data stream ended before step {step} of {num_steps}")
    if found.batch.step != step:
        raise TrainingError(
            f"the data stream gives step {found.batch.step} where the model is at step {step}; "
            "restart from the last checkpoint"
        )
    return found


def _is_due(done: int, learner: Learner) -> bool:
    every = learner.train.validate_every
    return every > 0 and done % every == 0


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
    torch.manual_seed(dropout_seed(learner.seed, micro))
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


def sum_of(tensors: list[Tensor]) -> Tensor:
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
        sizes[-1] = sum_of([count_other_bonds(part) for part in parts])
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


def start_reading(values: Tensor) -> Callable[[], Tensor]:
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


def named_losses(learner: Learner, sums: Tensor, counts: Tensor) -> Record:
    """The optimised loss and each head's own mean; a head without any target is left out, not called 0."""
    means = loss_means(dict(zip(LOSS_NAMES, sums, strict=True)), counts)
    model = learner.model
    optional = {
        "direction": model.direction_head,
        "distance": model.distance_head,
        "environment": model.environment_head,
        "descriptor": model.descriptor_head,
    }
    lacking = {name for name, head in optional.items() if head is None}
    total = sum(learner.loss.weight(name) * float(mean) for name, mean in means.items())
    heads = {
        f"{TOTAL_LOSS}_{name}": float(means[name])
        for name, count in zip(LOSS_NAMES, counts.tolist(), strict=True)
        if count > 0 and name not in lacking
    }
    return {TOTAL_LOSS: float(total), **heads}


def _raise_not_finite(
    learner: Learner, batch: StepBatch, losses: list[Tensor], record: Record, *, stop: bool
) -> NoReturn:
    """Name the molecules whose loss is not finite, from all ranks; if there are none, the gradient alone broke."""
    broken = [not bool(torch.isfinite(sums).all()) for sums in losses]
    suspects = _on_all_ranks(learner, batch, broken)
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
        micro_batches=tuple(suspects or _on_all_ranks(learner, batch, [True] * len(losses))),
    )
    raise NotFiniteError(anomaly, stop)


def _on_all_ranks(
    learner: Learner, batch: StepBatch, chosen: Sequence[bool]
) -> list[dict[str, Any]]:
    """The chosen micro-batches of every rank; all ranks call this."""
    here = [
        {
            "rank": learner.ranks.rank,
            "stream": micro.stream,
            "index": micro.index,
            "molecule_ids": micro.molecule_ids.tolist(),
        }
        for micro, is_chosen in zip(batch.micro_batches, chosen, strict=True)
        if is_chosen
    ]
    return [micro for of_rank in gather_from_ranks(here) for micro in of_rank]
