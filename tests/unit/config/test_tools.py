"""Settings of the small jobs."""

from __future__ import annotations

import pytest

from moleblend_ray.config.tools import SamplesConfig
from moleblend_ray.errors import ConfigError


def test_samples_go_to_a_file_that_prepare_will_read_as_parquet() -> None:
    assert SamplesConfig(out="s3://bucket/samples.parquet").num_molecules == 5000
    for out in ("samples.sdf", "samples", ""):
        with pytest.raises(ConfigError, match=r"ends in \.parquet"):
            SamplesConfig(out=out)
