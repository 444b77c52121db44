"""The next steps' micro-batches, unpacked and copied to the device while the current step computes."""

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

from moleblend_ray.data.batch import StepBatch
from moleblend_ray.model.batch import MoleculeBatch

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


def to_device(batch: StepBatch, device: torch.device) -> DeviceStep:
    """Unpack and copy the micro-batches of a step."""
    molecules = tuple(MoleculeBatch.from_micro_batch(m, device) for m in batch.micro_batches)
    return DeviceStep(batch=batch, molecules=molecules)


class DevicePrefetch:
    """Iterate over steps that a thread prepares: at most ``depth`` of them wait, and one more is at work.

    On CUDA the thread copies on a stream of its own, from page-locked memory, and the reader's stream waits for
    the copies of a step before it uses them. What reading or preparing raises is raised in the reader, after the
    steps before it. ``while_waiting`` is told each second for how many seconds the reader has waited; what it raises ends
    the wait. Leave the ``with`` block to stop the thread.
    """

    def __init__(
        self,
        steps: Iterator[StepBatch],
        device: torch.device,
        depth: int,
        *,
        while_waiting: Callable[[float], None] | None = None,
    ) -> None:
        self._steps = steps
        self._while_waiting = while_waiting
        self._device = device
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
        step, copied = item
        if copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            for molecules in step.molecules:
                molecules.record_stream(current)
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
                    if not self._put(self._prepare(batch)):
                        return
            self._put(_End(None))
        except BaseException as error:  # whatever it is, the reader must not wait for ever
            self._put(_End(error))

    def _prepare(self, batch: StepBatch) -> tuple[DeviceStep, torch.cuda.Event | None]:
        step = to_device(batch, self._device)
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
