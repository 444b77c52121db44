"""What a data set is to be made of: the settings that decide its content, and the claim on its place.

The plan is written before anything else. It names settings and files, not the content of the files: a repaired
file keeps the chunks that are the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.data import storage
from moleblend_ray.data.receipts import RECEIPTS_DIR, STAGED_DIR, Receipt, listed, valid_receipts
from moleblend_ray.data.shards import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    QUARANTINE_DIR,
    SPLITS,
    Manifest,
    SourceInfo,
    load_manifest,
)
from moleblend_ray.data.sources import ColumnConfig, SourceFile, SourceSet
from moleblend_ray.errors import ConfigError, DataError, without_credentials
from moleblend_ray.vocabulary import FEATURIZER_VERSION

logger = logging.getLogger(__name__)

PLAN_NAME: Final = f"{RECEIPTS_DIR}/plan.json"

Deduplicate = Literal["none", "inchikey"]
Unnamed = Literal["error", "train", "quarantine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertOptions:
    """What decides the content of a data set besides its sources."""

    columns: ColumnConfig = field(default_factory=ColumnConfig)
    featurize: FeaturizeConfig = field(default_factory=FeaturizeConfig)
    rows_per_chunk: int = 8192
    """Source records that make one unit of work, and without ``shuffle`` at most one shard of each split."""
    row_group_rows: int = 2048
    """Rows of each row group but the last of a shard."""
    valid_fraction: float = 0.05
    """Share of molecules, chosen by a hash of the canonical SMILES, in split ``valid``."""
    test_fraction: float = 0.0
    """Share of molecules, chosen likewise, in split ``test``."""
    split_seed: int = 0
    """Part of that hash."""
    split_file_digest: str | None = None
    """Digest of the source's own splits (``NamedSplits.digest``), which then decide instead of the hash."""
    split_file_unnamed: Unnamed = "error"
    """What becomes of a molecule that the split file does not name."""
    shuffle: bool = False
    """Order the molecules of the whole data set by a keyed hash."""
    shuffle_seed: int = 0
    """Key of that hash."""
    rows_per_shard: int = 65536
    """Rows that a shard of a shuffled data set has on average, all splits together."""
    deduplicate: Deduplicate = "none"
    """Keep one record of each InChIKey."""

    @property
    def needs_exchange(self) -> bool:
        """Whether molecules of different chunks must meet."""
        return self.shuffle or self.deduplicate != "none"

    def to_json(self) -> dict[str, Any]:
        """As a JSON value (tuples as lists), equal for equal options."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return value


def finished_manifest(
    out: str, files: Sequence[SourceFile], options: ConvertOptions
) -> Manifest | None:
    """The manifest of ``out`` if it is finished; ConfigError if it was made of something else or otherwise."""
    if not storage.exists(storage.join(out, MANIFEST_NAME)):
        return None
    manifest = load_manifest(out)
    made_of = [_identity(source) for source in manifest.sources]
    wanted = [_identity(file) for file in files]
    differences = _option_differences(manifest.options, options.to_json())
    if manifest.featurizer_version != FEATURIZER_VERSION:
        differences.append(
            f"featurizer version: there {manifest.featurizer_version}, now {FEATURIZER_VERSION}"
        )
    if made_of != wanted:
        differences.append(f"sources: there {_shown(made_of)}; now {_shown(wanted)}")
    if differences:
        raise ConfigError(
            f"out: {out} holds a data set prepared otherwise. {'; '.join(differences)}. "
            "Give another `out`, or delete this one to prepare it anew."
        )
    _check_shards(out, manifest)
    return manifest


def begin(out: str, sources: SourceSet, options: ConvertOptions) -> dict[tuple[int, int], Receipt]:
    """Claim ``out`` for this plan; returns receipts, by file and chunk, of what a former run has finished."""
    plan = {
        "format_version": FORMAT_VERSION,
        "featurizer_version": FEATURIZER_VERSION,
        "options": options.to_json(),
        "sources": [without_credentials(layout.file.uri) for layout in sources.layouts],
    }
    uri = storage.join(out, PLAN_NAME)
    present = listed(out)
    if uri in present:
        _check_plan(out, storage.read_json(uri), plan)
    elif _has_shards(out, present):
        raise ConfigError(
            f"out: {out} holds shards of which neither a manifest nor a plan tells anything. "
            "Give another `out`, or delete this one."
        )
    else:
        storage.write_json(uri, plan)
    return valid_receipts(out, present)


def _has_shards(out: str, present: Iterable[str]) -> bool:
    # Not anywhere in the URI: `out` itself may lie in a folder named test.
    places = tuple(storage.join(out, split) + "/" for split in (*SPLITS, QUARANTINE_DIR))
    return any(uri.startswith(places) for uri in present)


def remove_work(out: str) -> None:
    """Delete what a finished data set no longer needs: receipts, and molecules on their way to a shard."""
    for directory in (STAGED_DIR, RECEIPTS_DIR):
        storage.delete_tree(storage.join(out, directory))


def _check_shards(out: str, manifest: Manifest) -> None:
    """DataError if a file of a finished data set is missing or has another size."""
    sizes = listed(out, *SPLITS, QUARANTINE_DIR)
    damaged = []
    for shard in manifest.shards:
        size = sizes.get(storage.join(out, shard.path))
        if size != shard.num_bytes:
            state = "missing" if size is None else f"of {size} bytes, expected {shard.num_bytes}"
            damaged.append(f"{shard.path} is {state}")
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise DataError(
            f"{out} was prepared, but since then {len(damaged)} of its {len(manifest.shards)} files changed: "
            f"{'; '.join(damaged[:3])}{more}. Restore them, or delete all of {out} and prepare it again."
        )


def _identity(source: SourceFile | SourceInfo) -> tuple[str, int, str]:
    # Another signature or password does not make another file.
    return (without_credentials(source.uri), source.size, source.probe)


def _shown(identities: Sequence[tuple[str, int, str]]) -> str:
    texts = [f"{uri} ({size} bytes, probe {probe[:8]})" for uri, size, probe in identities[:3]]
    more = f" and {len(identities) - 3} more" if len(identities) > 3 else ""
    return ", ".join(texts) + more


def _option_differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that are not the same, by their dotted names.

    A setting that is not there is of a later version: the data set was made as by the default.
    """
    return _differences(_filled(there, ConvertOptions().to_json()), now)


def _filled(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    filled = {**defaults, **values}
    for key, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(filled[key], Mapping):
            filled[key] = _filled(filled[key], default)
    return filled


def _differences(there: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> list[str]:
    found: list[str] = []
    for key in sorted(set(there) | set(now)):
        old, new = there.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{at}{key}.")
        elif old != new:
            found.append(f"{at}{key}: there {old!r}, now {new!r}")
    return found


def _check_plan(out: str, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    defaults = {"options": ConvertOptions().to_json()}
    differences = _differences(_filled(there, defaults), now)
    if differences:
        raise ConfigError(
            f"out: {out} holds an unfinished data set begun otherwise. {'; '.join(differences)}. "
            "Give another `out`, the former settings to finish it, or delete it."
        )
