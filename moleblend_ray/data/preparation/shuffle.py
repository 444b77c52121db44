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

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moleblend_ray.data.dataset.dataset_files import (
    QUARANTINE_DIR,
    SPLITS,
    part_name,
    segments_path,
    shard_path,
    staged_path,
    unit_receipt_uri,
)
from moleblend_ray.data.dataset.manifest import ShardInfo
from moleblend_ray.data.dataset.shards import DUPLICATE, QUARANTINE_SCHEMA, quarantined_molecules
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.exchange import Exchange, StagedChunk, Unit, UnitKind, unit_name
from moleblend_ray.data.preparation.receipts import (
    STAGED,
    Statistics,
    UnitReceipt,
    shard_info,
    sum_statistics,
    write_part,
)
from moleblend_ray.data.preparation.segments import (
    decode_segment,
    encode_segment,
    read_segments,
    write_segments,
)
from moleblend_ray.data.preparation.staging import INCHIKEY, KEY, POSITION, RANK, SPLIT, place_of

_KEPT_SCHEMA: Final = pa.schema(
    [
        pa.field(POSITION, pa.int64()),
        pa.field("kept_id", pa.string()),
        pa.field("kept_position", pa.int64()),
    ]
)
"""One row per duplicate: where it is, and which molecule is kept instead."""

_THREADS: Final = 16


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
    uris = _segment_uris(exchange, "duplicates", exchange.num_buckets)
    dropped = read_segments(
        uris, unit.number, len(exchange.group_starts), exchange.file_digest, _KEPT_SCHEMA
    )
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
    return decode_segment(storage.read_bytes(uri), exchange.staged_schema, uri)


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
        storage.join(exchange.out, segments_path(unit_name(kind, number)))
        for number in range(count)
    ]


def _read_runs(exchange: Exchange, bucket: int) -> pa.Table:
    """The rows of a bucket from all runs."""
    uris = _segment_uris(exchange, "runs", len(exchange.group_starts))
    return read_segments(
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
    content = write_segments(storage.join(exchange.out, path), segments)
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
    """Rows whose InChIKey a better or earlier row also has, with that row; schema ``_KEPT_SCHEMA``, by position."""
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
    return pa.table(columns, schema=_KEPT_SCHEMA)


def _quarantined(exchange: Exchange, rows: pa.Table, dropped: pa.Table) -> pa.Table:
    """The duplicates ``rows`` as rows of the quarantine; ``dropped`` states, row by row, what is kept instead."""
    details = []
    for key, kept in zip(rows[INCHIKEY].to_pylist(), dropped.to_pylist(), strict=True):
        file_index, row = place_of(kept["kept_position"])
        place = f"row {row} of {exchange.source_uris[file_index]}"
        details.append(f"InChIKey {key} is kept as {kept['kept_id']}, {place}")
    uris = [exchange.source_uris[place_of(place)[0]] for place in rows[POSITION].to_pylist()]
    return quarantined_molecules(rows, uris, DUPLICATE, details)
