"""Training with a fixed number of workers, which can be stopped while it waits for a lost node; and Ctrl-C in any training."""

from __future__ import annotations

import signal
import threading
from typing import Any

import ray.train.torch
from ray._private import ray_constants
from ray.experimental.internal_kv import _internal_kv_get
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ScalingDecision

from moleblend_ray.orchestration.pretraining.stopping import StopFlag


class StoppableFixedPolicy(FixedScalingPolicy):
    """Ray Train's policy, which tries to start the workers until there is room. Runs in the controller of Ray Train."""

    def __init__(self, scaling_config: Any, stop_flag: StopFlag) -> None:
        super().__init__(scaling_config)
        self._stop_flag = stop_flag

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start the workers. Raises StoppedWhileWaitingError if SIGTERM came meanwhile."""
        self._stop_flag.end_wait_if_terminated()
        return super().make_decision_for_non_running_worker_group()


def _has_dashboard() -> bool:
    address = _internal_kv_get(
        ray_constants.DASHBOARD_ADDRESS, namespace=ray_constants.KV_NAMESPACE_DASHBOARD
    )
    return address is not None


class InterruptibleTrainer(ray.train.torch.TorchTrainer):
    """TorchTrainer of which Ctrl-C ends the workers and raises KeyboardInterrupt. Ray Train's own handler raises SystemExit, which
    ends a notebook's kernel or a script without a word, and stays when the training is over."""

    _is_interrupted = False

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        if _has_dashboard():
            return list(callbacks)
        # An actor, which takes two seconds of a core, asks the dashboard whether the controller was lost, and then frees the room of
        # its workers. In a private cluster there is none, and all ends with the command.
        return [
            callback
            for callback in callbacks
            if not isinstance(callback, PlacementGroupCleanerCallback)
        ]

    def _register_sigint_handler(self, controller: Any) -> None:
        # Called in the main thread only. The handler raises nothing: an exception that meets a callback of Python or Ray is
        # lost, and training would go on. The controller ends itself instead, and the call that waits for it with an error.
        def interrupt(*_: object) -> None:
            self._is_interrupted = True
            # Whoever asks again does not wait.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            controller.abort.remote()

        signal.signal(signal.SIGINT, interrupt)

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGINT)
        try:
            result = super()._initialize_and_run_controller(**options)  # type: ignore[misc]
        except Exception as error:
            if self._is_interrupted:
                raise KeyboardInterrupt from error
            raise
        finally:
            if is_main and before is not None:
                signal.signal(signal.SIGINT, before)
        if self._is_interrupted:
            raise KeyboardInterrupt
        return result


class FixedTrainer(InterruptibleTrainer):
    """TorchTrainer with a :class:`StoppableFixedPolicy`."""

    def __init__(self, *, stop_flag: StopFlag, **options: Any) -> None:
        super().__init__(**options)
        self._stop_flag = stop_flag

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        options["scaling_policy"] = StoppableFixedPolicy(self.scaling_config, self._stop_flag)
        return super()._initialize_and_run_controller(**options)
