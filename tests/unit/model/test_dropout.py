"""Dropout in which four elements share a draw."""

from __future__ import annotations

import pytest
import torch

from moleblend_ray.model.dropout import dropout


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.93])
def test_as_many_elements_are_dropped_as_asked_and_the_mean_stays(probability: float) -> None:
    torch.manual_seed(0)
    found = dropout(torch.ones(1000, 1001), probability, training=True)
    share = float((found == 0).double().mean())
    # Five standard deviations of a million draws.
    assert share == pytest.approx(
        probability, abs=5 * (probability * (1 - probability) / 1e6) ** 0.5
    )
    kept = found[found != 0]
    assert torch.equal(kept, kept[:1].expand_as(kept))
    assert float(kept[0]) == pytest.approx(1 / (1 - probability), rel=1e-3)


def test_elements_of_one_draw_are_independent() -> None:
    torch.manual_seed(0)
    kept = dropout(torch.ones(250_000, 4), 0.5, training=True) != 0
    correlation = torch.corrcoef(kept.double().T)
    assert (correlation - torch.eye(4)).abs().max() < 0.01


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 0, 4), (7, 1, 3)])
def test_any_shape_keeps_its_shape_and_type(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = dropout(torch.ones(shape, dtype=dtype), 0.3, training=True)
        assert (found.shape, found.dtype) == (shape, dtype)


def test_the_gradient_passes_where_the_value_did() -> None:
    torch.manual_seed(0)
    values = torch.randn(50, 40, dtype=torch.float64, requires_grad=True)
    found = dropout(values, 0.25, training=True)
    found.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad == 0, found == 0)
    assert torch.allclose(values.grad[values.grad != 0], torch.tensor(4 / 3, dtype=torch.float64))


def test_the_generator_decides() -> None:
    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return dropout(torch.ones(100), 0.5, training=True)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_nothing_is_dropped_outside_of_training_or_with_probability_0() -> None:
    values = torch.randn(10)
    assert dropout(values, 0.5, training=False) is values
    assert dropout(values, 0.0, training=True) is values


def test_a_probability_that_rounds_to_1_still_keeps_one_element_of_65536() -> None:
    torch.manual_seed(0)
    found = dropout(torch.ones(4_000_000), 0.999999, training=True)
    kept = found[found != 0]
    assert 30 < len(kept) < 100
    assert (kept == 65536).all()
