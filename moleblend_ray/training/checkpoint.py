"""The state of training, and reading it back: shards by torch DCP, believed through :mod:`.commits`.

Saving it is in :mod:`.saving`."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import pickle
import platform
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, EnumType
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from moleblend_ray.data.files import storage
from moleblend_ray.data.files.scratch import scratch_folder, scratch_path
from moleblend_ray.errors import CheckpointError, MoleBlendError
from moleblend_ray.training.commits import (
    Commit,
    CommittedFile,
    read_commit,
    step_uri,
)
from moleblend_ray.training.optim import CutInvariantAdamW
from moleblend_ray.training.ranks import Ranks, gather_from_ranks

logger = logging.getLogger(__name__)

TRANSFER_THREADS: Final = 8
MODEL_PREFIX: Final = "model."

# What the index of a checkpoint may be made of.
_INDEX_MODULE: Final = "torch.distributed.checkpoint.metadata"
_INDEX_NAMES: Final = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    }
)

T = TypeVar("T")


def training_state(model: nn.Module, optimizer: CutInvariantAdamW) -> dict[str, Tensor]:
    """Parameters, buffers and Adam moments under names that do not depend on strategy or world size.

    The tensors are the live ones (DTensors when sharded): writing into them restores the state. Learning rate and
    step count are functions of the step, so there is nothing else to save, and nothing that needs pickle.
    """
    state = {MODEL_PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, tensor in optimizer.state.get(parameter, {}).items():
            state[f"optimizer.{key}.{name}"] = tensor
    return state


def restore_training_state(
    model: nn.Module, optimizer: CutInvariantAdamW, run_uri: str, step: int, ranks: Ranks
) -> Commit:
    """Read the checkpoint at ``step`` into model and optimizer, whatever the world size that wrote it.

    Every rank calls this. Each machine downloads the files once and checks their checksums.
    """
    with _node_local_copy(run_uri, step, ranks) as (commit, local):
        _load(training_state(model, optimizer), local, step_uri(run_uri, step))
    return commit


def load_model_state(run_uri: str, step: int, model: nn.Module) -> None:
    """Read the parameters of the checkpoint at ``step`` into ``model``, in this process alone."""
    commit = read_commit(run_uri, step)
    state = {MODEL_PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    with scratch_folder("load") as local:
        _download_files(run_uri, commit, local)
        _load(state, local, step_uri(run_uri, step), alone=True)


def load_all_tensors(run_uri: str, commit: Commit, local: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name, in this process alone; its files are downloaded to ``local`` and checked."""
    _download_files(run_uri, commit, local)
    index = _SafeReader(local).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in index.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    _load(state, local, step_uri(run_uri, commit.step), alone=True)
    return state


def _load(state: dict[str, Tensor], local: Path, folder: str, *, alone: bool = False) -> None:
    try:
        with quiet_alone():
            load_shards(
                state,
                storage_reader=_SafeReader(local),
                no_dist=alone or not dist.is_initialized(),
            )
    except (CheckpointException, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} does not fit the model: {error}. "
            "It was written by another version or model; load it with the configuration it was made with."
        ) from error


@contextlib.contextmanager
def quiet_alone() -> Iterator[None]:
    """Without DCP's warning that there is no process group: ours to decide."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _SafeReader(FileSystemReader):
    """DCP's reader, except that the index (a pickle) may only build DCP's own records.

    Tensors are read by torch with ``weights_only=True`` and nothing else is in our checkpoints, so opening
    a checkpoint from elsewhere runs no code of its maker.
    """

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """The index of the checkpoint."""
        with (Path(self.path) / ".metadata").open("rb") as stream:
            metadata: Metadata = _IndexUnpickler(stream).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib":
            return PurePosixPath  # where the writer had its files; the module's name differs between Pythons
        if (module, name) == ("builtins", "getattr"):
            return _member  # so early releases of Python 3.11 store the members of enumerations
        found = super().find_class(module, name) if module.startswith("torch") else None
        is_record = module == _INDEX_MODULE and isinstance(found, type)
        if is_record or isinstance(found, torch.dtype) or (module, name) in _INDEX_NAMES:
            return found
        raise CheckpointError(
            f"the checkpoint's index asks for {module}.{name}, which no checkpoint needs; it was tampered with"
        )


def _member(kind: object, name: object) -> Enum:
    """The member of an enumeration, and nothing else that ``getattr`` could reach."""
    if isinstance(kind, EnumType) and isinstance(name, str) and name in kind.__members__:
        member: Enum = kind.__members__[name]
        return member
    raise CheckpointError(
        f"the checkpoint's index asks for {name!r} of {kind!r}, which no checkpoint needs; it was tampered with"
    )


@contextlib.contextmanager
def _node_local_copy(run_uri: str, step: int, ranks: Ranks) -> Iterator[tuple[Commit, Path]]:
    """The marker and a verified local copy of its files, one for all processes of a machine."""
    token = gather_from_ranks(uuid.uuid4().hex[:12])[0]
    with contextlib.ExitStack() as stack:

        def fetch() -> Commit:
            commit = read_commit(run_uri, step)
            if ranks.local_rank == 0:
                local = stack.enter_context(scratch_folder("load", token=token))
                _download_files(run_uri, commit, local)
            return commit

        yield on_every_rank(fetch)[ranks.rank], scratch_path("load", token)
        on_every_rank(lambda: None)  # no rank may still be reading when the copy goes


def _download_files(run_uri: str, commit: Commit, local: Path) -> None:
    folder = step_uri(run_uri, commit.step)

    def download(file: CommittedFile) -> None:
        target = local / file.name
        storage.download(storage.join(folder, file.name), target)
        with target.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != file.sha256:
                raise CheckpointError(
                    f"{storage.join(folder, file.name)} has another SHA-256 than its marker says: it is damaged"
                )

    with ThreadPoolExecutor(TRANSFER_THREADS) as pool:
        list(pool.map(download, commit.files))


def on_every_rank(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank does ``action``; the results in rank order. One rank's failure is raised on all as a CheckpointError.

    Without this, the others would wait in the next collective for a rank that has already given up.
    """
    outcome: tuple[T | None, str]
    try:
        outcome = (action(), "")
    except MoleBlendError as error:
        outcome = (None, str(error))
    # Of the local disk, or one that nobody thought of: the others must hear of it.
    except Exception as error:
        outcome = (None, f"{type(error).__name__}: {error}")
    outcomes = gather_from_ranks(outcome, group)
    errors = sorted({text for _, text in outcomes if text})
    if errors:
        raise CheckpointError("; ".join(errors))
    return [cast("T", result) for result, _ in outcomes]


def library_versions() -> dict[str, str]:
    """Versions that may matter when an old checkpoint behaves oddly."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["numpy"] = np.__version__
    with contextlib.suppress(PackageNotFoundError):  # run from a source tree
        versions["moleblend-ray"] = version("moleblend-ray")
    return versions
