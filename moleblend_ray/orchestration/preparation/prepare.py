"""Molecule files -> a prepared data set: chunks are converted, perhaps shuffled, and named in a manifest.

Actors convert the chunks of the source (:mod:`.conversion`); at the end the driver writes the manifest from all receipts.
What has a receipt is not done again, so the same command continues where it was interrupted. One command at a time works
on a data set (:mod:`moleblend_ray.data.dataset.lease`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from moleblend_ray.config.accept import accepted
from moleblend_ray.config.prepare import PrepareConfig
from moleblend_ray.data.dataset.lease import Lease, leased
from moleblend_ray.data.dataset.manifest import LabelInfo, Manifest
from moleblend_ray.data.dataset.shards import DUPLICATE
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.assembly import write_manifest
from moleblend_ray.data.preparation.claim import (
    check_output,
    claim_output,
    finished_manifest,
    remove_work_files,
)
from moleblend_ray.data.preparation.exchange import plan_exchange, staged_chunk
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.receipts import Receipt, UnitReceipt
from moleblend_ray.data.preparation.split_file import splits_of_file
from moleblend_ray.data.preparation.splits import NamedSplits
from moleblend_ray.data.sources import (
    ColumnConfig,
    SourceFile,
    SourceSet,
    find_sources,
    inspect_sources,
)
from moleblend_ray.errors import ConfigError, without_credentials
from moleblend_ray.orchestration.cluster.cluster_checks import Need, require_room
from moleblend_ray.orchestration.cluster.session import GIB, ray_session
from moleblend_ray.orchestration.identity import require_own
from moleblend_ray.orchestration.preparation.conversion import Conversion, Effort
from moleblend_ray.orchestration.preparation.exchange import run_exchange
from moleblend_ray.orchestration.progress.progress import Progress, Reporter

if TYPE_CHECKING:
    # It imports what property models are described by.
    from moleblend_ray.config.downstream import LibraryConfig

logger = logging.getLogger(__name__)

_MANY_QUARANTINED: Final = 0.5
"""Share of rows from which on a warning tells of them: probably it is not the column, the format or the setting that was meant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareSummary:
    """What `prepare` did."""

    out: str
    """URI of the data set."""
    status: str
    """``prepared``, ``continued`` (some chunks were there) or ``already prepared``."""
    rows_in: int
    rows_out: int
    rows_quarantined: int
    quarantined_by_reason: dict[str, int]
    train: int
    """Molecules for training."""
    valid: int
    """Molecules for validation."""
    test: int
    """Molecules for testing."""
    with_coordinates: int
    labels: int
    """Names of the label columns."""
    duplicate_ids: int
    shards: int
    bytes: int
    """Size of all shards."""
    fingerprint: str
    converting_seconds: float
    """Seconds from the start of the first chunk to the end of the last. The rest of ``seconds`` is for starting
    processes, the shuffle and the manifest."""
    converting_rows_per_s: float
    """Records converted per second while all processes were at work."""
    converting_peak_mib: int
    """Peak memory of a converting process, including libraries that it shares with others."""
    seconds: float

    @property
    def all_rejected(self) -> bool:
        """Whether there were records, and none became a molecule."""
        return self.rows_in > 0 and self.rows_out == 0


def prepare(
    config: PrepareConfig, *, wants_coordinates: bool = True, sources: SourceSet | None = None
) -> PrepareSummary:
    """Prepare ``config.source`` into ``config.out``. A finished data set stays as it is, an unfinished one is
    finished. Molecules without coordinates are warned of if ``wants_coordinates``.

    ``sources`` is what :func:`inspect_sources` has told of the source and the columns of ``config``, if it was asked
    before. InUseError if another command works on the same data set.
    """
    start_s = time.monotonic()
    config = accepted(config, PrepareConfig)  # The actors have another working directory.
    files = (
        find_sources(*config.sources())
        if sources is None
        else [layout.file for layout in sources.layouts]
    )
    check_apart(config, files)
    splits = _named_splits(config, len(files))
    options = _options(config, splits)
    if (manifest := _finished(config.out, files, options)) is not None:
        return _summary(config.out, "already prepared", manifest, Effort(), start_s)
    if sources is None:
        sources = inspect_sources(files, options.columns)
    require_own(config.out, "prepare")
    check_output(config.out, sources, options)
    with leased(config.out) as lease:
        # The command that held the lease before may have finished the data set.
        if (manifest := _finished(config.out, files, options)) is not None:
            return _summary(config.out, "already prepared", manifest, Effort(), start_s)
        status, manifest, effort = _run(config, sources, options, lease)
    _log_outcome(manifest, config, wants_coordinates=wants_coordinates)
    if splits is not None:
        splits.warn_of_rows_beyond(manifest.counts.rows_in)
    return _summary(config.out, status, manifest, effort, start_s)


