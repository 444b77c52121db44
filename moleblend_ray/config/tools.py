"""Settings of the small jobs: making the sample collection, exporting a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from moleblend_ray.checks import at_least, check_all, locations
from moleblend_ray.settings import typed


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class SamplesConfig:
    """Drug-like molecules enumerated from fragments, with conformers and computed labels."""

    out: str
    """Parquet file to write, as a path or URI."""
    num_molecules: int = 5000
    """Distinct molecules."""
    seed: int = 0
    """Seed of the enumeration and of the conformers: the same file for the same seed."""

    def __post_init__(self) -> None:
        check_all(
            *locations(self, "out"),
            (
                str(self.out).endswith((".parquet", ".pq")),
                f"out: expected a path or URI that ends in .parquet, found {self.out!r}",
            ),
            *at_least(self, 1, "num_molecules"),
        )


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """A checkpoint of a run -> model.safetensors and config.json."""

    checkpoint: str
    """A pretraining run (if unfinished, its newest complete checkpoint), one checkpoint of it, or a file of the
    official parameters (.pt, .npz), as a path or URI."""
    out: str
    """Directory to write model.safetensors and config.json to, as a path or URI."""

    def __post_init__(self) -> None:
        check_all(*locations(self, "checkpoint", "out"))
