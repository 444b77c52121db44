"""Steps prepared ahead: the same steps in the same order, bounded, with errors as themselves."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import count, islice

import pytest
import torch
import toy

from moleblend_ray.data.batches.batch import StepBatch
from moleblend_ray.errors import TrainingError
from moleblend_ray.model.config import BlendConfig, LossConfig
from moleblend_ray.training.prefetch import DevicePrefetch, DeviceStep, prepare_step

CPU = torch.device("cpu")


def prepare(batch: StepBatch) -> DeviceStep:
    return prepare_step(batch, CPU, blend=BlendConfig(), loss=LossConfig(), seed=3)


def test_steps_come_in_order_and_equal_those_prepared_one_by_one() -> None:
    with DevicePrefetch(islice(toy.steps(), 4), prepare, CPU, 2) as ahead:
        found = list(ahead)
    expected = [prepare(batch) for batch in islice(toy.steps(), 4)]
    assert [step.batch.step for step in found] == [0, 1, 2, 3]
    for ours, theirs in zip(found, expected, strict=True):
        for molecules, others in zip(ours.molecules, theirs.molecules, strict=True):
            assert torch.equal(molecules.spd, others.spd)
            assert torch.equal(molecules.positions, others.positions)
            assert torch.equal(molecules.molecule_ids, others.molecule_ids)
        for blend, other in zip(ours.blends, theirs.blends, strict=True):
            assert torch.equal(blend.pair_choice, other.pair_choice)
            assert torch.equal(blend.noise, other.noise)
        assert torch.equal(ours.counts, theirs.counts)


def test_no_more_steps_are_taken_ahead_than_asked() -> None:
    batch = next(toy.steps())
    taken = count()
    newest = 0

    def steps() -> Iterator[StepBatch]:
        nonlocal newest
        while True:
            newest = next(taken)
            yield batch

    with DevicePrefetch(steps(), prepare, CPU, 3) as ahead:
        next(ahead)
        time.sleep(0.5)
        assert 3 <= newest <= 4  # three wait, one is at work; the first was taken


def test_an_error_of_the_stream_is_raised_after_the_steps_before_it() -> None:
    def steps() -> Iterator[StepBatch]:
        yield next(toy.steps())
        raise TrainingError("a gap")

    with DevicePrefetch(steps(), prepare, CPU, 2) as ahead:
        assert next(ahead).batch.step == 0
        for _ in range(2):
            with pytest.raises(TrainingError, match="a gap"):
                next(ahead)


def test_who_waits_is_heard_each_second_and_may_give_up() -> None:
    hold = threading.Event()

    def steps() -> Iterator[StepBatch]:
        yield next(toy.steps())
        hold.wait()

    told: list[float] = []

    def tell(waited_s: float) -> None:
        told.append(waited_s)
        if len(told) == 2:
            raise TrainingError("enough")

    with DevicePrefetch(steps(), prepare, CPU, 2, while_waiting=tell) as ahead:
        assert next(ahead).batch.step == 0
        with pytest.raises(TrainingError, match="enough"):
            next(ahead)
        hold.set()
    assert 0.9 < told[0] < told[1]


def test_leaving_ends_the_thread_while_steps_are_waiting() -> None:
    before = threading.active_count()
    with DevicePrefetch(iter(toy.steps()), prepare, CPU, 1) as ahead:
        next(ahead)
    assert threading.active_count() == before
