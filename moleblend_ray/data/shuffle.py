"""Shuffling the whole data set and finding duplicates, in bounded memory.

This is a distribution sort whose data are in files. Each molecule has a 64-bit *key*: a keyed hash of its InChIKey (if
duplicates are to be found) or else of its position in the source. The range of keys is divided into *buckets* of equal
width. The molecules of each chunk are *staged*; consecutive chunks that fit into memory together form a *group*. With
``shuffle`` there are two passes:

1. ``runs``: the molecules of a group are sorted by key and become one file with a segment per bucket;
2. ``buckets``: the segments of one bucket are read from all runs, sorted by (key, position in the source), and become
   one shard per split.

So the shuffled data set is the whole source sorted by key: its order depends on the seed alone, not on groups, memory
or the number of processes. Without ``shuffle`` only the columns that identify duplicates take this way, in three
passes:

1. ``runs``: as above, but with keys and ids only;
2. ``duplicates``: the duplicates of a bucket become a file with a segment per group;
3. ``groups``: the staged molecules of a group, without its duplicates, become shards in the order of the source.

A source of one group needs no runs: a single unit does everything. Every unit of work writes its receipt last.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Final, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from moleblend_ray.data import storage
from moleblend_ray.data.dataset_files import (
    QUARANTINE_DIR,
    SPLITS,
    part_name,
    segments_path,
    shard_path,
    staged_path,
    unit_receipt_uri,
)
from moleblend_ray.data.manifest import ShardInfo
from moleblend_ray.data.options import ConvertOptions
from moleblend_ray.data.receipts import (
    STAGED,
    Receipt,
    Statistics,
    UnitReceipt,
    shard_info,
    sum_statistics,
    write_part,
)
from moleblend_ray.data.shards import DUPLICATE, QUARANTINE_SCHEMA, shard_schema
from moleblend_ray.data.splits import seed_key, text_hashes
from moleblend_ray.errors import DataError
from moleblend_ray.relations.hashing import keyed_hash

KEY: Final = "_key"
POSITION: Final = "_position"
SPLIT: Final = "_split"
RANK: Final = "_rank"
INCHIKEY: Final = "_inchikey"

_PLACE_FIELDS: Final = (
    pa.field(KEY, pa.uint64()),
    pa.field(POSITION, pa.int64()),
    pa.field(SPLIT, pa.uint8()),
)
_IDENTITY_FIELDS: Final = (pa.field(RANK, pa.uint8()), pa.field(INCHIKEY, pa.string()))
_KEPT_FIELDS: Final = (
    pa.field(POSITION, pa.int64()),
    pa.field("kept_id", pa.string()),
    pa.field("kept_position", pa.int64()),
)

_ROW_BITS: Final = 40
"""A position is ``file_index << 40 | row``."""
_MAX_BUCKET_BYTES: Final = 64 << 20
"""Memory of the molecules of one bucket, which become one shard, however few they are. A process needs at least
``_COPIES`` times as much."""
_COPIES: Final = 4
"""Copies of its molecules that a unit holds at the same time: as read, concatenated, selected, and encoded."""
_MAX_GROUP_BYTES: Final = 1 << 30
"""Larger groups are no faster, and the offsets of Arrow's lists have 32 bits."""
_THREADS: Final = 16
_HEADER: Final = struct.Struct("<IQ")
"""Header of a segment: CRC-32 of the compressed content that follows, and its size when decompressed."""
_EXCERPT_CHARACTERS: Final = 200


# --------------------------------------------------------------------------------------------------------------
# Staging


