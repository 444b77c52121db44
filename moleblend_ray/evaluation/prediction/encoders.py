"""Encoders that were trained, by the URI of whatever holds one."""

from __future__ import annotations

from typing import NamedTuple

from moleblend_ray.errors import CheckpointError
from moleblend_ray.evaluation.models.finetune import StartingPoint
from moleblend_ray.evaluation.models.property_model import (
    SavedProperty,
    is_property_model,
    load_property_model,
    require_finite,
)
from moleblend_ray.evaluation.prediction.ensemble import (
    is_of_several_tasks,
    list_of_models,
    model_folders,
    several_tasks,
)
from moleblend_ray.evaluation.results.results import weights_fingerprint
from moleblend_ray.model.moleblend import MoleBlendModel, PropertyModel
from moleblend_ray.training.export import load_model


class LoadedEncoder(NamedTuple):
    """The encoder of a checkpoint, with its property head if it has a trained one."""

    start: StartingPoint
    """The encoder's architecture, weights and fingerprint."""
    fine_tuned: SavedProperty | None
    """The whole model, if it is fine-tuned."""


def load_encoder(checkpoint: str) -> LoadedEncoder:
    """Load an encoder from a pretraining run, one of its checkpoints, an exported model or a fine-tuned model.

    Raises CheckpointError for anything else, for weights that are not finite, and also for a finished fine-tuning or sweep, of one
    task or several, whose models have an encoder each.
    """
    fine_tuned = load_property_model(checkpoint) if is_property_model(checkpoint) else None
    if fine_tuned is None and list_of_models(checkpoint) is not None:
        raise CheckpointError(
            f"{checkpoint} is the `out` of a fine-tuning, sweep or refit, whose models have an encoder each; name one of them: "
            + ", ".join(model_folders((checkpoint,)))
        )
    if is_of_several_tasks(checkpoint):
        raise CheckpointError(several_tasks(checkpoint))
    model: MoleBlendModel | PropertyModel
    if fine_tuned is None:
        model = pretrained = load_model(checkpoint)
        form = pretrained.origin.molecules if pretrained.origin else None
    else:
        model, form = fine_tuned.model, fine_tuned.trained.molecules
    state = {name: value.detach().cpu() for name, value in model.encoder.state_dict().items()}
    require_finite(state, checkpoint)
    start = StartingPoint(
        model=model.config,
        encoder=state,
        fingerprint=weights_fingerprint(state),
        molecules=form,
    )
    return LoadedEncoder(start, fine_tuned)
