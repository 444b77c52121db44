"""Reading molecules of a prepared data set at random or one after the other, and checking what is read."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moleblend_ray.data.dataset.block import GraphColumns, MoleculeBlock, concatenate, gather
from moleblend_ray.data.dataset.manifest import Manifest
from moleblend_ray.data.dataset.node_cache import NodeCache
from moleblend_ray.data.dataset.shards import (
    GRAPH_COLUMNS,
    PARQUET_MAGIC,
    damaged_shard,
    footer_bytes,
    footer_crc32,
    manifest_schema,
    read_file,
    read_shard_range,
)
from moleblend_ray.data.files.partial_file import PartialFile
from moleblend_ray.errors import DataError

_FOOTER_BYTES: Final = 1 << 16
"""Read first of a shard's end; most footers are shorter."""

# A parsed footer takes about 100 kB.
_MAX_FOOTERS: Final = 256

_FETCH_THREADS: Final = 8

_Key = TypeVar("_Key")

_Value = TypeVar("_Value")


class _Place(NamedTuple):
    """A row group of a shard."""

    shard: int
    group: int


class _RowGroup(NamedTuple):
    """A decoded row group."""

    table: pa.Table
    graph: GraphColumns | None
    """Its graph columns, most of them views of the table; None if the reader does not read all of them."""
    nbytes: int


