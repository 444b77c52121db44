"""What `moleblend prepare` reads, keeps and writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moleblend_ray.checks import at_least, below_one, check_all, locations
from moleblend_ray.chemistry.config import SMILES_COLUMN, FeaturizeConfig
from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.data.sources.classes import class_checks
from moleblend_ray.settings import typed


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Molecules in SDF, CSV/TSV, SMILES or Parquet -> checksummed Parquet shards with a manifest and a quarantine."""

    source: str | tuple[str, ...]
    """File, directory or glob of molecules, or a list of them, as paths or URIs: .sdf, .csv, .tsv, .smi, .cxsmiles, .mol (each also .gz,
    .bz2, .xz or .zst), .tar or .zip of these or of QM9's .xyz, .parquet."""
    out: str
    """Directory of the prepared dataset, as a path or URI."""
    smiles_column: str = SMILES_COLUMN
    """Column with the SMILES in tables."""
    id_column: str | None = None
    """Column (or SDF property) with the molecule's id; null numbers the rows."""
    label_columns: tuple[str, ...] | None = None
    """Numeric columns (or SDF properties) to keep as labels; null keeps every numeric column."""
    classes: tuple[str, ...] = ()
    """Words of classes that `label_columns` hold instead of numbers, such as [inactive,active]: of two, the second becomes 1. Of
    more, each becomes a label of its own, `COLUMN=CLASS`."""
    censored_labels: bool = False
    """Keep bounds such as >10 or <0.5 in label columns, beside the labels; otherwise such a cell counts as missing."""
    relation_column: str | None = None
    """With `censored_labels`: column (or SDF property) with the relation of a row's labels (>, <, =), for tables that keep it
    apart from the number, as ChEMBL's do."""
    featurize: FeaturizeConfig = field(default_factory=FeaturizeConfig)
    """From molecule to atom and bond codes and coordinates; what is refused."""
    rows_per_chunk: int = 8192
    """Source rows per unit of work, and so without shuffle at most per shard."""
    row_group_rows: int = 2048
    """Rows per Parquet row group: what training reads at a time."""
    valid_fraction: float = 0.05
    """Share of the molecules kept for validation, chosen by a hash of the molecule; 0 to keep none."""
    test_fraction: float = 0.0
    """Share of the molecules kept for testing, chosen likewise."""
    split_seed: int = 0
    """Seed of that hash."""
    split_file: str | None = None
    """The source's official split, as a path or URI (split_dict.pt, .json, .npz, .csv, a directory of index files),
    which then decides instead of the two shares; names like test-dev count as test."""
    split_file_unnamed: Literal["error", "train", "quarantine"] = "error"
    """What becomes of molecules that the split file does not name: end with an error, or a split or quarantine."""
    shuffle: bool = False
    """Order the molecules of the whole data set at random, instead of as in the source."""
    shuffle_seed: int = 0
    """Seed of that order."""
    rows_per_shard: int = 65536
    """Molecules per shard of a shuffled data set, on average over all splits."""
    deduplicate: Literal["none", "inchikey"] = "none"
    """Keep one molecule of each standard InChIKey (one with coordinates from the source before others, then the
    first); the rest goes to the quarantine as duplicate."""
    shuffle_memory_gib: float = 1.0
    """Memory for molecules in each actor while shuffling or deduplicating, in GiB; changes the speed, not the
    result."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the work runs."""

    def __post_init__(self) -> None:
        check_all(
            *locations(self, "source", "out", "split_file"),
            *at_least(self, 1, "rows_per_chunk", "row_group_rows", "rows_per_shard"),
            *at_least(self, 0.25, "shuffle_memory_gib"),
            (
                len(set(labels := self.label_columns or ())) == len(labels),
                f"label_columns: expected each column once, found {list(labels)}",
            ),
            *class_checks(self.classes),
            (
                not self.classes or bool(self.label_columns),
                "classes: expected with label_columns, which say where they are; found without",
            ),
            (
                not (self.classes and self.censored_labels),
                "classes: expected without censored_labels, as classes have no bounds; found both",
            ),
            (
                self.censored_labels or self.relation_column is None,
                f"relation_column: expected with censored_labels=true only, found {self.relation_column!r} without",
            ),
            *below_one(self, "valid_fraction"),
            (
                self.test_fraction >= 0.0 and self.valid_fraction + self.test_fraction < 1.0,
                f"test_fraction: expected 0 <= fraction < 1 - valid_fraction, found {self.test_fraction} with "
                f"valid_fraction {self.valid_fraction}",
            ),
            *(
                (
                    -(2**63) <= getattr(self, name) < 2**63,
                    f"{name}: expected -2**63 to 2**63 - 1, found {getattr(self, name)}",
                )
                for name in ("split_seed", "shuffle_seed")
            ),
        )

    def sources(self) -> tuple[str, ...]:
        """``source`` as several."""
        return (self.source,) if isinstance(self.source, str) else self.source
