"""What training costs on this machine, from a minute of it: the figures behind a plan for CPU workers.

As many processes as there will be workers take turns, in rounds, so that whatever else the machine does meets all alike:
one trains alone while the others wait, all train at once without knowing of each other, all exchange messages as large as the
model's. Each trains under the strategy of the run in a group of its own, which sends nothing.
"""

from __future__ import annotations

import datetime
import multiprocessing
import queue
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from moleblend_ray.data.batches.batch import StepBatch
from moleblend_ray.data.batches.builder import local_step_batches
from moleblend_ray.data.config import OrderConfig, StreamConfig
from moleblend_ray.data.files.scratch import scratch_folder
from moleblend_ray.errors import TrainingError
from moleblend_ray.model.config import BlendConfig, LossConfig, ModelConfig
from moleblend_ray.training.config import OptimConfig, Precision, Strategy, TrainConfig
from moleblend_ray.training.learner import Learner, build_learner
from moleblend_ray.training.prefetch import to_device
from moleblend_ray.training.ranks import Ranks
from moleblend_ray.training.step import train_step

_BATCHES: Final = 3
"""Different batches that steps take in turn."""
_WARM_UP: Final = 2
_SMALL_MESSAGES: Final = 20
_LARGE_MESSAGES: Final = 7
_LARGEST_MESSAGE: Final = 64 << 20
_TIMEOUT_S: Final = 600.0
_LOOK_S: Final = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """What is tried."""

    data: str
    """URI of the prepared data set."""
    model: ModelConfig
    batch: int
    """Molecules of a step of one worker."""
    micro_batch_size: int
    strategy: Strategy
    precision: Precision
    workers: int
    threads: int
    """Of each worker."""
    message_bytes: int
    """Of a collective of the model, as one worker sends it."""
    steps: int = 5
    """In each part of a round."""
    rounds: int = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What it costs here; medians over rounds."""

    step_s: float
    """A step of one worker while the others wait."""
    contention: float
    """How much longer the slowest takes while all train, none knowing of the others, each on other molecules."""
    message_s: float | None
    """A collective that sends next to nothing; None with one worker, which has nobody to send to."""
    sent_bytes_per_s: float | None
    """What all workers together send in a second, in messages of the model's size, their latency taken off; likewise."""
    actor_us: float
    """CPU microseconds to fetch, relate and pack a molecule."""
    trainer_host_us: float
    """CPU microseconds to unpack and pad one."""


def rehearse(settings: Rehearsal) -> Found:
    """Run it in processes of its own, for about a minute; TrainingError if one fails."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(settings.workers)
    with scratch_folder("rehearsal") as folder:
        results: Any = context.Queue()
        processes = [
            context.Process(target=_work, args=(settings, rank, barrier, folder, results))
            for rank in range(settings.workers)
        ]
        found: list[Any] = ["no result"]
        try:
            for process in processes:
                process.start()
            found = [_next_result(results, processes) for _ in processes]
        finally:
            problems = [result for result in found if isinstance(result, str)]
            for process in processes:
                if problems and process.pid is not None:
                    process.kill()  # it may wait for one that is gone
                if process.pid is not None:
                    process.join()
    if problems:
        # One fails first; the others only find it gone.
        own = [
            text for text in problems if not text.startswith(threading.BrokenBarrierError.__name__)
        ]
        raise TrainingError(f"this machine could not be measured: {(own or problems)[0]}")
    by_rank: list[dict[str, list[float]]] = [dict(result[1]) for result in sorted(found)]
    return _summary(settings, by_rank)


def _next_result(results: Any, processes: Sequence[BaseProcess]) -> Any:
    """What a process found, or a text that says why it did not."""
    while True:
        # Before the last look: what it sent is there when it is gone.
        lost = [process.exitcode for process in processes if process.exitcode]
        try:
            return results.get(timeout=_LOOK_S)
        except queue.Empty:
            if lost:
                return (
                    f"a process ended with status {lost[0]} (-9: killed, perhaps for its memory; 1: in a script of your own, "
                    'make the call under `if __name__ == "__main__":`, as each process imports the script)'
                )


def _summary(settings: Rehearsal, by_rank: Sequence[dict[str, list[float]]]) -> Found:
    """The first worker's times; of what all do at once, the slowest of each step, for which all would wait."""
    alone = _by_round(by_rank[0]["alone"], settings.steps)
    times = zip(*(rank["independent"] for rank in by_rank), strict=True)
    slowest = _by_round([max(step) for step in times], settings.steps)
    message_s = sent_bytes_per_s = None
    if settings.workers > 1:
        message_s = statistics.median(by_rank[0]["message"])
        large_s = statistics.median(by_rank[0]["large"])
        # A gathering of n bytes from each sends n to each of the others.
        sent = settings.workers * (settings.workers - 1) * _sent_bytes(settings)
        sent_bytes_per_s = sent / max(large_s - message_s, 0.05 * large_s)
    return Found(
        step_s=statistics.median(alone),
        contention=statistics.median(both / one for both, one in zip(slowest, alone, strict=True)),
        message_s=message_s,
        sent_bytes_per_s=sent_bytes_per_s,
        actor_us=by_rank[0]["actor_us"][0],
        trainer_host_us=by_rank[0]["trainer_host_us"][0],
    )


