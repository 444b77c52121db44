"""Numbers of a run to Weights & Biases; JSON lines are kept in any case (:mod:`.metrics`).

No secret passes through the configuration: an online run finds its key where wandb looks for it (``WANDB_API_KEY`` or
netrc).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

from moleblend_ray.errors import ConfigError
from moleblend_ray.training.config import TrackingConfig


class Tracker(Protocol):
    """Receives the numbers of steps."""

    def log(self, record: Mapping[str, float | int], step: int) -> None:
        """Take the numbers of one step."""

    def finish(self) -> None:
        """Flush and close."""


class NoTracker:
    """Keeps nothing."""

    def log(self, record: Mapping[str, float | int], step: int) -> None:
        """Drop the numbers."""

    def finish(self) -> None:
        """Nothing to close."""


class WandbTracker:
    """A wandb run whose identity follows from the run's URI, so that a resumed run continues its curves."""

    def __init__(self, config: TrackingConfig, run_uri: str, run_config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"tracking.mode is {config.mode!r} but wandb cannot be imported ({error}); "
                "install wandb or set tracking.mode=disabled"
            ) from error
        self._run = wandb.init(
            project=config.project,
            name=config.name or run_uri.rstrip("/").rsplit("/", 1)[-1],
            id=hashlib.sha256(run_uri.encode()).hexdigest()[:16],
            resume="allow" if config.mode == "online" else None,
            mode=config.mode,
            dir=config.dir,
            config=dict(run_config),
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )

    def log(self, record: Mapping[str, float | int], step: int) -> None:
        """Send the numbers of one step."""
        self._run.log(dict(record), step=step)

    def finish(self) -> None:
        """Flush and close the wandb run."""
        self._run.finish()


def start_tracker(config: TrackingConfig, run_uri: str, run_config: Mapping[str, Any]) -> Tracker:
    """The tracker that ``config`` asks for."""
    if config.mode == "disabled":
        return NoTracker()
    return WandbTracker(config, run_uri, run_config)
