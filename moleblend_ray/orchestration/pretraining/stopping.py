"""Asks the workers to commit their current step and leave: on SIGTERM, if a node will go, or to make the group larger.

Only rank 0 is asked, between two steps. It tells the others together with the sums of the step, so all of them stop
after the same step, and no work is lost.
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
from ray._raylet import PlacementGroupID
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

from moleblend_ray.errors import TrainingError

logger = logging.getLogger(__name__)

_REPEAT_S: Final = 2.0
_PATIENCE_S: Final = 10.0
"""Seconds to wait for data after SIGTERM: with the next step the workers would commit their work."""

StopReason = Literal["", "sigterm", "resize", "drain"]
"""Why the workers leave; "" if they were not asked to. After all reasons but "sigterm" new workers start."""


class StoppedWhileWaitingError(TrainingError):
    """A stop was asked for while there were no workers, or while no data came for the step after which they would
    stop."""


class _StopFlag:
    """The actor through which a stop is asked for."""

    def __init__(self) -> None:
        self._reason: StopReason = ""

    def ask(self, reason: StopReason) -> None:
        """Ask for a stop. No other reason replaces SIGTERM."""
        if self._reason != "sigterm":
            self._reason = reason

    def reason(self) -> StopReason:
        return self._reason


class StopFlag:
    """Handle of the flag, for the driver, the controller and the workers."""

    def __init__(self) -> None:
        # If its node is lost, it starts again on another, and no worker fails because of it.
        options = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        self._actor: Any = options(_StopFlag).remote()
        self.is_terminated = threading.Event()
        """Set in the driver by SIGTERM."""

    def ask(self, reason: StopReason) -> None:
        """Ask the workers to leave; "" withdraws this, unless the reason was SIGTERM. Does not wait."""
        self._actor.ask.remote(reason)

    def pending_reason(self) -> Any:
        """Reference to the reason, to be fetched later."""
        return self._actor.reason.remote()

    def end_wait_if_terminated(self) -> None:
        """Raise StoppedWhileWaitingError if SIGTERM came. A flag that does not answer counts as not set."""
        with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            if ray.get(self.pending_reason(), timeout=1.0) == "sigterm":
                raise StoppedWhileWaitingError("SIGTERM came while no workers were running")

    def __reduce__(self) -> tuple[Any, ...]:
        return (_flag_of, (self._actor,))

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)


def _flag_of(actor: Any) -> StopFlag:
    """The handle in another process, which does not get the signals of the driver."""
    flag = StopFlag.__new__(StopFlag)
    flag._actor = actor
    flag.is_terminated = threading.Event()
    return flag


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[StopFlag]:
    """A stop flag that SIGTERM sets during the body, in the main thread. Ray's own handler would simply exit."""
    flag = StopFlag()
    asked, over = flag.is_terminated, threading.Event()

    def forward() -> None:
        asked.wait()
        if not over.is_set():
            logger.warning("SIGTERM: committing the current step, if there is one, then stopping")
        # Repeated, as a flag that was started again has forgotten it, and as workers may be about to start again.
        while not over.is_set():
            flag.ask("sigterm")
            _remove_waiting_groups()
            over.wait(_REPEAT_S)

    # In a thread, as the main thread may be inside a call of Ray when the signal handler runs.
    threading.Thread(target=forward, name="stop-on-sigterm", daemon=True).start()
    is_main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.set()) if is_main else None
    try:
        yield flag
    finally:
        over.set()
        asked.set()  # The thread waits for it.
        if is_main:
            signal.signal(signal.SIGTERM, previous)
        flag.close()


def _remove_waiting_groups() -> None:
    """Remove this job's placement groups for which there is no room yet.

    Ray Train's controller does nothing else while it waits for the one of its workers. It then asks its scaling policy what
    to do next, which reads the flag.
    """
    job = ray.get_runtime_context().get_job_id()
    for name, group in placement_group_table().items():
        if group["state"] == "PENDING" and name.endswith(job):  # Each id ends with that of its job.
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


class StopPoll:
    """With this rank 0 reads the flag and notices about nodes once per step, without waiting for the answer."""

    def __init__(self, flag: StopFlag) -> None:
        self._flag = flag
        self._pending = flag.pending_reason()
        self.reason: StopReason = ""
        """Why the workers were asked to leave; "" if they were not, so far."""

    def __call__(self) -> bool:
        """Whether the workers were asked to leave."""
        if not self.reason and _is_draining():
            self.reason = "drain"
        ready, _ = ray.wait([self._pending], timeout=0)
        if ready and self.reason != "sigterm":
            # A flag that is lost, for a time or forever, counts as not set.
            with contextlib.suppress(ray.exceptions.RayActorError):
                asked = ray.get(self._pending)
                if asked == "sigterm" or not self.reason:
                    self.reason = asked
            self._pending = self._flag.pending_reason()
        return bool(self.reason)

    def end_wait(self, waited_s: float) -> None:
        """Raise StoppedWhileWaitingError if SIGTERM came and data were waited for long enough.

        Other ranks may be in the middle of a step, so they cannot be asked to commit. The work since the newest
        checkpoint is lost, as if the workers had been killed.
        """
        if waited_s >= _PATIENCE_S and self() and self.reason == "sigterm":
            raise StoppedWhileWaitingError(
                f"SIGTERM came, and no data for the next step in {waited_s:.0f} s: look at the data actors and the "
                "storage. What is committed is kept: the same command continues from it"
            )


def _is_draining() -> bool:
    """Whether Ray was told that the node of a worker will go away.

    `ray.train.get_preemption_info` says the same, but is a barrier of all workers through an actor: too slow for each
    step.
    """
    # Here, as the actor of the flag needs nothing of Ray Train, whose import takes it a second.
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None
