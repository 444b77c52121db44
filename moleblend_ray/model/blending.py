"""Which relation each atom pair shows, which feature each atom shows, and the noise on coordinates.

No random generator with a state is involved: every number is Philox4x32-10 (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", SC 2011) of a counter that says what the number is for. So it is the same on any device, in any
batch and after any restart:

    word 0   first atom << 16 | second atom          word 1   molecule id, bits 0 to 31
    word 2   purpose << 24 | id, bits 32 to 55       word 3   optimizer step
    key      seed, low and high 32 bits

Shape legend: B molecules, N atoms (padded).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import torch
from torch import Tensor

from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.config import BlendConfig
from moleblend_ray.model.device import on_gpu
from moleblend_ray.model.fused import uses_triton

__all__ = ["AtomFeature", "Blend", "BlendConfig", "Relation", "View", "draw_blend", "philox"]

_MASK: Final = 0xFFFFFFFF
_ROUND_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS: Final = (0x9E3779B9, 0xBB67AE85)
_TWO_TO_32: Final = float(1 << 32)


class Relation(IntEnum):
    """What a pair can show; values of ``Blend.pair_choice``."""

    SPD = 0
    EDGE = 1
    GEOMETRY = 2


class AtomFeature(IntEnum):
    """What an atom can show besides its categories; values of ``Blend.atom_choice``."""

    DEGREE = 0
    GEOMETRY = 1


class View(IntEnum):
    """What a molecule shows; values of ``Blend.view``, in the order of ``BlendConfig.view_probabilities``."""

    BLENDED = 0
    TOPOLOGY = 1
    GEOMETRY = 2
    ALL = 3


_SHOW_TOPOLOGY: Final = (View.TOPOLOGY, View.ALL)
_SHOW_GEOMETRY: Final = (View.GEOMETRY, View.ALL)


class _Purpose(IntEnum):
    PAIR_CHOICE = 0
    ATOM_CHOICE = 1
    NOISE = 2
    VIEW = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Blend:
    """The random choices for one batch. Padding entries are undefined."""

    pair_choice: Tensor
    """(B, N, N) uint8, the Relation that the pair [a, b] of a blended molecule shows."""
    atom_choice: Tensor
    """(B, N) uint8, the AtomFeature that an atom of a blended molecule shows."""
    noise: Tensor
    """(B, N, 3) float32, angstrom, added to the positions; 0 where they are missing."""
    view: Tensor | None = None
    """(B,) uint8, a View; None: all molecules are blended."""

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell CUDA's allocator that ``stream`` uses the tensors, which were made on another stream."""
        for values in (self.pair_choice, self.atom_choice, self.noise, self.view):
            if values is not None:
                values.record_stream(stream)

    def shows_pair(self, relation: Relation) -> Tensor:
        """(B, N, N) bool: pairs that show ``relation``."""
        return self._shown(self.pair_choice, relation, geometry=relation == Relation.GEOMETRY)

    def shown_relations(self) -> Tensor:
        """(B, N, N) uint8: bit r is set where a pair shows relation r."""
        if self.view is None:
            return torch.ones_like(self.pair_choice) << self.pair_choice
        spd, edge, geometry = (
            self.shows_pair(relation).to(torch.uint8) << relation for relation in Relation
        )
        return spd | edge | geometry

    def shows_atom(self, feature: AtomFeature) -> Tensor:
        """(B, N) bool: atoms that show ``feature``."""
        return self._shown(self.atom_choice, feature, geometry=feature == AtomFeature.GEOMETRY)

    def _shown(self, choice: Tensor, wanted: int, *, geometry: bool) -> Tensor:
        chosen = choice == wanted
        if self.view is None:
            return chosen
        view = self.view.view(-1, *(1,) * (choice.ndim - 1))
        first, second = _SHOW_GEOMETRY if geometry else _SHOW_TOPOLOGY
        return torch.where(view == View.BLENDED, chosen, (view == first) | (view == second))


