"""Records of work that is done, so that an interrupted preparation goes on where it was.

A receipt is written after the files it names, with their sizes and checksums, and with a digest of all that
decided their content. It counts only while the files are there and the digest is the same. Receipts hold counts,
never anything of the size of the molecules, as the driver reads all of them.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moleblend_ray.data import storage
from moleblend_ray.data.shards import (
    LABEL_PREFIX,
    QUARANTINE_DIR,
    SPLITS,
    ShardInfo,
    encode_shard,
    footer_crc32,
)
from moleblend_ray.errors import DataError, without_credentials
from moleblend_ray.vocabulary import ATOM_FEATURE_NAMES, ELEMENT_SYMBOLS

logger = logging.getLogger(__name__)

RECEIPTS_DIR: Final = "receipts"
"""Records of work in progress; removed when the manifest is written."""

STAGED_DIR: Final = "staged"
"""Files in progress that are no part of the data set; removed when the manifest is written."""

STAGED: Final = "staged"
"""``ShardInfo.split`` of molecules on their way to a shard."""

IDS: Final = "ids"
"""``ShardInfo.split`` of a file of id hashes."""

_CHUNK_RECEIPT: Final = re.compile(r"\d{5,}-\d{6,}\.json")
_THREADS: Final = 32

_Record = TypeVar("_Record")


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Counts over molecules."""

    molecules: int = 0
    atoms: int = 0
    with_coordinates: int = 0
    """Molecules with at least one conformer."""
    conformer_status: dict[str, int] = field(default_factory=dict)
    conformer_detail: dict[str, int] = field(default_factory=dict)
    """Kind of statement on made conformers -> molecules."""
    label_counts: dict[str, int] = field(default_factory=dict)
    """Label -> molecules that have it."""
    atom_count_histogram: dict[str, int] = field(default_factory=dict)
    """Number of atoms, as a decimal string -> molecules."""
    elements: dict[str, int] = field(default_factory=dict)
    """Element symbol -> molecules that contain it."""

    @classmethod
    def of(cls, table: pa.Table) -> Statistics:
        """Of the rows of a shard."""
        num_atoms = table["num_atoms"].to_numpy().astype(np.int64)
        sizes = np.bincount(num_atoms)
        holding = _molecules_with_each_code(num_atoms, table["atom_features"])
        labels = [name for name in table.column_names if name.startswith(LABEL_PREFIX)]
        return cls(
            molecules=table.num_rows,
            atoms=int(num_atoms.sum()),
            with_coordinates=int(np.count_nonzero(table["num_conformers"].to_numpy())),
            conformer_status=_value_counts(table["conformer_status"]),
            conformer_detail=_detail_kinds(table),
            label_counts={
                name.removeprefix(LABEL_PREFIX): table.num_rows - table[name].null_count
                for name in labels
            },
            atom_count_histogram={str(size): int(sizes[size]) for size in np.flatnonzero(sizes)},
            elements={
                ELEMENT_SYMBOLS[code]: int(holding[code]) for code in np.flatnonzero(holding)
            },
        )


def sum_statistics(parts: Iterable[Statistics]) -> Statistics:
    """Of all molecules together; histograms sorted, atoms by number, the rest by name."""
    molecules = atoms = with_coordinates = 0
    status, details, labels, sizes, elements = (Counter[str]() for _ in range(5))
    for part in parts:
        molecules += part.molecules
        atoms += part.atoms
        with_coordinates += part.with_coordinates
        status.update(part.conformer_status)
        details.update(part.conformer_detail)
        labels.update(part.label_counts)
        sizes.update(part.atom_count_histogram)
        elements.update(part.elements)
    return Statistics(
        molecules=molecules,
        atoms=atoms,
        with_coordinates=with_coordinates,
        conformer_status=dict(sorted(status.items())),
        conformer_detail=dict(sorted(details.items())),
        label_counts=dict(sorted(labels.items())),
        atom_count_histogram={size: sizes[size] for size in sorted(sizes, key=int)},
        elements=dict(sorted(elements.items())),
    )


def _molecules_with_each_code(
    num_atoms: NDArray[np.int64], atom_features: pa.ChunkedArray
) -> NDArray[np.int64]:
    """How many molecules have an atom of each element code, (119,)."""
    flat = [np.empty(0, np.uint8), *(chunk.flatten().to_numpy() for chunk in atom_features.chunks)]
    codes = np.concatenate(flat).reshape(-1, len(ATOM_FEATURE_NAMES))[:, 0]
    present = np.zeros((len(num_atoms), len(ELEMENT_SYMBOLS)), dtype=np.bool_)
    present[np.repeat(np.arange(len(num_atoms)), num_atoms), codes] = True
    molecules: NDArray[np.int64] = present.sum(axis=0, dtype=np.int64)
    return molecules


def _detail_kinds(table: pa.Table) -> dict[str, int]:
    """How many molecules have a statement of each kind: ``kind: what; kind: what``."""
    kinds: Counter[str] = Counter()
    if "conformer_detail" not in table.column_names:  # shards of format version 1 have none
        return {}
    for detail, count in _value_counts(table["conformer_detail"]).items():
        for kind in {part.split(":", 1)[0] for part in detail.split("; ") if part}:
            kinds[kind] += count
    return dict(kinds)


