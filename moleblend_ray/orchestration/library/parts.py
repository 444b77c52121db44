"""The output of a model for molecules, one Parquet part per shard, written by Ray Data actors that hold the model.

Parts are in the order of the source, and those that are already there are kept. Every source row is in one part or
among the rejected rows. The summary, written last, lists the parts with their checksums.
"""

from __future__ import annotations

import json
import logging
import pickle
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any, Final, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch

from moleblend_ray.config.describe import redact
from moleblend_ray.config.downstream import EmbedConfig, PredictConfig
from moleblend_ray.config.paths import path_settings
from moleblend_ray.data.dataset.dataset_files import (
    SPLITS,
    is_prepared,
    listed,
    prepared_source,
    source_index,
)
from moleblend_ray.data.dataset.lease import leased
from moleblend_ray.data.dataset.manifest import Manifest, ShardInfo, SourceInfo, load_manifest
from moleblend_ray.data.dataset.shards import QUARANTINE_SCHEMA, read_file
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.ahead import mapped_ahead
from moleblend_ray.data.files.documents import member, require_types
from moleblend_ray.data.files.scratch import scratch_folder
from moleblend_ray.data.preparation.claim import changed_files
from moleblend_ray.data.preparation.options import needs_exchange
from moleblend_ray.data.sources import SourceSet, find_sources
from moleblend_ray.errors import (
    ConfigError,
    DataError,
    TrainingError,
    without_credentials,
)
from moleblend_ray.evaluation.results.result_files import PARTS_DIR, PREPARED_DIR
from moleblend_ray.evaluation.results.results import versions
from moleblend_ray.orchestration.cluster.cluster_checks import (
    Need,
    require_room,
    require_shared_paths,
    warn_of_unused_gpus,
)
from moleblend_ray.orchestration.cluster.executor import MAX_RETRIES, retries_limited
from moleblend_ray.orchestration.cluster.placement import place_dataset
from moleblend_ray.orchestration.cluster.session import ray_session
from moleblend_ray.orchestration.identity import check_claim, check_finished, claim, data_inputs
from moleblend_ray.orchestration.library.part_writer import (
    PartActor,
    PartMaker,
    PartsJob,
    PartWriter,
)
from moleblend_ray.orchestration.preparation.molecules import look_at_source, prepare_molecules
from moleblend_ray.orchestration.preparation.prepare import check_apart
from moleblend_ray.orchestration.progress.progress import Progress
from moleblend_ray.settings import to_dict

logger = logging.getLogger(__name__)

REJECTED_NAME = "rejected.parquet"
_THREADS: Final = 16
_CHUNKS_A_ROW_GROUP: Final = 256
"""Chunks whose rejected rows are in memory at once: if all rows are rejected, a million, of about 400 bytes each."""
_NAMED: Final = 3
"""Rejected rows that an error names."""

_LABEL_COLUMNS: Final[tuple[str, ...]] = ()
"""Labels that are kept of a raw source: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The content of ``out``."""

    summary: Mapping[str, Any]
    """The summary as it is stored."""
    already_finished: bool
    """Whether an earlier command had finished the work."""


def run_parts(job: PartsJob) -> Outcome:
    """Make every missing part, the list of rejected rows and the summary; do nothing if all are there. InUseError if another
    command works on them."""
    began = time.monotonic()
    config = job.config
    stored = _finished(job)
    if stored is not None:
        return Outcome(summary=stored, already_finished=True)
    _tell_of_lost_files(job)
    # Read here as well, to find errors of the model before molecules are prepared and actors are started.
    maker = job.load(torch.device("cpu"))
    # Preparing a library can take hours, and would write into results of something else.
    check_claim(config.out, {"config": job.question(), "checkpoint_fingerprint": maker.fingerprint})
    # Likewise errors of the source, before Ray is started.
    sources = look_at_source(config, _LABEL_COLUMNS)
    if sources is not None:
        check_apart(config, [layout.file for layout in sources.layouts])
    with leased(config.out, partial(_has_summary, job)) as lease:
        # The command that held the lease before may have finished the work.
        if (stored := _finished(job)) is not None:
            return Outcome(summary=stored, already_finished=True)
        # Of an `out` that has lost files: while these are made again, it is unfinished.
        storage.delete(storage.join(config.out, job.kind.summary_name))
        found = _make_all(job, maker, sources)
        summary = redact({**found, "seconds": time.monotonic() - began})
        lease.confirm()
        storage.write_json(storage.join(config.out, job.kind.summary_name), summary)
    return Outcome(summary=summary, already_finished=False)


