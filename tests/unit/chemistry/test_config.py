from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from moleblend_ray.chemistry.config import ConformerConfig, FeaturizeConfig
from moleblend_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("config", "settings", "named"),
    [
        (FeaturizeConfig, {"max_atoms": 0}, ["max_atoms", "found 0"]),
        (FeaturizeConfig, {"max_atoms": 70_000}, ["max_atoms", "65535"]),
        (FeaturizeConfig, {"timeout_s": 0.0}, ["timeout_s", "found 0.0"]),
        (ConformerConfig, {"count": 0}, ["count", "found 0"]),
        (ConformerConfig, {"timeout_s": float("nan")}, ["timeout_s", "nan"]),
        (
            ConformerConfig,
            {"count": 999, "timeout_s": -1.0, "mmff_max_iterations": -1},
            ["count", "timeout_s", "mmff_max_iterations"],
        ),
    ],
)
def test_a_setting_out_of_range_is_named_with_what_was_found(
    config: type, settings: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        config(**settings)
    for word in named:
        assert word in str(error.value)


def test_the_configuration_does_not_load_rdkit() -> None:
    code = "import sys; import moleblend_ray.chemistry.config; sys.exit('rdkit' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("count", "generate", "stored", "timeout_s"),
    [(0, False, 1, 3), (1, True, 1, 3), (5, True, 5, 15)],
)
def test_more_conformers_have_more_time(
    count: int, generate: bool, stored: int, timeout_s: float
) -> None:
    config = ConformerConfig.of_count(count)
    assert (config.generate, config.count, config.timeout_s) == (generate, stored, timeout_s)
