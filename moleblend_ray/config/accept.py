"""What the functions of the Python API begin with: settings of their own class, with absolute paths."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Final, TypeVar

from moleblend_ray.config.paths import with_absolute_paths
from moleblend_ray.errors import ConfigError, without_credentials

T = TypeVar("T")

FUNCTIONS: Final[Mapping[str, str]] = {
    "CheckpointsConfig": "mb.inspect_checkpoints",
    "DownloadConfig": "mb.download",
    "EmbedConfig": "mb.embed",
    "ExportConfig": "mb.export",
    "FinetuneConfig": "mb.finetune (of several tasks mb.finetune_tasks, of folds mb.cross_validate)",
    "InspectConfig": "mb.inspect_data",
    "LeaderboardConfig": "mb.leaderboard",
    "PlanConfig": "mb.plan",
    "PredictConfig": "mb.predict",
    "PrepareConfig": "mb.prepare",
    "PretrainConfig": "mb.pretrain",
    "RefitConfig": "mb.refit (of several tasks mb.refit_tasks)",
    "SamplesConfig": "mb.samples",
    "StatusConfig": "mb.status",
    "SweepConfig": "mb.sweep (of several tasks mb.sweep_tasks, of folds mb.cross_validate)",
}
"""Class of settings -> the function that takes them."""


def accepted(config: T, expected: type[T]) -> T:
    """``config`` with absolute paths. ConfigError if it is not of the class ``expected``, which otherwise would be found by
    whatever first asks for a setting that is not there."""
    if not isinstance(config, expected):
        raise ConfigError(
            f"expected settings, such as mb.{expected.__name__}(...), found {_described(config)}"
        )
    return with_absolute_paths(config)


def _described(value: object) -> str:
    """What was given in place of settings, and what to do with it."""
    if isinstance(value, type):
        return f"the class {value.__name__}; call it with settings"
    if isinstance(value, Mapping):
        return "a mapping; unpack it: (**settings)"
    if not dataclasses.is_dataclass(value):
        return without_credentials(reprlib.repr(value))
    name = type(value).__name__
    function = FUNCTIONS.get(name)
    return f"{name}(...)" + (f", which {function} takes" if function else "")