def _make_all(job: PartsJob, maker: PartMaker, sources: SourceSet | None) -> dict[str, Any]:
    """Prepare the molecules, make all parts and the list of rejected rows; returns what the summary says of them."""
    config = job.config
    with ray_session(config.cluster):
        _check_cluster(job)
        _forget_useless(config.out)
        data_uri = _prepare(job, maker, sources)
        manifest = load_manifest(data_uri)
        if not manifest.counts.rows_out:
            _end_without_molecules(config, data_uri, manifest)
        if data_uri != storage.join(config.out, PREPARED_DIR):
            _tell_of_missing_coordinates(job, maker, data_uri, manifest)
        found = _make_parts(job, maker, data_uri, manifest)
    rejected = _write_rejected(config.out, data_uri, manifest)
    _check_sum(config.out, manifest, found[job.kind.counted], rejected)
    return {
        **found,
        "rejected": rejected,
        "rejected_by_reason": manifest.counts.quarantined_by_reason,
        "data": {
            "uri": data_uri,
            "fingerprint": manifest.fingerprint,
            "sources": [asdict(source) for source in manifest.sources],
        },
        "config": to_dict(config),
        "versions": versions(),
    }


def _forget_useless(out: str) -> None:
    """Delete what was prepared into ``out`` if no molecule is in it: it would refuse a source that was put right."""
    data_uri = storage.join(out, PREPARED_DIR)
    if is_prepared(data_uri) and not load_manifest(data_uri).counts.rows_out:
        storage.delete_tree(data_uri)


def _end_without_molecules(
    config: EmbedConfig | PredictConfig, data_uri: str, manifest: Manifest
) -> NoReturn:
    """Raise DataError that names some of the rows; ``out`` then lists all of them, and may be used again with other settings
    or a source that was put right."""
    _write_rejected(config.out, data_uri, manifest)
    uri = storage.join(config.out, REJECTED_NAME)
    rows = pq.read_table(pa.BufferReader(storage.read_bytes(uri))).slice(0, _NAMED).to_pylist()
    named = "; ".join(f"row {row['source_row']}: {row['detail']}" for row in rows)
    raise DataError(
        f"{without_credentials(', '.join(config.sources()))}: none of {manifest.counts.rows_in} rows is a usable molecule "
        f"({manifest.counts.quarantined_by_reason}), such as {named}. {uri} lists all of them. Correct the source or its "
        "settings, such as smiles_column, and run the command again"
    )


def _check_cluster(job: PartsJob) -> None:
    """Refuse a cluster on which the actors would wait forever, or on which each machine would write to its own disk."""
    config, cluster = job.config, job.config.cluster
    need = {"CPU": cluster.cpus_per_worker, **({"GPU": 1.0} if cluster.use_gpu else {})}
    what = f"one actor of {job.kind.command}"
    require_room(Need(what, need, cluster.worker_labels, "worker_labels"))
    # All of them: every actor reads the model by itself.
    require_shared_paths(path_settings(config))
    warn_of_unused_gpus(cluster)


def _prepare(job: PartsJob, maker: PartMaker, sources: SourceSet | None = None) -> str:
    """URI of the prepared molecules."""
    return prepare_molecules(
        job.config,
        storage.join(job.config.out, PREPARED_DIR),
        label_columns=_LABEL_COLUMNS,
        conformers=_wanted_conformers(job, maker),
        form=maker.form,
        require_coordinates=maker.needs_coordinates,
        cluster=job.config.cluster,
        sources=sources,
    )


def _wanted_conformers(job: PartsJob, maker: PartMaker) -> int:
    asked = job.config.conformers
    return maker.conformers if asked is None else int(asked)


def _tell_of_missing_coordinates(
    job: PartsJob, maker: PartMaker, data_uri: str, manifest: Manifest
) -> None:
    """Warn if the prepared source ``data_uri``, to which nothing is added, lacks coordinates that the model was tuned with."""
    total, placed = manifest.counts.rows_out, manifest.counts.with_coordinates
    if placed < total and _wanted_conformers(job, maker):
        seen = "the elements" if maker.needs_coordinates else "2D relations"
        logger.warning(
            "%d of %d molecules of %s have no coordinates: the model sees %s of them alone, as a prepared data set "
            "is used as it is. Prepare it with featurize.conformers.generate=true, or give the raw molecules",
            total - placed,
            total,
            without_credentials(data_uri),
            seen,
        )


