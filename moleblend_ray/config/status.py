"""What `moleblend status` looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moleblend_ray.checks import check_all, locations
from moleblend_ray.settings import typed


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class StatusConfig:
    """A directory that a command wrote or writes -> how far it is, from its files alone."""

    run: str
    """The `out` of `prepare`, `pretrain`, `sweep`, `finetune`, `embed` or `predict`, as a path or URI."""
    format: Literal["text", "json"] = "text"
    """Tables for people, or one JSON document on standard output."""

    def __post_init__(self) -> None:
        check_all(*locations(self, "run"))
