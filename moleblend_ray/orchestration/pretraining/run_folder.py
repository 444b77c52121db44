"""The folder of a pretraining run: whose run it is, where it stands, and whether a command may continue it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from moleblend_ray.config.describe import redact
from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.data.dataset.differences import with_defaults
from moleblend_ray.data.dataset.manifest import Manifest
from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.documents import require_types
from moleblend_ray.errors import CheckpointError, DataError, without_credentials
from moleblend_ray.model.config import BlendConfig, ModelConfig
from moleblend_ray.orchestration.identity import require_own
from moleblend_ray.settings import to_dict
from moleblend_ray.training.checkpoint import library_versions
from moleblend_ray.training.commits import (
    CONFIG_NAME,
    FINISHED_NAME,
    Commit,
    latest_committed,
    newest_identity,
    require_same_run,
)
from moleblend_ray.training.export import export_uri

logger = logging.getLogger(__name__)

_FEW_PLACED: Final = 0.5
"""Share of molecules with coordinates below which a run says that it has few."""


_OPTIONAL_HEADS: Final = {
    "distance": "model.distance_head",
    "environment": "model.environment_bins",
    "descriptor": "model.descriptor_head",
}
"""Heads that are off by default, and the settings that ask for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainSummary:
    """What a call of `pretrain` did or found."""

    out: str
    """URI of the run."""
    finished: bool
    """False if a stop was asked for before the last step; the same command continues."""
    steps: int
    """Steps committed since the start of the run."""
    resumed_from: int
    """Committed step at which this call started; 0 for a new run."""
    world_size: int
    """Number of workers at the end of this call."""
    molecules: int
    """Molecules seen in all steps, repetitions counted."""
    loss_first: dict[str, float]
    """Mean losses of the first tenth of the steps (at most 50): "loss" is the optimised loss, "loss_<head>" that of a
    head."""
    loss_last: dict[str, float]
    """The same for the last tenth."""
    molecules_per_s: float
    """Molecules seen per second of step time, over all steps."""
    seconds: float
    """Wall time of this call."""
    data_fingerprint: str
    """Fingerprint of the prepared dataset."""
    export: str | None
    """Folder with model.safetensors and config.json; None while unfinished."""


def run_identity(config: PretrainConfig, manifest: Manifest) -> dict[str, Any]:
    """The settings of a run that must not change between its checkpoints."""
    settings = to_dict(config)
    # Runs of earlier versions do not have these settings.
    if config.blend.view_probabilities == BlendConfig().view_probabilities:
        del settings["blend"]["view_probabilities"]
    if not config.model.environment_head:
        del settings["model"]["environment_bins"]
    if not config.model.descriptor_head:
        del settings["model"]["descriptor_head"]
    return {
        "data_fingerprint": manifest.fingerprint,
        # Part of the fingerprint; named here as well, to show why data that were prepared again are different.
        "featurizer_version": manifest.featurizer_version,
        # Likewise; the molecules that the encoder meets later get this form.
        "molecules": asdict(MoleculeForm.of_options(manifest.options)),
        "seed": config.seed,
        "random_rotation": config.stream.random_rotation,
        **{name: settings[name] for name in ("order", "model", "blend")},
    }


def open_run(
    config: PretrainConfig, manifest: Manifest, finished: PretrainSummary | None = None
) -> Commit | None:
    """Check that the configuration may continue the run in ``out``, store it there, and return the newest commit.

    ``finished``: the summary of a run that is to be longer now.
    """
    if manifest.num_molecules("train") == 0:
        raise DataError(f"{config.data} has no molecules to train on: its train split is empty")
    _require_coordinates(config, manifest)
    _require_descriptors(config, manifest)
    _require_validation(config, manifest)
    _tell_untrained_heads(config)
    identity = run_identity(config, manifest)
    commit = latest_committed(config.out, verify_content=True)
    if commit is not None:
        _require_same_run(commit.identity, identity, config.out)
    elif finished is not None:
        # From step 0 it would replace the metrics and the exported model of the run.
        raise CheckpointError(
            f"{config.out} is finished ({finished.steps} steps) and has no checkpoints any more: it cannot go on to "
            f"{config.train.num_steps} steps. Put its newest checkpoint back, or start a new run under another `out`."
        )
    else:
        require_own(config.out, "pretrain")
        if storage.exists(storage.join(config.out, CONFIG_NAME)):
            logger.info("%s was started before but committed nothing: starting anew", config.out)
    document = {
        "config": redact(to_dict(config)),
        "data_fingerprint": manifest.fingerprint,
        "versions": library_versions(),
    }
    storage.write_json(storage.join(config.out, CONFIG_NAME), document)
    return commit


