"""From a run to a model that can be used: export to safetensors, and what ``checkpoint=URI`` may name."""

from __future__ import annotations

import logging
import os
import re
from typing import Any, Final

from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.files import storage
from moleblend_ray.errors import CheckpointError, ConfigError, StorageError, without_credentials
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.hub import CONFIG_NAME, WEIGHTS_NAME, from_pretrained, save_pretrained
from moleblend_ray.model.moleblend import MoleBlendModel
from moleblend_ray.model.origin import Origin
from moleblend_ray.training.commits import (
    COMMIT_NAME,
    FINISHED_NAME,
    Commit,
    is_committed,
    latest_committed,
    read_commit,
)

logger = logging.getLogger(__name__)

EXPORT_DIR: Final = "export"
_CHECKPOINT_DIR: Final = re.compile(r"(?P<run>.+)/checkpoints/step-(?P<step>\d{8,})/*$")


def export_uri(run_uri: str) -> str:
    """Folder of the finished model of a run."""
    return storage.join(run_uri, EXPORT_DIR)


def split_checkpoint_uri(uri: str) -> tuple[str, int | None]:
    """The run that ``uri`` is or lies in, and the step if it is one checkpoint's folder."""
    match = _CHECKPOINT_DIR.match(uri)
    return (match["run"], int(match["step"])) if match else (uri, None)


def load_model(uri: str | os.PathLike[str]) -> MoleBlendModel:
    """The model that ``uri`` names, on the CPU, in evaluation mode.

    ``uri`` is a run (its export if it is finished, else its newest committed checkpoint), one checkpoint folder
    of a run, a folder with ``model.safetensors``, or a file of official parameters (``.pt``, ``.npz``).
    """
    uri = os.fspath(uri)
    run, step = split_checkpoint_uri(uri)
    if step is not None:
        return _from_commit(run, read_commit(run, step))
    if uri.endswith((".pt", ".npz")) or storage.exists(storage.join(uri, WEIGHTS_NAME)):
        return from_pretrained(uri)
    if storage.exists(storage.join(uri, FINISHED_NAME)):
        return from_pretrained(export_uri(uri))
    found = _newest_model(uri)
    if found is None:
        raise CheckpointError(
            f"{uri} names no model: expected a run of `moleblend pretrain` with a committed checkpoint, a folder "
            f".../checkpoints/step-NNNNNNNN with {COMMIT_NAME}, a folder with {WEIGHTS_NAME} and {CONFIG_NAME}, "
            "or a file of official parameters (.pt, .npz)"
        )
    model, commit = found
    logger.info("%s is not finished: taking its checkpoint of step %d", uri, commit.step)
    return model


def export_run(run_uri: str) -> str:
    """Write the newest committed model of a run as ``model.safetensors`` and ``config.json``; the folder's URI."""
    found = _newest_model(run_uri)
    if found is None:
        raise CheckpointError(f"{run_uri} has no committed checkpoint to export")
    target = export_uri(run_uri)
    save_pretrained(found[0], target)
    return target


def _newest_model(run_uri: str) -> tuple[MoleBlendModel, Commit] | None:
    """The model and the marker of the newest committed checkpoint of a run; None without one."""
    while True:
        # Every byte: what is damaged is found now, while the checkpoint before it can still be taken.
        commit = latest_committed(run_uri, verify_content=True)
        if commit is None:
            return None
        try:
            return _from_commit(run_uri, commit), commit
        except (CheckpointError, StorageError):
            if is_committed(run_uri, commit.step):
                raise
            logger.info(
                "%s: the checkpoint of step %d was deleted while it was read, as the run goes on: taking a newer one",
                run_uri,
                commit.step,
            )


def _from_commit(run_uri: str, commit: Commit) -> MoleBlendModel:
    # Most processes load finished models, and need neither this module nor the half second that importing it takes.
    from moleblend_ray.training.checkpoint import load_model_state

    model = MoleBlendModel.without_weights(_model_config(run_uri, commit.identity))
    # Runs of earlier versions do not say it.
    molecules = commit.identity.get("molecules")
    model.origin = Origin(
        uri=without_credentials(run_uri),
        step=commit.step,
        data_fingerprint=commit.identity.get("data_fingerprint"),
        molecules=None if molecules is None else MoleculeForm.from_json(molecules),
        versions=commit.versions,
    )
    load_model_state(run_uri, commit.step, model)
    return model.eval()


def _model_config(run_uri: str, identity: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig(**identity["model"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"the checkpoints of {run_uri} describe no model of this version: {error!r}"
        ) from error
