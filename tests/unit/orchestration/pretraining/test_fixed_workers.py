"""What a training leaves of Ray Train's own callbacks."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.train import RunConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)

from moleblend_ray.orchestration.pretraining import fixed_workers


@pytest.mark.parametrize("has_dashboard", [True, False])
def test_the_room_of_a_lost_controller_is_freed_where_there_is_a_dashboard_to_ask(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_dashboard: bool
) -> None:
    monkeypatch.setattr(fixed_workers, "_has_dashboard", lambda: has_dashboard)
    trainer = fixed_workers.FixedTrainer(
        stop_flag=None,  # type: ignore[arg-type]
        train_loop_per_worker=lambda: None,
        run_config=RunConfig(storage_path=str(tmp_path)),
    )
    kinds = {type(callback) for callback in trainer._create_default_callbacks()}
    assert (PlacementGroupCleanerCallback in kinds) == has_dashboard
    assert DatasetsCallback in kinds
