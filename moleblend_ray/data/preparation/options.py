"""What decides the content of a prepared data set besides its sources."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.data.sources import ColumnConfig

Deduplicate = Literal["none", "inchikey"]
Unnamed = Literal["error", "train", "quarantine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertOptions:
    """Settings of the conversion of molecule files into shards.

    The defaults are not those of a user (``PrepareConfig`` has these): a manifest without one of these settings was
    written before the setting existed, and the default is what it was made with. So they never change.
    """

    columns: ColumnConfig = field(default_factory=ColumnConfig)
    featurize: FeaturizeConfig = field(default_factory=FeaturizeConfig)
    rows_per_chunk: int = 8192
    """Source records per unit of work, which without ``shuffle`` becomes at most one shard of each split."""
    row_group_rows: int = 2048
    """Rows of each row group of a shard, except the last one."""
    valid_fraction: float = 0.05
    """Fraction of the molecules, chosen by a hash of the canonical SMILES, in split ``valid``."""
    test_fraction: float = 0.0
    """Fraction of the molecules, chosen in the same way, in split ``test``."""
    split_seed: int = 0
    """Key of that hash."""
    split_file_digest: str | None = None
    """Digest of the source's own splits (``NamedSplits.digest``), which then decide instead of the hash."""
    split_file_unnamed: Unnamed = "error"
    """What to do with a molecule that the split file does not name."""
    shuffle: bool = False
    """Order the molecules of the whole data set by a keyed hash."""
    shuffle_seed: int = 0
    """Key of that hash."""
    rows_per_shard: int = 65536
    """Average rows per shard of a shuffled data set, all splits together."""
    deduplicate: Deduplicate = "none"
    """Keep one record per InChIKey."""

    @property
    def needs_exchange(self) -> bool:
        """Whether molecules of different chunks must be brought together."""
        return self.shuffle or self.deduplicate != "none"

    def to_json(self) -> dict[str, Any]:
        """As a JSON value (tuples as lists), equal for equal options."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return value


def needs_exchange(options: Mapping[str, Any]) -> bool:
    """As :attr:`ConvertOptions.needs_exchange`, of the options that a plan or a manifest states, perhaps an old one."""
    return bool(options.get("shuffle")) or options.get("deduplicate", "none") != "none"
