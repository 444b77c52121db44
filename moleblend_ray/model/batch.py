"""One micro-batch of molecules as padded tensors, plus the indices that pack away the padding.

Shape legend: B molecules, N atoms of the largest molecule, T = N + 1 tokens (graph token first),
A real atoms of all molecules together, S = A + B real tokens, L hops of a bond path.

Atoms are padded only where pairs need a rectangle; everything that is done atom by atom runs on the A or S
packed rows. All index tensors are made on the CPU from ``num_atoms``, so that no forward pass has to ask the
accelerator for a size.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from moleblend_ray.data.batch import MicroBatch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MoleculeBatch:
    """The molecules of one forward pass. Values of padding entries are undefined unless stated."""

    step: int
    """Optimizer step these molecules belong to; keys the random draws of blending."""
    molecule_ids: Tensor
    """(B,) int64, position of the molecule in its data set; keys the random draws of blending."""
    num_atoms: Tensor
    """(B,) int64."""
    atom_mask: Tensor
    """(B, N) bool, True for real atoms."""
    atom_features: Tensor
    """(B, N, 9) uint8, OGB atom codes; padding is 0."""
    degrees: Tensor
    """(B, N) uint8, number of bonded neighbours in the graph; padding is 0."""
    positions: Tensor
    """(B, N, 3) float32, angstrom; exactly 0 where position_mask is False."""
    position_mask: Tensor
    """(B, N) bool, True for real atoms whose coordinates are known."""
    spd: Tensor
    """(B, N, N) uint8, shortest-path distance in bonds; 255 in different fragments; padding is 0."""
    path_codes: Tensor
    """(B, N, N, L) uint8, bond code of each hop from atom a to atom b, 0 for no hop; padding is 0."""
    atom_index: Tensor
    """(A,) int64, row of each real atom in the flattened (B * N) rectangle."""
    token_index: Tensor
    """(S,) int64, row of each real token in the flattened (B * T) rectangle."""
    token_molecule: Tensor
    """(S,) int64, molecule of each real token."""
    atom_token: Tensor
    """(A,) int64, packed token row of each real atom."""
    graph_token: Tensor
    """(B,) int64, packed token row of each molecule's graph token."""

    @classmethod
    def from_micro_batch(
        cls, micro: MicroBatch, device: torch.device | str = "cpu"
    ) -> MoleculeBatch:
        """Copy the packed arrays of ``micro`` to ``device`` and pad them there."""
        device = torch.device(device)
        num_atoms = micro.num_atoms.astype(np.int64)
        B, N = len(num_atoms), int(num_atoms.max())
        first_atom = np.cumsum(num_atoms) - num_atoms
        molecule_of_atom = np.repeat(np.arange(B), num_atoms)
        atom_rank = np.arange(len(molecule_of_atom)) - first_atom[molecule_of_atom]
        molecule_of_token = np.repeat(np.arange(B), num_atoms + 1)
        graph_token = first_atom + np.arange(B)
        token_rank = np.arange(len(molecule_of_token)) - graph_token[molecule_of_token]

        sizes = _send(num_atoms, device)
        atom_mask = torch.arange(N, device=device) < sizes[:, None]
        pair_mask = atom_mask[:, :, None] & atom_mask[:, None, :]
        known = _send(micro.position_mask, device)
        # Missing coordinates may be stored as anything, NaN included; zero keeps the arithmetic finite.
        positions = _send(micro.positions, device).masked_fill(~known[:, None], 0.0)
        return cls(
            step=micro.step,
            molecule_ids=_send(micro.molecule_ids, device),
            num_atoms=sizes,
            atom_mask=atom_mask,
            atom_features=_spread(_send(micro.atom_features, device), atom_mask),
            degrees=_spread(_send(micro.degrees, device), atom_mask),
            positions=_spread(positions, atom_mask),
            position_mask=_spread(known, atom_mask),
            spd=_spread(_send(micro.spd, device), pair_mask),
            path_codes=_spread(_send(micro.path_codes, device), pair_mask),
            atom_index=_send(molecule_of_atom * N + atom_rank, device),
            token_index=_send(molecule_of_token * (N + 1) + token_rank, device),
            token_molecule=_send(molecule_of_token, device),
            atom_token=_send(np.arange(len(molecule_of_atom)) + molecule_of_atom + 1, device),
            graph_token=_send(graph_token, device),
        )

    def to(self, device: torch.device | str) -> MoleculeBatch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    @property
    def num_molecules(self) -> int:
        """B."""
        return self.atom_mask.shape[0]

    @property
    def max_atoms(self) -> int:
        """N."""
        return self.atom_mask.shape[1]

    @property
    def pair_mask(self) -> Tensor:
        """(B, N, N) bool, True where both atoms are real."""
        return self.atom_mask[:, :, None] & self.atom_mask[:, None, :]

    @property
    def pair_position_mask(self) -> Tensor:
        """(B, N, N) bool, True where both atoms have coordinates."""
        return self.position_mask[:, :, None] & self.position_mask[:, None, :]

    def pack_atoms(self, padded: Tensor) -> Tensor:
        """(B, N, ...) to the (A, ...) real atoms."""
        return padded.flatten(0, 1).index_select(0, self.atom_index)

    def pad_atoms(self, packed: Tensor) -> Tensor:
        """(A, ...) to (B, N, ...), padding rows 0."""
        B, N = self.atom_mask.shape
        rectangle = packed.new_zeros((B * N, *packed.shape[1:]))
        filled = rectangle.index_copy(0, self.atom_index, packed)
        return filled.view(B, N, *packed.shape[1:])

    def pack_tokens(self, padded: Tensor) -> Tensor:
        """(B, T, ...) to the (S, ...) real tokens."""
        return padded.flatten(0, 1).index_select(0, self.token_index)

    def pad_tokens(self, packed: Tensor) -> Tensor:
        """(S, ...) to (B, T, ...), padding rows 0."""
        B, T = self.num_molecules, self.max_atoms + 1
        rectangle = packed.new_zeros((B * T, *packed.shape[1:]))
        filled = rectangle.index_copy(0, self.token_index, packed)
        return filled.view(B, T, *packed.shape[1:])


def _send(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    # Views of a received buffer are read-only and unaligned; torch wants neither, and the copy is small.
    return torch.from_numpy(np.array(array, order="C")).to(device, non_blocking=True)


def _spread(packed: Tensor, mask: Tensor) -> Tensor:
    """Rows of ``packed`` into the True entries of ``mask``, in row-major order; zero elsewhere."""
    trailing = packed.shape[1:]
    full = mask.reshape(*mask.shape, *(1 for _ in trailing)).expand(*mask.shape, *trailing)
    return torch.zeros(full.shape, dtype=packed.dtype, device=packed.device).masked_scatter(
        full, packed
    )
