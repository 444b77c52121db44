"""Chunks of molecule files -> shards, converted by actors of Ray Data.

Reading tasks split each file into chunks of raw records. A chunk is one row, so Ray cannot change it by splitting or
merging blocks. Actors turn a chunk into its files and a receipt. A chunk that has a receipt already is read again, but
not converted.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from typing import Any, Final, NamedTuple

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata

from moleblend_ray.chemistry.rejection import RejectionCode
from moleblend_ray.config.prepare import PrepareConfig
from moleblend_ray.data.dataset.lease import Lease
from moleblend_ray.data.dataset.shards import DUPLICATE, NOT_IN_SPLIT_FILE
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.receipts import Receipt
from moleblend_ray.data.preparation.shard_writer import convert_chunk
from moleblend_ray.data.preparation.split_file import splits_of_file
from moleblend_ray.data.sources import (
    ParquetPart,
    RowChunk,
    SourceLayout,
    SourceSet,
    parquet_parts,
    read_chunks,
)
from moleblend_ray.errors import DataError, StorageError
from moleblend_ray.host import peak_memory_bytes
from moleblend_ray.orchestration.cluster.executor import MAX_RETRIES, retries_limited
from moleblend_ray.orchestration.cluster.placement import place_dataset
from moleblend_ray.orchestration.progress.metrics import JobMetrics
from moleblend_ray.orchestration.progress.progress import Reporter

_PARTS_PER_TASK: Final = 16
"""Chunks per reading task of a Parquet file."""
_BYTES_PER_ACTOR: Final = 256 << 10
"""Source bytes per actor: starting an actor takes about as long as converting so many bytes."""
_BYTES_PER_CONFORMER_ACTOR: Final = 4 << 10
"""The same of SMILES that get conformers: some dozens of molecules."""
_THREADS: Final = 16
_MAX_SHOWN: Final = 10
"""Damaged files that one error names."""
_READER_CPUS: Final = 0.1
"""Reading is cheap, and must find room beside the converting actors on any cluster."""
ACTOR_CPUS: Final = 0.9

_REASONS: Final = (*RejectionCode, DUPLICATE, NOT_IN_SPLIT_FILE)
"""Every reason of the quarantine."""

_CHUNK_SCHEMA: Final = pa.schema(
    [
        ("file_index", pa.int64()),
        ("chunk_index", pa.int64()),
        ("first_row", pa.int64()),
        ("num_rows", pa.int64()),
        ("is_text", pa.bool_()),
        ("payload", pa.large_binary()),
        ("damage", pa.string()),
        ("failure", pa.string()),
    ]
)
"""One row per chunk. A row without ``payload`` is a chunk that was converted before or, with ``damage`` of the file or
``failure`` of the storage, the end of reading."""

_RESULT_SCHEMA: Final = pa.schema(
    [
        ("file_index", pa.int64()),
        ("chunk_index", pa.int64()),
        ("receipt", pa.string()),
        ("damage", pa.string()),
        ("failure", pa.string()),
        ("process", pa.string()),
        ("started_s", pa.float64()),
        ("ended_s", pa.float64()),
        ("peak_bytes", pa.int64()),
    ]
)
"""One row per chunk: its receipt, the process that converted it, when (seconds since 1970), and the peak memory of that
process. Without ``receipt`` the existing one is valid."""


class _Interval(NamedTuple):
    """The conversion of one chunk."""

    process: str
    rows: int
    started_s: float
    ended_s: float


class Effort:
    """Time and memory that the conversion of chunks took."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._intervals: list[_Interval] = []

    def add(self, rows: int, result: Mapping[str, Any]) -> None:
        """Add the result of a chunk with this number of records."""
        if result["process"] is None:
            return  # It was converted by an earlier run.
        times = (result["started_s"], result["ended_s"])
        self._intervals.append(_Interval(result["process"], rows, *times))
        self.peak_bytes = max(self.peak_bytes, result["peak_bytes"])

    @property
    def seconds(self) -> float:
        """Seconds from the first start to the last end; 0 if nothing was converted."""
        if not self._intervals:
            return 0.0
        started_s = min(interval.started_s for interval in self._intervals)
        return max(interval.ended_s for interval in self._intervals) - started_s

    @property
    def rows_per_s(self) -> float:
        """Records converted per second while all processes were at work; 0 if they never were."""
        spans: dict[str, tuple[float, float]] = {}
        for process, _, started_s, ended_s in self._intervals:
            first_s, last_s = spans.get(process, (started_s, ended_s))
            spans[process] = (min(first_s, started_s), max(last_s, ended_s))
        begin_s = max((first_s for first_s, _ in spans.values()), default=0.0)
        end_s = min((last_s for _, last_s in spans.values()), default=0.0)
        if end_s <= begin_s:
            return 0.0
        rows = 0.0
        for _, count, started_s, ended_s in self._intervals:
            inside_s = max(0.0, min(ended_s, end_s) - max(started_s, begin_s))
            rows += count * inside_s / max(ended_s - started_s, 1e-9)
        return rows / (end_s - begin_s)