class ShardReader:
    """Random and sequential access to the molecules of one split.

    Position p is the p-th row of the split's shards in manifest order. Row groups are fetched by byte range, several
    at a time; the most recently used ones are kept, up to ``cache_bytes``.
    """

    def __init__(
        self,
        uri: str,
        manifest: Manifest,
        split: str,
        *,
        columns: Sequence[str] | None = None,
        cache_bytes: int = 256 << 20,
        shared: NodeCache | None = None,
        verify: bool = False,
    ) -> None:
        """Read ``columns`` (None: all) of ``split``; ``verify`` checks each shard's SHA-256 when it is first opened.

        ``shared`` keeps the decoded row groups of this data set and these columns for all processes of the machine.
        """
        self._uri = uri
        self._shards = manifest.shards_of(split)
        self._schema = manifest_schema(manifest)
        self._columns = list(columns) if columns is not None else self._schema.names
        unknown = [name for name in self._columns if name not in self._schema.names]
        if unknown:
            raise DataError(f"{uri} has no columns {unknown}; it has {self._schema.names}.")
        self._split = split
        self._group_rows = manifest.row_group_rows
        self._starts = np.cumsum([0, *(shard.num_rows for shard in self._shards)], dtype=np.int64)
        most_rows = max((shard.num_rows for shard in self._shards), default=0)
        self._max_groups = max(1, -(-most_rows // self._group_rows))
        self._footers: OrderedDict[int, pq.FileMetaData] = OrderedDict()
        self._groups: OrderedDict[_Place, _RowGroup] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._shared = shared
        self._verify = verify
        self._threads: ThreadPoolExecutor | None = None

    @property
    def num_rows(self) -> int:
        """Molecules of the split."""
        return int(self._starts[-1])

    def read(self, positions: NDArray[np.int64]) -> pa.Table:
        """The rows at ``positions`` (M,), in that order; repeats allowed."""
        places, which, row = self._locate(np.asarray(positions, dtype=np.int64))
        if not places:
            return self._schema.empty_table().select(self._columns)
        order = np.lexsort((row, which))
        ends = np.searchsorted(which[order], np.arange(len(places) + 1))
        tables: list[pa.Table] = [None] * len(places)
        for index, group in self._row_groups(places):
            rows = row[order[ends[index] : ends[index + 1]]]
            tables[index] = group.table.take(pa.array(rows))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return pa.concat_tables(tables).combine_chunks().take(pa.array(back))

    def read_block(
        self, positions: NDArray[np.int64], conformer: NDArray[np.int64] | None = None
    ) -> MoleculeBlock:
        """The molecules at ``positions`` (M,), in that order; repeats allowed.

        ``conformer`` (M,) chooses among each molecule's conformers, see :func:`block.gather`. The memory used besides
        the result is bounded by ``cache_bytes``, however many row groups the positions touch.
        """
        positions = np.asarray(positions, dtype=np.int64)
        places, which, row = self._locate(positions)
        held: list[GraphColumns] = []
        held_bytes = 0
        slot = np.full(len(places), -1, np.int64)
        parts: list[MoleculeBlock] = []
        taken: list[NDArray[np.int64]] = []

        def flush() -> None:
            mine = np.flatnonzero(slot[which] >= 0)
            draw = None if conformer is None else conformer[mine]
            parts.append(gather(held, slot[which[mine]], row[mine], positions[mine], draw))
            taken.append(mine)

        for index, group in self._row_groups(places):
            held_bytes += group.nbytes
            slot[index] = len(held)
            if group.graph is None:
                raise DataError(f"blocks of molecules need the columns {GRAPH_COLUMNS}")
            held.append(group.graph)
            if held_bytes > self._cache_bytes:
                flush()
                slot[:], held_bytes = -1, 0
                held.clear()
        if held or not parts:
            flush()
        if len(parts) == 1:
            return parts[0]
        back = np.empty(len(positions), np.int64)
        back[np.concatenate(taken)] = np.arange(len(positions))
        return concatenate(parts).take(back)

    def iter_tables(self) -> Iterator[pa.Table]:
        """Each shard as one table, in order; the cache is not used."""
        for index, shard in enumerate(self._shards):
            content = read_file(self._uri, shard)
            with self._parquet_errors(index):
                file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
                table = file.read(self._columns)
            self._check_schema(index, table, shard.num_rows)
            yield table

    def _locate(
        self, positions: NDArray[np.int64]
    ) -> tuple[list[_Place], NDArray[np.int64], NDArray[np.int64]]:
        """The row groups that hold ``positions``; for each position the index of its row group, and its row in it."""
        self._check_positions(positions)
        shard = np.searchsorted(self._starts, positions, side="right") - 1
        group, row = np.divmod(positions - self._starts[shard], self._group_rows)
        keys, which = np.unique(shard * self._max_groups + group, return_inverse=True)
        shards, groups = np.divmod(keys, self._max_groups)
        places = [_Place(*place) for place in zip(shards.tolist(), groups.tolist(), strict=True)]
        return places, which.reshape(-1), row

    def _check_positions(self, positions: NDArray[np.int64]) -> None:
        if positions.ndim != 1:
            raise DataError(f"Positions must be one-dimensional, got shape {positions.shape}.")
        if len(positions) and not 0 <= positions.min() <= positions.max() < self.num_rows:
            raise DataError(
                f"Positions {positions.min()} to {positions.max()} asked of split {self._split!r} of "
                f"{self._uri}, which has {self.num_rows} molecules."
            )

    def _row_groups(self, places: Sequence[_Place]) -> Iterator[tuple[int, _RowGroup]]:
        """Each row group with its index in ``places``: first those in the cache, then the others."""
        missing = []
        for index, place in enumerate(places):
            group = self._groups.get(place)
            if group is None:
                missing.append(index)
            else:
                self._groups.move_to_end(place)
                yield index, group
        if self._shared is not None and missing:
            # Processes that need the same row groups at the same time begin with different ones, and share the work.
            first = os.getpid() % len(missing)
            missing = missing[first:] + missing[:first]
        for start in range(0, len(missing), _FETCH_THREADS):
            batch = missing[start : start + _FETCH_THREADS]
            asked = [places[index] for index in batch]
            self._fetch_footers(
                sorted({place.shard for place in asked if not self._is_made(place)})
            )
            # Threads only wait for storage: an actor with one core decodes fastest in one thread.
            for index, fetched in zip(
                batch, self._in_threads(self._fetch_group, asked), strict=True
            ):
                group = self._row_group(places[index], fetched)
                self._keep(places[index], group)
                yield index, group

    def _keep(self, place: _Place, group: _RowGroup) -> None:
        """Add a row group to the cache, and drop the least recently used ones that exceed its size."""
        self._groups[place] = group
        self._cached_bytes += group.nbytes
        while self._cached_bytes > self._cache_bytes:
            _, dropped = self._groups.popitem(last=False)
            self._cached_bytes -= dropped.nbytes

    def _fetch_footers(self, shards: Sequence[int]) -> None:
        missing = [index for index in shards if index not in self._footers]
        for index, footer in zip(
            missing, self._in_threads(self._read_footer, missing), strict=True
        ):
            self._footers[index] = footer
        for index in shards:
            self._footers.move_to_end(index)
        while len(self._footers) > max(_MAX_FOOTERS, len(shards)):
            self._footers.popitem(last=False)

    def _read_footer(self, index: int) -> pq.FileMetaData:
        """A shard's Parquet footer, after checking the file against the manifest."""
        size = self._shards[index].num_bytes
        if self._verify:
            read_file(self._uri, self._shards[index])
        start = max(0, size - _FOOTER_BYTES)
        tail = self._read_range(index, start, size - start + 1)
        if len(tail) != size - start or tail[-4:] != PARQUET_MAGIC:
            raise self._damaged(index, f"it is not a Parquet file of {size} bytes")
        length = footer_bytes(tail)
        if len(tail) < length <= size:
            start = size - length
            tail = self._read_range(index, start, length)
        expected = self._shards[index].footer_crc32
        if expected is not None and footer_crc32(tail) != expected:
            raise self._damaged(index, "its footer has not the CRC-32 of the manifest")
        with self._parquet_errors(index):
            metadata = pq.read_metadata(_FetchedPart(tail, start, size))
            self._check_schema(index, metadata.schema.to_arrow_schema(), metadata.num_rows)
        return metadata

    def _fetch_group(self, place: _Place) -> bytes | pa.Table:
        """The byte range of a row group, fetched by one read; with a shared cache, the decoded table."""
        if self._shared is None:
            return self._read_group(place)
        return self._shared.table(
            self._shared_name(place), lambda: self._decode_group(place, self._read_group(place))
        )

    def _is_made(self, place: _Place) -> bool:
        """Whether another process has decoded the row group, so that nothing of its shard needs to be read."""
        return self._shared is not None and self._shared.has(self._shared_name(place))

    def _shared_name(self, place: _Place) -> str:
        return f"{self._split}-{place.shard}-{place.group}"

    def _footer(self, shard: int) -> pq.FileMetaData:
        # The shared table that made it seem needless may have been dropped since.
        footer = self._footers.get(shard)
        return self._read_footer(shard) if footer is None else footer

    def _read_group(self, place: _Place) -> bytes:
        start, end = self._group_range(place)
        return self._read_range(place.shard, start, end - start)

    def _group_range(self, place: _Place) -> tuple[int, int]:
        """First and one-past-last byte of the columns in a row group."""
        group = self._footer(place.shard).row_group(place.group)
        return _byte_range(group, frozenset(self._columns))

    def _decode_group(self, place: _Place, content: bytes) -> pa.Table:
        """The columns of a row group, from its byte range."""
        with self._parquet_errors(place.shard):
            metadata = self._footer(place.shard)
            start, _ = self._group_range(place)
            source = _FetchedPart(content, start, self._shards[place.shard].num_bytes)
            file = pq.ParquetFile(source, metadata=metadata, page_checksum_verification=True)
            return file.read_row_group(place.group, self._columns, use_threads=False)

    def _row_group(self, place: _Place, fetched: bytes | pa.Table) -> _RowGroup:
        """The decoded row group, from what :meth:`_fetch_group` returned."""
        table = self._decode_group(place, fetched) if isinstance(fetched, bytes) else fetched
        if not set(GRAPH_COLUMNS) <= set(self._columns):
            return _RowGroup(table, None, table.nbytes)
        try:
            graph = GraphColumns.from_table(table)
        except DataError as error:
            raise self._damaged(place.shard, f"row group {place.group}: {error}") from error
        own = graph.rows.nbytes + graph.position_mask.nbytes
        return _RowGroup(table, graph, table.nbytes + own)

    def _in_threads(
        self, function: Callable[[_Key], _Value], keys: Sequence[_Key]
    ) -> Iterable[_Value]:
        """``function`` of each key, several at a time, as most of the time is spent waiting for storage."""
        if len(keys) <= 1:
            return [function(key) for key in keys]
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_FETCH_THREADS)
        return self._threads.map(function, keys)

    def _read_range(self, index: int, offset: int, length: int) -> bytes:
        return read_shard_range(self._uri, self._shards[index], offset, length)

    def _check_schema(self, index: int, found: pa.Table | pa.Schema, num_rows: int) -> None:
        expected = self._shards[index].num_rows
        names = found.column_names if isinstance(found, pa.Table) else found.names
        lacking = [name for name in self._columns if name not in names]
        if lacking or num_rows != expected:
            raise self._damaged(
                index, f"it has {num_rows} rows instead of {expected}, and lacks columns {lacking}"
            )

    @contextmanager
    def _parquet_errors(self, index: int) -> Iterator[None]:
        """Raise Arrow's errors about bytes that it cannot decode as a DataError about the shard."""
        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(index, " ".join(str(error).split())) from error

    def _damaged(self, index: int, reason: str) -> DataError:
        return damaged_shard(self._uri, self._shards[index], reason)


def _byte_range(group: Any, columns: frozenset[str]) -> tuple[int, int]:
    """First and one-past-last byte of these columns in a row group."""
    starts, ends = [], []
    for index in range(group.num_columns):
        column = group.column(index)
        # "positions.list.element" belongs to "positions"; but the name of a label may contain dots.
        path = column.path_in_schema
        if path in columns or path.split(".", 1)[0] in columns:
            start = column.dictionary_page_offset or column.data_page_offset
            starts.append(start)
            ends.append(start + column.total_compressed_size)
    return min(starts), max(ends)


class _FetchedPart(PartialFile):
    """A file of ``size`` bytes of which only ``content``, which begins at ``start``, was fetched."""

    def __init__(self, content: bytes, start: int, size: int) -> None:
        super().__init__(size)
        self._content = memoryview(content)
        self._start = start

    def _range(self, start: int, end: int) -> bytes:
        fetched_end = self._start + len(self._content)
        if not self._start <= start <= end <= fetched_end:
            raise ValueError(
                f"bytes {start} to {end} asked, fetched were {self._start} to {fetched_end}"
            )
        return bytes(self._content[start - self._start : end - self._start])
