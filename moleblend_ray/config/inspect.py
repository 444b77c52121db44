"""What `moleblend data` and `moleblend checkpoints` look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moleblend_ray.checks import at_least, check_all, locations
from moleblend_ray.settings import typed


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """A prepared dataset -> what it holds: counts, histograms, labels, quarantine, damage."""

    data: str
    """Directory of the prepared dataset, as a path or URI."""
    verify: bool = False
    """Read every file and compare it with its checksum."""
    examples: int = 3
    """Quarantined rows shown for each reason."""
    format: Literal["text", "json"] = "text"
    """A report for people, or one JSON document on standard output."""

    def __post_init__(self) -> None:
        check_all(*locations(self, "data"), *at_least(self, 0, "examples"))


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointsConfig:
    """A run -> its checkpoints: which are whole, how two differ; deletes old ones if asked."""

    run: str
    """Folder of a run (the `out` of `pretrain`) or, to compare, one checkpoint of it, as a path or URI."""
    verify: bool = False
    """Read every file and compare it with its checksum."""
    against: str | None = None
    """Another run or checkpoint: show what differs between the two instead."""
    keep_last: int | None = None
    """Delete all but this many of the newest whole checkpoints; null deletes nothing."""
    format: Literal["text", "json"] = "text"
    """A report for people, or one JSON document on standard output."""

    def __post_init__(self) -> None:
        check_all(
            *locations(self, "run", "against"),
            *at_least(self, 1, "keep_last"),
            (
                self.against is None or not (self.verify or self.keep_last),
                "against: a comparison deletes and verifies nothing; leave verify and keep_last out",
            ),
        )
