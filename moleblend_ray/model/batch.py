"""One micro-batch of molecules as padded tensors, plus the indices that pack away the padding.

Shape legend: B molecules, N atoms of the largest molecule, T = N + 1 tokens (graph token first),
A real atoms of all molecules together, S = A + B real tokens, L hops of a bond path.

Atoms are padded only where pairs need a rectangle; everything that is done atom by atom runs on the A or S
packed rows. All index tensors are made on the CPU from ``num_atoms``, so that no forward pass has to ask the
accelerator for a size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moleblend_ray.data.batch import SECTIONS, MicroBatch, section_begins
from moleblend_ray.relations.topology import HOP_BITS, HOP_MASK
from moleblend_ray.vocabulary import NUM_HOPS

# As torch has no unsigned shifts, path words are read as int32.
_TORCH_TYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.uint32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.bool_): torch.bool,
}


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
        """Copy the buffer of ``micro`` to ``device``, view its arrays there and pad them.

        Two transfers, whatever the number of molecules: the buffer as it is, and the index tensors.
        """
        device = torch.device(device)
        num_atoms = micro.num_atoms.astype(np.int64)
        B, N = len(num_atoms), int(num_atoms.max())
        first_atom = np.cumsum(num_atoms) - num_atoms
        molecule_of_atom = np.repeat(np.arange(B), num_atoms)
        atom_rank = np.arange(len(molecule_of_atom)) - first_atom[molecule_of_atom]
        molecule_of_token = np.repeat(np.arange(B), num_atoms + 1)
        graph_token = first_atom + np.arange(B)
        token_rank = np.arange(len(molecule_of_token)) - graph_token[molecule_of_token]
        indices = _send_indices(
            device,
            molecule_ids=micro.molecule_ids,
            num_atoms=num_atoms,
            atom_index=molecule_of_atom * N + atom_rank,
            token_index=molecule_of_token * (N + 1) + token_rank,
            token_molecule=molecule_of_token,
            atom_token=np.arange(len(molecule_of_atom)) + molecule_of_atom + 1,
            graph_token=graph_token,
        )
        arrays = _send_arrays(micro, device)
        atom_mask = torch.arange(N, device=device) < indices["num_atoms"][:, None]
        pair_mask = atom_mask[:, :, None] & atom_mask[:, None, :]
        known = arrays["position_mask"]
        # Missing coordinates may be stored as anything, NaN included; zero keeps the arithmetic finite.
        positions = arrays["positions"].masked_fill(~known[:, None], 0.0)
        return cls(
            step=micro.step,
            atom_mask=atom_mask,
            atom_features=_spread(arrays["atom_features"], atom_mask),
            degrees=_spread(arrays["degrees"], atom_mask),
            positions=_spread(positions, atom_mask),
            position_mask=_spread(known, atom_mask),
            spd=_spread(arrays["spd"], pair_mask),
            path_codes=_path_codes(_spread(arrays["path_words"], pair_mask)),
            **indices,
        )

    def to(self, device: torch.device | str) -> MoleculeBatch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell CUDA's allocator that ``stream`` uses the tensors, which another stream has made."""
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), Tensor):
                value.record_stream(stream)

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


def _send(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A copy of a one-dimensional array on ``device``."""
    # Received buffers are read-only, which torch does not know; page-locked memory is sent while the CPU goes on.
    staged = torch.empty(
        array.shape, dtype=_TORCH_TYPES[array.dtype], pin_memory=device.type == "cuda"
    )
    staged.numpy()[:] = array
    return staged.to(device, non_blocking=True)


def _send_indices(device: torch.device, **arrays: npt.NDArray[np.int64]) -> dict[str, Tensor]:
    """One-dimensional arrays by one transfer."""
    sent = _send(np.concatenate(list(arrays.values())), device)
    parts = torch.split(sent, [len(array) for array in arrays.values()])
    return dict(zip(arrays, parts, strict=True))


def _send_arrays(micro: MicroBatch, device: torch.device) -> dict[str, Tensor]:
    """The arrays of ``micro`` as views of its buffer on ``device``; ``path_words`` as int32, of which it uses 30 bits."""
    buffer = _send(micro.payload, device)
    arrays = {}
    for section, begin in zip(SECTIONS, section_begins(micro), strict=True):
        array = getattr(micro, section.name)
        view = buffer[begin : begin + array.nbytes].view(_TORCH_TYPES[section.dtype])
        arrays[section.name] = view.view(array.shape)
    return arrays


def _path_codes(words: Tensor) -> Tensor:
    """Path words (...) as the bond codes (..., L) uint8 of their hops."""
    shifts = torch.arange(0, HOP_BITS * NUM_HOPS, HOP_BITS, dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts & HOP_MASK).to(torch.uint8)


def _spread(packed: Tensor, mask: Tensor) -> Tensor:
    """Rows of ``packed`` into the True entries of ``mask``, in row-major order; zero elsewhere."""
    trailing = packed.shape[1:]
    full = mask.reshape(*mask.shape, *(1 for _ in trailing)).expand(*mask.shape, *trailing)
    return torch.zeros(full.shape, dtype=packed.dtype, device=packed.device).masked_scatter(
        full, packed
    )
