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
from moleblend_ray.model.config import BlendConfig
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
    assert "show_all" not in before["blend"]
    require_same_run(before, identity(blend=BlendConfig(show_all=False)), "run")
    with pytest.raises(CheckpointError, match=r"blend\.show_all: the run has None.*asks for True"):
        require_same_run(before, identity(blend=BlendConfig(show_all=True)), "run")
