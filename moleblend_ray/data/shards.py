"""The prepared data set in storage: its Parquet schema, its manifest, and a reader that checks what it reads.

See ``docs/data-format.md``. A data set consists of what its ``manifest.json`` names and nothing else; the manifest is
written last, so a directory without one is unfinished. Needs neither RDKit nor ``chemistry``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moleblend_ray.data import storage
from moleblend_ray.data.block import GraphColumns, MoleculeBlock, concatenate, gather
from moleblend_ray.data.dataset_files import MANIFEST_NAME, SPLITS
from moleblend_ray.data.node_cache import NodeCache
from moleblend_ray.data.partial_file import PartialFile
from moleblend_ray.errors import DataError

FORMAT_VERSION: Final = 3
"""Increased whenever older code could not read what newer code writes. All versions up to this one can be read."""

LABEL_PREFIX: Final = "label:"

DUPLICATE: Final = "duplicate"
"""Quarantine reason: another record of the same InChIKey is kept (``deduplicate``)."""

NOT_IN_SPLIT_FILE: Final = "not_in_split_file"
"""Quarantine reason: the split file names the record in no split."""

MOLECULE_FIELDS: Final = (
    pa.field("mol_id", pa.string()),
    pa.field("source_row", pa.int64()),
    pa.field("smiles", pa.string()),
    pa.field("conformer_status", pa.string()),
    pa.field("conformer_detail", pa.string()),
    pa.field("conformer_energies", pa.list_(pa.float32()), metadata={"unit": "kcal/mol"}),
    pa.field("num_atoms", pa.uint16()),
    pa.field("atom_features", pa.list_(pa.uint8())),
    pa.field("bonds", pa.list_(pa.uint16())),
    pa.field("bond_features", pa.list_(pa.uint8())),
    pa.field("num_conformers", pa.uint8()),
    pa.field("positions", pa.list_(pa.float32()), metadata={"unit": "angstrom"}),
    pa.field("position_mask", pa.list_(pa.bool_())),
)
"""Columns of every shard, before its label columns. The graph columns are adjacent, so one range read fetches them."""

_SINCE_VERSION_2: Final = frozenset({"conformer_detail", "conformer_energies"})

GRAPH_COLUMNS: Final = (
    "num_atoms",
    "atom_features",
    "bonds",
    "bond_features",
    "num_conformers",
    "positions",
    "position_mask",
)
"""The columns that a model needs."""

QUARANTINE_SCHEMA: Final = pa.schema(
    [
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("mol_id", pa.string()),
        pa.field("excerpt", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
    ]
)
"""One row per source row that is in no shard: where it is, what it looks like, why it was rejected."""

_DICTIONARY_COLUMNS: Final = (
    "conformer_status",
    "conformer_detail",
    "num_atoms",
    "atom_features.list.element",
    "bonds.list.element",
    "bond_features.list.element",
    "num_conformers",
)
"""Columns with few distinct values: with a dictionary they are smaller and decode in two thirds of the time."""

_FOOTER_BYTES: Final = 1 << 16
"""Read first of a shard's end; most footers are shorter."""
# A parsed footer takes about 100 kB.
_MAX_FOOTERS: Final = 256
_FETCH_THREADS: Final = 8
_PARQUET_MAGIC: Final = b"PAR1"

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelInfo:
    """A label of the data set."""

    name: str
    """Name in the source; the column of the shards is ``label:<name>``."""

    unit: str | None
    """Unit as the source states it (Parquet field metadata ``unit``), None if it states none."""

    count: int
    """Molecules that have a value."""

    num_unreadable: int = 0
    """Molecules whose cell in the source holds something that is not a number; their label is null."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceInfo:
    """A source file as it was when the data set was prepared."""

    uri: str
    """Without credentials."""
    format: str
    size: int
    """Bytes."""
    probe: str
    """SHA-256 of the file's first and last 64 KiB and its size, which detects most changes without reading the file."""
    rows: int
    """Records read from it."""
    members: str | None = None
    """Pattern of the members of an archive that were read; None in manifests of before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One Parquet file of the data set."""

    path: str
    """Path within the data set, such as ``train/00000-000003.parquet``."""
    split: str
    """``train``, ``valid``, ``test`` or ``quarantine``."""
    num_rows: int
    num_bytes: int
    sha256: str
    footer_crc32: int | None = None
    """CRC-32 of the file's end, from its Parquet footer on; None in data sets of earlier versions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Where the source's rows went; ``rows_in == rows_out + rows_quarantined``."""

    rows_in: int
    rows_out: int
    rows_quarantined: int
    quarantined_by_reason: dict[str, int]
    """Rejection code -> rows."""
    atoms_out: int
    with_coordinates: int
    """Molecules with at least one conformer that has a coordinate for some atom."""
    conformer_status: dict[str, int]
    """Conformer status -> molecules out."""
    duplicate_ids: int
    """Molecules with the ``mol_id`` of an earlier molecule, including those in the quarantine as duplicates."""
    conformer_detail: dict[str, int] = field(default_factory=dict)
    """Kind of statement in ``conformer_detail`` (the words before the colon) -> molecules out."""
    without_inchikey: int = 0
    """With ``deduplicate``: molecules for which InChI makes no key, and which therefore never count as duplicates."""
    atom_count_histogram: dict[str, int] = field(default_factory=dict)
    """Number of atoms, as a decimal string -> molecules out; empty in data sets of earlier versions."""
    elements: dict[str, int] = field(default_factory=dict)
    """Element symbol (``*`` for a dummy atom) -> molecules out that contain it; empty in data sets of earlier
    versions."""

    @property
    def molecules_by_atoms(self) -> dict[int, int]:
        """Number of atoms -> molecules out; without a histogram, all molecules with the mean number of atoms."""
        if self.atom_count_histogram:
            return {int(atoms): count for atoms, count in self.atom_count_histogram.items()}
        return {round(self.atoms_out / max(1, self.rows_out)): self.rows_out}


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The files of a prepared data set, and how they were made; the only way to find its files."""

    format_version: int
    featurizer_version: int
    options: dict[str, Any]
    """The settings that decided the content, as JSON values."""
    sources: tuple[SourceInfo, ...]
    labels: tuple[LabelInfo, ...]
    shards: tuple[ShardInfo, ...]
    """Files of train, then valid, test and quarantine; within each in source order, or in the order of the shuffle."""
    counts: Counts
    row_group_rows: int
    """Rows of each row group of a shard, except the last one."""
    fingerprint: str
    """SHA-256 over versions, options, labels and the checksums of train, valid and test shards."""

    def shards_of(self, split: str) -> tuple[ShardInfo, ...]:
        """The files of a split, in the order that defines the positions of its molecules."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def num_molecules(self, split: str) -> int:
        """Rows of a split."""
        return sum(shard.num_rows for shard in self.shards_of(split))

    def label_names(self) -> tuple[str, ...]:
        """Names of the labels, in the order of their columns."""
        return tuple(label.name for label in self.labels)

    def to_json(self) -> dict[str, Any]:
        """As a JSON value."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Manifest:
        """From a JSON value; KeyError or TypeError if it does not have the form of this version."""
        fields = dict(value)
        fields["sources"] = tuple(SourceInfo(**source) for source in value["sources"])
        fields["labels"] = tuple(LabelInfo(**label) for label in value["labels"])
        fields["shards"] = tuple(ShardInfo(**shard) for shard in value["shards"])
        # The manifest of a data set from elsewhere could name any file of this machine.
        foreign = [shard.path for shard in fields["shards"] if _leads_out(shard.path)]
        if foreign:
            raise TypeError(f"{foreign[0]!r} lies outside of the data set")
        fields["counts"] = Counts(**value["counts"])
        return cls(**fields)


def _leads_out(path: str) -> bool:
    return path.startswith(("/", "\\")) or "://" in path or ".." in re.split(r"[/\\]", path)


def fingerprint(
    featurizer_version: int,
    options: Mapping[str, Any],
    labels: Sequence[LabelInfo],
    shards: Sequence[ShardInfo],
    *,
    format_version: int = FORMAT_VERSION,
) -> str:
    """The identity of a data set's molecules, wherever the data set and its sources are stored.

    The quarantine, which names the sources, is not included.
    """
    content = {
        "format_version": format_version,
        "featurizer_version": featurizer_version,
        "options": dict(options),
        "labels": [asdict(label) for label in labels],
        "shards": [
            [shard.path, shard.num_rows, shard.sha256] for shard in shards if shard.split in SPLITS
        ],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_manifest(uri: str) -> Manifest:
    """The manifest of the data set in directory ``uri``; DataError if it is missing, damaged or of a newer version."""
    manifest_uri = storage.join(uri, MANIFEST_NAME)
    try:
        value = storage.read_json(manifest_uri)
    except storage.NotFoundError as error:
        raise DataError(
            f"{uri} holds no {MANIFEST_NAME}: it is not a prepared data set (the `out` of `moleblend prepare`), or its "
            "preparation has not finished. Molecules in SDF, CSV, SMILES or Parquet are prepared by "
            "`moleblend prepare source=FILE out=FOLDER`; the same command continues an unfinished preparation."
        ) from error
    version = value.get("format_version") if isinstance(value, dict) else None
    if not isinstance(version, int):
        raise DataError(f"{manifest_uri} is not a data set manifest: it has no format_version.")
    if version > FORMAT_VERSION:
        raise DataError(
            f"{manifest_uri} has format version {version}; this installation reads up to {FORMAT_VERSION}. "
            "Upgrade moleblend-ray."
        )
    try:
        manifest = Manifest.from_json(value)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{manifest_uri} is damaged: {error!s}. Prepare the data set again."
        ) from error
    found = fingerprint(
        manifest.featurizer_version,
        manifest.options,
        manifest.labels,
        manifest.shards,
        format_version=manifest.format_version,
    )
    if found != manifest.fingerprint:
        raise DataError(
            f"{manifest_uri} was changed after it was written: its fingerprint is {manifest.fingerprint}, "
            f"its content gives {found}. Restore it or prepare the data set again."
        )
    return manifest


def shard_schema(
    labels: Sequence[LabelInfo] | Sequence[tuple[str, str | None]],
    format_version: int = FORMAT_VERSION,
) -> pa.Schema:
    """The schema of a shard with these labels (``LabelInfo`` or (name, unit)) in a version of the format."""
    label_fields = []
    for label in labels:
        name, unit = (label.name, label.unit) if isinstance(label, LabelInfo) else label
        metadata = {"unit": unit} if unit else None
        label_fields.append(pa.field(LABEL_PREFIX + name, pa.float64(), metadata=metadata))
    absent = _SINCE_VERSION_2 if format_version < 2 else ()
    return pa.schema(
        [*(field for field in MOLECULE_FIELDS if field.name not in absent), *label_fields],
        metadata={"moleblend.format_version": str(format_version)},
    )


def encode_shard(table: pa.Table, row_group_rows: int) -> bytes:
    """The table as the bytes of a Parquet file, the same for equal tables and the same version of pyarrow."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=row_group_rows,
        compression="zstd",
        write_statistics=False,
        write_page_checksum=True,
        use_dictionary=list(_DICTIONARY_COLUMNS) if "num_atoms" in table.column_names else False,
        store_schema=True,
    )
    return bytes(sink.getvalue())


