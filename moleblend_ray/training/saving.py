"""Committing the state of a run while it trains on: read :meth:`CheckpointWriter.commit` first.

A step waits only for a copy of the state in host memory. Everything that touches files happens behind it, in one thread
of each rank with a process group of its own, so that its collectives cannot meet those of the training step.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.serialization import get_crc32_options, set_crc32_options

from moleblend_ray.data.files import storage
from moleblend_ray.data.files.scratch import scratch_folder
from moleblend_ray.errors import CheckpointError, DataError, StorageError
from moleblend_ray.training.checkpoint import (
    TRANSFER_THREADS,
    library_versions,
    on_every_rank,
    quiet_alone,
)
from moleblend_ray.training.commits import (
    COMMIT_FORMAT,
    Commit,
    CommittedFile,
    committed_steps,
    delete_checkpoint,
    delete_old_checkpoints,
    read_commit,
    step_uri,
    steps_to_keep,
    write_commit,
)
from moleblend_ray.training.config import CheckpointConfig
from moleblend_ray.training.metrics import (
    TOTAL_LOSS,
    VALID_PREFIX,
    Record,
    iter_records,
    write_records,
)
from moleblend_ray.training.ranks import Ranks

logger = logging.getLogger(__name__)


class Save(NamedTuple):
    """How a save ended."""

    step: int
    """Steps done since the start of the run."""
    is_committed: bool
    """False if it failed: what was committed before is kept."""
    num_bytes: int = 0
    """Of all files; 0 of a failed one."""
    seconds: float = 0.0
    """From the copy of the state to the marker."""
    waited_s: float = 0.0
    """Of these, the seconds in which training stood still."""


class AnotherWriterError(CheckpointError):
    """Someone else commits to the same run. Raised on all ranks together; trying again would only repeat it."""


class CheckpointWriter:
    """Commits the state of a run, from all ranks together. A context manager: on leaving, what was begun is committed."""

    def __init__(
        self,
        config: CheckpointConfig,
        run_uri: str,
        ranks: Ranks,
        *,
        identity: Mapping[str, Any],
        config_fingerprint: str,
        start_step: int,
        on_save: Callable[[Save], None] | None = None,
    ) -> None:
        """Every rank makes one, at the same point: it opens a process group. ``on_save`` hears how each save ended, in
        the thread that saves."""
        self._on_save = on_save
        self._config = config
        self._run_uri = run_uri
        self._ranks = ranks
        self._identity = dict(identity)
        self._config_fingerprint = config_fingerprint
        self._start_step = start_step
        self._committed_step = start_step
        self._attempt = uuid.uuid4().hex
        self._unsaved: list[Record] = []
        self._validations: list[tuple[int, float]] | None = None
        self._failure: CheckpointError | None = None
        self._failures_in_row = 0
        self._failures_told = 0
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._stager = _stager(ranks) if config.asynchronous else None
        # CUDA's current device belongs to a thread: copies from another one would not be waited for.
        on_gpu = ranks.device.type == "cuda"
        self._thread = ThreadPoolExecutor(
            1,
            thread_name_prefix="checkpoint",
            initializer=partial(torch.cuda.set_device, ranks.device) if on_gpu else None,
        )
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the save under way. If the newest save failed that is raised, unless another error is on its way."""
        try:
            if kind is None:
                self.wait()
                if self._failure is not None:
                    raise self._failure
            else:
                self._wait_quietly()
        finally:
            self._thread.shutdown()
            if self._stager is not None:
                self._stager.close()
            # Where a rank is lost, its group cannot be closed in order any more.
            if self._group is not None and kind is None:
                dist.destroy_process_group(self._group)

    def is_due(self, step: int) -> bool:
        """Whether the interval asks for a checkpoint after ``step`` steps."""
        return step % self._config.every_steps == 0

    def commit(self, step: int, state: dict[str, Tensor], records: Sequence[Record]) -> None:
        """Save ``state`` as the checkpoint of ``step``, with the ``records`` since the last call (rank 0's count).

        Every rank calls this. It returns once ``state`` may change again; the marker is written behind the next steps,
        with ``checkpoint.asynchronous=false`` before this returns. One save at a time: this waits for the one before,
        whose failure is a warning, or raised on all ranks if more than ``checkpoint.max_failed_saves`` in a row failed.
        """
        began_s = time.perf_counter()
        self.wait()
        self._tolerate_failure()
        self._unsaved += records
        snapshot = state if self._stager is None else self._stager.stage(state)
        waited_s = time.perf_counter() - began_s
        self._pending = self._thread.submit(self._save_and_tell, step, snapshot, waited_s)
        if self._stager is None:
            self.wait()
            self._tolerate_failure()

    def wait(self) -> None:
        """Until the save under way is over; how it ended is said at the next commit."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except AnotherWriterError:
            raise
        except CheckpointError as error:
            self._failure = error
            self._failures_in_row += 1
        else:
            self._failure = None
            self._failures_in_row = self._failures_told = 0

    def _wait_quietly(self) -> None:
        """As :meth:`wait` where training has failed."""
        try:
            self.wait()
        # Lost ranks make a save fail in many ways, none of which may hide why training failed.
        except Exception as error:
            logger.warning("the save under way was lost as well: %s", error)

    def _tolerate_failure(self) -> None:
        """Warn of the failure of the newest save, once, or raise it if it is one too many."""
        if self._failure is None or self._failures_in_row == self._failures_told:
            return
        allowed = self._config.max_failed_saves
        if self._failures_in_row > allowed:
            raise CheckpointError(
                f"{self._failure} (save {self._failures_in_row} in a row that failed; "
                "what was committed before is kept)"
            ) from self._failure
        self._failures_told = self._failures_in_row
        if self._ranks.is_first:
            logger.warning(
                "a checkpoint could not be saved; training goes on (failure %d in a row, "
                "checkpoint.max_failed_saves=%d): %s",
                self._failures_in_row,
                allowed,
                self._failure,
            )

    # ------------------------------------------------------------------------------------- in the thread

    def _save_and_tell(self, step: int, state: Any, waited_s: float) -> None:
        save = Save(step=step, is_committed=False)
        try:
            save = self._save(step, state, waited_s)
        finally:
            if self._on_save is not None:
                self._on_save(save)

    def _save(self, step: int, state: Any, waited_s: float) -> Save:
        began_s = time.perf_counter()
        self._require_sole_writer()
        folder = step_uri(self._run_uri, step)
        # What an abandoned attempt left there: its marker must go before its files change.
        self._on_first_rank(lambda: delete_checkpoint(self._run_uri, step))
        files = self._save_shards(folder, state)
        self._on_first_rank(lambda: self._write_marker(step, files))
        self._committed_step = step
        self._unsaved = []
        num_bytes = sum(file.num_bytes for file in files)
        seconds = time.perf_counter() - began_s + waited_s
        if self._ranks.is_first:
            logger.info(
                "committed step %d: %.0f MiB in %.1f s, of which training waited %.2f s",
                step,
                num_bytes / 2**20,
                seconds,
                waited_s,
            )
        return Save(
            step, is_committed=True, num_bytes=num_bytes, seconds=seconds, waited_s=waited_s
        )

    def _require_sole_writer(self) -> None:
        """Stop where another driver trains the same run: each would delete and replace what the other commits."""
        look = self._foreign_step if self._ranks.is_first else lambda: None
        foreign = on_every_rank(look, self._group)[0]
        if foreign is not None:
            raise AnotherWriterError(
                f"another driver is writing to this run: it committed step {foreign} of {self._run_uri}, "
                f"while this one was at step {self._committed_step}. Let only one of them run; "
                "the same command then continues from what is committed."
            )

    def _foreign_step(self) -> int | None:
        """A step at or after our last one that somebody else has committed since this attempt started."""
        for step in committed_steps(self._run_uri):
            if step < self._committed_step or step == self._start_step:
                break
            if read_commit(self._run_uri, step).attempt != self._attempt:
                return step
        return None

    def _save_shards(self, folder: str, state: Any) -> list[CommittedFile]:
        with self._scratch(folder) as local:
            try:
                with quiet_alone(), _without_crc32():
                    save_shards(
                        state,
                        # In a local run these are the checkpoint: they must be on disk before its marker is.
                        storage_writer=FileSystemWriter(local, sync_files=storage.is_local(folder)),
                        process_group=self._group,
                        no_dist=self._group is None,
                    )
            except CheckpointException as error:  # raised on all ranks
                causes = "; ".join(
                    f"rank {rank}: {failure[0]!r}" for rank, failure in error.failures.items()
                )
                raise CheckpointError(f"cannot write shards to {local}: {causes}") from error
            placed = on_every_rank(lambda: self._place_files(local, folder), self._group)
        return [file for files in placed for file in files]

    @contextlib.contextmanager
    def _scratch(self, folder: str) -> Iterator[Path]:
        """A local folder for the files of each rank; if one rank cannot make it, all raise.

        It is the checkpoint's own where that is local: without a marker nobody believes it, and nothing is copied.
        """
        if storage.is_local(folder):
            local = storage.local_path(folder)
            on_every_rank(lambda: local.mkdir(parents=True, exist_ok=True), self._group)
            try:
                yield local
            except CheckpointError:
                # Raised on all ranks, so none writes there any more. The disk may be full: leave nothing.
                shutil.rmtree(local, ignore_errors=True)
                raise
            return
        with contextlib.ExitStack() as stack:
            made = on_every_rank(lambda: stack.enter_context(scratch_folder("save")), self._group)
            yield made[self._ranks.rank]

    def _place_files(self, local: Path, folder: str) -> list[CommittedFile]:
        """Those that this rank wrote: ranks of one machine may share the folder."""
        own = f"__{self._ranks.rank}_"  # the index, which rank 0 writes, has no number
        paths = [
            path
            for path in sorted(local.iterdir())
            if path.name.startswith(own) or (self._ranks.is_first and path.name[:2] != "__")
        ]
        with ThreadPoolExecutor(TRANSFER_THREADS) as pool:
            return list(pool.map(lambda path: _place_file(path, folder), paths))

    def _write_marker(self, step: int, files: list[CommittedFile]) -> None:
        commit = Commit(
            format=COMMIT_FORMAT,
            step=step,
            world_size=self._ranks.world_size,
            files=tuple(files),
            identity=self._identity,
            config_fingerprint=self._config_fingerprint,
            versions=library_versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            attempt=self._attempt,
        )
        write_records(self._run_uri, self._unsaved, self._committed_step, step)
        write_commit(self._run_uri, commit)
        try:
            self._delete_old(self._unsaved)
        except (StorageError, DataError) as error:
            # The new checkpoint is whole; the next commit tries again.
            logger.warning("old checkpoints were not deleted: %s", error)

    def _delete_old(self, records: Sequence[Record]) -> None:
        if self._config.keep_best:
            # Once, after a restart, those of earlier commands as well; `records` are on file by now.
            new = records if self._validations is not None else iter_records(self._run_uri)
            self._validations = [*(self._validations or []), *_validations(new)]
        validations = self._validations or []

        def keep(steps: Sequence[int]) -> set[int]:
            # Of the very weights in a checkpoint: an earlier validation says nothing about them.
            losses = {at + 1: loss for at, loss in validations if at + 1 in steps}
            return steps_to_keep(steps, self._config, losses)

        delete_old_checkpoints(self._run_uri, keep)

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        """Rank 0 does ``action`` while the others wait; its failure is raised on all."""
        on_every_rank(action if self._ranks.is_first else lambda: None, self._group)


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    """torch.save without its own checksums: 60 % of its time, and the marker has a SHA-256 of each file."""
    before = get_crc32_options()
    set_crc32_options(compute_crc32=False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _stager(ranks: Ranks) -> DefaultStager:
    """Copies state to host memory that is used again at the next copy; from a GPU into pinned pages."""
    on_gpu = ranks.device.type == "cuda"
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=on_gpu,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=on_gpu,
        )
    )


def _place_file(path: Path, folder: str) -> CommittedFile:
    """Bring a local file to ``folder``, unless it was written there."""
    if not storage.is_local(folder):
        storage.upload(path, storage.join(folder, path.name))
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return CommittedFile(name=path.name, num_bytes=path.stat().st_size, sha256=digest)


def _validations(records: Iterable[Record]) -> list[tuple[int, float]]:
    """Step and loss of every validation whose loss is a number that can be ranked."""
    name = VALID_PREFIX + TOTAL_LOSS
    return [
        (int(record["step"]), record[name])
        for record in records
        if math.isfinite(record.get(name, math.nan))
    ]
