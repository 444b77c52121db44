"""Settings of fine-tuning and sweeps that no run could use are refused before it starts."""

from __future__ import annotations

import pytest

from moleblend_ray.config.describe import describe
from moleblend_ray.config.downstream import FinetuneConfig, SweepConfig, TaskConfig
from moleblend_ray.errors import ConfigError

TASK = TaskConfig(name="esol", source="esol.csv")


@pytest.mark.parametrize("seeds", [(), (1, 1), (0, -1), (2**32,)])
def test_seeds_that_no_generator_takes_are_refused(seeds: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^seeds: expected"):
        FinetuneConfig(task=TASK, out="out", seeds=seeds)
    with pytest.raises(ConfigError, match=r"^final_seeds: expected"):
        SweepConfig(task=TASK, out="out", final_seeds=seeds)


def test_a_search_seed_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^search_seed: expected 0 to"):
        SweepConfig(task=TASK, out="out", search_seed=-1)


@pytest.mark.parametrize("config", [FinetuneConfig, SweepConfig])
def test_every_setting_has_a_description_for_help(config: type) -> None:
    keys = list(describe(config))
    assert {"task.name", "cluster.use_gpu", "gpus_per_worker"} <= {key.path for key in keys}
    assert not [key.path for key in keys if not key.doc]