def read_file(uri: str, shard: ShardInfo) -> bytes:
    """The content of a file of the data set ``uri``; DataError if size or SHA-256 are not those of the manifest."""
    content = _read_range(uri, shard, 0, shard.num_bytes + 1)
    if len(content) != shard.num_bytes:
        raise _damaged(uri, shard, f"it has not the {shard.num_bytes} bytes of the manifest")
    found = storage.sha256_bytes(content)
    if found != shard.sha256:
        raise _damaged(uri, shard, f"its SHA-256 is {found}, not {shard.sha256}")
    return content


def _read_range(uri: str, shard: ShardInfo, offset: int, length: int) -> bytes:
    try:
        return storage.read_range(storage.join(uri, shard.path), offset, length)
    except storage.NotFoundError as error:
        raise _damaged(uri, shard, "it does not exist") from error


def _damaged(uri: str, shard: ShardInfo, reason: str) -> DataError:
    return DataError(
        f"Shard {shard.path} of {uri} is missing or damaged: {reason}. "
        "Restore it, or prepare the data set again in an empty directory."
    )


def footer_crc32(content: bytes) -> int | None:
    """CRC-32 of a Parquet file from its footer to its end; None for other files.

    ``content`` is the file, or its end from the footer on at least. Parquet's own checksums cover pages only, and
    Arrow does not check the footer: a flipped bit there can end the process (an exception that its C++ threads do not
    catch) or change numbers without an error.
    """
    if content[-4:] != _PARQUET_MAGIC:
        return None
    return zlib.crc32(content[-_footer_bytes(content) :])