def position_of(file_index: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position in the source: a number that sorts by file, then by row."""
    return (np.int64(file_index) << np.int64(_ROW_BITS)) | rows


def staged_table(
    molecules: pa.Table,
    file_index: int,
    split_codes: NDArray[np.uint8],
    inchikeys: Sequence[str | None] | None,
    seed: int,
) -> pa.Table:
    """Rows of a shard with the columns that place them; with ``inchikeys`` equal molecules get equal keys."""
    rows = molecules["source_row"].to_numpy()
    keys = keyed_hash(seed, file_index, rows)
    columns = [pa.array(position_of(file_index, rows)), pa.array(split_codes)]
    if inchikeys is not None:
        known = np.array([key is not None for key in inchikeys], dtype=np.bool_)
        keys = keys.copy()
        keys[known] = text_hashes([key for key in inchikeys if key is not None], seed_key(seed))
        columns += [pa.array(_ranks(molecules)), pa.array(inchikeys, pa.string())]
    schema = _staged_schema(molecules.schema, deduplicate=inchikeys is not None)
    arrays = [*molecules.columns, pa.array(keys), *columns]
    return pa.table([*arrays], schema=schema)


def _staged_schema(molecules: pa.Schema, *, deduplicate: bool) -> pa.Schema:
    return pa.schema([*molecules, *_PLACE_FIELDS, *(_IDENTITY_FIELDS if deduplicate else ())])


def _ranks(molecules: pa.Table) -> NDArray[np.uint8]:
    """Which of equal molecules to keep, lowest rank first: with geometry from the source, made here, or without."""
    from_source = np.array(molecules["conformer_status"].to_pylist(), dtype=object) == "source"
    has_any = molecules["num_conformers"].to_numpy() > 0
    return np.where(from_source & has_any, 0, np.where(has_any, 1, 2)).astype(np.uint8)


def encode_segment(table: pa.Table) -> bytes:
    """A table, without its schema, as bytes: the same for equal tables."""
    if not table.num_rows:
        return b""
    (batch,) = table.combine_chunks().to_batches()
    message = batch.serialize()
    packed: bytes = pa.compress(message, codec="zstd", asbytes=True)
    return _HEADER.pack(zlib.crc32(packed), message.size) + packed


def _decode_segment(content: bytes, schema: pa.Schema, where: str) -> pa.RecordBatch:
    if not content:
        return pa.RecordBatch.from_arrays(
            [pa.array([], field.type) for field in schema], schema=schema
        )
    if len(content) >= _HEADER.size:
        crc, size = _HEADER.unpack_from(content)
        packed = memoryview(content)[_HEADER.size :]
        if zlib.crc32(packed) == crc:
            message = pa.decompress(pa.py_buffer(packed), size, codec="zstd")
            return pa.ipc.read_record_batch(message, schema)
    raise _damaged(where)


def _damaged(where: str) -> DataError:
    return DataError(
        f"{where} is damaged. Delete it and run the same command again: what it held is made anew."
    )


# --------------------------------------------------------------------------------------------------------------
# Files of segments


def _write_segments(uri: str, segments: Sequence[bytes]) -> bytes:
    """Write a file of offsets, (n + 1) uint64, and the n segments; returns its content."""
    offsets = np.zeros(len(segments) + 1, dtype="<u8")
    np.cumsum([len(segment) for segment in segments], out=offsets[1:])
    content = b"".join([(offsets + np.uint64(offsets.nbytes)).tobytes(), *segments])
    storage.write_bytes(uri, content)
    return content


@lru_cache(maxsize=4096)
def _offsets(uri: str, num_segments: int, digest: str) -> NDArray[np.uint64]:
    """The offsets of a file of segments; cached, as every bucket reads from every run."""
    del digest  # in the cache's key, as the same name may be used again for other content
    content = storage.read_range(uri, 0, 8 * (num_segments + 1))
    if len(content) != 8 * (num_segments + 1):
        raise _damaged(uri)
    return np.frombuffer(content, "<u8")


def _read_segments(
    uris: Sequence[str], number: int, num_segments: int, digest: str, schema: pa.Schema
) -> pa.Table:
    """Segment ``number`` of every file, concatenated to one table of one chunk."""

    def read(uri: str) -> pa.RecordBatch:
        offsets = _offsets(uri, num_segments, digest)
        start, end = int(offsets[number]), int(offsets[number + 1])
        content = storage.read_range(uri, start, end - start) if end > start else b""
        return _decode_segment(content, schema, uri)

    with ThreadPoolExecutor(_THREADS) as pool:
        batches = list(pool.map(read, uris))
    return pa.Table.from_batches(batches, schema=schema).combine_chunks()


# --------------------------------------------------------------------------------------------------------------
# The plan


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
        return _unit_name(self.kind, self.number)


def _unit_name(kind: UnitKind, number: int) -> str:
    return f"{kind}/{number:06d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """What every process that does a unit of work needs to know."""

    out: str
    source_uris: tuple[str, ...]
    """URIs of the source files, without credentials."""
    labels: tuple[tuple[str, str | None], ...]
    """Name and unit of each label."""
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
        return _staged_schema(self.schema, deduplicate=self.deduplicate)

    @property
    def run_schema(self) -> pa.Schema:
        """Schema of the runs."""
        if self.shuffle:
            return self.staged_schema
        return pa.schema([pa.field("mol_id", pa.string()), *_PLACE_FIELDS[:2], *_IDENTITY_FIELDS])


def plan_exchange(
    out: str,
    source_uris: Sequence[str],
    labels: Sequence[tuple[str, str | None]],
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
    settings = [shuffle, deduplicate, num_buckets, row_group_rows, [list(pair) for pair in labels]]
    digest.update(json.dumps(settings).encode())
    for chunk in ordered:
        digest.update(json.dumps(chunk).encode())
    groups = _groups(ordered, min(memory_bytes // _COPIES, _MAX_GROUP_BYTES))
    exchange = Exchange(
        out=out,
        source_uris=tuple(source_uris),
        labels=tuple((name, unit) for name, unit in labels),
        descriptors=options.featurize.descriptors,
        row_group_rows=row_group_rows,
        shuffle=shuffle,
        deduplicate=deduplicate,
        num_buckets=num_buckets,
        group_starts=tuple(
            (group[0].file_index << _ROW_BITS) | group[0].first_row for group in groups if group
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


# --------------------------------------------------------------------------------------------------------------
# Units of work


class _Done(NamedTuple):
    """Files of a unit, and the statistics of their molecules."""

    files: list[ShardInfo]
    statistics: list[Statistics]


def run_unit(exchange: Exchange, unit: Unit) -> UnitReceipt:
    """Do a unit of work: write its files, and last its receipt."""
    if unit.kind == "runs":
        done = _write_run(exchange, unit)
    elif unit.kind == "buckets":
        done = _write_bucket(exchange, unit)
    elif unit.kind == "duplicates":
        done = _write_duplicates(exchange, unit)
    elif unit.kind == "groups":
        done = _write_group(exchange, unit)
    else:
        done = _write_all(exchange, unit)
    receipt = UnitReceipt(
        name=unit.name,
        digest=exchange.digest(unit),
        files=tuple(done.files),
        statistics=sum_statistics(done.statistics),
    )
    storage.write_json(unit_receipt_uri(exchange.out, unit.name), receipt.to_json())
    return receipt


def _write_run(exchange: Exchange, unit: Unit) -> _Done:
    table = _load_group(exchange, unit.chunks, exchange.run_schema)
    order, bounds = _by_bucket(table, exchange.num_buckets)
    return _write_cut(exchange, unit, table, order, bounds)


def _write_bucket(exchange: Exchange, unit: Unit) -> _Done:
    table = _read_runs(exchange, unit.number)
    return _place_bucket(exchange, table, unit.number)


def _write_duplicates(exchange: Exchange, unit: Unit) -> _Done:
    table = _read_runs(exchange, unit.number)
    dropped = _dropped(table)
    ends = [*exchange.group_starts, np.iinfo(np.int64).max]
    bounds = np.searchsorted(dropped[POSITION].to_numpy(), ends)
    return _write_cut(exchange, unit, dropped, np.arange(len(dropped)), bounds)


def _write_group(exchange: Exchange, unit: Unit) -> _Done:
    num_groups, schema = len(exchange.group_starts), pa.schema(_KEPT_FIELDS)
    uris = _segment_uris(exchange, "duplicates", exchange.num_buckets)
    dropped = _read_segments(uris, unit.number, num_groups, exchange.file_digest, schema)
    return _place_group(exchange, unit.chunks, dropped)


def _write_all(exchange: Exchange, unit: Unit) -> _Done:
    table = _load_group(exchange, unit.chunks, exchange.run_schema)
    if not exchange.shuffle:
        return _place_group(exchange, unit.chunks, _dropped(table))
    order, bounds = _by_bucket(table, exchange.num_buckets)
    done = _Done([], [])
    for bucket in range(exchange.num_buckets):
        part = table.take(pa.array(order[bounds[bucket] : bounds[bucket + 1]]))
        placed = _place_bucket(exchange, part, bucket)
        done.files.extend(placed.files)
        done.statistics.extend(placed.statistics)
    return done


def _load_group(exchange: Exchange, group: Sequence[StagedChunk], schema: pa.Schema) -> pa.Table:
    """The columns of ``schema`` of a group's staged molecules, in source order, as a table of one chunk."""

    def load(chunk: StagedChunk) -> pa.RecordBatch:
        return _load_chunk(exchange, chunk).select(schema.names)

    with ThreadPoolExecutor(_THREADS) as pool:
        return pa.Table.from_batches(list(pool.map(load, group)), schema=schema).combine_chunks()


def _load_chunk(exchange: Exchange, chunk: StagedChunk) -> pa.RecordBatch:
    uri = storage.join(exchange.out, staged_path(chunk.file_index, chunk.chunk_index))
    return _decode_segment(storage.read_bytes(uri), exchange.staged_schema, uri)


def _by_bucket(table: pa.Table, num_buckets: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(M,), the order of the rows by key, and (B + 1,), where each bucket begins in it, the last one being the end."""
    keys = table[KEY].to_numpy()
    order = np.argsort(keys, kind="stable")
    # Bucket b holds the keys k with b = k * B >> 64.
    starts = np.array([-(-(b << 64) // num_buckets) for b in range(num_buckets)], dtype=np.uint64)
    return order, np.append(np.searchsorted(keys[order], starts), len(keys))


def _segment_uris(exchange: Exchange, kind: UnitKind, count: int) -> list[str]:
    """The files in progress that a pass leaves."""
    return [
        storage.join(exchange.out, segments_path(_unit_name(kind, number)))
        for number in range(count)
    ]


def _read_runs(exchange: Exchange, bucket: int) -> pa.Table:
    """The rows of a bucket from all runs."""
    uris = _segment_uris(exchange, "runs", len(exchange.group_starts))
    return _read_segments(
        uris, bucket, exchange.num_buckets, exchange.file_digest, exchange.run_schema
    )


def _write_cut(
    exchange: Exchange,
    unit: Unit,
    table: pa.Table,
    order: NDArray[np.int64],
    bounds: NDArray[np.int64],
) -> _Done:
    """Write the rows, in ``order``, as the unit's file in progress: a segment between each two of ``bounds``."""
    segments = [
        encode_segment(table.take(pa.array(order[start:end]))) if end > start else b""
        for start, end in pairwise(bounds.tolist())
    ]
    path = segments_path(unit.name)
    content = _write_segments(storage.join(exchange.out, path), segments)
    return _Done([shard_info(path, STAGED, table.num_rows, content)], [])


def _place_bucket(exchange: Exchange, table: pa.Table, bucket: int) -> _Done:
    """Write the shards of a bucket, in the order of (key, position): no two molecules have the same position."""
    order = np.lexsort((table[POSITION].to_numpy(), table[KEY].to_numpy()))
    ordered = table.take(pa.array(order))
    dropped = _dropped(ordered) if exchange.deduplicate else None
    return _place(exchange, f"{bucket:06d}", ordered, dropped)


def _place_group(exchange: Exchange, group: Sequence[StagedChunk], dropped: pa.Table) -> _Done:
    """Write the shards of a group without its duplicates (those in ``dropped``), in the order of the source."""
    dropped = dropped.sort_by(POSITION)
    positions = dropped[POSITION].to_numpy()
    done = _Done([], [])
    for chunk in group:
        table = pa.Table.from_batches([_load_chunk(exchange, chunk)])
        own = table[POSITION].to_numpy()
        bounds = (own[0], own[-1] + 1) if len(own) else (0, 0)
        start, end = np.searchsorted(positions, bounds)
        stem = part_name(chunk.file_index, chunk.chunk_index)
        placed = _place(exchange, stem, table, dropped.slice(start, end - start))
        done.files.extend(placed.files)
        done.statistics.extend(placed.statistics)
    return done


def _place(exchange: Exchange, stem: str, table: pa.Table, dropped: pa.Table | None) -> _Done:
    """Write staged molecules, in this order, as shards, and the duplicates among them as a part of the quarantine."""
    duplicates = QUARANTINE_SCHEMA.empty_table()
    if dropped is not None and dropped.num_rows:
        is_dropped = np.isin(table[POSITION].to_numpy(), dropped[POSITION].to_numpy())
        rows = table.filter(pa.array(is_dropped)).sort_by(POSITION)
        duplicates = _quarantined(exchange, rows, dropped)
        table = table.filter(pa.array(~is_dropped))
    codes = table[SPLIT].to_numpy()
    molecules = table.select(exchange.schema.names).replace_schema_metadata(
        exchange.schema.metadata
    )
    parts = {
        shard_path(split, stem): (split, molecules.filter(pa.array(codes == code)))
        for code, split in enumerate(SPLITS)
    }
    parts[shard_path(QUARANTINE_DIR, f"{DUPLICATE}-{stem}")] = (QUARANTINE_DIR, duplicates)
    files = [
        info
        for path, (split, part) in parts.items()
        for info in write_part(exchange.out, path, split, part, exchange.row_group_rows)
    ]
    return _Done(files, [Statistics.of(molecules)])


def _dropped(table: pa.Table) -> pa.Table:
    """Rows whose InChIKey a better or earlier row also has, with that row; schema ``_KEPT_FIELDS``, by position."""
    positions = table[POSITION].to_numpy()
    # Molecules without an InChIKey have no code and never count as duplicates.
    codes = table[INCHIKEY].combine_chunks().dictionary_encode().indices
    known = np.flatnonzero(codes.is_valid().to_numpy(zero_copy_only=False))
    codes = codes.drop_null().to_numpy()
    order = np.lexsort((positions[known], table[RANK].to_numpy()[known], codes))
    rows, codes = known[order], codes[order]
    is_first = np.append(True, codes[1:] != codes[:-1])[: len(codes)]
    kept = rows[np.flatnonzero(is_first)[np.cumsum(is_first) - 1]] if len(rows) else rows
    rows, kept = rows[~is_first], kept[~is_first]
    by_position = np.argsort(positions[rows])
    rows, kept = rows[by_position], kept[by_position]
    kept_ids = table["mol_id"].take(pa.array(kept, pa.int64()))
    columns = [pa.array(positions[rows]), kept_ids, pa.array(positions[kept])]
    return pa.table(columns, schema=pa.schema(_KEPT_FIELDS))


def _quarantined(exchange: Exchange, rows: pa.Table, dropped: pa.Table) -> pa.Table:
    """The duplicates ``rows`` as rows of the quarantine; ``dropped`` states, row by row, what is kept instead."""
    details = []
    for key, kept in zip(rows[INCHIKEY].to_pylist(), dropped.to_pylist(), strict=True):
        file_index, row = divmod(kept["kept_position"], 1 << _ROW_BITS)
        place = f"row {row} of {exchange.source_uris[file_index]}"
        details.append(f"InChIKey {key} is kept as {kept['kept_id']}, {place}")
    files = rows[POSITION].to_numpy() >> np.int64(_ROW_BITS)
    return quarantined_molecules(
        rows, [exchange.source_uris[index] for index in files.tolist()], DUPLICATE, details
    )


def quarantined_molecules(
    molecules: pa.Table, source_uris: Sequence[str], reason: str, details: Sequence[str]
) -> pa.Table:
    """Rows of the quarantine for molecules that are sound, but left out of the data set."""
    count = molecules.num_rows
    excerpts = [text[:_EXCERPT_CHARACTERS] for text in molecules["smiles"].to_pylist()]
    columns = {
        "source_uri": list(source_uris),
        "source_row": molecules["source_row"],
        "mol_id": molecules["mol_id"],
        "excerpt": excerpts,
        "reason": [reason] * count,
        "detail": list(details),
    }
    return pa.table(columns, schema=QUARANTINE_SCHEMA)