class Conversion:
    """One run of the Ray Data pipeline."""

    def __init__(
        self,
        config: PrepareConfig,
        sources: SourceSet,
        options: ConvertOptions,
        done: Mapping[tuple[int, int], Receipt],
    ) -> None:
        self._out = config.out
        self._split_file = config.split_file
        self._sources = sources
        self._options = options
        self._done = done
        self._labels = config.cluster.data_labels
        self._num_actors = _num_actors(config, sources)
        self.effort = Effort()

    def run(self, reporter: Reporter, metrics: JobMetrics, lease: Lease) -> list[Receipt]:
        """Convert what is not yet converted; returns the receipts of all chunks, or raises an error that says what is
        missing, or that the ``lease`` is lost."""
        receipts: list[Receipt] = []
        damages: list[str] = []
        rows = quarantined = 0
        metrics.count_rows(0, dict.fromkeys(_REASONS, 0))
        for result in self._results(reporter):
            lease.require()
            if result["failure"] is not None:
                # The storage is out of reach or full: all later chunks would fail as well.
                raise StorageError(result["failure"])
            if result["damage"] is not None:
                damages.append(result["damage"])
                continue
            receipt = self._receipt(result)
            self.effort.add(receipt.rows_in, result)
            receipts.append(receipt)
            rows += receipt.rows_in
            quarantined += receipt.rows_quarantined
            if result["receipt"] is not None:  # Converted now, not by an earlier run.
                metrics.count_rows(receipt.rows_in, receipt.quarantined_by_reason)
            else:
                reporter.count("done", receipt.rows_in)
            reporter({"done": rows, "quarantined": quarantined})
        if damages:
            more = len(damages) - _MAX_SHOWN
            shown = [*sorted(damages)[:_MAX_SHOWN], *([f"And {more} more."] if more > 0 else [])]
            raise DataError("\n".join(shown))
        return receipts

    def _receipt(self, result: Mapping[str, Any]) -> Receipt:
        if result["receipt"] is None:
            return self._done[result["file_index"], result["chunk_index"]]
        return Receipt.from_json(json.loads(result["receipt"]))

    def _results(self, reporter: Reporter) -> Iterator[dict[str, Any]]:
        source = _Chunks(self._sources, self._options.rows_per_chunk, self._done)
        dataset = ray.data.read_datasource(
            source,
            num_cpus=_READER_CPUS,
            concurrency=min(self._num_actors, source.num_tasks),
            override_num_blocks=source.num_tasks,
        )
        with retries_limited() as limit:
            dataset = dataset.map_batches(
                _Converter,
                fn_constructor_args=(
                    self._sources,
                    self._options,
                    self._out,
                    self._split_file,
                    reporter,
                ),
                batch_size=1,
                batch_format="pyarrow",
                zero_copy_batch=True,
                compute=ray.data.ActorPoolStrategy(
                    min_size=1, initial_size=self._num_actors, max_size=self._num_actors
                ),
                num_cpus=ACTOR_CPUS,
                **limit,
            )
        place_dataset(dataset, self._labels)
        # One row per block, or one actor would get many chunks at once and the others none.
        dataset.context.target_max_block_size = 1
        # Ray logs advice to reserve memory for the readers, whose few hundred MB are mostly shared libraries.
        dataset.context.issue_detectors_config.detectors = []
        try:
            yield from dataset.iter_rows()
        except ray.exceptions.RayActorError as error:
            raise DataError(
                f"Converting a chunk into {self._out} ended its process {MAX_RETRIES + 1} times: it was "
                f"killed for lack of memory, its machine was lost, or a record crashes RDKit. ({error}) "
                "Chunks converted so far are kept: run the same command again, with fewer "
                "cluster.num_data_actors if memory is short."
            ) from error


def _num_actors(config: PrepareConfig, sources: SourceSet) -> int:
    """As many as asked for, but no more than have work for longer than they take to start."""
    generate = config.featurize.conformers.generate
    worth = sum(
        layout.file.size
        / (_BYTES_PER_CONFORMER_ACTOR if generate and not layout.holds_atoms else _BYTES_PER_ACTOR)
        for layout in sources.layouts
    )
    return max(1, min(config.cluster.num_data_actors, int(worth)))


