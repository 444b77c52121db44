"""What `moleblend download` fetches, from where and to where."""

from __future__ import annotations

from dataclasses import dataclass, field

from moleblend_ray.checks import check_all, locations
from moleblend_ray.data.files.download import Collection
from moleblend_ray.data.files.transfer import TransferOptions
from moleblend_ray.settings import typed


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadConfig:
    """Published files of a collection -> a directory or object store, verified."""

    collection: Collection
    """The collection: one of conf/collection, or files of your own."""
    out: str
    """Directory to write the files to, as a path or URI."""
    mirrors: tuple[str, ...] = ()
    """URLs (http, https, file, s3, gs) of directories that hold the files under their names, tried in this order
    before the published URLs."""
    spool: str | None = None
    """Local directory of unfinished files if `out` is an object store; null for moleblend-ray/download in the user's
    cache directory."""
    transfer: TransferOptions = field(default_factory=TransferOptions)
    """Timeouts and attempts."""

    def __post_init__(self) -> None:
        check_all(*locations(self, "out", "spool"))
