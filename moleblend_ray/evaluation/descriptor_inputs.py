"""RDKit's descriptors as inputs of models, and their scaling by the training molecules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.errors import CheckpointError

DESCRIPTOR_LIMIT: Final = 5.0
"""Standardised descriptors are clipped to +-5, as a single outlier could ruin a linear model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DescriptorScaling:
    """Scales descriptors for a linear model, by the training molecules only.

    A value that is not finite, or too large for float32 (Ipc overflows), counts as missing and is replaced by the
    median of the training molecules. Then descriptors are scaled to mean 0 and standard deviation 1 in the training
    part and clipped to :data:`DESCRIPTOR_LIMIT`. Descriptors that are missing or constant in the training part become
    0.
    """

    median: NDArray[np.float64]
    """(D,) median of the known values."""
    mean: NDArray[np.float64]
    """(D,) mean after replacement."""
    scale: NDArray[np.float64]
    """(D,) reciprocal of the standard deviation; 0 for a constant descriptor."""

    @classmethod
    def fit(cls, values: NDArray[np.float64]) -> DescriptorScaling:
        """Fit the scaling to the (N, D) descriptors of the training molecules."""
        known = np.where(_is_usable(values), values, np.nan)
        nowhere = np.isnan(known).all(axis=0)
        median = np.nanmedian(np.where(nowhere, 0.0, known), axis=0)
        filled = np.where(np.isnan(known), median, known)
        mean, std = filled.mean(axis=0), filled.std(axis=0)
        # Because the mean is rounded, a constant column has a tiny deviation without meaning.
        varies = std > 1e-9 * np.maximum(1e-6, np.abs(mean))
        scale = np.where(varies, 1.0 / np.where(varies, std, 1.0), 0.0)
        return cls(median=median, mean=mean, scale=scale)

    def apply(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(M, D) descriptors, scaled; every value is finite."""
        filled = np.where(_is_usable(values), values, self.median)
        scaled = (filled - self.mean) * self.scale
        return np.clip(scaled, -DESCRIPTOR_LIMIT, DESCRIPTOR_LIMIT)


def _is_usable(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.abs(values) <= float(np.finfo(np.float32).max)


class DescriptorTable(NamedTuple):
    """Descriptors of M molecules."""

    names: tuple[str, ...]
    """(D,) RDKit's names of the descriptors."""
    values: NDArray[np.float64]
    """(M, D), each in its own unit; some are NaN or infinite."""

    @classmethod
    def of(cls, smiles: Sequence[str]) -> DescriptorTable:
        """All descriptors of RDKit; about 6 ms per drug-like molecule."""
        # Here, as models that read no descriptors need no RDKit.
        from moleblend_ray.chemistry.descriptors import DESCRIPTOR_NAMES, descriptors

        return cls(DESCRIPTOR_NAMES, descriptors(smiles))

    def take(self, rows: NDArray[np.int64]) -> DescriptorTable:
        """The molecules at ``rows``."""
        return self._replace(values=self.values[rows])


@dataclass(frozen=True, kw_only=True, slots=True)
class DescriptorInputs:
    """Which descriptors a model reads, and how they are scaled."""

    names: tuple[str, ...]
    """(D,) RDKit's names, in the order of the model's inputs."""
    scaling: DescriptorScaling
    """Fitted to the training part."""

    @classmethod
    def fit(cls, training: DescriptorTable) -> DescriptorInputs:
        """All descriptors, scaled by these molecules."""
        return cls(names=training.names, scaling=DescriptorScaling.fit(training.values))

    def of(self, table: DescriptorTable) -> NDArray[np.float32]:
        """(M, D) inputs; CheckpointError if a descriptor is not in ``table``."""
        values = table.values
        if table.names != self.names:
            place = {name: index for index, name in enumerate(table.names)}
            lacking = [name for name in self.names if name not in place]
            if lacking:
                raise CheckpointError(
                    f"the model reads descriptors {lacking[:5]}, which this RDKit does not have; use the release with which "
                    "it was fine-tuned"
                )
            values = values[:, [place[name] for name in self.names]]
        return self.scaling.apply(values).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """As values of JSON."""
        return {
            "names": list(self.names),
            "median": self.scaling.median.tolist(),
            "mean": self.scaling.mean.tolist(),
            "scale": self.scaling.scale.tolist(),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> DescriptorInputs:
        """From what :meth:`to_json` gave; KeyError, TypeError or ValueError for anything else."""
        scaling = {
            name: np.asarray(document[name], dtype=np.float64)
            for name in ("median", "mean", "scale")
        }
        return cls(names=tuple(document["names"]), scaling=DescriptorScaling(**scaling))