def _require_coordinates(config: PretrainConfig, manifest: Manifest) -> None:
    """Refuse 3D losses on molecules that all lack coordinates; say so if many do."""
    total, placed = manifest.counts.rows_out, manifest.counts.with_coordinates
    losses = [name for name in ("denoise", "direction", "distance") if config.loss.weight(name) > 0]
    remedy = "prepare them with featurize.conformers.generate=true"
    if not placed and losses:
        zero = " ".join(f"loss.{name}_weight=0" for name in losses)
        raise DataError(
            f"none of the {total} molecules of {config.data} has coordinates: nothing would teach the encoder 3D relations. "
            f"Use sources with coordinates or {remedy}. To pretrain on 2D relations alone, say so: {zero}"
        )
    if placed < _FEW_PLACED * total:
        logger.warning(
            "%d of %d molecules of %s have no coordinates and teach 2D relations only; %s",
            total - placed,
            total,
            without_credentials(config.data),
            remedy,
        )


def _require_descriptors(config: PretrainConfig, manifest: Manifest) -> None:
    if config.model.descriptor_head and manifest.descriptors is None:
        raise DataError(
            f"{config.data} has no descriptors, which model.descriptor_head=true is to predict. Prepare the molecules into "
            "another `out` with featurize.descriptors=true, or pretrain without: model.descriptor_head=false "
            "loss.descriptor_weight=0"
        )


def _tell_untrained_heads(config: PretrainConfig) -> None:
    """Name heads that were asked for and learn nothing, as their losses have no weight."""
    for name, setting in _OPTIONAL_HEADS.items():
        if getattr(config.model, f"{name}_head") and config.loss.weight(name) == 0.0:
            logger.warning(
                "%s is set, but loss.%s_weight is 0: that head costs time and is not trained",
                setting,
                name,
            )


def _require_validation(config: PretrainConfig, manifest: Manifest) -> None:
    """Refuse to keep the best of checkpoints that are never validated; say so if a run has no validations."""
    if config.train.validate_every == 0 or manifest.num_molecules("valid"):
        return
    lacking = f"{without_credentials(config.data)} has no molecules for validation (valid_fraction of `moleblend prepare`)"
    if config.checkpoint.keep_best:
        raise DataError(
            f"{lacking}, by whose losses checkpoint.keep_best={config.checkpoint.keep_best} chooses. Prepare a data set that "
            "has some, or set checkpoint.keep_best=0"
        )
    logger.warning("%s: the run has no validation losses", lacking)


def config_fingerprint(config: PretrainConfig) -> str:
    """SHA-256 of the whole configuration, in hexadecimal."""
    # Without credentials: a URI with a new signature is the same configuration.
    text = json.dumps(redact(to_dict(config)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_finished(config: PretrainConfig, manifest: Manifest) -> PretrainSummary | None:
    """The stored summary of a finished run, if ``config`` describes that run."""
    uri = storage.join(config.out, FINISHED_NAME)
    if not storage.exists(uri):
        return None
    try:
        stored = dict(storage.read_json(uri))
        identity = stored.pop("identity", None)
        summary = PretrainSummary(**stored)
        require_types(summary)
        if not isinstance(identity, dict | None):
            raise TypeError(f"identity: expected a mapping, found {identity!r}")
    except (TypeError, ValueError) as error:
        raise DataError(f"{uri} is not the summary of a run: {error}") from error
    if identity is None:  # an earlier version wrote it
        identity = newest_identity(config.out)
    if identity is None:  # and the checkpoints were deleted
        identity = {"data_fingerprint": summary.data_fingerprint}
    _require_same_run(identity, run_identity(config, manifest), config.out)
    # The stored URIs have no credentials, and the folder may have been moved.
    return replace(summary, out=config.out, export=export_uri(config.out))


def _require_same_run(stored: Mapping[str, Any], wanted: Mapping[str, Any], run_uri: str) -> None:
    """As :func:`require_same_run`; both with the settings that :func:`run_identity` leaves out."""
    # Of what earlier versions did not store of molecules, the fingerprint of the data tells.
    if isinstance(stored.get("molecules"), Mapping):
        stored = {**stored, "molecules": with_defaults(stored["molecules"], wanted["molecules"])}
    require_same_run(_with_later_settings(stored), _with_later_settings(wanted), run_uri)


def _with_later_settings(identity: Mapping[str, Any]) -> dict[str, Any]:
    later = {
        "blend": {"view_probabilities": to_dict(BlendConfig())["view_probabilities"]},
        "model": {
            name: getattr(ModelConfig(), name) for name in ("environment_bins", "descriptor_head")
        },
    }
    # A section that was not stored stays out: what is not known is not compared.
    return with_defaults(identity, {name: later[name] for name in later if name in identity})
