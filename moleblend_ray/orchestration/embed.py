"""Batch embedding on a Ray cluster: every shard of molecules becomes one Parquet part, in the source's order."""

from __future__ import annotations

import json
import logging
import pickle
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from numpy.typing import NDArray

from moleblend_ray.config.builder import to_dict
from moleblend_ray.config.describe import redact
from moleblend_ray.config.downstream import EmbedConfig
from moleblend_ray.config.paths import with_absolute_paths
from moleblend_ray.data import storage
from moleblend_ray.data.shards import (
    GRAPH_COLUMNS,
    QUARANTINE_SCHEMA,
    SPLITS,
    Manifest,
    ShardReader,
    load_manifest,
    read_file,
)
from moleblend_ray.errors import (
    CheckpointError,
    DataError,
    MoleBlendError,
    TrainingError,
    without_credentials,
)
from moleblend_ray.evaluation.embedding import MOLECULE_COLUMNS, Embedder, part_schema
from moleblend_ray.evaluation.results import versions
from moleblend_ray.orchestration.downstream import (
    check_finished,
    claim,
    data_inputs,
    load_encoder,
    prepare_molecules,
)
from moleblend_ray.orchestration.local import ray_session
from moleblend_ray.orchestration.progress import Progress
from moleblend_ray.orchestration.workers import use_reserved

logger = logging.getLogger(__name__)

SUMMARY_NAME = "embeddings.json"
"""Names every part with its rows, bytes and checksum; written last."""

REJECTED_NAME = "rejected.parquet"

DATA_DIR = "prepared"
"""Where a raw source is prepared within ``out``."""

ROWS_PER_CHUNK = 4096
"""Rows per task when preparing, and so at most per part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedSummary:
    """What became of the molecules and where the vectors lie."""

    out: str
    """Directory of the embeddings."""
    embeddings: int
    """Molecules with a vector."""
    rejected: int
    """Source rows without one; each is in ``rejected.parquet`` with its reason."""
    dim: int
    """Length of a vector."""
    parts: int
    """Parquet files."""
    parts_reused: int
    """Of these, made by an earlier, interrupted command."""
    seconds: float
    """Wall time of the command that finished."""
    already_finished: bool
    """True if an earlier command had finished, and this one did nothing."""


def embed(config: EmbedConfig) -> EmbedSummary:
    """One vector a molecule, in ``<out>/parts/part-NNNNN.parquet``, rows in the source's order.

    Repeating a finished command does nothing; repeating an interrupted one makes the parts that are missing.
    """
    config = with_absolute_paths(config)
    began = time.monotonic()
    stored = _finished(config)
    if stored is not None:
        return _summary(config.out, stored, already_finished=True)
    with ray_session(config.cluster):
        data_uri = _prepare(config)
        manifest = load_manifest(data_uri)
        if not any(manifest.num_molecules(split) for split in SPLITS):
            raise DataError(
                f"{config.source}: none of {manifest.counts.rows_in} rows is a usable molecule; "
                f"reasons: {manifest.counts.quarantined_by_reason}"
            )
        found = _embed_shards(config, data_uri, manifest)
    rejected = _write_rejected(config.out, data_uri, manifest)
    summary = {
        **found,
        "rejected": rejected,
        "data": {"uri": data_uri, "fingerprint": manifest.fingerprint},
        "config": to_dict(config),
        "versions": versions(),
        "seconds": time.monotonic() - began,
    }
    storage.write_json(storage.join(config.out, SUMMARY_NAME), redact(summary))
    return _summary(config.out, summary, already_finished=False)


def part_path(number: int) -> str:
    """Where the part with that number lies within ``out``."""
    return f"parts/part-{number:05d}.parquet"


def _prepare(config: EmbedConfig) -> str:
    """URI of the prepared molecules."""
    return prepare_molecules(
        config,
        storage.join(config.out, DATA_DIR),
        label_columns=(),
        rows_per_chunk=ROWS_PER_CHUNK,
        cluster=config.cluster,
    )


def _embed_shards(config: EmbedConfig, data_uri: str, manifest: Manifest) -> dict[str, Any]:
    """Every part that is not there yet, on Ray Data actors that each hold the model."""
    encoder = load_encoder(config.checkpoint)
    start = encoder.start
    predictions = encoder.fine_tuned.trained.columns if encoder.fine_tuned else ()
    identity = {
        "config": _question(config),
        "data_fingerprint": manifest.fingerprint,
        "checkpoint_fingerprint": start.fingerprint,
    }
    claim(config.out, identity)
    writer = PartWriter(
        config, data_uri, manifest, start.fingerprint, part_schema(start.model.dim, predictions)
    )
    parts = _run_actors(writer, _parts(manifest))
    reused = sum(part.pop("reused") for part in parts)
    if reused:
        logger.info("%d of %d parts were made before", reused, len(parts))
    return {
        "parts": parts,
        "parts_reused": reused,
        "embeddings": sum(part["rows"] for part in parts),
        "dim": start.model.dim,
        "predictions": list(predictions),
        "checkpoint": {"uri": config.checkpoint, "fingerprint": start.fingerprint},
    }


def _parts(manifest: Manifest) -> list[dict[str, Any]]:
    """One part for each shard: the source's order, for a data set that is all one split."""
    places = [
        (split, index, shard.num_rows)
        for split in SPLITS
        for index, shard in enumerate(manifest.shards_of(split))
    ]
    return [
        {"number": number, "split": split, "shard": index, "rows": rows}
        for number, (split, index, rows) in enumerate(places)
    ]


