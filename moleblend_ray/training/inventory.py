"""The checkpoints of a run as they lie in storage: which are whole, how two differ, and what may be deleted."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moleblend_ray.data.dataset.differences import differences
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.scratch import scratch_folder
from moleblend_ray.errors import CheckpointError
from moleblend_ray.training.checkpoint import MODEL_PREFIX, load_all_tensors
from moleblend_ray.training.commits import (
    FINISHED_NAME,
    Commit,
    Examined,
    delete_checkpoint,
    examine_checkpoints,
    latest_committed,
    newest_identity,
    read_commit,
    step_uri,
)
from moleblend_ray.training.export import split_checkpoint_uri
from moleblend_ray.training.metrics import TOTAL_LOSS, VALID_PREFIX, Record, iter_records


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointReport:
    """One checkpoint folder."""

    step: int
    """Steps done."""
    state: str
    """``whole``, ``damaged``, ``newer`` (of a newer version, not to be touched), or ``incomplete``: without a marker, what a
    crash left or a running command is writing."""
    detail: str
    """What is damaged."""
    created: str
    """UTC time, ISO 8601; empty without a marker."""
    world_size: int
    """Ranks that wrote it; 0 without a marker."""
    num_files: int
    num_bytes: int
    """Of the files that the marker names."""
    loss: float | None
    """Of the last step it includes, from the run's metrics."""
    valid_loss: float | None
    """Of the validation at its own step, if there was one: of these very weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InventoryReport:
    """The checkpoints of a run."""

    uri: str
    finished: bool
    """Whether the run has its summary."""
    checkpoints: tuple[CheckpointReport, ...]
    """Newest first."""
    continues_at: int | None
    """Step at which the run's command would go on; None if it would refuse, or has nothing to go on from."""
    identity: Mapping[str, Any]
    """What cannot change within the run, of the newest readable marker."""
    verified: bool
    """Whether every byte was compared with its checksum."""
    deleted: tuple[int, ...]
    """Steps whose checkpoints were deleted just now."""
    damages: tuple[str, ...]
    """Every damaged checkpoint with what is wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorDifference:
    """One tensor of two checkpoints."""

    name: str
    max_abs: float
    """Largest absolute difference of two elements; infinite if shapes differ, one of them lacks the tensor, or some are
    not finite."""
    relative: float
    """Norm of the difference over the norm of the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DifferenceReport:
    """Two checkpoints side by side."""

    first: str
    second: str
    """Folders of the checkpoints."""
    settings: tuple[str, ...]
    """Settings of the runs' identities and library versions that differ, with both values."""
    tensors: tuple[TensorDifference, ...]
    """Model tensors that differ, most relative difference first."""
    num_tensors: int
    """Of the models, together."""
    optimizer_equal: bool
    """Whether steps and moments of the optimizer are bit-identical."""


