"""The job that downloads a published collection, in this process. It needs neither Ray nor RDKit."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from moleblend_ray.config.accept import accepted
from moleblend_ray.config.download import DownloadConfig
from moleblend_ray.data.files.download import download_collection
from moleblend_ray.errors import without_credentials
from moleblend_ray.orchestration.progress.terminal import progress_bar
from moleblend_ray.quantities import bytes_text

logger = logging.getLogger(__name__)


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
    config = accepted(config, DownloadConfig)
    collection = config.collection
    bars: dict[str, Callable[[int, int | None], None]] = {}
    with contextlib.ExitStack() as newest:

        def report(name: str, done: int, total: int | None) -> None:
            if name not in bars:
                newest.close()
                bar = progress_bar(name, unit="B", show=bytes_text, leave=True)
                bars[name] = newest.enter_context(bar)
            bars[name](done, total)

        fetched = download_collection(
            collection,
            config.out,
            mirrors=config.mirrors,
            options=config.transfer,
            spool=config.spool,
            report=report,
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