def philox(counter: tuple[Tensor, ...], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of four counter words (broadcastable int64 tensors, each 0 to 2**32 - 1)."""
    if on_gpu(counter[0]) and uses_triton():
        from moleblend_ray.model.philox_kernels import philox_words  # needs Triton

        return philox_words(counter, seed)
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # Products wrap modulo 2**64; a right shift copies the sign bit, which the mask removes.
        p0, p1 = c0 * _ROUND_MULTIPLIERS[0], c2 * _ROUND_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def draw_blend(batch: MoleculeBatch, config: BlendConfig, seed: int) -> Blend:
    """The choices and the noise of ``batch``: a function of seed, step, molecule ids and atoms only."""
    return Blend(
        pair_choice=_pair_choice(batch, config, seed),
        atom_choice=_atom_choice(batch, config, seed),
        noise=_noise(batch, config, seed),
        view=_view(batch, config, seed),
    )


def only_geometry(batch: MoleculeBatch) -> Blend:
    """Every pair and atom shows its 3D relation, without noise; those without coordinates show nothing."""
    return Blend(
        pair_choice=torch.full_like(batch.spd, Relation.GEOMETRY),
        atom_choice=torch.full_like(batch.degrees, AtomFeature.GEOMETRY),
        noise=torch.zeros_like(batch.positions),
    )


def _pair_choice(batch: MoleculeBatch, config: BlendConfig, seed: int) -> Tensor:
    B, N = batch.atom_mask.shape
    atom = torch.arange(N, device=batch.atom_mask.device)
    pair = (atom[:, None] << 16) | atom[None, :]
    ids = batch.molecule_ids[:1] * 0 if config.per_batch else batch.molecule_ids
    word, *_ = philox(_counter(_Purpose.PAIR_CHOICE, batch.step, ids[:, None, None], pair), seed)
    uniform = word.double() / _TWO_TO_32
    # Normalized: if rounding left the sum below 1, a last relation of probability 0 could still be drawn.
    spd, edge, _ = (p / math.fsum(config.pair_probabilities) for p in config.pair_probabilities)
    choice = (uniform >= spd).to(torch.uint8) + (uniform >= spd + edge).to(torch.uint8)
    if config.per_batch:
        return choice.expand(B, N, N)
    # Without coordinates the same number chooses among the two graph relations, by the ratio of their probabilities.
    spd_share = spd / (spd + edge) if spd + edge > 0.0 else 0.5
    graph_choice = (uniform >= spd_share).to(torch.uint8)
    return torch.where(batch.pair_position_mask, choice, graph_choice)


def _atom_choice(batch: MoleculeBatch, config: BlendConfig, seed: int) -> Tensor:
    word, *_ = philox(_atom_counter(_Purpose.ATOM_CHOICE, batch), seed)
    threshold = config.atom_probabilities[0] / math.fsum(config.atom_probabilities)
    geometry = word.double() / _TWO_TO_32 >= threshold
    return (geometry & batch.position_mask).to(torch.uint8)


def _view(batch: MoleculeBatch, config: BlendConfig, seed: int) -> Tensor | None:
    blended, topology, geometry, _ = config.view_probabilities
    if blended >= 1.0:
        return None
    counter = _counter(_Purpose.VIEW, batch.step, batch.molecule_ids, batch.molecule_ids * 0)
    word, *_ = philox(counter, seed)
    uniform = word.double() / _TWO_TO_32 * math.fsum(config.view_probabilities)
    view = sum(
        (uniform >= edge).to(torch.uint8)
        for edge in itertools.accumulate((blended, topology, geometry))
    )
    assert isinstance(view, Tensor)
    whole = (batch.position_mask == batch.atom_mask).all(1)
    return view.masked_fill((view == View.GEOMETRY) & ~whole, View.TOPOLOGY)


def _noise(batch: MoleculeBatch, config: BlendConfig, seed: int) -> Tensor:
    words = philox(_atom_counter(_Purpose.NOISE, batch), seed)
    u0, u1, u2, u3 = (word.double() for word in words)
    # Box-Muller: (u + 1) / 2**32 lies in (0, 1], so the logarithm is finite.
    radius0 = (-2.0 * ((u0 + 1.0) / _TWO_TO_32).log()).sqrt()
    radius2 = (-2.0 * ((u2 + 1.0) / _TWO_TO_32).log()).sqrt()
    angle0, angle2 = 2 * math.pi * u1 / _TWO_TO_32, 2 * math.pi * u3 / _TWO_TO_32
    normal = torch.stack(
        [radius0 * angle0.cos(), radius0 * angle0.sin(), radius2 * angle2.cos()], -1
    )
    noise = (config.noise_std_angstrom * normal).float()
    return noise.masked_fill(~batch.position_mask[..., None], 0.0)


def _atom_counter(purpose: _Purpose, batch: MoleculeBatch) -> tuple[Tensor, ...]:
    atom = torch.arange(batch.max_atoms, device=batch.atom_mask.device)
    return _counter(purpose, batch.step, batch.molecule_ids[:, None], atom << 16)


def _counter(purpose: _Purpose, step: int, ids: Tensor, atoms: Tensor) -> tuple[Tensor, ...]:
    high = (int(purpose) << 24) | ((ids >> 32) & 0xFFFFFF)
    return atoms, ids & _MASK, high, torch.full_like(ids, step & _MASK)
