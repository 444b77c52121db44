"""The files of a prepared data set, finished or not: their names, which of them are there, and which are wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from moleblend_ray.data.files import storage

if TYPE_CHECKING:
    from moleblend_ray.data.dataset.manifest import ShardInfo

MANIFEST_NAME: Final = "manifest.json"
"""Names the files that are the data set; written last."""

SPLITS: Final = ("train", "valid", "test")
"""Directories of the shards; a split's code is its index."""

QUARANTINE_DIR: Final = "quarantine"
"""Directory of the source rows that are in no split."""

RECEIPTS_DIR: Final = "receipts"
"""Records of work in progress; removed when the manifest is written."""

PLAN_NAME: Final = f"{RECEIPTS_DIR}/plan.json"
"""What the data set is to be made of; written first, so that it marks an unfinished data set."""

STAGED_DIR: Final = "staged"
"""Files in progress that are not part of the data set; removed when the manifest is written."""

LEASES_DIR: Final = "leases"
"""Files by which commands that prepare the same data set know of each other; removed when the manifest is written."""

_CHUNK_RECEIPT: Final = re.compile(r"\d{5,}-\d{6,}\.json")


def is_prepared(uri: str) -> bool:
    """Whether the directory ``uri`` is a finished data set."""
    return storage.exists(storage.join(uri, MANIFEST_NAME))


def prepared_source(sources: Sequence[str]) -> str | None:
    """The finished data set that ``sources`` are; None for raw molecules. One among several is refused by whoever looks for their
    files."""
    # Of a long list, each look would be a request.
    return sources[0] if len(sources) == 1 and is_prepared(sources[0]) else None


def part_name(file_index: int, chunk_index: int) -> str:
    """The stem of the names of a chunk's files."""
    return f"{file_index:05d}-{chunk_index:06d}"


def source_index(path: str) -> int:
    """Number of the source file that the shard at ``path``, of a chunk, was made of: what :func:`part_name` says."""
    return int(path.rpartition("/")[2].partition("-")[0])


def shard_path(split: str, stem: str) -> str:
    """Path within the data set of a shard, or of a part of the quarantine."""
    return f"{split}/{stem}.parquet"


def staged_path(file_index: int, chunk_index: int) -> str:
    """Path within the data set of a chunk's staged molecules."""
    return f"{STAGED_DIR}/chunks/{part_name(file_index, chunk_index)}.segment"


def ids_path(stem: str) -> str:
    """Path within the data set of the hashes of the ids of a chunk's molecules."""
    return f"{STAGED_DIR}/ids/{stem}.u64"


def segments_path(unit_name: str) -> str:
    """Path within the data set of the segments that a unit of an exchange leaves for the next pass."""
    return f"{STAGED_DIR}/{unit_name}.segments"


def receipt_uri(out: str, file_index: int, chunk_index: int) -> str:
    """URI of the receipt of a chunk."""
    return storage.join(out, RECEIPTS_DIR, part_name(file_index, chunk_index) + ".json")


def is_chunk_receipt(uri: str) -> bool:
    """Whether a file of a data set is the receipt of a chunk, by its name."""
    return _CHUNK_RECEIPT.fullmatch(storage.name_of(uri)) is not None


def unit_receipt_uri(out: str, unit_name: str) -> str:
    """URI of the receipt of a unit of an exchange; the name of a unit has two parts, ``kind/number``."""
    return storage.join(out, RECEIPTS_DIR, f"{unit_name}.json")


def is_unit_receipt(out: str, uri: str) -> bool:
    """Whether a file of the data set ``out`` is the receipt of a unit of an exchange, by its place."""
    directory = storage.join(out, RECEIPTS_DIR) + "/"
    return uri.startswith(directory) and "/" in uri.removeprefix(directory)


def listed(out: str, *directories: str) -> dict[str, int]:
    """Size by URI of the files in these directories of ``out`` (none: in all)."""
    found: dict[str, int] = {}
    for directory in directories or ("",):
        # Files are named as the caller names `out`: a listing gives absolute paths.
        base = storage.join(out, directory)
        try:
            files = storage.list_files(base)
        except storage.NotFoundError:
            continue
        root = storage.absolute(base)
        found |= {storage.join(base, file.uri.removeprefix(root)): file.size for file in files}
    return found


def listed_shards(out: str) -> dict[str, int]:
    """Size by URI of the shards and the parts of the quarantine that are in ``out``."""
    return listed(out, *SPLITS, QUARANTINE_DIR)


def wrong_files(
    out: str, expected: Iterable[ShardInfo], present: Mapping[str, int]
) -> dict[str, str]:
    """What is wrong, by path, with the files of ``expected`` that are missing or have another size, in their order.

    ``present`` is the size by URI of the files that are there (:func:`listed`).
    """
    wrong = {}
    for file in expected:
        size = present.get(storage.join(out, file.path))
        if size is None:
            wrong[file.path] = "is missing"
        elif size != file.num_bytes:
            wrong[file.path] = f"has {size} bytes instead of {file.num_bytes}"
    return wrong
