"""The next steps' micro-batches, unpacked, copied to the device and blended while the current step computes."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import torch
from torch import Tensor

from moleblend_ray.data.batches.batch import StepBatch
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.blending import Blend, BlendConfig, draw_blend
from moleblend_ray.model.losses import LossConfig, loss_counts

_POLL_S: Final = 0.1
_JOIN_S: Final = 10.0
_TELL_S: Final = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceStep:
    """One rank's share of a step, on its device."""

    batch: StepBatch
    """As it came, in host memory."""

    molecules: tuple[MoleculeBatch, ...]
    """The micro-batches of ``batch``, in its order."""
    blends: tuple[Blend, ...]
    """What each of them shows."""
    counts: Tensor
    """(7,) float64, sum of :func:`~moleblend_ray.model.losses.loss_counts` over them."""

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell CUDA's allocator that ``stream`` uses the tensors, which were made on another stream."""
        for molecules, blend in zip(self.molecules, self.blends, strict=True):
            molecules.record_stream(stream)
            blend.record_stream(stream)
        self.counts.record_stream(stream)


def to_device(batch: StepBatch, device: torch.device) -> tuple[MoleculeBatch, ...]:
    """Unpack and copy the micro-batches of a step."""
    return tuple(MoleculeBatch.from_micro_batch(micro, device) for micro in batch.micro_batches)


def prepare_step(
    batch: StepBatch, device: torch.device, *, blend: BlendConfig, loss: LossConfig, seed: int
) -> DeviceStep:
    """All of a step that does not depend on the model: many small operations, for which a GPU would wait in the step."""
    molecules = to_device(batch, device)
    blends = tuple(draw_blend(part, blend, seed) for part in molecules)
    counts = [loss_counts(*part, loss) for part in zip(molecules, blends, strict=True)]
    return DeviceStep(
        batch=batch, molecules=molecules, blends=blends, counts=torch.stack(counts).sum(0)
    )


class DevicePrefetch:
    """Iterate over steps that a thread prepares on ``device``: at most ``depth`` of them wait, and one more is at work.

    On CUDA the thread works on a stream of its own and copies from page-locked memory, and the reader's stream waits for
    a step before it uses it. What reading or preparing raises is raised in the reader, after the
    steps before it. ``while_waiting`` is told each second for how many seconds the reader has waited; what it raises ends
    the wait. Leave the ``with`` block to stop the thread.
    """

    def __init__(
        self,
        steps: Iterator[StepBatch],
        prepare: Callable[[StepBatch], DeviceStep],
        device: torch.device,
        depth: int,
        *,
        while_waiting: Callable[[float], None] | None = None,
    ) -> None:
        self._steps = steps
        self._while_waiting = while_waiting
        self._device = device
        self._prepare = prepare
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ready: queue.Queue[_Item] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="device-prefetch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._ready.get_nowait()
        # It may wait for data that will not come: then it ends with the process.
        self._thread.join(_JOIN_S)

    def __iter__(self) -> Iterator[DeviceStep]:
        return self

    def __next__(self) -> DeviceStep:
        item = self._next_item()
        if isinstance(item, _End):
            self._ready.put(item)  # for who asks again
            if item.error is None:
                raise StopIteration
            raise item.error
        step, prepared = item
        if prepared is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(prepared)
            step.record_stream(current)
        return step

    def _next_item(self) -> _Item:
        if self._while_waiting is None:
            return self._ready.get()
        began_s = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                return self._ready.get(timeout=_TELL_S)
            self._while_waiting(time.monotonic() - began_s)

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            with torch.cuda.stream(self._stream):
                for batch in self._steps:
                    if not self._put(self._item(batch)):
                        return
            self._put(_End(None))
        except BaseException as error:  # whatever it is, the reader must not wait for ever
            self._put(_End(error))

    def _item(self, batch: StepBatch) -> _Item:
        step = self._prepare(batch)
        return step, self._stream.record_event() if self._stream is not None else None

    def _put(self, item: _Item) -> bool:
        """Hand over an item; False if nobody wants it any more."""
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=_POLL_S)
                return True
        return False


@dataclass(frozen=True, slots=True)
class _End:
    error: BaseException | None


_Item = tuple[DeviceStep, torch.cuda.Event | None] | _End