def _footer_bytes(content: bytes) -> int:
    """Bytes of a Parquet file from its footer to its end, as the file itself states."""
    return int.from_bytes(content[-8:-4], "little") + 8


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
        self._schema = shard_schema(manifest.labels, manifest.format_version)
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
            self._fetch_footers(sorted({place.shard for place in asked}))
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
        if len(tail) != size - start or tail[-4:] != _PARQUET_MAGIC:
            raise self._damaged(index, f"it is not a Parquet file of {size} bytes")
        footer_bytes = _footer_bytes(tail)
        if len(tail) < footer_bytes <= size:
            start = size - footer_bytes
            tail = self._read_range(index, start, footer_bytes)
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
        name = f"{self._split}-{place.shard}-{place.group}"
        return self._shared.table(name, lambda: self._decode_group(place, self._read_group(place)))

    def _read_group(self, place: _Place) -> bytes:
        start, end = self._group_range(place)
        return self._read_range(place.shard, start, end - start)

    def _group_range(self, place: _Place) -> tuple[int, int]:
        """First and one-past-last byte of the columns in a row group."""
        group = self._footers[place.shard].row_group(place.group)
        return _byte_range(group, frozenset(self._columns))

    def _decode_group(self, place: _Place, content: bytes) -> pa.Table:
        """The columns of a row group, from its byte range."""
        with self._parquet_errors(place.shard):
            start, _ = self._group_range(place)
            source = _FetchedPart(content, start, self._shards[place.shard].num_bytes)
            metadata = self._footers[place.shard]
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
        return _read_range(self._uri, self._shards[index], offset, length)

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
        return _damaged(self._uri, self._shards[index], reason)


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
