"""Which checkpoints of a run can be believed: commit markers, their discovery and their checks.

A run's folder (any storage URI) holds::

    config.json                               the resolved configuration
    checkpoints/step-00001000/
        __0_0.distcp, __1_0.distcp, ...       shards, written by each rank (torch DCP)
        .metadata                             which tensor piece lies where (torch DCP)
        COMMIT.json                           the marker: every file with size and SHA-256, and what the run is
    metrics/steps-00000000-00001000.jsonl     numbers of the steps that the checkpoint includes
    export/model.safetensors, config.json     the finished model
    FINISHED.json                             the summary of a finished run

Nothing but what a marker names is believed. The number of a checkpoint is the number of steps done, which is the next
step to run: data order and all randomness are functions of the step, so it is the whole data cursor.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final, Literal

from moleblend_ray.data.dataset.differences import differences
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.documents import require_types
from moleblend_ray.errors import CheckpointError, DataError
from moleblend_ray.training.config import CheckpointConfig

logger = logging.getLogger(__name__)

CONFIG_NAME: Final = "config.json"
COMMIT_NAME: Final = "COMMIT.json"
FINISHED_NAME: Final = "FINISHED.json"
COMMIT_FORMAT: Final = 1
"""Raised whenever older code could not read newer checkpoints."""

# From the end of a file's URI: the run itself may lie below another run's checkpoint.
_STEP_FILE: Final = re.compile(r"/checkpoints/step-(\d{8,})/[^/]+$")
_PLAIN_NAME: Final = re.compile(r"\.?[A-Za-z0-9_][A-Za-z0-9_.-]*")
_HASH_CHUNK_BYTES: Final = 8 << 20
_CHECK_THREADS: Final = 8


class NewerFormatError(CheckpointError):
    """A checkpoint was written by a newer version: it is whole, but this version must not touch it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommittedFile:
    """One file of a checkpoint, as the marker names it."""

    name: str
    """Relative to the checkpoint's folder."""
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """The marker of one checkpoint."""

    format: int
    """COMMIT_FORMAT of the writer."""
    step: int
    """Steps done, and so the next step to run."""
    world_size: int
    """Ranks that wrote it; any other number can read it."""
    files: tuple[CommittedFile, ...]
    identity: dict[str, Any]
    """What must not change within a run: data fingerprint, model, data order, blend, seed."""
    config_fingerprint: str
    """SHA-256 of the run's resolved configuration."""
    versions: dict[str, str]
    """Versions of the libraries that wrote it."""
    created: str
    """UTC time, ISO 8601."""
    attempt: str = ""
    """Random name of the worker group that wrote it: a run has one writer at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Examined:
    """One checkpoint folder, and what was found there."""

    step: int
    state: Literal["whole", "damaged", "newer", "incomplete"]
    """``newer``: a newer version wrote it, and it is not to be touched; ``incomplete``: it has no marker, as a crash left it or
    a running command is writing it."""
    detail: str
    """What is damaged, or which format is newer; else empty."""
    commit: Commit | None
    """Its marker, if it could be read."""

    @property
    def num_bytes(self) -> int:
        """Of the files that the marker names."""
        return sum(file.num_bytes for file in self.commit.files) if self.commit else 0


def step_uri(run_uri: str, step: int) -> str:
    """Folder of the checkpoint at ``step``."""
    return storage.join(run_uri, "checkpoints", f"step-{step:08d}")


def committed_steps(run_uri: str) -> list[int]:
    """Steps of all checkpoints with a marker, newest first; not yet checked."""
    return sorted(
        (step for step, files in _checkpoint_files(run_uri).items() if COMMIT_NAME in files),
        reverse=True,
    )


def is_committed(run_uri: str, step: int) -> bool:
    """Whether there is a marker of ``step`` at this moment."""
    return step in committed_steps(run_uri)


def latest_committed(run_uri: str, *, verify_content: bool = False) -> Commit | None:
    """The newest checkpoint whose files are all there with the sizes of its marker; None if there never was one.

    ``verify_content`` also reads every byte and compares checksums. A damaged checkpoint is reported and the one before
    it is taken; if all are damaged that is an error, for starting again from nothing would hide it. So is one that a
    newer version wrote: going on from an older one would replace it.
    """
    steps = committed_steps(run_uri)
    damages: list[str] = []
    for step in steps:
        try:
            commit = read_commit(run_uri, step)
            check_files(run_uri, commit, verify_content=verify_content)
        except NewerFormatError:
            raise
        except CheckpointError as error:
            if not is_committed(run_uri, step):
                # A running command has deleted it meanwhile, and the older ones of this listing; it has committed newer ones.
                return latest_committed(run_uri, verify_content=verify_content)
            damages.append(str(error))
            logger.warning("skipped a damaged checkpoint: %s", error)
        else:
            return commit
    if damages:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints of {run_uri} can be used: "
            + "; ".join(damages)
            + ". Restore the files, or start anew under another `out`."
        )
    return None


def newest_identity(run_uri: str) -> dict[str, Any] | None:
    """The identity of the run, by the newest marker that can be read; None without one."""
    for step in committed_steps(run_uri):
        with contextlib.suppress(CheckpointError):
            return read_commit(run_uri, step).identity
    return None


def examine_checkpoints(
    run_uri: str,
    *,
    verify_content: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Examined]:
    """Every checkpoint folder of the run, newest first, but for those that a running command deletes meanwhile.

    ``verify_content`` reads every byte; ``progress`` is told how many folders are done, and of how many.
    """
    files = _checkpoint_files(run_uri)
    found: list[Examined] = []
    for done, step in enumerate(sorted(files, reverse=True), 1):
        one = _examine(run_uri, step, COMMIT_NAME in files[step], verify_content)
        if one.state != "damaged" or step in _checkpoint_files(run_uri):
            found.append(one)
        if progress is not None:
            progress(done, len(files))
    return found


def _examine(run_uri: str, step: int, is_marked: bool, verify_content: bool) -> Examined:
    if not is_marked:
        return Examined(step=step, state="incomplete", detail="", commit=None)
    commit: Commit | None = None
    try:
        commit = read_commit(run_uri, step)
        check_files(run_uri, commit, verify_content=verify_content)
    except NewerFormatError as error:
        return Examined(step=step, state="newer", detail=str(error), commit=None)
    except CheckpointError as error:
        return Examined(step=step, state="damaged", detail=str(error), commit=commit)
    return Examined(step=step, state="whole", detail="", commit=commit)


def read_commit(run_uri: str, step: int) -> Commit:
    """The marker of the checkpoint at ``step``."""
    uri = storage.join(step_uri(run_uri, step), COMMIT_NAME)
    try:
        value = storage.read_json(uri)
        found_format = value["format"]
        if found_format > COMMIT_FORMAT:
            raise NewerFormatError(
                f"{uri} has format {found_format}; this installation reads up to {COMMIT_FORMAT}. "
                "Upgrade moleblend-ray."
            )
        files = tuple(CommittedFile(**file) for file in value["files"])
        commit = Commit(**{**value, "files": files})
        _check_marker(commit, step)
        return commit
    except storage.NotFoundError as error:
        raise CheckpointError(f"{uri} does not exist: no checkpoint was committed there") from error
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{uri} is not a commit marker: {error!r}") from error


def _check_marker(commit: Commit, step: int) -> None:
    """TypeError or ValueError if no version of this program wrote this at ``step``."""
    require_types(commit)
    if commit.step != step:
        raise ValueError(f"it is that of step {commit.step}")
    if datetime.fromisoformat(commit.created).tzinfo is None:
        raise ValueError(f"created: expected a time with its zone, found {commit.created!r}")
    # Files are copied to this machine under their names: a marker from elsewhere must not choose the place.
    foreign = [file.name for file in commit.files if not _PLAIN_NAME.fullmatch(file.name)]
    if foreign:
        raise ValueError(f"{foreign[0]!r} is no file name")


def check_files(run_uri: str, commit: Commit, *, verify_content: bool) -> None:
    """Raise a CheckpointError naming every file of ``commit`` that is missing, cut off or (if asked) altered."""
    folder = step_uri(run_uri, commit.step)
    with ThreadPoolExecutor(_CHECK_THREADS) as pool:
        problems = pool.map(lambda file: _file_problem(folder, file, verify_content), commit.files)
        found = [problem for problem in problems if problem]
    if found:
        raise CheckpointError(f"{folder}: " + ", ".join(found))


def _file_problem(folder: str, file: CommittedFile, verify_content: bool) -> str | None:
    uri = storage.join(folder, file.name)
    try:
        num_bytes = storage.size(uri)
        if num_bytes != file.num_bytes:
            return f"{file.name} has {num_bytes} bytes, its marker says {file.num_bytes}"
        if verify_content and _sha256_of(uri) != file.sha256:
            return f"{file.name} has another SHA-256 than its marker says"
    except storage.NotFoundError:
        return f"{file.name} is missing"
    return None


def _sha256_of(uri: str) -> str:
    digest = hashlib.sha256()
    with storage.translate_errors("read", uri), storage.open_read(uri) as stream:
        while chunk := stream.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _checkpoint_files(run_uri: str) -> dict[int, set[str]]:
    """Names of the (not hidden) files below the folder of every step."""
    try:
        infos = storage.list_files(storage.join(run_uri, "checkpoints"))
    except storage.NotFoundError:
        return {}
    found: dict[int, set[str]] = {}
    for info in infos:
        if match := _STEP_FILE.search(info.uri):
            found.setdefault(int(match[1]), set()).add(storage.name_of(info.uri))
    return found


def require_same_run(stored: Mapping[str, Any], wanted: Mapping[str, Any], run_uri: str) -> None:
    """Refuse to continue a run under settings that would make it another one, naming each with both values.

    What an earlier version did not store is not compared.
    """
    comparable = {name: value for name, value in wanted.items() if name in stored}
    changed = [
        f"{key}: the run has {old!r}, the configuration asks for {new!r}"
        for key, (old, new) in differences(stored, comparable).items()
    ]
    if changed:
        raise CheckpointError(
            f"{run_uri} cannot be continued with this configuration:\n  "
            + "\n  ".join(changed)
            + "\nGive the run's own settings, or start a new run under another `out`."
        )


def write_commit(run_uri: str, commit: Commit) -> None:
    """Write the marker that makes a checkpoint exist; its files must be in place."""
    storage.write_json(storage.join(step_uri(run_uri, commit.step), COMMIT_NAME), asdict(commit))


def delete_checkpoint(run_uri: str, step: int) -> None:
    """Remove a checkpoint or what is left of one; its marker goes first, so that it is never half believed."""
    folder = step_uri(run_uri, step)
    storage.delete(storage.join(folder, COMMIT_NAME))
    storage.delete_tree(folder)


def steps_to_keep(
    steps: Sequence[int], config: CheckpointConfig, valid_losses: Mapping[int, float]
) -> set[int]:
    """Those of the committed ``steps`` that stay; ``valid_losses`` of the ones that have one."""
    newest = sorted(steps, reverse=True)[: config.keep_last]
    every = config.keep_every_steps
    milestones = [step for step in steps if every is not None and step % every == 0]
    # Of equal losses the earlier checkpoint is no better: the newer one stays.
    ranked = sorted((valid_losses[step], -step) for step in steps if step in valid_losses)
    best = [-negative for _, negative in ranked[: config.keep_best]]
    return {*newest, *milestones, *best}


def delete_old_checkpoints(run_uri: str, keep: Callable[[Sequence[int]], set[int]]) -> None:
    """Remove the checkpoints that ``keep`` (committed steps -> those to keep) leaves out, and folders before the newest
    checkpoint that never got a marker."""
    committed = committed_steps(run_uri)
    kept = keep(committed)
    newest = max(committed, default=0)
    for step in _checkpoint_files(run_uri):
        if step < newest and step not in kept:
            delete_checkpoint(run_uri, step)


def abandon_after(run_uri: str, step: int) -> None:
    """Remove checkpoints newer than ``step``, where training goes on: they were found damaged or never committed.

    CheckpointError if one is whole, which then somebody else has committed since ``step`` was found to be the newest.
    """
    found = _checkpoint_files(run_uri)
    newer = sorted((one for one in found if one > step), reverse=True)
    for one in newer:
        if _examine(run_uri, one, COMMIT_NAME in found[one], True).state in ("whole", "newer"):
            raise CheckpointError(
                f"step {one} of {run_uri} was committed while this command started at step {step}, by another command or by "
                "workers that were taken for lost. It is kept: start again from it. Let only one command train this run."
            )
    for one in newer:
        delete_checkpoint(run_uri, one)
