"""Training with a fixed number of workers, which can be stopped while it waits for a lost node; and Ctrl-C in any training."""

from __future__ import annotations

import contextlib
from typing import Any, Final

import ray
import ray.exceptions
import ray.train.torch
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ScalingDecision

from moleblend_ray.orchestration.stopping import StopFlag

_ABORT_S: Final = 30.0
"""Seconds that workers have to end after Ctrl-C."""


class StoppableFixedPolicy(FixedScalingPolicy):
    """Ray Train's policy, which tries to start the workers until there is room. Runs in the controller of Ray Train."""

    def __init__(self, scaling_config: Any, stop_flag: StopFlag) -> None:
        super().__init__(scaling_config)
        self._stop_flag = stop_flag

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start the workers. Raises StoppedWhileWaitingError if SIGTERM came meanwhile."""
        self._stop_flag.end_wait_if_terminated()
        return super().make_decision_for_non_running_worker_group()


class InterruptibleTrainer(ray.train.torch.TorchTrainer):
    """TorchTrainer of which Ctrl-C ends the workers and raises KeyboardInterrupt. Ray Train's own handler raises SystemExit, which
    ends a notebook's kernel or a script without a word, and stays when the training is over."""

    _controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        try:
            return super()._initialize_and_run_controller(**options)  # type: ignore[misc]
        except KeyboardInterrupt:
            if self._controller is not None:
                # The cluster may go on without this command. The controller ends itself, which is an error of the call.
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.get(self._controller.abort.remote(), timeout=_ABORT_S)
            raise


class FixedTrainer(InterruptibleTrainer):
    """TorchTrainer with a :class:`StoppableFixedPolicy`."""

    def __init__(self, *, stop_flag: StopFlag, **options: Any) -> None:
        super().__init__(**options)
        self._stop_flag = stop_flag

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        options["scaling_policy"] = StoppableFixedPolicy(self.scaling_config, self._stop_flag)
        return super()._initialize_and_run_controller(**options)
