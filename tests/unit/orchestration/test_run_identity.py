"""What makes a pretraining run another one, and what does not."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import pytest

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.data.shards import Manifest
from moleblend_ray.errors import CheckpointError
from moleblend_ray.model.config import BlendConfig, ModelConfig
from moleblend_ray.orchestration.pretrain import run_identity
from moleblend_ray.training.commits import require_same_run

CONFIG = PretrainConfig(data="data", out="run")


def identity(**changes: Any) -> dict[str, Any]:
    manifest = SimpleNamespace(fingerprint="aaa", featurizer_version=1)
    return run_identity(dataclasses.replace(CONFIG, **changes), cast("Manifest", manifest))


def test_where_a_run_is_computed_may_change() -> None:
    require_same_run(identity(), identity(cluster=ClusterConfig(num_workers=4)), "run")


def test_runs_from_before_a_choice_existed_are_those_without_it() -> None:
    before = identity()
    assert "view_probabilities" not in before["blend"]
    assert "environment_bins" not in before["model"]
    blended = BlendConfig(view_probabilities=(1.0, 0.0, 0.0, 0.0))
    require_same_run(before, identity(blend=blended), "run")
    shown = BlendConfig(view_probabilities=(0.0, 0.0, 0.0, 1.0))
    with pytest.raises(
        CheckpointError, match=r"blend\.view_probabilities: the run has None.*asks for"
    ):
        require_same_run(before, identity(blend=shown), "run")
    with pytest.raises(CheckpointError, match=r"model\.environment_bins: the run has None.*512"):
        require_same_run(before, identity(model=ModelConfig(environment_bins=512)), "run")
