"""Training with a fixed number of workers, which can be stopped while it waits for a lost node."""

from __future__ import annotations

from typing import Any

import ray.train.torch
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ScalingDecision

from moleblend_ray.orchestration.stopping import StopFlag


class StoppableFixedPolicy(FixedScalingPolicy):
    """Ray Train's policy, which tries to start the workers until there is room. Runs in the controller of Ray Train."""

    def __init__(self, scaling_config: Any, stop_flag: StopFlag) -> None:
        super().__init__(scaling_config)
        self._stop_flag = stop_flag

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start the workers. Raises StoppedWhileWaitingError if SIGTERM came meanwhile."""
        self._stop_flag.end_wait_if_terminated()
        return super().make_decision_for_non_running_worker_group()


class FixedTrainer(ray.train.torch.TorchTrainer):
    """TorchTrainer with a :class:`StoppableFixedPolicy`."""

    def __init__(self, *, stop_flag: StopFlag, **options: Any) -> None:
        super().__init__(**options)
        self._stop_flag = stop_flag

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        options["scaling_policy"] = StoppableFixedPolicy(self.scaling_config, self._stop_flag)
        return super()._initialize_and_run_controller(**options)  # type: ignore[misc]
