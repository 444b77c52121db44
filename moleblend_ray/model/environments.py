"""How often each circular atom environment occurs in a molecule: what the graph token is asked for in pretraining.

An environment of radius r is an atom with all that lies within r bonds of it, as in extended-connectivity fingerprints
(Rogers and Hahn, "Extended-Connectivity Fingerprints", J. Chem. Inf. Model. 2010): its identifier is a hash of the
atom's own codes, and then, radius by radius, of its identifier with those of its neighbours and the bonds to them. Environments
are counted, not only noted, and equal sets of atoms are not merged. Everything comes from the batch on its own device: no
prepared data holds it.

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
"""Bonds from the centre of the largest environment: radii 0, 1 and 2, as ECFP4 has."""

CHIRALITY_COLUMN: Final = 1
"""Of the atom codes: left out, as its codes depend on the order of the neighbours."""

# Odd 64-bit constants of SplitMix64 (Steele et al., OOPSLA 2014), as signed numbers; products wrap.
_STEP: Final = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX: Final = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def environment_counts(batch: MoleculeBatch, num_bins: int) -> Tensor:
    """(B, K) float32: environments of radius 0 to ``MAX_RADIUS`` of all atoms, folded into ``num_bins`` bins.

    The same for any numbering of the atoms, any padding and any device.
    """
    identifiers = _atom_identifiers(batch)
    bins = [identifiers]
    bonds = torch.where(batch.spd == 1, batch.path_codes[..., 0], 0)
    factors = _bond_factors(bonds.device)[bonds.int()]
    for radius in range(1, MAX_RADIUS + 1):
        # A sum does not depend on the order of the neighbours. Random factors of hashed terms (Carter and Wegman's multilinear
        # hash) leave two operations for each pair of atoms; to hash every pair took ten times as long.
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
    """(61,) int64: an odd factor for each bond code, 0 for no bond. Kept on its device: making it anew would make the host wait."""
    codes = torch.arange(NUM_BOND_CODES, device=device)
    return (_mix(codes * _STEP) | 1).masked_fill(codes == 0, 0)


def _mix(value: Tensor) -> Tensor:
    """SplitMix64's finalizer of int64 numbers, taken as unsigned."""
    value = (value ^ _shifted(value, 30)) * _MIX[0]
    value = (value ^ _shifted(value, 27)) * _MIX[1]
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's copies the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
