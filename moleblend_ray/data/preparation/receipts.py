"""Records of finished work, from which an interrupted preparation continues.

A receipt is written after the files it names. It states their sizes and checksums, and a digest of everything that
decided their content; it is valid only while the files are there and the digest is the same. The driver reads all
receipts, so they hold counts and nothing whose size grows with the molecules.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moleblend_ray.data.dataset.dataset_files import (
    QUARANTINE_DIR,
    SPLITS,
    is_chunk_receipt,
    is_unit_receipt,
    wrong_files,
)
from moleblend_ray.data.dataset.manifest import ShardInfo
from moleblend_ray.data.dataset.shards import (
    AT_LEAST_PREFIX,
    AT_MOST_PREFIX,
    LABEL_PREFIX,
    encode_shard,
    footer_crc32,
)
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.documents import require_types
from moleblend_ray.errors import DataError, without_credentials
from moleblend_ray.vocabulary import ATOM_FEATURE_NAMES, ELEMENT_SYMBOLS

logger = logging.getLogger(__name__)

STAGED: Final = "staged"
"""``ShardInfo.split`` of molecules that are yet to be put into a shard."""

IDS: Final = "ids"
"""``ShardInfo.split`` of a file of id hashes."""

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
    """Conformer status -> molecules."""
    conformer_detail: dict[str, int] = field(default_factory=dict)
    """Kind of statement in ``conformer_detail`` -> molecules."""
    label_counts: dict[str, int] = field(default_factory=dict)
    """Label -> molecules that have it."""
    bound_counts: dict[str, int] = field(default_factory=dict)
    """Label -> molecules of which only a bound is known, of labels with bounds."""
    atom_count_histogram: dict[str, int] = field(default_factory=dict)
    """Number of atoms, as a decimal string -> molecules."""
    elements: dict[str, int] = field(default_factory=dict)
    """Element symbol -> molecules that contain it."""

    @classmethod
    def of(cls, table: pa.Table) -> Statistics:
        """The counts of the rows of a shard."""
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
            bound_counts=_bound_counts(table),
            atom_count_histogram={str(size): int(sizes[size]) for size in np.flatnonzero(sizes)},
            elements={
                ELEMENT_SYMBOLS[code]: int(holding[code]) for code in np.flatnonzero(holding)
            },
        )


def sum_statistics(parts: Iterable[Statistics]) -> Statistics:
    """The counts of all parts together; keys sorted, numbers of atoms by value and all others by name."""
    molecules = atoms = with_coordinates = 0
    status, details, labels, bounds, sizes, elements = (Counter[str]() for _ in range(6))
    for part in parts:
        molecules += part.molecules
        atoms += part.atoms
        with_coordinates += part.with_coordinates
        status.update(part.conformer_status)
        details.update(part.conformer_detail)
        labels.update(part.label_counts)
        bounds.update(part.bound_counts)
        sizes.update(part.atom_count_histogram)
        elements.update(part.elements)
    return Statistics(
        molecules=molecules,
        atoms=atoms,
        with_coordinates=with_coordinates,
        conformer_status=dict(sorted(status.items())),
        conformer_detail=dict(sorted(details.items())),
        label_counts=dict(sorted(labels.items())),
        bound_counts=dict(sorted(bounds.items())),
        atom_count_histogram={size: sizes[size] for size in sorted(sizes, key=int)},
        elements=dict(sorted(elements.items())),
    )


def _bound_counts(table: pa.Table) -> dict[str, int]:
    """The number of molecules with a bound of each label that has bounds: each has one at most."""
    counts: Counter[str] = Counter()
    for name in table.column_names:
        for prefix in (AT_LEAST_PREFIX, AT_MOST_PREFIX):
            if name.startswith(prefix):
                counts[name.removeprefix(prefix)] += table.num_rows - table[name].null_count
    return dict(counts)


def _molecules_with_each_code(
    num_atoms: NDArray[np.int64], atom_features: pa.ChunkedArray
) -> NDArray[np.int64]:
    """(119,), the number of molecules that contain each element."""
    flat = [np.empty(0, np.uint8), *(chunk.flatten().to_numpy() for chunk in atom_features.chunks)]
    codes = np.concatenate(flat).reshape(-1, len(ATOM_FEATURE_NAMES))[:, 0]
    present = np.zeros((len(num_atoms), len(ELEMENT_SYMBOLS)), dtype=np.bool_)
    present[np.repeat(np.arange(len(num_atoms)), num_atoms), codes] = True
    molecules: NDArray[np.int64] = present.sum(axis=0, dtype=np.int64)
    return molecules


def _detail_kinds(table: pa.Table) -> dict[str, int]:
    """The number of molecules with a statement of each kind; a detail is ``kind: what; kind: what``."""
    kinds: Counter[str] = Counter()
    if "conformer_detail" not in table.column_names:  # format version 1
        return {}
    for detail, count in _value_counts(table["conformer_detail"]).items():
        for kind in {part.split(":", 1)[0] for part in detail.split("; ") if part}:
            kinds[kind] += count
    return dict(kinds)


def _value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in column.value_counts().to_pylist()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """The outcome of converting one chunk."""

    file_index: int
    chunk_index: int
    first_row: int
    digest: str
    """Digest of the raw content: the receipt is not valid for other content."""
    rows_in: int
    files: tuple[ShardInfo, ...]
    """Shards, part of the quarantine, staged molecules, hashes of ids."""
    quarantined_by_reason: dict[str, int]
    unreadable_labels: dict[str, int]
    """Label -> molecules whose cell held something that is not a number."""
    without_inchikey: int
    """With ``deduplicate``: molecules for which InChI makes no key."""
    memory_bytes: int
    """Memory that the staged molecules take; 0 if none are staged."""
    statistics: Statistics
    """Counts over the molecules in shards; staged ones are not counted."""

    @property
    def rows_out(self) -> int:
        """Molecules in the chunk's shards, or staged ones."""
        return sum(file.num_rows for file in self.files if file.split in (*SPLITS, STAGED))

    @property
    def rows_quarantined(self) -> int:
        """Records in the chunk's part of the quarantine."""
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
        receipt = cls(**_with_records(value))
        require_types(receipt)
        return receipt


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitReceipt:
    """The outcome of one unit of work of an exchange (see ``shuffle``)."""

    name: str
    digest: str
    """Digest of everything that decides the content of the files."""
    files: tuple[ShardInfo, ...]
    statistics: Statistics
    """Counts over the molecules in shards."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON value."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> UnitReceipt:
        """From a JSON value; KeyError or TypeError if it is none."""
        receipt = cls(**_with_records(value))
        require_types(receipt)
        return receipt


def _with_records(value: Mapping[str, Any]) -> dict[str, Any]:
    files = tuple(ShardInfo(**file) for file in value["files"])
    return {**value, "files": files, "statistics": Statistics(**value["statistics"])}


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
    """Write a shard or a part of the quarantine; returns its record, or no record for a table without rows."""
    if not table.num_rows:
        # An earlier attempt, on other content, may have left a file.
        storage.delete(storage.join(out, path))
        return []
    content = encode_shard(table, row_group_rows)
    storage.write_bytes(storage.join(out, path), content)
    return [shard_info(path, split, table.num_rows, content)]


def valid_receipts(out: str, present: Mapping[str, int]) -> dict[tuple[int, int], Receipt]:
    """Receipts, by file and chunk, of the chunks whose files are all there with the expected size.

    ``present`` is the size by URI of every file in ``out``.
    """
    loaded = _load([uri for uri in present if is_chunk_receipt(uri)], Receipt.from_json)
    return {
        (receipt.file_index, receipt.chunk_index): receipt
        for receipt in loaded
        if not wrong_files(out, receipt.files, present)
    }


def valid_unit_receipts(out: str, present: Mapping[str, int]) -> dict[str, UnitReceipt]:
    """Receipts, by name, of the units of an exchange whose files are all there with the expected size."""
    loaded = _load([uri for uri in present if is_unit_receipt(out, uri)], UnitReceipt.from_json)
    return {
        receipt.name: receipt for receipt in loaded if not wrong_files(out, receipt.files, present)
    }


def _load(uris: Sequence[str], parse: Callable[[Mapping[str, Any]], _Record]) -> list[_Record]:
    """The records at these URIs; a damaged one is left out, as if its work had not been done."""

    def load(uri: str) -> _Record | None:
        try:
            return parse(storage.read_json(uri))
        except (DataError, KeyError, TypeError) as error:
            logger.warning("%s is damaged and does not count: %s", without_credentials(uri), error)
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        return [record for record in pool.map(load, uris) if record is not None]
