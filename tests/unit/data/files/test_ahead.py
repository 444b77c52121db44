"""Results come in order, and no more of them are made than are wanted soon."""

from __future__ import annotations

import threading

import pytest

from moleblend_ray.data.files.ahead import mapped_ahead


def test_results_are_in_order_and_few_are_made_before_they_are_taken() -> None:
    begun: list[int] = []

    def double(item: int) -> int:
        begun.append(item)
        return 2 * item

    results = mapped_ahead(double, range(10), 3)
    assert next(results) == 0
    assert sorted(begun) == [0, 1, 2]
    assert list(results) == [2 * item for item in range(1, 10)]
    assert list(mapped_ahead(str, [], 3)) == []


def test_items_are_worked_on_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=10.0)
    assert sorted(mapped_ahead(lambda _: together.wait(), range(6), 3)) == [0, 0, 1, 1, 2, 2]


def test_an_error_is_raised_in_its_place() -> None:
    results = mapped_ahead(lambda item: 1 // item, [1, 1, 0, 1], 2)
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
