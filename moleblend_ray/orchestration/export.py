"""`moleblend export`: the model of a checkpoint as safetensors."""

from __future__ import annotations

from dataclasses import dataclass

from moleblend_ray.config.accept import accepted
from moleblend_ray.config.tools import ExportConfig
from moleblend_ray.errors import ConfigError
from moleblend_ray.evaluation.models.property_model import is_property_model
from moleblend_ray.model.hub import PROPERTY_NAME, WEIGHTS_NAME, save_pretrained
from moleblend_ray.orchestration.identity import require_own
from moleblend_ray.training.export import load_model


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSummary:
    """What :func:`export` wrote."""

    parameters: int
    """Parameters of the model, heads included."""
    layers: int
    """Transformer blocks of its encoder."""
    dim: int
    """Length of its embeddings."""


def export(config: ExportConfig) -> ExportSummary:
    """Write the model of a run, a checkpoint or a file of official parameters as safetensors.

    Raises ConfigError for a fine-tuned model, which needs no export, and for an ``out`` that holds what another command has
    made: its files have the names of those of a run or a fine-tuned model.
    """
    config = accepted(config, ExportConfig)
    if is_property_model(config.checkpoint):
        raise ConfigError(
            f"checkpoint: {config.checkpoint} is a fine-tuned model, which is stored as {WEIGHTS_NAME} and {PROPERTY_NAME} "
            "already; copy these two files. Expected a pretraining run, a checkpoint or official parameters"
        )
    require_own(config.out, "export")
    if is_property_model(config.out):
        raise ConfigError(
            f"out: {config.out} is a fine-tuned model. Give another `out` for `moleblend export`"
        )
    model = load_model(config.checkpoint)
    save_pretrained(model, config.out)
    return ExportSummary(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=model.config.num_layers,
        dim=model.config.dim,
    )
