"""How often each circular atom environment occurs in a molecule: the pretraining target of the graph token.

An environment of radius r is an atom with everything within r bonds of it, as in extended-connectivity fingerprints
(Rogers and Hahn, "Extended-Connectivity Fingerprints", J. Chem. Inf. Model. 2010). Its identifier starts as a hash of
the atom's own codes; for each further radius it is hashed with the identifiers of the neighbours and the bonds to them.
Environments are counted, not only marked as present, and equal sets of atoms are not merged. Everything is computed
from the batch on its device; nothing is stored with the data.

Shape legend: B molecules, N atoms (padded), K bins.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.vocabulary import NUM_BOND_CODES

MAX_RADIUS: Final = 2
"""Radius of the largest environments, in bonds: 0, 1 and 2 are counted, as in ECFP4."""

CHIRALITY_COLUMN: Final = 1
"""Column of the atom codes that is left out, because chirality codes depend on the order of the neighbours."""

# Odd 64-bit constants of SplitMix64 (Steele et al., OOPSLA 2014) as signed numbers; products wrap around.
_STEP: Final = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX: Final = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def environment_counts(batch: MoleculeBatch, num_bins: int) -> Tensor:
    """(B, K) float32: environments of radius 0 to ``MAX_RADIUS`` of all atoms, folded into ``num_bins`` bins.

    Independent of the numbering of the atoms, of padding and of the device.
    """
    identifiers = _atom_identifiers(batch)
    bins = [identifiers]
    bonds = torch.where(batch.spd == 1, batch.path_codes[..., 0], 0)
    factors = _bond_factors(bonds.device)[bonds.int()]
    for radius in range(1, MAX_RADIUS + 1):
        # A sum does not depend on the order of the neighbours. Multiplying hashed terms by random factors (Carter and
        # Wegman's multilinear hash) takes two operations for each pair of atoms; hashing each pair took ten times as
        # long.
        around = (factors * _mix(identifiers)[:, None, :]).sum(2)
        identifiers = _mix(_mix(identifiers + radius) + around)
        bins.append(identifiers)
    found = torch.stack(bins, 2).remainder(num_bins).flatten(1)
    weight = batch.atom_mask.float()[:, :, None].expand(-1, -1, len(bins)).flatten(1)
    return weight.new_zeros(len(found), num_bins).scatter_add(1, found, weight)


def _atom_identifiers(batch: MoleculeBatch) -> Tensor:
    """(B, N) int64: a hash of the atom codes."""
    codes = batch.atom_features.long()
    hashed = torch.zeros_like(codes[..., 0])
    for column in range(codes.shape[-1]):
        if column != CHIRALITY_COLUMN:
            hashed = _mix(hashed + (codes[..., column] + 1) * _STEP)
    return hashed


@lru_cache
def _bond_factors(device: torch.device) -> Tensor:
    """(61,) int64: an odd factor for each bond code, 0 for no bond.

    Cached for each device, which saves more than a dozen kernel launches in each step.
    """
    codes = torch.arange(NUM_BOND_CODES, device=device)
    return (_mix(codes * _STEP) | 1).masked_fill(codes == 0, 0)


def _mix(value: Tensor) -> Tensor:
    """The finalizer of SplitMix64, for int64 numbers read as unsigned."""
    value = (value ^ _shifted(value, 30)) * _MIX[0]
    value = (value ^ _shifted(value, 27)) * _MIX[1]
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's ``>>`` copies the sign bit."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
