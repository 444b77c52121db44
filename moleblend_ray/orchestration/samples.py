"""`moleblend samples`: the project's own sample molecules."""

from __future__ import annotations

from dataclasses import dataclass

from moleblend_ray.chemistry.samples import write_samples
from moleblend_ray.config.accept import accepted
from moleblend_ray.config.tools import SamplesConfig
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.scratch import scratch_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplesSummary:
    """What :func:`samples` wrote."""

    molecules: int
    """Distinct molecules in the file."""
    bytes: int
    """Size of the file."""


def samples(config: SamplesConfig) -> SamplesSummary:
    """Write the sample collection; a local file that holds it already is kept."""
    config = accepted(config, SamplesConfig)
    if "://" not in config.out:
        rows = write_samples(config.out, config.num_molecules, config.seed)
        return SamplesSummary(molecules=rows, bytes=storage.size(config.out))
    with scratch_folder("samples") as folder:
        local = folder / "samples.parquet"
        rows = write_samples(local, config.num_molecules, config.seed)
        storage.upload(str(local), config.out)
    return SamplesSummary(molecules=rows, bytes=storage.size(config.out))
