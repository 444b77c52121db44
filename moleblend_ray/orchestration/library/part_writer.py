"""A shard of molecules -> a Parquet part with the output of a model, in an actor of Ray Data (:mod:`.parts`)."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from moleblend_ray.config.downstream import EmbedConfig, PredictConfig
from moleblend_ray.data.dataset.dataset_files import SPLITS
from moleblend_ray.data.dataset.manifest import Manifest, ShardInfo
from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.dataset.shard_reader import ShardReader
from moleblend_ray.data.dataset.shards import GRAPH_COLUMNS
from moleblend_ray.data.files import storage
from moleblend_ray.errors import CheckpointError, MoleBlendError, TrainingError, without_credentials
from moleblend_ray.evaluation.models.batches import MOLECULE_COLUMNS
from moleblend_ray.evaluation.results.result_files import PARTS_DIR, PartsKind
from moleblend_ray.orchestration.cluster.reserved import use_reserved
from moleblend_ray.settings import to_dict

logger = logging.getLogger(__name__)

_PLACE_SETTINGS: Final = ("out", "cluster", "batch_size")
"""Settings that change where and how fast the work is done, but not its result."""

_FEWEST_DIGITS: Final = 5
"""Of the number of a part in its name."""


class PartMaker(Protocol):
    """A model that is ready to process molecules."""

    @property
    def schema(self) -> pa.Schema:
        """Columns of the table that :meth:`part` returns."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and of everything else in the model that changes the result."""

    @property
    def batch_size(self) -> int:
        """Molecules that it computes at once."""

    @property
    def conformers(self) -> int:
        """Conformers that it uses of each molecule; 0: it needs no coordinates."""

    @property
    def needs_coordinates(self) -> bool:
        """Whether what it makes of molecules without coordinates means nothing."""

    @property
    def form(self) -> MoleculeForm | None:
        """The form that molecules should have, which is that of its training; None: unknown."""

    def describe(self) -> dict[str, Any]:
        """What the summary says about the model, as JSON values."""

    def part(self, table: pa.Table) -> pa.Table:
        """A table with one row per row of a shard table (columns ``MOLECULE_COLUMNS`` and ``GRAPH_COLUMNS``), in its
        order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartsJob:
    """A model, the molecules that it processes, and where the result goes. Actors receive it pickled."""

    kind: PartsKind
    """The command."""
    config: EmbedConfig | PredictConfig
    """Source, ``out`` and cluster."""
    model: str
    """URI of the model, for messages."""
    load: Callable[[torch.device], PartMaker]
    """Reads the model and moves it to the device."""
    other_settings: tuple[str, ...] = ()
    """Settings of the command, besides those of place and speed, that do not change the parts."""

    def question(self) -> dict[str, Any]:
        """The settings that determine the result."""
        settings = to_dict(self.config)
        for name in (*_PLACE_SETTINGS, *self.other_settings):
            settings.pop(name)
        return {"job": type(self.config).__name__, **settings}


class PartWriter:
    """Turns a shard into a Parquet part in storage. The model is read when it is first needed."""

    def __init__(
        self,
        job: PartsJob,
        data_uri: str,
        manifest: Manifest,
        fingerprint: str,
        schema: pa.Schema,
    ) -> None:
        self.job = job
        self._data_uri = data_uri
        self._manifest = manifest
        self._shards = {split: manifest.shards_of(split) for split in SPLITS}
        num_parts = sum(map(len, self._shards.values()))
        # Names in alphabetical order are parts in order, however many there are.
        self._digits = max(_FEWEST_DIGITS, len(str(num_parts - 1)))
        self._fingerprint = fingerprint
        self._schema = schema
        self._maker: PartMaker | None = None

    def write(self, number: int, split: str, shard: int) -> dict[str, Any]:
        """Make the part unless it is there; returns its path, rows, bytes, checksum and whether it was there."""
        path = f"{PARTS_DIR}/part-{number:0{self._digits}d}.parquet"
        uri = storage.join(self.job.config.out, path)
        info = self._shards[split][shard]
        content = self._made_before(uri, info.num_rows)
        reused = content is not None
        if content is None:
            table = read_shard(self._data_uri, self._manifest, info)
            content = parquet_bytes(self._part(table), compression="zstd", write_page_checksum=True)
            storage.write_bytes(uri, content)
        return {
            "path": path,
            "rows": info.num_rows,
            "bytes": len(content),
            "sha256": storage.sha256_bytes(content),
            "reused": reused,
        }

    def _made_before(self, uri: str, rows: int) -> bytes | None:
        """The part, if an earlier command made it completely. A file of that name alone is no proof of its content."""
        if not storage.exists(uri):
            return None
        content = storage.read_bytes(uri)
        try:
            # All of it: the checksums of the pages are compared as they are read.
            table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
        # A damaged footer raises whatever its bytes happen to mean.
        except (pa.ArrowException, OSError, ValueError) as error:
            logger.warning("%s is damaged and made again: %s", without_credentials(uri), error)
            return None
        if table.num_rows == rows and table.schema.equals(self._schema):
            return content
        logger.warning("%s holds other rows or columns and is made again", without_credentials(uri))
        return None

    def _part(self, table: pa.Table) -> pa.Table:
        maker = self._loaded()
        try:
            return maker.part(table)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
            raise TrainingError(
                f"{self.job.kind.command}: batch_size: the memory of the GPU is too small for {maker.batch_size} molecules at "
                f"once, of up to {max(table['num_atoms'].to_pylist())} atoms. Parts made so far are kept: run the same command "
                f"again with a smaller one, such as batch_size={max(1, maker.batch_size // 4)} ({reason})"
            ) from error

    def _loaded(self) -> PartMaker:
        if self._maker is None:
            maker = self.job.load(use_reserved(self.job.config.cluster))
            if maker.fingerprint != self._fingerprint:
                raise CheckpointError(
                    f"{self.job.model} changed while {self.job.kind.command} was at work; use a checkpoint "
                    "(.../checkpoints/step-NNNNNNNN) or models that nothing writes to, and an empty `out`"
                )
            self._maker = maker
        return self._maker


class PartActor:
    """A `PartWriter` as Ray Data calls it.

    Its constructor does nothing, as Ray would start a new actor forever for each that fails to start. An error of this
    package is returned as a result: of an error that a task raises, Ray Data passes on only the text.
    """

    def __init__(self, writer: PartWriter) -> None:
        self._writer = writer

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        """What the summary says about the parts (JSON) of rows ``number, split, shard``, or their errors (pickled)."""
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


def read_shard(data_uri: str, manifest: Manifest, shard: ShardInfo) -> pa.Table:
    """The rows of one shard of a data set, in their order."""
    # As if it were the only one: a reader of all takes the longer to make the more there are, and each shard needs one.
    alone = replace(manifest, shards=(shard,))
    columns = [*MOLECULE_COLUMNS, *GRAPH_COLUMNS]
    reader = ShardReader(data_uri, alone, shard.split, columns=columns, cache_bytes=0)
    return reader.read(np.arange(shard.num_rows, dtype=np.int64))


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    """The table as the bytes of a Parquet file; ``options`` of ``pyarrow.parquet.write_table``."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return bytes(sink.getvalue())
