"""Paths and URIs of settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from moleblend_ray.config.paths import with_absolute_paths
from moleblend_ray.config.prepare import PrepareConfig
from moleblend_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("s3:/bucket/mols", "s3://bucket/mols"),
        ("gs:/bucket/mols", "gs://bucket/mols"),
        ("file:/mnt/mols", "file:///mnt/mols"),
    ],
)
def test_a_uri_that_lacks_a_slash_is_no_path_on_this_machine(given: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"^out: {given} .* Write {meant}$"):
        with_absolute_paths(PrepareConfig(source="a.csv", out=given))
    with pytest.raises(ConfigError, match=rf"^source: {given} "):
        with_absolute_paths(PrepareConfig(source=("a.csv", given), out="out"))


@pytest.mark.parametrize("uri", ["s3://bucket/x", "file:///mnt/x", "https://a.org/x", "memory://x"])
def test_a_uri_stays_as_it_is_and_a_path_becomes_absolute(uri: str) -> None:
    config = with_absolute_paths(PrepareConfig(source=uri, out="s3/x"))
    assert (config.source, config.out) == (uri, str(Path.cwd() / "s3/x"))