def _make_parts(
    job: PartsJob, maker: PartMaker, data_uri: str, manifest: Manifest
) -> dict[str, Any]:
    """Make every part that is not there yet; returns what the summary says about all parts."""
    identity = {
        "config": job.question(),
        "data_fingerprint": manifest.fingerprint,
        "checkpoint_fingerprint": maker.fingerprint,
    }
    claim(job.config.out, identity)
    writer = PartWriter(job, data_uri, manifest, maker.fingerprint, maker.schema)
    began = time.monotonic()
    parts = _run_actors(writer, _places(manifest))
    seconds = time.monotonic() - began
    for part, uri in zip(parts, _source_uris(manifest), strict=True):
        part["source_uri"] = uri
    made = sum(part["rows"] for part in parts if not part["reused"])
    reused = sum(part.pop("reused") for part in parts)
    if reused:
        logger.info("%d of %d parts were made before", reused, len(parts))
    if made:
        logger.info(
            "%s: %d molecules in %.1f s, %.4g per second",
            job.kind.command,
            made,
            seconds,
            made / seconds,
        )
    return {
        **maker.describe(),
        "parts": parts,
        "parts_reused": reused,
        job.kind.counted: sum(part["rows"] for part in parts),
        "molecules_per_s": made / seconds if made else None,
    }


def _places(manifest: Manifest) -> list[dict[str, Any]]:
    """One part per shard, in the order of the source, for a data set that has one split."""
    places = [
        (split, index, shard.num_rows)
        for split in SPLITS
        for index, shard in enumerate(manifest.shards_of(split))
    ]
    return [
        {"number": number, "split": split, "shard": index, "rows": rows}
        for number, (split, index, rows) in enumerate(places)
    ]


def _source_uris(manifest: Manifest) -> list[str | None]:
    """The source file of each part, which tells rows of several files apart; None if molecules of several were brought together."""
    shards = [shard for split in SPLITS for shard in manifest.shards_of(split)]
    if needs_exchange(manifest.options):
        return [None] * len(shards)
    return [manifest.sources[source_index(shard.path)].uri for shard in shards]


