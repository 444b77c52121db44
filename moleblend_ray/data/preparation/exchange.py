"""The plan of a shuffle or of a search for duplicates (:mod:`.shuffle`): its settings, passes and units of work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import pyarrow as pa

from moleblend_ray.data.dataset.manifest import LabelColumn
from moleblend_ray.data.dataset.shards import shard_schema
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.receipts import STAGED, Receipt
from moleblend_ray.data.preparation.staging import IDENTITY_SCHEMA, position_of, staged_schema

_MAX_BUCKET_BYTES: Final = 64 << 20
"""Memory of the molecules of one bucket, which become one shard, however few they are. A process needs at least
``_COPIES`` times as much."""
_COPIES: Final = 4
"""Copies of its molecules that a unit holds at the same time: as read, concatenated, selected, and encoded."""
_MAX_GROUP_BYTES: Final = 1 << 30
"""Larger groups are no faster, and the offsets of Arrow's lists have 32 bits."""


class StagedChunk(NamedTuple):
    """A chunk whose molecules are staged."""

    file_index: int
    chunk_index: int
    first_row: int
    num_rows: int
    """Number of staged molecules."""
    memory_bytes: int
    """Memory that they take."""
    digest: str
    """SHA-256 of the file of staged molecules."""


def staged_chunk(receipt: Receipt) -> StagedChunk:
    """What an exchange needs to know about a converted chunk."""
    (file,) = receipt.files_of(STAGED)
    return StagedChunk(
        receipt.file_index,
        receipt.chunk_index,
        receipt.first_row,
        file.num_rows,
        receipt.memory_bytes,
        file.sha256,
    )


UnitKind = Literal["runs", "buckets", "duplicates", "groups", "all"]


class Unit(NamedTuple):
    """Work that one process does."""

    kind: UnitKind
    number: int
    chunks: tuple[StagedChunk, ...] = ()
    """The staged chunks that it reads: those of a group, or none."""

    @property
    def name(self) -> str:
        """Name of its receipt and of its file in progress."""
        return unit_name(self.kind, self.number)


def unit_name(kind: UnitKind, number: int) -> str:
    """Name of a unit's receipt and of its file in progress."""
    return f"{kind}/{number:06d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """What every process that does a unit of work needs to know."""

    out: str
    source_uris: tuple[str, ...]
    """URIs of the source files, without credentials."""
    labels: tuple[LabelColumn, ...]
    descriptors: bool
    """Whether molecules have descriptors."""
    row_group_rows: int
    shuffle: bool
    """Whether shards are in the order of the keys instead of the source's order."""
    deduplicate: bool
    num_buckets: int
    group_starts: tuple[int, ...]
    """Position of the first record of each group's first chunk."""
    content_digest: str
    """Digest of the molecules and the settings."""

    def digest(self, unit: Unit) -> str:
        """Digest of everything that decides the files of a unit; a receipt with another digest is not valid."""
        # The content of shards does not depend on the groups; the segments of files in progress do.
        return self.content_digest if unit.kind in ("buckets", "all") else self.file_digest

    @property
    def file_digest(self) -> str:
        """Digest of everything that decides the content of files in progress."""
        text = json.dumps([self.content_digest, self.group_starts])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def schema(self) -> pa.Schema:
        """Schema of the shards."""
        return shard_schema(self.labels, descriptors=self.descriptors)

    @property
    def staged_schema(self) -> pa.Schema:
        """Schema of staged molecules."""
        return staged_schema(self.schema, deduplicate=self.deduplicate)

    @property
    def run_schema(self) -> pa.Schema:
        """Schema of the runs."""
        return self.staged_schema if self.shuffle else IDENTITY_SCHEMA


def plan_exchange(
    out: str,
    source_uris: Sequence[str],
    labels: Sequence[LabelColumn],
    chunks: Iterable[StagedChunk],
    options: ConvertOptions,
    *,
    memory_bytes: int,
) -> tuple[Exchange, list[list[Unit]]]:
    """The exchange of these chunks, and its passes, by processes that each have ``memory_bytes`` for molecules.

    The units of one pass can be done in any order or at the same time, but the passes one after the other.
    """
    ordered = sorted(chunks)
    num_rows = sum(chunk.num_rows for chunk in ordered)
    num_bytes = sum(chunk.memory_bytes for chunk in ordered)
    shards = -(-num_rows // options.rows_per_shard)
    num_buckets = max(1, shards, -(-num_bytes // _MAX_BUCKET_BYTES))
    shuffle, deduplicate = options.shuffle, options.deduplicate != "none"
    row_group_rows = options.row_group_rows
    digest = hashlib.blake2b(digest_size=16)
    settings = [shuffle, deduplicate, num_buckets, row_group_rows, list(labels)]
    digest.update(json.dumps(settings).encode())
    for chunk in ordered:
        digest.update(json.dumps(chunk).encode())
    groups = _groups(ordered, min(memory_bytes // _COPIES, _MAX_GROUP_BYTES))
    exchange = Exchange(
        out=out,
        source_uris=tuple(source_uris),
        labels=tuple(labels),
        descriptors=options.featurize.descriptors,
        row_group_rows=row_group_rows,
        shuffle=shuffle,
        deduplicate=deduplicate,
        num_buckets=num_buckets,
        group_starts=tuple(
            position_of(group[0].file_index, group[0].first_row) for group in groups if group
        ),
        content_digest=digest.hexdigest(),
    )
    return exchange, _passes(exchange, groups)


def _passes(exchange: Exchange, groups: Sequence[tuple[StagedChunk, ...]]) -> list[list[Unit]]:
    if len(groups) == 1:
        return [[Unit("all", 0, groups[0])]]
    runs = [Unit("runs", number, group) for number, group in enumerate(groups)]
    if exchange.shuffle:
        return [runs, [Unit("buckets", number) for number in range(exchange.num_buckets)]]
    return [
        runs,
        [Unit("duplicates", number) for number in range(exchange.num_buckets)],
        [Unit("groups", number, group) for number, group in enumerate(groups)],
    ]


def _groups(chunks: Sequence[StagedChunk], max_bytes: int) -> tuple[tuple[StagedChunk, ...], ...]:
    """Consecutive chunks of at most ``max_bytes`` in total, or one larger chunk; without chunks, one empty group."""
    groups: list[list[StagedChunk]] = [[]]
    size = 0
    for chunk in chunks:
        if groups[-1] and size + chunk.memory_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(chunk)
        size += chunk.memory_bytes
    return tuple(tuple(group) for group in groups)
