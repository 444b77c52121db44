"""How far the preparation of a data set is, from little: its manifest, or the names of its receipts and a sample of them.

``inspect`` describes a data set in full, and reads every receipt of an unfinished one for that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from moleblend_ray.data import storage
from moleblend_ray.data.receipts import RECEIPTS_DIR, STAGED_DIR, Receipt, listed
from moleblend_ray.data.shards import MANIFEST_NAME, QUARANTINE_DIR, SPLITS, load_manifest
from moleblend_ray.errors import DataError

_PLAN_NAME: Final = f"{RECEIPTS_DIR}/plan.json"
_CHUNK: Final = re.compile(r"\d{5,}-\d{6,}\.json")
_MOST_RECEIPTS: Final = 64
_THREADS: Final = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class DataStatus:
    """A prepared data set, or one in the making."""

    kind: str
    uri: str
    state: str
    """``finished``, ``unfinished``, or ``damaged`` (files of a finished one are missing or have another size)."""
    detail: str
    chunks_done: int | None
    """Units of work with a receipt; None once finished."""
    rows_in: int
    """Source rows; of an unfinished one those in the chunks done, extrapolated from some of them if ``is_estimate``."""
    rows_out: int
    rows_quarantined: int
    is_estimate: bool
    molecules: Mapping[str, int]
    """Split -> molecules; empty while unfinished."""
    bytes: int
    """Of all shards there are."""
    sources: tuple[str, ...]
    """URIs of the source files, without credentials."""


def has_data_set(uri: str) -> bool:
    """Whether `prepare` has begun there."""
    return any(storage.exists(storage.join(uri, name)) for name in (MANIFEST_NAME, _PLAN_NAME))


def data_status(uri: str) -> DataStatus:
    """Of the data set at ``uri``; DataError or NotFoundError if `prepare` has not begun there."""
    if storage.exists(storage.join(uri, MANIFEST_NAME)):
        return _finished(uri)
    return _unfinished(uri)


def _finished(uri: str) -> DataStatus:
    manifest = load_manifest(uri)
    sizes = listed(uri, *SPLITS, QUARANTINE_DIR)
    wrong = [
        shard.path
        for shard in manifest.shards
        if sizes.get(storage.join(uri, shard.path)) != shard.num_bytes
    ]
    detail = "its manifest is there, and every file it names"
    if wrong:
        detail = f"{len(wrong)} of {len(manifest.shards)} files are missing or have another size, the first of them {wrong[0]}"
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
    plan = storage.read_json(storage.join(uri, _PLAN_NAME))
    receipts = [
        name for name in listed(uri, RECEIPTS_DIR) if _CHUNK.fullmatch(storage.name_of(name))
    ]
    stride = max(1, -(-len(receipts) // _MOST_RECEIPTS))
    with ThreadPoolExecutor(_THREADS) as pool:
        read = [one for one in pool.map(_receipt, sorted(receipts)[::stride]) if one is not None]
    scale = len(receipts) / len(read) if read else 0.0
    shards = listed(uri, *SPLITS, STAGED_DIR)
    options: Mapping[str, Any] = plan.get("options", {})
    meets = options.get("shuffle") or options.get("deduplicate", "none") != "none"
    then = "; molecules are shuffled or deduplicated after that" if meets else ""
    return DataStatus(
        kind="data",
        uri=uri,
        state="unfinished",
        detail=f"there is a plan but no manifest: the same `moleblend prepare` continues{then}",
        chunks_done=len(receipts),
        rows_in=round(scale * sum(one.rows_in for one in read)),
        rows_out=round(scale * sum(one.rows_out for one in read)),
        rows_quarantined=round(scale * sum(one.rows_quarantined for one in read)),
        is_estimate=len(read) < len(receipts),
        molecules={},
        bytes=sum(shards.values()),
        sources=tuple(plan.get("sources", ())),
    )


def _receipt(uri: str) -> Receipt | None:
    """None for one that a running command is writing or has just deleted."""
    try:
        return Receipt.from_json(storage.read_json(uri))
    except (storage.NotFoundError, DataError, KeyError, TypeError):
        return None
