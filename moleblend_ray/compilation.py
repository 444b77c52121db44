"""How functions of flat arrays are compiled: by Numba, with the machine code kept on disk where that is possible."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from numba import njit

logger = logging.getLogger(__name__)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile ``function`` at its first call, without Python objects and without the GIL.

    Numba keeps the code beside the source or in the user's cache folder. A service often may write to neither (another
    user's installation, no home, a read-only disk); then each process compiles again, and a warning says how to avoid it.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        _warn_of_repeated_compilation()
        return njit(nogil=True)(function)


@functools.cache
def _warn_of_repeated_compilation() -> None:
    logger.warning(
        "compiled code cannot be stored: neither the installed package nor a cache folder in the home of this user is "
        "writable. Each process compiles for about 15 s when it is first used; set NUMBA_CACHE_DIR to a folder that "
        "this user alone can write to"
    )
