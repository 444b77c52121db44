"""What `moleblend prepare` reads, keeps and writes."""

from __future__ import annotations

from dataclasses import dataclass, field

from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.errors import check_all


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Molecules in SDF, CSV/TSV or Parquet -> checksummed Parquet shards with a manifest and a quarantine."""

    source: str | tuple[str, ...]
    """File, directory or glob of molecules, or a list of them, as paths or URIs: .sdf, .csv, .tsv (each also .gz),
    .parquet."""
    out: str
    """Directory of the prepared dataset, as a path or URI."""
    smiles_column: str = "smiles"
    """Column with the SMILES in tables."""
    id_column: str | None = None
    """Column (or SDF property) with the molecule's id; null numbers the rows."""
    label_columns: tuple[str, ...] | None = None
    """Numeric columns (or SDF properties) to keep as labels; null keeps every numeric column."""
    featurize: FeaturizeConfig = field(default_factory=FeaturizeConfig)
    """From molecule to atom and bond codes and coordinates; what is refused."""
    rows_per_chunk: int = 8192
    """Source rows per unit of work, and so at most per shard."""
    row_group_rows: int = 1024
    """Rows per Parquet row group: what training reads at a time."""
    valid_fraction: float = 0.05
    """Share of the molecules kept for validation, chosen by a hash of the molecule; 0 to keep none."""
    split_seed: int = 0
    """Seed of that hash."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the work runs."""

    def __post_init__(self) -> None:
        check_all(
            (
                bool(self.source) and "" not in self.sources(),
                f"source: expected a path or URI or several, found {self.source!r}",
            ),
            (bool(self.out), "out: expected a path or URI, found an empty string"),
            (
                self.rows_per_chunk >= 1,
                f"rows_per_chunk: expected >= 1, found {self.rows_per_chunk}",
            ),
            (
                self.row_group_rows >= 1,
                f"row_group_rows: expected >= 1, found {self.row_group_rows}",
            ),
            (
                0.0 <= self.valid_fraction < 1.0,
                f"valid_fraction: expected 0 <= fraction < 1, found {self.valid_fraction}",
            ),
        )

    def sources(self) -> tuple[str, ...]:
        """``source`` as several."""
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)
