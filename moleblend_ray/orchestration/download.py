"""The job that downloads a published collection, in this process. It needs neither Ray nor RDKit."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from moleblend_ray.config.download import DownloadConfig
from moleblend_ray.config.paths import with_absolute_paths
from moleblend_ray.data.download import download_collection
from moleblend_ray.errors import without_credentials

logger = logging.getLogger(__name__)

_LOG_INTERVAL_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadSummary:
    """The files of a collection, and how they were verified."""

    out: str
    files: int
    """Number of files; all of them are there."""
    bytes: int
    """Size of all files."""
    transferred: int
    """Bytes that this command downloaded."""
    verified_by: dict[str, str]
    """File -> what it was compared with: "published sha256", "published md5", "recorded sha256" (of the first
    download), or "first download" (there is nothing to compare with)."""
    seconds: float


def download(config: DownloadConfig) -> DownloadSummary:
    """Download the files of ``config.collection``. Files that are already there are verified and kept."""
    start_s = time.monotonic()
    config = with_absolute_paths(config)
    collection = config.collection
    with _Display() as display:
        fetched = download_collection(
            collection,
            config.out,
            mirrors=config.mirrors,
            options=config.transfer,
            spool=config.spool,
            report=display,
        )
    for file in fetched:
        if file.verified_by == "first download":
            logger.warning(
                "%s: no checksum is published; its SHA-256 %s is recorded, and later downloads are compared with it",
                file.name,
                file.sha256,
            )
    logger.info("licence of %s: %s", collection.name, collection.licence)
    logger.info("please cite: %s", collection.citation)
    return DownloadSummary(
        out=without_credentials(config.out),
        files=len(fetched),
        bytes=sum(file.bytes for file in fetched),
        transferred=sum(file.transferred for file in fetched),
        verified_by={file.name: file.verified_by for file in fetched},
        seconds=round(time.monotonic() - start_s, 3),
    )


class _Display:
    """Shows a bar for each file on a terminal, and log lines elsewhere."""

    def __init__(self) -> None:
        self._name = ""
        self._bar: tqdm[Any] | None = None
        self._logged_s = time.monotonic()

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, name: str, done: int, total: int | None) -> None:
        if name != self._name:
            self._close()
            self._name = name
            self._bar = tqdm(
                desc=name,
                total=total,
                initial=done,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                disable=None,
            )
        assert self._bar is not None
        self._bar.update(done - self._bar.n)
        if self._bar.disable and time.monotonic() - self._logged_s >= _LOG_INTERVAL_S:
            self._logged_s = time.monotonic()
            logger.info("%s: %d of %s bytes", name, done, total if total is not None else "unknown")

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
