"""The training loop: read :func:`fit` first, then :func:`~moleblend_ray.training.step.train_step`.

Everything random or ordered is a function of (seed, step, molecule or micro-batch), and the loss is normalised by counts
of the whole step. So a step gives the same numbers (up to rounding) at any number of ranks and after any restart.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from moleblend_ray.data.batches.batch import StepBatch
from moleblend_ray.errors import TrainingError
from moleblend_ray.training.anomalies import Anomaly, NotFiniteError, SpikeDetector
from moleblend_ray.training.checkpoint import training_state
from moleblend_ray.training.learner import Learner
from moleblend_ray.training.metrics import TOTAL_LOSS, Record
from moleblend_ray.training.prefetch import DevicePrefetch, DeviceStep
from moleblend_ray.training.saving import CheckpointWriter
from moleblend_ray.training.step import micro_batches_of_ranks, train_step
from moleblend_ray.training.throughput import Meter, compiled_graphs

logger = logging.getLogger(__name__)


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
        return Anomaly(
            step=batch.step,
            reason="spike",
            detail=f"step {batch.step}: {problem}",
            record=record,
            micro_batches=tuple(micro_batches_of_ranks(self._learner.ranks, batch)),
        )

    def _report(self, anomaly: Anomaly) -> None:
        if self._learner.ranks.is_first:
            logger.warning("%s", anomaly.detail)
        self._tell(anomaly)


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