def _finished(out: str, files: Sequence[SourceFile], options: ConvertOptions) -> Manifest | None:
    """The manifest of a finished data set, in which only its own files are left; None if it is not finished."""
    manifest = finished_manifest(out, files, options)
    if manifest is not None:
        logger.info("%s is prepared already: nothing to do", without_credentials(out))
        _warn_of_many_quarantined(manifest, out)
        remove_work_files(out)  # The run that wrote the manifest may have ended before this.
    return manifest


def _run(
    config: PrepareConfig, sources: SourceSet, options: ConvertOptions, lease: Lease
) -> tuple[str, Manifest, Effort]:
    """Do what is not done yet; returns ``prepared`` or ``continued``, the manifest, and what the conversion took."""
    done = claim_output(config.out, sources, options)
    if done:
        logger.info(
            "%s is unfinished: %d chunks are there", without_credentials(config.out), len(done)
        )
    with ray_session(config.cluster), Progress("prepare", unit="row", out=config.out) as progress:
        require_room(Need("prepare", {}, config.cluster.data_labels, "data_labels"))
        job = Conversion(config, sources, options, done)
        receipts = job.run(progress.reporter, progress.metrics, lease)
        placed = _exchanged(config, sources, options, receipts, progress.reporter, lease)
        rows = sum(receipt.rows_in for receipt in receipts)
        progress.reporter({"done": rows, "total": rows})
    lease.confirm()
    manifest = write_manifest(config.out, sources, options, receipts, placed)
    return "continued" if done else "prepared", manifest, job.effort


def _exchanged(
    config: PrepareConfig,
    sources: SourceSet,
    options: ConvertOptions,
    receipts: Sequence[Receipt],
    report: Reporter,
    lease: Lease,
) -> list[UnitReceipt]:
    """Shards of all staged molecules after the shuffle or without duplicates; none if neither is asked for."""
    if not options.needs_exchange:
        return []
    exchange, passes = plan_exchange(
        config.out,
        [without_credentials(layout.file.uri) for layout in sources.layouts],
        sources.labels,
        map(staged_chunk, receipts),
        options,
        memory_bytes=int(config.shuffle_memory_gib * GIB),
    )
    return run_exchange(exchange, passes, config.cluster, report, lease)


def _named_splits(config: PrepareConfig, num_files: int) -> NamedSplits | None:
    """The content of the split file, if there is one."""
    if config.split_file is None:
        return None
    splits = splits_of_file(config.split_file)
    if splits.names_rows and num_files > 1:
        raise ConfigError(
            f"split_file: {config.split_file} names rows, which are those of one file; the source has "
            f"{num_files} files. Give one file as the source, or a split file that names molecule ids."
        )
    return splits


def _options(config: PrepareConfig, splits: NamedSplits | None) -> ConvertOptions:
    return ConvertOptions(
        columns=ColumnConfig(
            smiles_column=config.smiles_column,
            id_column=config.id_column,
            label_columns=config.label_columns,
            censored_labels=config.censored_labels,
            relation_column=config.relation_column,
            classes=config.classes,
        ),
        featurize=config.featurize,
        rows_per_chunk=config.rows_per_chunk,
        row_group_rows=config.row_group_rows,
        valid_fraction=config.valid_fraction,
        test_fraction=config.test_fraction,
        split_seed=config.split_seed,
        split_file_digest=splits.digest if splits is not None else None,
        split_file_unnamed=config.split_file_unnamed,
        shuffle=config.shuffle,
        shuffle_seed=config.shuffle_seed,
        rows_per_shard=config.rows_per_shard,
        deduplicate=config.deduplicate,
    )


