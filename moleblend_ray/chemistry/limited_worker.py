"""The program of the child process that calls functions within limits; see :func:`limited.limited`."""

from __future__ import annotations

import importlib
import resource
from functools import partial
from typing import Final

from rdkit import rdBase

from moleblend_ray.chemistry.killable import serve
from moleblend_ray.chemistry.limited import GIB, MEMORY_LIMIT, Answer, Call
from moleblend_ray.host import status_bytes

_CALLED: Final = ("descriptors", "inchi", "molecule", "scaffolds", "xyz")
"""Modules of this package with functions that are called here."""

_HARD_LIMIT: Final = MEMORY_LIMIT + GIB // 2


def answer(call: Call, *, memory_before: int) -> Answer:
    """The value of the call; None if there was not as much memory as it asked for."""
    try:
        value = call.function(*call.arguments)
    except MemoryError:
        return Answer(None, _HARD_LIMIT)
    return Answer(value, status_bytes("VmHWM") - memory_before)


def limit_memory() -> None:
    """Let allocations fail beyond what is in use now and what a call may take; without effect where there is no /proc.

    Some libraries reserve gigabytes of addresses when they are imported, so this comes afterwards.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    in_use = status_bytes("VmData")
    wanted = in_use + _HARD_LIMIT
    if in_use and (hard == resource.RLIM_INFINITY or wanted < hard):
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


if __name__ == "__main__":
    # RDKit's messages about a molecule are in its rejection.
    rdBase.DisableLog("rdApp.*")
    for module in _CALLED:
        importlib.import_module(f"moleblend_ray.chemistry.{module}")
    limit_memory()
    serve(partial(answer, memory_before=status_bytes("VmHWM")))
