"""Numbers of a run to Weights & Biases; JSON lines are kept in any case (:mod:`.metrics`).

No secret passes through the configuration: an online run finds its key where wandb looks for it (``WANDB_API_KEY`` or
netrc). A tracker that cannot start is the configuration's fault; one that fails later only loses curves, so it warns.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from moleblend_ray.errors import ConfigError
from moleblend_ray.training.config import TrackingConfig

logger = logging.getLogger(__name__)


class TrackerError(ConfigError):
    """The tracker cannot start: wandb is missing, has no key, or its server does not answer."""


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
        self._has_failed = False
        try:
            import wandb
        except ImportError as error:
            raise TrackerError(
                f"tracking.mode is {config.mode!r} but wandb cannot be imported ({error}); "
                "install wandb or set tracking.mode=disabled"
            ) from error
        try:
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
        except (wandb.Error, OSError) as error:
            raise TrackerError(
                f"tracking.mode is {config.mode!r} but wandb does not start: {error}. For an online run set "
                "WANDB_API_KEY (or `wandb login`) where the workers run; or set tracking.mode=offline"
            ) from error
        files = Path(self._run.dir).resolve()
        if not files.is_relative_to(Path(config.dir).resolve()):
            # wandb takes a temporary folder then, and is silent here.
            logger.warning(
                "tracking.dir: %s cannot be written on this machine; wandb's files are in %s",
                config.dir,
                files.parent,
            )

    def log(self, record: Mapping[str, float | int], step: int) -> None:
        """Send the numbers of one step."""
        with self._only_warn():
            self._run.log(dict(record), step=step)

    def finish(self) -> None:
        """Flush and close the wandb run."""
        with self._only_warn():
            self._run.finish()

    @contextlib.contextmanager
    def _only_warn(self) -> Iterator[None]:
        try:
            yield
        # Whatever another library raises: the run is worth more than its curves.
        except Exception as error:
            if not self._has_failed:
                logger.warning(
                    "wandb failed (%s: %s): its curves will have gaps, the run's own metrics do not",
                    type(error).__name__,
                    error,
                )
            self._has_failed = True


def start_tracker(config: TrackingConfig, run_uri: str, run_config: Mapping[str, Any]) -> Tracker:
    """The tracker that ``config`` asks for. ``run_config`` leaves the machine as it is: hide secrets before."""
    if config.mode == "disabled":
        return NoTracker()
    return WandbTracker(config, run_uri, run_config)
