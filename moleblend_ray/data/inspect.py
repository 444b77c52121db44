"""What a prepared data set holds, and whether its files are still the ones that were written.

The manifest answers nearly everything, so inspecting a billion molecules reads a few files. The shards are read only
to compare checksums (``verify``) and for statistics that manifests of earlier versions lack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moleblend_ray.data.dataset.dataset_files import (
    PLAN_NAME,
    QUARANTINE_DIR,
    SPLITS,
    is_prepared,
    listed,
    listed_shards,
    wrong_files,
)
from moleblend_ray.data.dataset.manifest import (
    Counts,
    LabelInfo,
    Manifest,
    ShardInfo,
    SourceInfo,
    load_manifest,
)
from moleblend_ray.data.dataset.shard_reader import ShardReader
from moleblend_ray.data.dataset.shards import manifest_schema
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.ahead import mapped_ahead
from moleblend_ray.data.preparation.receipts import Statistics, sum_statistics, valid_receipts
from moleblend_ray.errors import DataError

_THREADS: Final = 8
_MOST_SEARCHED: Final = 2000
"""Parts of the quarantine that are read for examples. There is one for each chunk, and nearly always a reason with fewer rows
than examples are asked for, so that a search would read all of them: 122,000 for a billion molecules."""
_STATISTICS_COLUMNS: Final = ("num_atoms", "atom_features", "num_conformers", "conformer_status")


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitSize:
    """One split of a data set."""

    molecules: int
    shards: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarantinedRow:
    """A source row that is not in the data set."""

    source_uri: str
    source_row: int
    excerpt: str
    """Its SMILES, or the beginning of the record."""
    detail: str
    """What was found in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarantineReason:
    """The source rows that were rejected for one reason."""

    rows: int
    examples: tuple[QuarantinedRow, ...]
    """The first of these rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSetReport:
    """A prepared data set."""

    uri: str
    format_version: int
    fingerprint: str
    """SHA-256 of the manifest's content: the data set's identity."""
    options: Mapping[str, Any]
    """Settings that decided the content."""
    sources: tuple[SourceInfo, ...]
    labels: tuple[LabelInfo, ...]
    counts: Counts
    """With the histograms of atoms and elements, also if the manifest lacks them; they are empty if it does and molecules cannot
    be read."""
    splits: Mapping[str, SplitSize]
    """Those of ``train``, ``valid``, ``test`` and ``quarantine`` that are not empty."""
    quarantine: Mapping[str, QuarantineReason]
    """Reason -> rows; most frequent reason first."""
    schema: Mapping[str, str]
    """Column of the shards -> Arrow type and unit, if it has one."""
    verified: bool
    """Whether every file was read and compared with its checksum."""
    damages: tuple[str, ...]
    """The path of each damaged file and what is wrong with it, in the manifest's order. Without ``verify``: missing
    files, wrong sizes, and what the report itself would have to read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnfinishedReport:
    """A data set whose preparation has not finished."""

    uri: str
    options: Mapping[str, Any]
    sources: tuple[str, ...]
    """URIs of the files, without credentials."""
    chunks_done: int
    rows_in: int
    """Source rows in these chunks."""
    rows_quarantined: int


