"""Calls with a limit of time and memory, in a child process of which RDKit may make what it will.

For the few molecules of which :mod:`moleblend_ray.chemistry.cost` says that RDKit could need hours or all memory. The
child is another one than that for conformers, so that it is started only where such a molecule is met. Needs no RDKit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from moleblend_ray.chemistry.config import TIMEOUT_S
from moleblend_ray.chemistry.killable import (
    KillableWorker,
    WorkerCrashedError,
    WorkerTimeoutError,
    shared_worker,
)

GIB: Final = 1 << 30

MEMORY_LIMIT: Final = 3 * GIB // 2
"""Bytes that a call may take; half a million rings of a hundred atoms."""

_KEPT_MEMORY: Final = GIB // 4
"""A child that took more bytes is ended after its answer, as it may not give them back."""

_WORKER_MODULE: Final = "moleblend_ray.chemistry.limited_worker"


class LimitExceededError(Exception):
    """The call took too long or too much memory, or crashed; the argument says which, as ``kind: what``."""


class Call(NamedTuple):
    """A request to the child process."""

    function: Callable[..., Any]
    """A function of a module, which returns its failures instead of raising them."""
    arguments: tuple[Any, ...]


class Answer(NamedTuple):
    """The child's answer."""

    value: Any
    memory: int
    """Bytes, at the peak of this call or an earlier one, more than before the first call."""


def limited(function: Callable[..., Any], *arguments: Any, timeout_s: float = TIMEOUT_S) -> Any:
    """``function(*arguments)`` in a child process; both and the result must be picklable.

    LimitExceededError if the call was not done after ``timeout_s``, took more than :data:`MEMORY_LIMIT`, or ended the
    child. WorkerStartError if no child can be started.
    """
    worker = _worker()
    try:
        answer: Answer = worker.call(Call(function, arguments), timeout_s)
    except WorkerTimeoutError:
        raise LimitExceededError(f"timeout: not done after {timeout_s:g} s") from None
    except WorkerCrashedError as error:
        raise LimitExceededError(f"crashed: {error}") from error
    if answer.memory > _KEPT_MEMORY:
        worker.close()
    # Whatever the answer is: without memory, RDKit's parsers return nothing, as for what is no molecule.
    if answer.memory > MEMORY_LIMIT:
        raise LimitExceededError(f"memory: more than {MEMORY_LIMIT / GIB:g} GiB")
    return answer.value


def _worker() -> KillableWorker:
    return shared_worker("-m", _WORKER_MODULE)
