"""Descriptors of molecules as numbers of similar size: what a shard's column holds, on the scale of its data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from moleblend_ray.data.dataset.block import MoleculeBlock

DESCRIPTOR_LIMIT: Final = 5.0
"""Standardised descriptors are clipped to +-5, as a single outlier could ruin a linear model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DescriptorScaling:
    """Brings descriptors to one scale, that of the molecules that it was fitted to.

    A value that is not finite, or too large for float32 (Ipc overflows), counts as missing and is replaced by the
    median of the known ones. Then descriptors are scaled to mean 0 and standard deviation 1 among the molecules of the
    fit, and clipped to :data:`DESCRIPTOR_LIMIT`. Descriptors that are missing or constant there become 0.
    """

    median: NDArray[np.float64]
    """(D,) median of the known values."""
    mean: NDArray[np.float64]
    """(D,) mean after replacement."""
    scale: NDArray[np.float64]
    """(D,) reciprocal of the standard deviation; 0 for a constant descriptor."""

    @classmethod
    def fit(cls, values: NDArray[np.floating]) -> DescriptorScaling:
        """Fit the scaling to the (N, D) descriptors of some molecules."""
        known = np.where(_is_usable(values), values, np.nan).astype(np.float64)
        nowhere = np.isnan(known).all(axis=0)
        median = np.nanmedian(np.where(nowhere, 0.0, known), axis=0)
        filled = np.where(np.isnan(known), median, known)
        mean, std = filled.mean(axis=0), filled.std(axis=0)
        # Because the mean is rounded, a constant column has a tiny deviation without meaning.
        varies = std > 1e-9 * np.maximum(1e-6, np.abs(mean))
        scale = np.where(varies, 1.0 / np.where(varies, std, 1.0), 0.0)
        return cls(median=median, mean=mean, scale=scale)

    def apply(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        """(M, D) descriptors, scaled; every value is finite."""
        filled = np.where(_is_usable(values), values, self.median)
        scaled = (filled - self.mean) * self.scale
        return np.clip(scaled, -DESCRIPTOR_LIMIT, DESCRIPTOR_LIMIT)

    def targets(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """(M, D) float32 descriptors as shards hold them, finite or NaN, scaled; NaN stays: nobody is to predict the
        median instead."""
        # In float32, in place, and without a look for missing values, which NaN passes through: each block of the stream
        # goes through here.
        found = values - self.mean.astype(np.float32)
        found *= self.scale.astype(np.float32)
        clipped: NDArray[np.float32] = found.clip(-DESCRIPTOR_LIMIT, DESCRIPTOR_LIMIT, out=found)
        return clipped

    def to_json(self) -> dict[str, list[float]]:
        """As values of JSON."""
        return {name: value.tolist() for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> DescriptorScaling:
        """From what :meth:`to_json` gave, other keys allowed; KeyError, TypeError or ValueError for anything else."""
        values = {
            field.name: np.asarray(document[field.name], dtype=np.float64) for field in fields(cls)
        }
        return cls(**values)


def with_targets(block: MoleculeBlock, scaling: DescriptorScaling | None) -> MoleculeBlock:
    """The block with its descriptors scaled as targets of pretraining; unchanged without a scaling."""
    if scaling is None:
        return block
    return replace(block, descriptors=scaling.targets(block.descriptors))


def _is_usable(values: NDArray[np.floating]) -> NDArray[np.bool_]:
    # In float64, as the limit itself is a float32.
    return np.abs(values.astype(np.float64)) <= float(np.finfo(np.float32).max)