class _Chunks(ray.data.Datasource):
    """The chunks of all files, read by one task per text file and several per Parquet file."""

    def __init__(
        self, sources: SourceSet, rows_per_chunk: int, done: Mapping[tuple[int, int], Receipt]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        digests: list[dict[int, str]] = [{} for _ in sources.layouts]
        for (file_index, chunk_index), receipt in done.items():
            digests[file_index][chunk_index] = receipt.digest
        with ThreadPoolExecutor(_THREADS) as pool:
            cut = partial(_cut, rows_per_chunk=rows_per_chunk)
            parts_of_files = list(pool.map(cut, sources.layouts))
        self._tasks = [
            (
                partial(
                    _read, layout, index, rows_per_chunk, parts, _of_parts(digests[index], parts)
                ),
                layout,
            )
            for index, layout in enumerate(sources.layouts)
            for parts in parts_of_files[index]
        ]

    @property
    def num_tasks(self) -> int:
        """Reading tasks."""
        return len(self._tasks)

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: files may be compressed."""
        return None

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002 - files and row groups decide
        per_task_row_limit: int | None = None,  # noqa: ARG002 - no limit is ever asked here
        data_context: Any = None,  # noqa: ARG002
    ) -> list[Any]:
        """The tasks, whatever parallelism Ray asks for."""
        return [
            ray.data.ReadTask(
                read,
                BlockMetadata(
                    num_rows=None,
                    size_bytes=layout.file.size,
                    input_files=(layout.file.uri,),
                    exec_stats=None,
                ),
                schema=_CHUNK_SCHEMA,
            )
            for read, layout in self._tasks
        ]


def _cut(layout: SourceLayout, rows_per_chunk: int) -> list[list[ParquetPart] | None]:
    """What each reading task of a file reads: parts of a Parquet file, or all of a text file (None)."""
    if layout.file.format != "parquet" or layout.file.size == 0:
        return [None]
    parts = parquet_parts(layout.file, rows_per_chunk)
    return [parts[i : i + _PARTS_PER_TASK] for i in range(0, len(parts), _PARTS_PER_TASK)]


def _of_parts(digests: dict[int, str], parts: list[ParquetPart] | None) -> dict[int, str]:
    """The digests, by chunk, of the chunks that a task reads: those of a whole file would be sent with each of its tasks."""
    if parts is None:
        return digests
    chunks = (part.chunk_index for part in parts)
    return {chunk: digests[chunk] for chunk in chunks if chunk in digests}


def _read(
    layout: SourceLayout,
    file_index: int,
    rows_per_chunk: int,
    parts: list[ParquetPart] | None,
    digests: Mapping[int, str],
) -> Iterator[pa.Table]:
    """A table of one row per chunk. Damage becomes the last row; the chunks before it still count."""
    try:
        for chunk in read_chunks(layout, file_index, rows_per_chunk, parts):
            is_done = digests.get(chunk.chunk_index) == chunk.digest(layout)
            yield _row(
                _CHUNK_SCHEMA,
                file_index=file_index,
                chunk_index=chunk.chunk_index,
                first_row=chunk.first_row,
                num_rows=chunk.num_rows,
                is_text=chunk.is_text,
                payload=None if is_done else chunk.payload,
            )
    except DataError as error:
        yield _row(_CHUNK_SCHEMA, file_index=file_index, damage=str(error))
    except StorageError as error:
        yield _row(_CHUNK_SCHEMA, file_index=file_index, failure=str(error))


class _Converter:
    """Converts chunks, in an actor."""

    def __init__(
        self,
        sources: SourceSet,
        options: ConvertOptions,
        out: str,
        split_file: str | None,
        reporter: Reporter,
    ) -> None:
        self._sources = sources
        self._options = options
        self._out = out
        self._splits = splits_of_file(split_file) if split_file is not None else None
        self._count_done = partial(reporter.count, "done")

    def __call__(self, batch: pa.Table) -> pa.Table:
        row = batch.to_pylist()[0]
        if row["payload"] is None:
            return _row(_RESULT_SCHEMA, **row)
        chunk = RowChunk(**{field.name: row[field.name] for field in fields(RowChunk)})
        layout = self._sources.layouts[chunk.file_index]
        started_s = time.time()
        try:
            receipt = convert_chunk(
                chunk,
                layout,
                self._sources.labels,
                self._options,
                self._out,
                self._splits,
                self._count_done,
            )
        except StorageError as error:
            return _row(_RESULT_SCHEMA, **{**row, "failure": str(error)})
        except DataError as error:
            return _row(_RESULT_SCHEMA, **{**row, "damage": str(error)})
        return _row(
            _RESULT_SCHEMA,
            **row,
            receipt=json.dumps(receipt.to_json()),
            process=f"{platform.node()}:{os.getpid()}",
            started_s=started_s,
            ended_s=time.time(),
            peak_bytes=peak_memory_bytes(),
        )


def _row(schema: pa.Schema, **values: Any) -> pa.Table:
    """A table of one row with the values whose names the schema has."""
    return pa.table({name: [values.get(name)] for name in schema.names}, schema=schema)
