"""Settings of the small jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from moleblend_ray.config.tools import SamplesConfig
from moleblend_ray.errors import ConfigError


def test_samples_go_to_a_file_that_prepare_will_read_as_parquet() -> None:
    assert SamplesConfig(out="s3://bucket/samples.parquet").num_molecules == 5000
    for out in ("samples.sdf", "samples", ""):
        with pytest.raises(ConfigError, match=r"ends in \.parquet"):
            SamplesConfig(out=out)


def test_a_path_object_is_asked_for_as_text() -> None:
    with pytest.raises(
        ConfigError, match=r"out: expected str, .* \(give it as text: str\(path\)\)"
    ):
        SamplesConfig(out=Path("a.parquet"))  # type: ignore[arg-type]