def _run_actors(writer: PartWriter, places: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the summary says about each part, in order."""
    job, cluster = writer.job, writer.job.config.cluster
    items = ray.data.from_items(places, override_num_blocks=len(places))
    with retries_limited() as limit:
        dataset = items.map_batches(
            PartActor,
            fn_constructor_args=(writer,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(cluster.num_data_actors, len(places))),
            num_cpus=cluster.cpus_per_worker,
            num_gpus=1 if cluster.use_gpu else 0,
            **limit,
        )
    place_dataset(dataset, cluster.worker_labels)
    total = sum(place["rows"] for place in places)
    written: dict[int, dict[str, Any]] = {}
    done = made = 0
    began = time.monotonic()
    with Progress(job.kind.command, unit="molecule", total=total, out=job.config.out) as progress:
        try:
            for row in dataset.iter_rows():
                if row["error"]:
                    raise pickle.loads(row["error"])
                part = written[row["number"]] = json.loads(row["part"])
                done += part["rows"]
                made += 0 if part["reused"] else part["rows"]
                rate = made / (time.monotonic() - began)
                progress.reporter({"done": done, "total": total, "molecules_per_s": rate})
        except ray.exceptions.RayTaskError:
            # An error of this program: its traceback is needed.
            raise
        except ray.exceptions.RayError as error:
            raise TrainingError(
                f"{job.kind.command} into {job.config.out}: making a part ended its process {MAX_RETRIES + 1} times: it was "
                f"killed for lack of memory, or its machine was lost. ({error}) Parts made so far are kept: run the same "
                "command again, with a smaller batch_size or fewer cluster.num_data_actors if memory is short"
            ) from error
    return [written[number] for number in sorted(written)]


def _write_rejected(out: str, data_uri: str, manifest: Manifest) -> int:
    """Write ``rejected.parquet``: every source row that is in no part, with the reason."""

    def read(shard: ShardInfo) -> pa.Table:
        return pq.read_table(pa.BufferReader(read_file(data_uri, shard)))

    # There is one for each chunk: 244,000 of a billion molecules.
    tables = mapped_ahead(read, manifest.shards_of("quarantine"), _THREADS)
    rows = 0
    with scratch_folder("rejected") as folder:
        path = folder / REJECTED_NAME
        with pq.ParquetWriter(path, QUARANTINE_SCHEMA) as writer:
            while some := list(islice(tables, _CHUNKS_A_ROW_GROUP)):
                table = pa.concat_tables(some)
                writer.write_table(table)
                rows += table.num_rows
        storage.upload(path, storage.join(out, REJECTED_NAME))
    return rows


def _check_sum(out: str, manifest: Manifest, kept: int, rejected: int) -> None:
    rows_in = manifest.counts.rows_in
    if kept + rejected != rows_in:
        raise DataError(
            f"{out}: {kept} molecules in parts and {rejected} rejected rows are not the {rows_in} rows of the source; "
            "the prepared data set is damaged, prepare it again"
        )


def _has_summary(job: PartsJob, out: str) -> bool:
    return storage.exists(storage.join(out, job.kind.summary_name))


def _summary(job: PartsJob) -> dict[str, Any]:
    uri = storage.join(job.config.out, job.kind.summary_name)
    summary = storage.read_object(uri, {job.kind.counted: int, "parts": list[dict[str, Any]]})
    for part in summary["parts"]:
        storage.require_members(uri, part, {"path": str, "bytes": int})
    return summary


def _lost_files(out: str, summary: Mapping[str, Any]) -> list[str]:
    """The files that the summary of ``out`` is about and that are gone, or have another size."""
    present = listed(out, PARTS_DIR)
    lost = [
        part["path"]
        for part in summary["parts"]
        if present.get(storage.join(out, part["path"])) != part["bytes"]
    ]
    return lost + [REJECTED_NAME] * (not storage.exists(storage.join(out, REJECTED_NAME)))


def _tell_of_lost_files(job: PartsJob) -> None:
    """Warn if ``out`` was finished and has lost files since then, which are made again."""
    out = job.config.out
    lost = _lost_files(out, _summary(job)) if _has_summary(job, out) else []
    if lost:
        logger.warning(
            "%s was finished, but %d of its files are gone or have another size since then, such as %s: making them again",
            without_credentials(out),
            len(lost),
            lost[0],
        )


def _finished(job: PartsJob) -> dict[str, Any] | None:
    """The stored summary, if ``out`` is finished and for this question, with all its files. Raises ConfigError if it is for
    another."""
    out = job.config.out
    if not _has_summary(job, out):
        return None
    summary = _summary(job)
    data_uri = storage.join(out, PREPARED_DIR)

    def inputs() -> dict[str, str | None]:
        _require_same_files(job, summary)
        maker = job.load(torch.device("cpu"))
        return {
            **data_inputs(job.config.sources(), data_uri, lambda: _prepare(job, maker)),
            "checkpoint_fingerprint": maker.fingerprint,
        }

    check_finished(out, job.question(), inputs)
    if _lost_files(out, summary):
        return None
    logger.info("%s is finished: %d %s", out, summary[job.kind.counted], job.kind.counted)
    return summary


def _require_same_files(job: PartsJob, summary: Mapping[str, Any]) -> None:
    """Raise ConfigError if the files of a raw source are not those that the finished ``out`` was made of, which may have its
    prepared molecules no more."""
    config = job.config
    made_of = _made_of(config.out, summary)
    if made_of is None or prepared_source(config.sources()) is not None:
        return
    if (changed := changed_files(made_of, find_sources(*config.sources()))) is not None:
        raise ConfigError(
            f"out: {config.out} is finished, and its source has changed since then: {changed}. Give another `out` for the source as "
            "it is now"
        )


def _source_info(out: str, stored: Mapping[str, Any]) -> SourceInfo:
    try:
        found = SourceInfo(**stored)
        require_types(found)
    except TypeError as error:
        raise DataError(f"the summary in {out} does not tell its sources: {error}") from error
    return found


def _made_of(out: str, summary: Mapping[str, Any]) -> list[SourceInfo] | None:
    """The files that a finished ``out`` was made of; None if it does not tell."""
    stored = member(summary, "data.sources", list[dict[str, Any]])
    if stored is not None:
        return [_source_info(out, source) for source in stored]
    # As earlier versions wrote it.
    data_uri = storage.join(out, PREPARED_DIR)
    return list(load_manifest(data_uri).sources) if is_prepared(data_uri) else None
