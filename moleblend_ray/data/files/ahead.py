"""Reading many files one after the other, a few of them ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def mapped_ahead(
    function: Callable[[_Item], _Result], items: Sequence[_Item], num_threads: int
) -> Iterator[_Result]:
    """``function`` of each item, in order, ``num_threads`` at a time; so many results are held, however many items there are."""
    with ThreadPoolExecutor(num_threads) as pool:
        # In portions: `map` begins with all items at once, and keeps the results that nobody has taken yet.
        for start in range(0, len(items), num_threads):
            yield from pool.map(function, items[start : start + num_threads])
