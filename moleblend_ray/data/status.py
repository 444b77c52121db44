"""How far the preparation of a data set has come, from few reads: the manifest, or the names of receipts and a sample.

Module ``inspect`` describes a data set in full, and reads every receipt of an unfinished one.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from moleblend_ray.data.dataset.dataset_files import (
    PLAN_NAME,
    RECEIPTS_DIR,
    SPLITS,
    STAGED_DIR,
    is_chunk_receipt,
    is_prepared,
    listed,
    listed_shards,
    wrong_files,
)
from moleblend_ray.data.dataset.lease import command_at_work
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.options import needs_exchange
from moleblend_ray.data.preparation.receipts import Receipt
from moleblend_ray.errors import DataError

_MOST_RECEIPTS: Final = 64
"""Receipts that are read of an unfinished data set; the rest is extrapolated."""
_THREADS: Final = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class DataStatus:
    """A data set, prepared or being prepared."""

    kind: str
    uri: str
    state: str
    """``finished``, ``running`` (a command works on it), ``unfinished``, or ``damaged`` (files of a finished one are missing
    or have another size)."""
    detail: str
    chunks_done: int | None
    """Chunks that are converted; None once the data set is finished."""
    rows_in: int
    """Source rows, before it is finished those of the converted chunks."""
    rows_out: int
    rows_quarantined: int
    is_estimate: bool
    """Whether the numbers of rows were extrapolated from a sample of the converted chunks."""
    molecules: Mapping[str, int]
    """Split -> molecules; empty before it is finished."""
    bytes: int
    """Total size of the shards (before it is finished, also of staged molecules)."""
    sources: tuple[str, ...]
    """URIs of the source files, without credentials."""


def has_data_set(uri: str) -> bool:
    """Whether `prepare` has begun there."""
    return is_prepared(uri) or storage.exists(storage.join(uri, PLAN_NAME))


def data_status(uri: str) -> DataStatus:
    """The status of the data set at ``uri``; DataError or NotFoundError if `prepare` has not begun there."""
    if is_prepared(uri):
        return _finished(uri)
    return _unfinished(uri)


def _finished(uri: str) -> DataStatus:
    manifest = load_manifest(uri)
    wrong = wrong_files(uri, manifest.shards, listed_shards(uri))
    detail = "its manifest is there, and every file it names"
    if wrong:
        detail = (
            f"{len(wrong)} of {len(manifest.shards)} files are missing or have another size, "
            f"the first of them {next(iter(wrong))}"
        )
    counts = manifest.counts
    return DataStatus(
        kind="data",
        uri=uri,
        state="damaged" if wrong else "finished",
        detail=detail,
        chunks_done=None,
        rows_in=counts.rows_in,
        rows_out=counts.rows_out,
        rows_quarantined=counts.rows_quarantined,
        is_estimate=False,
        molecules={split: count for split in SPLITS if (count := manifest.num_molecules(split))},
        bytes=sum(shard.num_bytes for shard in manifest.shards),
        sources=tuple(source.uri for source in manifest.sources),
    )


def _unfinished(uri: str) -> DataStatus:
    members = {"options": dict[str, Any], "sources": list[str]}
    plan = storage.read_object(storage.join(uri, PLAN_NAME), members)
    receipts = [name for name in listed(uri, RECEIPTS_DIR) if is_chunk_receipt(name)]
    stride = max(1, -(-len(receipts) // _MOST_RECEIPTS))
    with ThreadPoolExecutor(_THREADS) as pool:
        read = [one for one in pool.map(_receipt, sorted(receipts)[::stride]) if one is not None]
    scale = len(receipts) / len(read) if read else 0.0
    shards = listed(uri, *SPLITS, STAGED_DIR)
    meets = needs_exchange(plan["options"])
    then = "; molecules are shuffled or deduplicated after the last chunk" if meets else ""
    at_work = command_at_work(uri)
    detail = f"there is a plan but no manifest: the same `moleblend prepare` continues{then}"
    if at_work is not None:
        detail = f"a command works on it ({at_work}){then}"
    return DataStatus(
        kind="data",
        uri=uri,
        state="unfinished" if at_work is None else "running",
        detail=detail,
        chunks_done=len(receipts),
        rows_in=round(scale * sum(one.rows_in for one in read)),
        rows_out=round(scale * sum(one.rows_out for one in read)),
        rows_quarantined=round(scale * sum(one.rows_quarantined for one in read)),
        is_estimate=len(read) < len(receipts),
        molecules={},
        bytes=sum(shards.values()),
        sources=tuple(plan["sources"]),
    )


def _receipt(uri: str) -> Receipt | None:
    """The receipt at ``uri``; None if a running command is writing it or has just deleted it."""
    try:
        return Receipt.from_json(storage.read_json(uri))
    except (storage.NotFoundError, DataError, KeyError, TypeError):
        return None
