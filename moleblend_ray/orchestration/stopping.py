"""Asking the workers to commit the step they are at and leave: SIGTERM, a node about to go, room for more workers.

Only rank 0 is asked, between two steps, and the others hear of it with the step's sums: so all of them stop after the same
step, and nothing that was computed is lost.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any, Final, Literal

import ray
import ray.exceptions
from ray.train.v2._internal.execution.context import get_train_context

from moleblend_ray.errors import TrainingError

logger = logging.getLogger(__name__)

_REPEAT_S: Final = 2.0
_PATIENCE_S: Final = 10.0
"""For data, after SIGTERM: with the next step the workers would commit what they have done."""

StopReason = Literal["", "sigterm", "resize", "drain"]
"""Why the workers leave; "" if they were not asked to. All but "sigterm" are followed by a new start."""


class StoppedWhileWaitingError(TrainingError):
    """A stop was asked for, and there are no workers that could leave, or no data for the step after which they would."""


class _StopFlag:
    """The actor through which a stop is asked for."""

    def __init__(self) -> None:
        self._reason: StopReason = ""

    def ask(self, reason: StopReason) -> None:
        """Ask for a stop; SIGTERM is not taken back by a weaker reason."""
        if self._reason != "sigterm":
            self._reason = reason

    def reason(self) -> StopReason:
        return self._reason


class StopFlag:
    """Handle of the flag, for the driver, the controller and the workers."""

    def __init__(self) -> None:
        # Its node may be lost: then it starts anew elsewhere, and no worker fails because of it.
        options = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        self._actor: Any = options(_StopFlag).remote()
        self.is_terminated = threading.Event()
        """Set in the driver by SIGTERM."""

    def ask(self, reason: StopReason) -> None:
        """Ask the workers to leave; "" takes a question back, other than that of SIGTERM. Does not wait."""
        self._actor.ask.remote(reason)

    def pending_reason(self) -> Any:
        """Reference to the reason, to be fetched when it is there."""
        return self._actor.reason.remote()

    def end_wait_if_terminated(self) -> None:
        """For who waits for room: StoppedWhileWaitingError if SIGTERM came. A flag that does not answer says nothing."""
        with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            if ray.get(self.pending_reason(), timeout=1.0) == "sigterm":
                raise StoppedWhileWaitingError(
                    "SIGTERM came while the run waited for room in the cluster"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        return (_flag_of, (self._actor,))

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)


def _flag_of(actor: Any) -> StopFlag:
    """The handle in another process, where nobody gets the driver's signals."""
    flag = StopFlag.__new__(StopFlag)
    flag._actor = actor
    flag.is_terminated = threading.Event()
    return flag


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[StopFlag]:
    """A stop flag that SIGTERM sets, within the body, if this is the main thread; Ray's own handler would just exit."""
    flag = StopFlag()
    asked, over = flag.is_terminated, threading.Event()

    def forward() -> None:
        asked.wait()
        if not over.is_set():
            logger.warning("SIGTERM: committing the current step, then stopping")
        while not over.is_set():
            flag.ask("sigterm")
            over.wait(_REPEAT_S)  # said again: a flag that was started anew has forgotten it

    # From a thread: a signal handler runs inside whatever call of Ray the main thread is in.
    threading.Thread(target=forward, name="stop-on-sigterm", daemon=True).start()
    is_main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.set()) if is_main else None
    try:
        yield flag
    finally:
        over.set()
        asked.set()  # the thread waits for it
        if is_main:
            signal.signal(signal.SIGTERM, previous)
        flag.close()


class StopPoll:
    """Rank 0's look at the flag and at notices about nodes, once a step; it never waits for the answer."""

    def __init__(self, flag: StopFlag) -> None:
        self._flag = flag
        self._pending = flag.pending_reason()
        self.reason: StopReason = ""
        """Why the workers were asked to leave, so far."""

    def __call__(self) -> bool:
        """Whether they were."""
        if not self.reason and _is_draining():
            self.reason = "drain"
        ready, _ = ray.wait([self._pending], timeout=0)
        if ready and self.reason != "sigterm":
            # A flag that is lost, for now or for good, asks for nothing.
            with contextlib.suppress(ray.exceptions.RayActorError):
                asked = ray.get(self._pending)
                if asked == "sigterm" or not self.reason:
                    self.reason = asked
            self._pending = self._flag.pending_reason()
        return bool(self.reason)

    def end_wait(self, waited_s: float) -> None:
        """For who has waited for data: StoppedWhileWaitingError if that is long enough and SIGTERM came.

        The other ranks may be within the step, so they cannot be asked to commit: what was done since the newest checkpoint is
        lost, as if the workers had been killed.
        """
        if waited_s >= _PATIENCE_S and self() and self.reason == "sigterm":
            raise StoppedWhileWaitingError(
                f"SIGTERM came, and no data for the next step in {waited_s:.0f} s: look at the data actors and the storage. "
                "What is committed is kept: the same command continues from it"
            )


def _is_draining() -> bool:
    """Whether Ray was told that the node of a worker will be taken away.

    `ray.train.get_preemption_info` says the same, but is a barrier of all workers through an actor, too slow for each step.
    """
    return get_train_context().preemption_context.preemption_info is not None