def _run_actors(writer: PartWriter, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``embeddings.json`` says of each part, in order."""
    cluster = writer.config.cluster
    dataset = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
        _PartActor,
        fn_constructor_args=(writer,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(cluster.num_data_actors, len(parts))),
        num_cpus=cluster.cpus_per_worker,
        num_gpus=1 if cluster.use_gpu else 0,
    )
    total = sum(part["rows"] for part in parts)
    written: dict[int, dict[str, Any]] = {}
    with Progress("embed", unit="molecule", total=total) as progress:
        try:
            for row in dataset.iter_rows():
                if row["error"]:
                    raise pickle.loads(row["error"])
                written[row["number"]] = json.loads(row["part"])
                done = sum(part["rows"] for part in written.values())
                progress.reporter({"done": done, "total": total})
        except ray.exceptions.RayTaskError:
            # A fault of this program: its traceback is what helps.
            raise
        except ray.exceptions.RayError as error:
            raise TrainingError(
                f"embedding into {writer.config.out}: a worker was lost: {error}. Parts made so far are kept: "
                "run the same command again"
            ) from error
    return [written[number] for number in sorted(written)]


class PartWriter:
    """A shard in, a Parquet part on storage out, with the model in memory once it is needed."""

    def __init__(
        self,
        config: EmbedConfig,
        data_uri: str,
        manifest: Manifest,
        fingerprint: str | None,
        schema: pa.Schema,
    ) -> None:
        self.config = config
        self._data_uri = data_uri
        self._manifest = manifest
        self._fingerprint = fingerprint
        self._schema = schema
        self._embedder: Embedder | None = None

    def write(self, number: int, split: str, shard: int) -> dict[str, Any]:
        """Make the part, unless it is there; its path, rows, bytes, checksum and whether it was there."""
        path = part_path(number)
        uri = storage.join(self.config.out, path)
        rows = self._manifest.shards_of(split)[shard].num_rows
        content = self._made_before(uri, rows)
        reused = content is not None
        if content is None:
            table = read_shard(self._data_uri, self._manifest, split, shard)
            content = _parquet(self._loaded().part(table), compression="zstd")
            storage.write_bytes(uri, content)
        return {
            "path": path,
            "rows": rows,
            "bytes": len(content),
            "sha256": storage.sha256_bytes(content),
            "reused": reused,
        }

    def _made_before(self, uri: str, rows: int) -> bytes | None:
        """The part, if an earlier command made it whole: the name alone tells nothing of its content."""
        if not storage.exists(uri):
            return None
        content = storage.read_bytes(uri)
        try:
            file = pq.ParquetFile(pa.BufferReader(content))
        except pa.ArrowInvalid as error:
            logger.warning("%s is damaged and made again: %s", without_credentials(uri), error)
            return None
        if file.metadata.num_rows == rows and file.schema_arrow.equals(self._schema):
            return content
        logger.warning("%s holds other rows or columns and is made again", without_credentials(uri))
        return None

    def _loaded(self) -> Embedder:
        if self._embedder is None:
            loaded = load_encoder(self.config.checkpoint)
            if loaded.start.fingerprint != self._fingerprint:
                raise CheckpointError(
                    f"{self.config.checkpoint} changed while its embeddings were computed; embed from one "
                    "checkpoint (.../checkpoints/step-NNNNNNNN) or an exported model, into an empty `out`"
                )
            device = use_reserved(self.config.cluster)
            self._embedder = Embedder.build(
                loaded.start, loaded.fine_tuned, self.config.batch_size, device
            )
        return self._embedder


class _PartActor:
    """A `PartWriter` as Ray Data calls it.

    It does nothing when made: Ray starts a new actor for each that fails to start, for ever. An error of this
    package is a result like others: of those that a task raises, Ray Data passes on the text alone.
    """

    def __init__(self, writer: PartWriter) -> None:
        self._writer = writer

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        places = zip(*(batch[name].tolist() for name in ("number", "split", "shard")), strict=True)
        parts, errors = [], []
        for place in places:
            part, error = None, b""
            try:
                part = self._writer.write(*place)
            except MoleBlendError as problem:
                error = pickle.dumps(problem)
            parts.append(json.dumps(part))
            errors.append(error)
        return {"number": batch["number"].tolist(), "part": parts, "error": errors}


def read_shard(data_uri: str, manifest: Manifest, split: str, shard: int) -> pa.Table:
    """The rows of one shard, in its order."""
    before = sum(info.num_rows for info in manifest.shards_of(split)[:shard])
    rows = manifest.shards_of(split)[shard].num_rows
    reader = ShardReader(
        data_uri, manifest, split, columns=[*MOLECULE_COLUMNS, *GRAPH_COLUMNS], cache_bytes=0
    )
    return reader.read(np.arange(before, before + rows, dtype=np.int64))


def _write_rejected(out: str, data_uri: str, manifest: Manifest) -> int:
    """``rejected.parquet``: every source row without a vector, and why."""
    tables = [
        pq.read_table(pa.BufferReader(read_file(data_uri, shard)))
        for shard in manifest.shards_of("quarantine")
    ]
    table = pa.concat_tables(tables) if tables else QUARANTINE_SCHEMA.empty_table()
    storage.write_bytes(storage.join(out, REJECTED_NAME), _parquet(table))
    return int(table.num_rows)


def _parquet(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return bytes(sink.getvalue())


def _finished(config: EmbedConfig) -> dict[str, Any] | None:
    uri = storage.join(config.out, SUMMARY_NAME)
    if not storage.exists(uri):
        return None
    summary: dict[str, Any] = storage.read_json(uri)
    data_uri = storage.join(config.out, DATA_DIR)

    def inputs() -> dict[str, str | None]:
        return {
            **data_inputs(config.source, data_uri, lambda: _prepare(config)),
            "checkpoint_fingerprint": load_encoder(config.checkpoint).start.fingerprint,
        }

    check_finished(config.out, _question(config), inputs)
    logger.info("%s is finished: %d embeddings", config.out, summary["embeddings"])
    return summary


def _question(config: EmbedConfig) -> dict[str, Any]:
    """The settings that decide the vectors: not where they are computed or stored."""
    settings = to_dict(config)
    for name in ("out", "cluster", "batch_size"):
        settings.pop(name)
    return {"job": "EmbedConfig", **settings}


def _summary(out: str, stored: Mapping[str, Any], *, already_finished: bool) -> EmbedSummary:
    return EmbedSummary(
        out=out,
        embeddings=stored["embeddings"],
        rejected=stored["rejected"],
        dim=stored["dim"],
        parts=len(stored["parts"]),
        parts_reused=stored["parts_reused"],
        seconds=stored["seconds"],
        already_finished=already_finished,
    )
