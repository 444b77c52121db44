"""The small jobs, done in this process: the sample collection, and the export of a checkpoint."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from moleblend_ray.config.paths import with_absolute_paths
from moleblend_ray.config.tools import ExportConfig, SamplesConfig
from moleblend_ray.data import storage


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplesSummary:
    """What `samples` wrote."""

    molecules: int
    """Distinct molecules in the file."""
    bytes: int
    """Size of the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSummary:
    """What `export` wrote."""

    parameters: int
    """Parameters of the model, heads included."""
    layers: int
    """Transformer blocks of its encoder."""
    dim: int
    """Length of its embeddings."""


def samples(config: SamplesConfig) -> SamplesSummary:
    """Write the sample collection; a local file that holds it already is kept."""
    # The only job here that needs RDKit.
    from moleblend_ray.chemistry.samples import write_samples

    config = with_absolute_paths(config)
    if "://" not in config.out:
        rows = write_samples(config.out, config.num_molecules, config.seed)
        return SamplesSummary(molecules=rows, bytes=storage.size(config.out))
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "samples.parquet"
        rows = write_samples(local, config.num_molecules, config.seed)
        storage.upload(str(local), config.out)
    return SamplesSummary(molecules=rows, bytes=storage.size(config.out))


def export(config: ExportConfig) -> ExportSummary:
    """Write the model of a run, a checkpoint or a file of official parameters as safetensors."""
    from moleblend_ray.model.hub import save_pretrained
    from moleblend_ray.training.export import load_model

    config = with_absolute_paths(config)
    model = load_model(config.checkpoint)
    save_pretrained(model, config.out)
    return ExportSummary(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=model.config.num_layers,
        dim=model.config.dim,
    )
