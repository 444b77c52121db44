"""What `moleblend data` looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moleblend_ray.errors import check_all


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
        check_all(
            (bool(self.data), "data: expected a path or URI, found an empty string"),
            (self.examples >= 0, f"examples: expected >= 0, found {self.examples}"),
        )