def inspect_data_set(
    uri: str,
    *,
    verify: bool = False,
    num_examples: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> DataSetReport | UnfinishedReport:
    """Describe the data set in directory ``uri``, finished or not; DataError if there is none.

    ``verify`` reads every file and compares its SHA-256; ``progress`` is called with the bytes read so far and the
    total. Damage is reported, not raised.
    """
    if not is_prepared(uri) and storage.exists(storage.join(uri, PLAN_NAME)):
        return _unfinished(uri)
    manifest = load_manifest(uri)
    damages = _damages(uri, manifest, verify=verify, progress=progress)
    # These read files, and may find damage that sizes do not show.
    counts = _counts(uri, manifest, damages)
    quarantine = _quarantine(uri, manifest, num_examples, damages)
    return DataSetReport(
        uri=uri,
        format_version=manifest.format_version,
        fingerprint=manifest.fingerprint,
        options=manifest.options,
        sources=manifest.sources,
        labels=manifest.labels,
        counts=counts,
        splits={
            split: SplitSize(
                molecules=sum(shard.num_rows for shard in shards),
                shards=len(shards),
                bytes=sum(shard.num_bytes for shard in shards),
            )
            for split in (*SPLITS, QUARANTINE_DIR)
            if (shards := manifest.shards_of(split))
        },
        quarantine=quarantine,
        schema=_schema(manifest),
        verified=verify,
        damages=tuple(
            f"{shard.path} {damages[shard.path]}"
            for shard in manifest.shards
            if shard.path in damages
        ),
    )


def _unfinished(uri: str) -> UnfinishedReport:
    members = {"options": dict[str, Any], "sources": list[str]}
    plan = storage.read_object(storage.join(uri, PLAN_NAME), members)
    receipts = valid_receipts(uri, listed(uri)).values()
    return UnfinishedReport(
        uri=uri,
        options=plan["options"],
        sources=tuple(plan["sources"]),
        chunks_done=len(receipts),
        rows_in=sum(receipt.rows_in for receipt in receipts),
        rows_quarantined=sum(receipt.rows_quarantined for receipt in receipts),
    )


def _damages(
    uri: str,
    manifest: Manifest,
    *,
    verify: bool,
    progress: Callable[[int, int], None] | None,
) -> dict[str, str]:
    """What is wrong with each damaged file, by path."""
    wrong = wrong_files(uri, manifest.shards, listed_shards(uri))
    found = {}
    total = sum(shard.num_bytes for shard in manifest.shards)
    read = 0

    def check(shard: ShardInfo) -> str | None:
        if shard.path in wrong or not verify:
            return wrong.get(shard.path)
        digest = storage.sha256_bytes(storage.read_bytes(storage.join(uri, shard.path)))
        return None if digest == shard.sha256 else f"has SHA-256 {digest} instead of {shard.sha256}"

    with ThreadPoolExecutor(_THREADS) as pool:
        for shard, damage in zip(manifest.shards, pool.map(check, manifest.shards), strict=True):
            if damage is not None:
                found[shard.path] = damage
            read += shard.num_bytes
            if verify and progress is not None:
                progress(read, total)
    return found


def _counts(uri: str, manifest: Manifest, damages: dict[str, str]) -> Counts:
    """The manifest's counts, with histograms from the shards if it has none and all can be read; else the reasons are added to
    ``damages``."""
    counts = manifest.counts
    shards = [shard.path for split in SPLITS for shard in manifest.shards_of(split)]
    if counts.atom_count_histogram or not counts.rows_out or not damages.keys().isdisjoint(shards):
        return counts
    try:
        statistics = sum_statistics(
            Statistics.of(table)
            for split in SPLITS
            for table in ShardReader(
                uri, manifest, split, columns=_STATISTICS_COLUMNS
            ).iter_tables()
        )
    except DataError:
        # The error tells of one file; this finds all of them.
        damages.update(_damages(uri, manifest, verify=True, progress=None))
        if not damages:
            raise
        return counts
    return replace(
        counts,
        atom_count_histogram=statistics.atom_count_histogram,
        elements=statistics.elements,
    )


def _quarantine(
    uri: str, manifest: Manifest, num_examples: int, damages: dict[str, str]
) -> dict[str, QuarantineReason]:
    """Each reason with its first rows; files are read only until every reason has enough of them, at most ``_MOST_SEARCHED``,
    and those that cannot be are added to ``damages``."""
    rows = manifest.counts.quarantined_by_reason
    wanted = {reason: min(count, num_examples) for reason, count in rows.items()}
    examples: dict[str, list[QuarantinedRow]] = {reason: [] for reason in rows}
    for table in _quarantine_tables(uri, manifest, damages):
        lacking = [reason for reason, count in wanted.items() if len(examples[reason]) < count]
        if not lacking:
            break
        found = pc.is_in(table["reason"], pa.array(lacking))
        for row in table.filter(found).to_pylist():
            shown = examples[row["reason"]]
            if len(shown) < num_examples:
                shown.append(
                    QuarantinedRow(
                        source_uri=row["source_uri"],
                        source_row=row["source_row"],
                        excerpt=row["excerpt"] or "",
                        detail=row["detail"] or "",
                    )
                )
    return {
        reason: QuarantineReason(rows=count, examples=tuple(examples[reason]))
        for reason, count in sorted(rows.items(), key=lambda item: (-item[1], item[0]))
    }


def _quarantine_tables(uri: str, manifest: Manifest, damages: dict[str, str]) -> Iterator[pa.Table]:
    """The parts of the quarantine, a few of them read ahead."""

    def read(shard: ShardInfo) -> pa.Table | str:
        content = storage.read_bytes(storage.join(uri, shard.path))
        try:
            return pq.read_table(pa.BufferReader(content))
        except (pa.ArrowException, OSError) as error:
            return f"cannot be read: {' '.join(str(error).split())}"

    shards = [one for one in manifest.shards_of(QUARANTINE_DIR) if one.path not in damages]
    searched = shards[:_MOST_SEARCHED]
    for shard, found in zip(searched, mapped_ahead(read, searched, _THREADS), strict=True):
        if isinstance(found, str):
            damages[shard.path] = found
        else:
            yield found


def _schema(manifest: Manifest) -> dict[str, str]:
    schema = {}
    for field in manifest_schema(manifest):
        unit = (field.metadata or {}).get(b"unit", b"").decode()
        schema[field.name] = f"{field.type}{f' ({unit})' if unit else ''}"
    return schema
