"""Runs several commands in one process and on one Ray cluster, for `jobs/demo.py` and `jobs/results.py`."""

from __future__ import annotations

import logging
import shlex
import time
from dataclasses import dataclass, field
from typing import Any

from moleblend_ray.cli import JOBS, load_reference
from moleblend_ray.config.compose import load_config
from moleblend_ray.errors import MoleBlendError

logger = logging.getLogger(__name__)


class StoppedError(MoleBlendError):
    """A command was asked to stop before its end, so those that follow cannot build on it. The same stages continue."""


@dataclass(kw_only=True, slots=True)
class Stage:
    """A command and its result."""

    job: str
    """The `moleblend` command."""
    overrides: tuple[str, ...]
    """Its KEY=VALUE arguments."""
    where: str
    """URI of what it wrote."""
    summary: Any
    """The summary that it returned."""
    seconds: float
    """Wall time in seconds."""

    @property
    def command(self) -> str:
        """The command as a user types it."""
        return command_line(self.job, self.overrides)


@dataclass(kw_only=True, slots=True)
class Stages:
    """The commands that were run so far, each with a name."""

    done: dict[str, Stage] = field(default_factory=dict)
    """Name -> stage, in the order in which they ran."""

    def run(self, name: str, job: str, where: str, *overrides: str) -> Any:
        """Log the command, run it here, and return its summary; StoppedError if SIGTERM ended it before its time."""
        logger.info("$ %s", command_line(job, overrides))
        began_s = time.monotonic()
        config = load_config(load_reference(JOBS[job].config), job, overrides)
        summary = load_reference(JOBS[job].function)(config)
        self.done[name] = Stage(
            job=job,
            overrides=overrides,
            where=where,
            summary=summary,
            seconds=time.monotonic() - began_s,
        )
        if not getattr(summary, "finished", True):
            raise StoppedError(f"{name}: stopped by SIGTERM; the same command continues")
        return summary


def command_line(job: str, overrides: tuple[str, ...]) -> str:
    """The command as a user types it."""
    return shlex.join(["moleblend", job, *overrides])