def _by_round(times: Sequence[float], steps: int) -> list[float]:
    """Medians of each round: what else the machine did in some steps is left out."""
    rounds = range(0, len(times), steps)
    return [statistics.median(times[first : first + steps]) for first in rounds]


def _sent_bytes(settings: Rehearsal) -> int:
    return max(4096, min(settings.message_bytes, _LARGEST_MESSAGE))


def _work(settings: Rehearsal, rank: int, barrier: Barrier, folder: Path, results: Any) -> None:
    try:
        results.put((rank, _measure(settings, rank, barrier, folder)))
    # Whatever it was, the parent must hear of it, and the other processes must not wait.
    except Exception as error:
        barrier.abort()
        results.put(f"{type(error).__name__}: {error}")


def _measure(
    settings: Rehearsal, rank: int, barrier: Barrier, folder: Path
) -> dict[str, list[float]]:
    torch.set_num_threads(settings.threads)
    found: dict[str, list[float]] = {}
    steps = _steps(settings, found)
    alone = f"file://{folder}/alone-{rank}"
    dist.init_process_group("gloo", init_method=alone, rank=0, world_size=1)
    learner = _learner(settings)
    group = _Group(settings, rank, folder)
    trainer = _Trainer(learner, steps, first=rank)
    trainer.seconds(_WARM_UP)
    parts: list[tuple[str, Callable[[], list[float]], bool]] = [
        ("alone", lambda: trainer.seconds(settings.steps), rank == 0),
        ("independent", lambda: trainer.seconds(settings.steps), True),
        ("message", lambda: [group.small_s()], settings.workers > 1),
        ("large", lambda: [group.large_s()], settings.workers > 1),
    ]
    for _ in range(settings.rounds):
        for name, run, takes_part in parts:
            barrier.wait(_TIMEOUT_S)
            found.setdefault(name, []).extend(run() if takes_part else [0.0])
    barrier.wait(_TIMEOUT_S)
    dist.destroy_process_group()
    return found


def _steps(settings: Rehearsal, found: dict[str, list[float]]) -> list[StepBatch]:
    """Batches as the stream makes them for one worker; what making them costs goes to ``found``."""
    order = OrderConfig(global_batch_size=settings.batch, num_streams=1)
    stream = StreamConfig(micro_batch_size=settings.micro_batch_size)
    batches: list[StepBatch] = []
    many = max(_BATCHES, -(-4096 // settings.batch))  # enough for CPU times to be read
    source = local_step_batches(
        settings.data, order, stream, first_step=0, num_steps=_WARM_UP + many
    )
    for _ in range(_WARM_UP):
        next(source)  # compiles the kernels
    began = time.process_time()
    batches = list(source)
    molecules = many * settings.batch
    found["actor_us"] = [1e6 * (time.process_time() - began) / molecules]
    device = torch.device("cpu")
    to_device(batches[0], device)
    began = time.process_time()
    for batch in batches:
        to_device(batch, device)
    found["trainer_host_us"] = [1e6 * (time.process_time() - began) / molecules]
    return batches[:_BATCHES]


def _learner(settings: Rehearsal) -> Learner:
    return build_learner(
        settings.model,
        train=TrainConfig(
            num_steps=10**6, strategy=settings.strategy, precision=settings.precision
        ),
        optim=OptimConfig(),
        blend=BlendConfig(),
        # The weights of heads that a model may lack do not change what a step costs.
        loss=LossConfig(
            direction_weight=0.5 if settings.model.direction_head else 0.0,
            ignore_other_bonds=not settings.model.edge_other_class,
        ),
        seed=0,
        ranks=Ranks(),
    )


class _Trainer:
    """Takes steps on its batches in turn, beginning with the ``first``."""

    def __init__(self, learner: Learner, batches: Sequence[StepBatch], *, first: int) -> None:
        self._learner, self._done = learner, first
        self._steps = [learner.prepare(batch) for batch in batches]
        learner.objective.train()

    def seconds(self, count: int) -> list[float]:
        """Seconds of each of ``count`` steps."""
        times = []
        for _ in range(count):
            began = time.perf_counter()
            train_step(self._learner, self._steps[self._done % len(self._steps)])
            times.append(time.perf_counter() - began)
            self._done += 1
        return times


class _Group:
    """All processes, beside the group of one in which each trains."""

    def __init__(self, settings: Rehearsal, rank: int, folder: Path) -> None:
        c10d: Any = dist  # its stubs lack what follows
        store = c10d.FileStore(str(folder / "all"), settings.workers)
        timeout = datetime.timedelta(seconds=_TIMEOUT_S)
        self._group = c10d.ProcessGroupGloo(store, rank, settings.workers, timeout)
        self._small = torch.zeros(1)
        self._mine = torch.zeros(_sent_bytes(settings) // 4)
        self._all = torch.zeros(settings.workers * self._mine.numel())

    def small_s(self) -> float:
        """Seconds of an all-reduce of one number."""
        return _median_s(lambda: self._group.allreduce([self._small]).wait(), _SMALL_MESSAGES)

    def large_s(self) -> float:
        """Seconds of a gathering of messages of the model's size."""
        gather = self._group._allgather_base
        return _median_s(lambda: gather(self._all, self._mine).wait(), _LARGE_MESSAGES)


def _median_s(run: Callable[[], Any], count: int) -> float:
    run()
    times = []
    for _ in range(count):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