def check_apart(config: PrepareConfig | LibraryConfig, files: Sequence[SourceFile]) -> None:
    """Refuse an output among the sources, as the next run would read its shards as sources."""
    out = storage.absolute(config.out).rstrip("/") + "/"
    for source in config.sources():
        if out.startswith(storage.absolute(source).rstrip("/") + "/"):
            raise ConfigError(
                f"out: {config.out} lies inside source {source}; give a place outside of it."
            )
    for file in files:
        if file.uri.startswith(out):
            raise ConfigError(f"out: {config.out} holds the source {file.uri}; give a place apart.")


def _warn_of_many_quarantined(manifest: Manifest, out: str) -> None:
    counts = manifest.counts
    if counts.rows_quarantined > _MANY_QUARANTINED * counts.rows_in:
        logger.warning(
            "%d of %d rows are in the quarantine, not among the molecules (%s); `moleblend data %s` shows examples",
            counts.rows_quarantined,
            counts.rows_in,
            ", ".join(f"{name}: {count}" for name, count in counts.quarantined_by_reason.items()),
            without_credentials(out),
        )


def _log_outcome(manifest: Manifest, config: PrepareConfig, *, wants_coordinates: bool) -> None:
    _warn_of_many_quarantined(manifest, config.out)
    counts = manifest.counts
    for label in manifest.labels:
        if label.num_unreadable:
            logger.warning(
                "label %r: %d cells hold %s and count as missing%s",
                label.name,
                label.num_unreadable,
                _unreadable_text(config, label),
                f" (or {config.relation_column!r} holds no relation for them, or another one)"
                if config.relation_column is not None
                else "",
            )
    fractions = {"valid": config.valid_fraction, "test": config.test_fraction}
    wanted = [split for split, fraction in fractions.items() if fraction]
    for split in ["train", *([] if config.split_file else wanted)]:
        # Of no molecules at all the quarantine tells.
        if counts.rows_out and not manifest.num_molecules(split):
            logger.warning("%s: split %s has no molecules", without_credentials(config.out), split)
    flat = counts.conformer_status.get("none", 0)
    if flat and wants_coordinates:
        logger.warning(
            "%d of %d molecules have no coordinates, only 2D relations; featurize.conformers.generate=true makes them",
            flat,
            counts.rows_out,
        )
    failed = counts.conformer_status.get("failed", 0)
    if failed:
        logger.warning(
            "%d of %d molecules have no coordinates, as no conformer could be made (column conformer_detail "
            "tells why; of all molecules: %s)",
            failed,
            counts.rows_out,
            ", ".join(f"{kind} {count}" for kind, count in counts.conformer_detail.items()),
        )
    if counts.duplicate_ids:
        logger.info("%d rows repeat the id of another", counts.duplicate_ids)
    if config.deduplicate != "none":
        logger.info(
            "%d duplicates; %d molecules have no InChIKey and are none",
            counts.quarantined_by_reason.get(DUPLICATE, 0),
            counts.without_inchikey,
        )


def _unreadable_text(config: PrepareConfig, label: LabelInfo) -> str:
    if config.classes:
        return f"none of the classes {', '.join(config.classes)}"
    return "no number" if label.num_bounds is None else "neither a number nor a bound"


def _summary(
    out: str, status: str, manifest: Manifest, effort: Effort, start_s: float
) -> PrepareSummary:
    counts = manifest.counts
    return PrepareSummary(
        out=out,
        status=status,
        rows_in=counts.rows_in,
        rows_out=counts.rows_out,
        rows_quarantined=counts.rows_quarantined,
        quarantined_by_reason=counts.quarantined_by_reason,
        train=manifest.num_molecules("train"),
        valid=manifest.num_molecules("valid"),
        test=manifest.num_molecules("test"),
        with_coordinates=counts.with_coordinates,
        labels=len(manifest.labels),
        duplicate_ids=counts.duplicate_ids,
        shards=len(manifest.shards),
        bytes=sum(shard.num_bytes for shard in manifest.shards),
        fingerprint=manifest.fingerprint,
        converting_seconds=round(effort.seconds, 3),
        converting_rows_per_s=round(effort.rows_per_s, 1),
        converting_peak_mib=effort.peak_bytes >> 20,
        seconds=round(time.monotonic() - start_s, 3),
    )
