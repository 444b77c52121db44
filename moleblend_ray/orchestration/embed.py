"""Batch embedding on a Ray cluster: every shard of molecules becomes one Parquet part, in the source's order."""

from __future__ import annotations

import logging
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
)
from moleblend_ray.errors import CheckpointError, DataError, MoleBlendError
from moleblend_ray.evaluation.embedding import MOLECULE_COLUMNS, Embedder
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
"""Names every part with its checksum; written last."""

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
    identity = {
        "config": _question(config),
        "data_fingerprint": manifest.fingerprint,
        "checkpoint_fingerprint": encoder.start.fingerprint,
    }
    claim(config.out, identity)
    parts = _parts(manifest)
    missing = [part for part in parts if not storage.exists(_part_uri(config.out, part))]
    if len(missing) < len(parts):
        logger.info("%d of %d parts were made before", len(parts) - len(missing), len(parts))
    if missing:
        _run_actors(config, data_uri, manifest, missing, encoder.start.fingerprint)
    return {
        "parts": [{"path": part_path(part["number"]), "rows": part["rows"]} for part in parts],
        "parts_reused": len(parts) - len(missing),
        "embeddings": sum(part["rows"] for part in parts),
        "dim": encoder.start.model.dim,
        "predictions": list(encoder.fine_tuned.trained.columns) if encoder.fine_tuned else [],
        "checkpoint": {"uri": config.checkpoint, "fingerprint": encoder.start.fingerprint},
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


def _run_actors(
    config: EmbedConfig,
    data_uri: str,
    manifest: Manifest,
    parts: list[dict[str, Any]],
    fingerprint: str | None,
) -> None:
    cluster = config.cluster
    actors = min(cluster.num_data_actors, len(parts))
    dataset = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
        _PartWriter,
        fn_constructor_args=(config, data_uri, manifest, fingerprint),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=cluster.cpus_per_worker,
        num_gpus=1 if cluster.use_gpu else 0,
    )
    total = sum(part["rows"] for part in parts)
    done = 0
    with Progress("embed", unit="molecule", total=total) as progress:
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
                done += int(batch["rows"].sum())
                progress.reporter({"done": done, "total": total})
        except ray.exceptions.RayTaskError as error:
            raise _own_error(error) or error from None


def _own_error(error: BaseException | None) -> MoleBlendError | None:
    """The error of this package somewhere below Ray Data's wrappers."""
    while error is not None and not isinstance(error, MoleBlendError):
        error = getattr(error, "cause", None) or error.__cause__
    return error


class _PartWriter:
    """An actor with the model in memory; a shard in, a Parquet part on storage out."""

    def __init__(
        self, config: EmbedConfig, data_uri: str, manifest: Manifest, fingerprint: str | None
    ) -> None:
        loaded = load_encoder(config.checkpoint)
        if loaded.start.fingerprint != fingerprint:
            raise CheckpointError(
                f"{config.checkpoint} changed while its embeddings were computed; embed from one checkpoint "
                "(.../checkpoints/step-NNNNNNNN) or an exported model, into an empty `out`"
            )
        self._config = config
        self._data_uri = data_uri
        self._manifest = manifest
        self._embedder = Embedder.build(
            loaded.start, loaded.fine_tuned, config.batch_size, use_reserved(config.cluster)
        )

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        for number, split, shard in zip(
            batch["number"], batch["split"], batch["shard"], strict=True
        ):
            table = read_shard(self._data_uri, self._manifest, str(split), int(shard))
            sink = pa.BufferOutputStream()
            pq.write_table(self._embedder.part(table), sink, compression="zstd")
            uri = storage.join(self._config.out, part_path(int(number)))
            storage.write_bytes(uri, sink.getvalue().to_pybytes())
        return {"rows": batch["rows"]}


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
        pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(data_uri, shard.path))))
        for shard in manifest.shards_of("quarantine")
    ]
    table = pa.concat_tables(tables) if tables else QUARANTINE_SCHEMA.empty_table()
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.write_bytes(storage.join(out, REJECTED_NAME), sink.getvalue().to_pybytes())
    return int(table.num_rows)


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


def _part_uri(out: str, part: Mapping[str, Any]) -> str:
    return storage.join(out, part_path(part["number"]))


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