def _value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in column.value_counts().to_pylist()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What became of one chunk."""

    file_index: int
    chunk_index: int
    first_row: int
    digest: str
    """Of the raw content: a receipt for other content does not count."""
    rows_in: int
    files: tuple[ShardInfo, ...]
    """Shards, quarantine part, staged molecules, hashes of ids."""
    quarantined_by_reason: dict[str, int]
    unreadable_labels: dict[str, int]
    """Label -> molecules whose cell held something that is not a number."""
    without_inchikey: int
    """Molecules without InChIKey, if these are asked for."""
    memory_bytes: int
    """What the staged molecules take in memory; 0 where none are staged."""
    statistics: Statistics
    """Of the molecules in shards; nothing for staged ones."""

    @property
    def rows_out(self) -> int:
        """Molecules in the chunk's shards, or staged."""
        return sum(file.num_rows for file in self.files if file.split in (*SPLITS, STAGED))

    @property
    def rows_quarantined(self) -> int:
        """Records in the chunk's quarantine part."""
        return sum(file.num_rows for file in self.files if file.split == QUARANTINE_DIR)

    def files_of(self, split: str) -> tuple[ShardInfo, ...]:
        """The files of one kind."""
        return tuple(file for file in self.files if file.split == split)

    def to_json(self) -> dict[str, Any]:
        """As a JSON value."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Receipt:
        """From a JSON value; KeyError or TypeError if it is none."""
        return cls(**_with_records(value))


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitReceipt:
    """What became of one unit of work of an exchange (see ``shuffle``)."""

    name: str
    digest: str
    """Of all that decides the content of the files."""
    files: tuple[ShardInfo, ...]
    statistics: Statistics
    """Of the molecules in shards."""

    @property
    def rows_duplicate(self) -> int:
        """Rows in the unit's quarantine parts."""
        return sum(file.num_rows for file in self.files if file.split == QUARANTINE_DIR)

    def to_json(self) -> dict[str, Any]:
        """As a JSON value."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> UnitReceipt:
        """From a JSON value; KeyError or TypeError if it is none."""
        return cls(**_with_records(value))


def _with_records(value: Mapping[str, Any]) -> dict[str, Any]:
    files = tuple(ShardInfo(**file) for file in value["files"])
    return {**value, "files": files, "statistics": Statistics(**value["statistics"])}


def part_name(file_index: int, chunk_index: int) -> str:
    """The stem of the names of a chunk's files."""
    return f"{file_index:05d}-{chunk_index:06d}"


def receipt_uri(out: str, file_index: int, chunk_index: int) -> str:
    """Where the receipt of a chunk is."""
    return storage.join(out, RECEIPTS_DIR, part_name(file_index, chunk_index) + ".json")


def unit_receipt_uri(out: str, name: str) -> str:
    """Where the receipt of a unit of an exchange is."""
    return storage.join(out, RECEIPTS_DIR, f"{name}.json")


def shard_info(path: str, split: str, num_rows: int, content: bytes) -> ShardInfo:
    """The record of a file with this content."""
    return ShardInfo(
        path=path,
        split=split,
        num_rows=num_rows,
        num_bytes=len(content),
        sha256=storage.sha256_bytes(content),
        footer_crc32=footer_crc32(content),
    )


def write_part(
    out: str, path: str, split: str, table: pa.Table, row_group_rows: int
) -> list[ShardInfo]:
    """Write a shard or quarantine part, or nothing for a table without rows; its record, if there is one."""
    if not table.num_rows:
        # A former attempt on other content may have left one.
        storage.delete(storage.join(out, path))
        return []
    content = encode_shard(table, row_group_rows)
    storage.write_bytes(storage.join(out, path), content)
    return [shard_info(path, split, table.num_rows, content)]


def valid_receipts(out: str, present: Mapping[str, int]) -> dict[tuple[int, int], Receipt]:
    """Receipts of chunks whose files are all there with the size they should have.

    ``present`` lists the size of each file below ``out`` by URI.
    """
    names = [uri for uri in present if _CHUNK_RECEIPT.fullmatch(storage.name_of(uri))]
    loaded = _load(names, Receipt.from_json)
    return {
        (receipt.file_index, receipt.chunk_index): receipt
        for receipt in loaded
        if _has_files(out, receipt.files, present)
    }


def valid_unit_receipts(out: str, present: Mapping[str, int]) -> dict[str, UnitReceipt]:
    """Receipts of an exchange, by name, whose files are all there with the size they should have."""
    directory = storage.join(out, RECEIPTS_DIR) + "/"
    names = [
        uri for uri in present if uri.startswith(directory) and "/" in uri.removeprefix(directory)
    ]
    loaded = _load(names, UnitReceipt.from_json)
    return {receipt.name: receipt for receipt in loaded if _has_files(out, receipt.files, present)}


def _load(uris: Sequence[str], parse: Callable[[Mapping[str, Any]], _Record]) -> list[_Record]:
    """The records at these URIs; one that was cut short is left out, as if its work had not been done."""

    def load(uri: str) -> _Record | None:
        try:
            return parse(storage.read_json(uri))
        except (DataError, KeyError, TypeError) as error:
            logger.warning("%s is damaged and does not count: %s", without_credentials(uri), error)
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        return [record for record in pool.map(load, uris) if record is not None]


def _has_files(out: str, files: Iterable[ShardInfo], present: Mapping[str, int]) -> bool:
    return all(present.get(storage.join(out, file.path)) == file.num_bytes for file in files)


def listed(out: str, *parts: str) -> dict[str, int]:
    """Size by URI of the files of these directories of ``out`` (none: of all)."""
    found: dict[str, int] = {}
    for directory in parts or ("",):
        # Files are named as the caller names `out`: a listing gives absolute paths.
        base = storage.join(out, directory)
        try:
            files = storage.list_files(base)
        except storage.NotFoundError:
            continue
        root = storage.absolute(base)
        found |= {storage.join(base, file.uri.removeprefix(root)): file.size for file in files}
    return found