def take_inventory(
    run_uri: str,
    *,
    verify_content: bool = False,
    keep_last: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> InventoryReport:
    """Look at every checkpoint of the run; with ``keep_last``, first delete all but that many of the newest whole ones.

    ``verify_content`` reads every byte; ``progress`` is told how many checkpoints are done, and of how many. Deleting spares
    damaged checkpoints newer than the ones kept, and folders without a marker newer than the newest whole one: a running
    command may be writing there. Raises CheckpointError where there is no run.
    """
    examined = examine_checkpoints(run_uri, verify_content=verify_content, progress=progress)
    finished = storage.exists(storage.join(run_uri, FINISHED_NAME))
    if not examined and not finished:
        raise CheckpointError(
            f"{run_uri} holds no checkpoints: expected the folder of a run, the `out` of `moleblend pretrain`"
        )
    last = _records_before(run_uri, [one.step for one in examined])
    found = [_report(one, last.get(one.step, {})) for one in examined]
    deleted = () if keep_last is None else _prune(run_uri, found, keep_last)
    left = tuple(report for report in found if report.step not in deleted)
    whole = [report.step for report in left if report.state == "whole"]
    newer = any(report.state == "newer" and report.step > max(whole, default=0) for report in left)
    return InventoryReport(
        uri=run_uri,
        finished=finished,
        checkpoints=left,
        continues_at=None if not whole or newer else whole[0],
        identity=newest_identity(run_uri) or {},
        verified=verify_content,
        deleted=deleted,
        damages=tuple(
            f"step {report.step}: {report.detail}" for report in left if report.state == "damaged"
        ),
    )


def _report(found: Examined, last: Record) -> CheckpointReport:
    """``last``: the newest record before the checkpoint."""
    commit = found.commit
    own = last if last.get("step") == found.step - 1 else {}
    return CheckpointReport(
        step=found.step,
        state=found.state,
        detail=found.detail,
        created=commit.created if commit else "",
        world_size=commit.world_size if commit else 0,
        num_files=len(commit.files) if commit else 0,
        num_bytes=found.num_bytes,
        loss=last.get(TOTAL_LOSS),
        valid_loss=own.get(VALID_PREFIX + TOTAL_LOSS),
    )


def _records_before(run_uri: str, steps: Sequence[int]) -> dict[int, Record]:
    """The newest record of a step before each of ``steps`` that has one."""
    ordered = sorted(steps)
    found: dict[int, Record] = {}
    for record in iter_records(run_uri):
        if following := ordered[bisect_right(ordered, record["step"]) :][:1]:
            found[following[0]] = record
    for earlier, later in pairwise(ordered):
        if earlier in found:
            found.setdefault(later, found[earlier])
    return found


def _prune(run_uri: str, found: Sequence[CheckpointReport], keep_last: int) -> tuple[int, ...]:
    kept = [report.step for report in found if report.state == "whole"][:keep_last]
    if not kept:
        return ()
    deleted = tuple(
        report.step for report in found if report.step < kept[-1] and report.state != "newer"
    )
    for step in deleted:
        delete_checkpoint(run_uri, step)
    return deleted


def compare_checkpoints(first_uri: str, second_uri: str) -> DifferenceReport:
    """How two checkpoints differ; each is a run (its newest whole checkpoint) or one checkpoint folder of a run."""
    first, second = _commit_of(first_uri), _commit_of(second_uri)
    ours, theirs = _tensors(*first), _tensors(*second)
    settings = differences(
        {**first[1].identity, "versions": first[1].versions},
        {**second[1].identity, "versions": second[1].versions},
    )
    model = sorted(name for name in ours.keys() | theirs.keys() if name.startswith(MODEL_PREFIX))
    others = [name for name in ours.keys() | theirs.keys() if not name.startswith(MODEL_PREFIX)]
    tensors = [_difference(name, ours.get(name), theirs.get(name)) for name in model]
    return DifferenceReport(
        first=step_uri(first[0], first[1].step),
        second=step_uri(second[0], second[1].step),
        settings=tuple(f"{name}: {old!r} and {new!r}" for name, (old, new) in settings.items()),
        tensors=tuple(
            sorted(
                (tensor for tensor in tensors if tensor.max_abs > 0), key=lambda one: -one.relative
            )
        ),
        num_tensors=len(model),
        optimizer_equal=all(
            name in ours and name in theirs and torch.equal(ours[name], theirs[name])
            for name in others
        ),
    )


def _commit_of(uri: str) -> tuple[str, Commit]:
    run, step = split_checkpoint_uri(uri)
    if step is not None:
        return run, read_commit(run, step)
    commit = latest_committed(run)
    if commit is None:
        raise CheckpointError(
            f"{uri} holds no checkpoints: expected a run or one of its checkpoints"
        )
    return run, commit


def _tensors(run_uri: str, commit: Commit) -> dict[str, Tensor]:
    with scratch_folder("compare") as local:
        return load_all_tensors(run_uri, commit, local)


def _difference(name: str, one: Tensor | None, other: Tensor | None) -> TensorDifference:
    short = name.removeprefix(MODEL_PREFIX)
    if one is None or other is None or one.shape != other.shape:
        return TensorDifference(name=short, max_abs=float("inf"), relative=float("inf"))
    delta = other.double() - one.double()
    if not delta.numel() or torch.equal(one, other):
        return TensorDifference(name=short, max_abs=0.0, relative=0.0)
    if not bool(torch.isfinite(delta).all()):
        return TensorDifference(name=short, max_abs=float("inf"), relative=float("inf"))
    norm = float(one.double().norm())
    return TensorDifference(
        name=short,
        max_abs=float(delta.abs().max()),
        relative=float(delta.norm()) / norm if norm else float("inf"),
    )
