"""Descriptors on the scale of their data set."""

from __future__ import annotations

import numpy as np
import pytest

from moleblend_ray.data.dataset.descriptors import DESCRIPTOR_LIMIT, DescriptorScaling


def test_targets_lie_within_the_limit_and_unknown_ones_stay_unknown() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, (500, 2))
    scaling = DescriptorScaling.fit(values)
    given = np.array([[3e38, -3e38], [np.nan, 3.0], [5.0, np.nan]], np.float32)
    found = scaling.targets(given)
    assert found.dtype == np.float32
    assert found[0].tolist() == [DESCRIPTOR_LIMIT, -DESCRIPTOR_LIMIT]
    assert np.isnan(found).tolist() == [[False, False], [True, False], [False, True]]
    # Otherwise those of models that read the same descriptors.
    known = ~np.isnan(found)
    np.testing.assert_allclose(found[known], scaling.apply(given)[known], rtol=1e-5, atol=1e-6)
    # In the type in which they travel to training they are finite.
    assert np.isfinite(found[known].astype(np.float16)).all()


@pytest.mark.parametrize("value", [0.1, 12.3456, 1e-3])
def test_a_constant_descriptor_says_nothing_though_its_mean_is_rounded(value: float) -> None:
    constant = np.full((100, 1), value)
    assert constant.std() > 0
    scaling = DescriptorScaling.fit(constant)
    assert scaling.apply(np.array([[value], [2 * value], [np.nan]])).tolist() == [[0.0]] * 3
