"""One micro-batch of molecules as padded tensors, and the indices that remove the padding.

Shape legend: B molecules, N atoms of the largest molecule, T = N + 1 tokens (graph token first),
A real atoms of all molecules together, S = A + B real tokens, L hops of a bond path.

Atoms are padded only where pairs need a rectangle; computations for single atoms or tokens run on the A or S packed
rows. All index tensors are made on the CPU, so that no forward pass has to ask the accelerator for a size.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moleblend_ray.compilation import kernel
from moleblend_ray.data.batches.batch import MicroBatch, build_micro_batch
from moleblend_ray.data.dataset.block import NUM_ATOM_FEATURES, block_from_table
from moleblend_ray.errors import DataError
from moleblend_ray.relations.topology import HOP_BITS, HOP_MASK
from moleblend_ray.vocabulary import NUM_HOPS

if TYPE_CHECKING:  # benchmarks of the model need no pyarrow
    import pyarrow as pa

_TORCH_TYPES: Final = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float16): torch.float16,
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.bool_): torch.bool,
}
_SMALLEST_TILE: Final = 16
"""Smallest number of rows of a tensor-core matrix product."""

_MOST_GROUPS: Final = 8
"""Most groups of a batch: each costs a kernel launch. Sorted molecules need one for each power of two, so fewer."""

# Unsigned as the path words are: with mixed signs Numba would compute in floating point.
_HOP_BITS: Final = np.uint32(HOP_BITS)
_HOP_MASK: Final = np.uint32(HOP_MASK)


class SizeGroup(NamedTuple):
    """Neighbouring molecules of similar size."""

    first: int
    """Number of the first molecule in the batch."""
    molecules: int
    """Number of molecules."""
    tile: int
    """Power of two, at least 16 and at least the tokens of each molecule."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MoleculeBatch:
    """The molecules of one forward pass. Values of padding entries are undefined unless stated."""

    step: int
    """Optimizer step these molecules belong to; part of the key of the random draws of blending."""
    molecule_ids: Tensor
    """(B,) int64, position of each molecule within its split; part of the key of the random draws of blending."""
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
    descriptors: Tensor
    """(B, D) float16, targets of pretraining, NaN where unknown; (0, D) if the molecules have none."""
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
    size_groups: tuple[SizeGroup, ...]
    """All molecules in order, in groups of similar size, for kernels that hold a whole molecule in a tile."""

    @classmethod
    def from_table(cls, table: pa.Table, device: torch.device | str = "cpu") -> MoleculeBatch:
        """The rows of a shard, or of a part of one, in their order, each with its first conformer if it has one.

        DataError if there are none, or if the columns are not those of a shard.
        """
        if not len(table):
            raise DataError(
                "expected rows of a shard, found none: a batch has at least one molecule"
            )
        block = block_from_table(table, np.arange(len(table)))
        return cls.from_micro_batch(build_micro_batch(block), device)

    @classmethod
    def from_micro_batch(
        cls, micro: MicroBatch, device: torch.device | str = "cpu"
    ) -> MoleculeBatch:
        """Pad the arrays of ``micro`` on the host and copy them to ``device`` in one transfer."""
        device = torch.device(device)
        B, A, N = len(micro), len(micro.positions), int(micro.num_atoms.max())
        shapes: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
            "molecule_ids": (np.int64, (B,)),
            "num_atoms": (np.int64, (B,)),
            "graph_token": (np.int64, (B,)),
            "atom_index": (np.int64, (A,)),
            "atom_token": (np.int64, (A,)),
            "token_index": (np.int64, (A + B,)),
            "token_molecule": (np.int64, (A + B,)),
            "positions": (np.float32, (B, N, 3)),
            "descriptors": (np.float16, micro.descriptors.shape),
            "atom_mask": (np.bool_, (B, N)),
            "position_mask": (np.bool_, (B, N)),
            "atom_features": (np.uint8, (B, N, NUM_ATOM_FEATURES)),
            "degrees": (np.uint8, (B, N)),
            "spd": (np.uint8, (B, N, N)),
            "path_codes": (np.uint8, (B, N, N, NUM_HOPS)),
        }
        staging = _Staging(shapes, device)
        host = staging.arrays
        host["molecule_ids"][:] = micro.molecule_ids
        host["num_atoms"][:] = micro.num_atoms
        host["descriptors"][:] = micro.descriptors
        _index(
            N,
            micro.num_atoms,
            *(host[name] for name in ("graph_token", "atom_index", "atom_token")),
            *(host[name] for name in ("token_index", "token_molecule")),
        )
        _pad_atoms(
            micro.num_atoms,
            (micro.positions, micro.position_mask, micro.atom_features, micro.degrees),
            *(host[name] for name in ("positions", "atom_mask", "position_mask")),
            *(host[name] for name in ("atom_features", "degrees")),
        )
        _pad_pairs(micro.num_atoms, micro.spd, micro.path_words, host["spd"], host["path_codes"])
        return cls(step=micro.step, size_groups=size_groups(micro.num_atoms), **staging.send())

    def to(self, device: torch.device | str) -> MoleculeBatch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell CUDA's allocator that ``stream`` uses the tensors, which were made on another stream."""
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
        rectangle.index_copy_(0, self.atom_index, packed)
        return rectangle.view(B, N, *packed.shape[1:])

    def sum_atoms(self, packed: Tensor) -> Tensor:
        """(A, ...) to the (B, ...) sums over the atoms of each molecule."""
        sums = packed.new_zeros((self.num_molecules, *packed.shape[1:]))
        return sums.index_add(0, self.token_molecule[self.atom_token], packed)

    def without_coordinates(self) -> MoleculeBatch:
        """The same molecules as if their coordinates were unknown."""
        return dataclasses.replace(
            self,
            positions=torch.zeros_like(self.positions),
            position_mask=torch.zeros_like(self.position_mask),
        )

    def without_atom(self, molecule: Tensor, atom: Tensor) -> MoleculeBatch:
        """V molecules: ``molecule`` (V,) int64 of this batch, each without its ``atom`` (V,) int64; both on the CPU.

        All else stays as in the whole molecule: the number of neighbours of the other atoms, and paths also through the absent atom.
        Each molecule must have at least two atoms.
        """
        device = self.atom_mask.device
        num_atoms = self.num_atoms.cpu()[molecule] - 1
        N = int(num_atoms.max())
        rank = torch.arange(N)
        kept = (rank + (rank >= atom[:, None])).to(device)
        of = molecule.to(device)
        rows, pairs = (of[:, None], kept), (of[:, None, None], kept[:, :, None], kept[:, None, :])
        of_atoms = ("atom_features", "degrees", "positions", "position_mask")
        changed: dict[str, Any] = {
            "molecule_ids": self.molecule_ids[of],
            "num_atoms": num_atoms.to(device),
            "atom_mask": (rank < num_atoms[:, None]).to(device),
            "descriptors": self.descriptors[of] if len(self.descriptors) else self.descriptors,
            "size_groups": size_groups(num_atoms.numpy()),
            **{name: getattr(self, name)[rows] for name in of_atoms},
            **{name: getattr(self, name)[pairs] for name in ("spd", "path_codes")},
            **_indices(num_atoms.numpy(), N, device),
        }
        return dataclasses.replace(self, **changed)

    def pack_tokens(self, padded: Tensor) -> Tensor:
        """(B, T, ...) to the (S, ...) real tokens."""
        return padded.flatten(0, 1).index_select(0, self.token_index)

    def pad_tokens(self, packed: Tensor) -> Tensor:
        """(S, ...) to (B, T, ...), padding rows 0."""
        B, T = self.num_molecules, self.max_atoms + 1
        rectangle = packed.new_zeros((B * T, *packed.shape[1:]))
        rectangle.index_copy_(0, self.token_index, packed)
        return rectangle.view(B, T, *packed.shape[1:])


def size_groups(num_atoms: NDArray[np.integer]) -> tuple[SizeGroup, ...]:
    """Groups of neighbouring molecules with tiles of one size, from their ``num_atoms`` (B,).

    A molecule has one token more than atoms. If the molecules are in no order of size, so that there would be too many
    groups, one group holds all.
    """
    tiles = 1 << np.ceil(np.log2(np.maximum(num_atoms + 1, _SMALLEST_TILE))).astype(np.int64)
    begins = [0, *(np.flatnonzero(np.diff(tiles)) + 1).tolist()]
    if len(begins) > _MOST_GROUPS:
        return (SizeGroup(0, len(tiles), int(tiles.max())),)
    ends = [*begins[1:], len(tiles)]
    return tuple(
        SizeGroup(begin, end - begin, int(tiles[begin]))
        for begin, end in zip(begins, ends, strict=True)
    )


def _indices(num_atoms: NDArray[np.int64], N: int, device: torch.device) -> dict[str, Tensor]:
    """The index tensors of :class:`MoleculeBatch` for molecules of ``num_atoms`` (B,), at most ``N``."""
    B, A = len(num_atoms), int(num_atoms.sum())
    lengths = {
        "graph_token": B,
        "atom_index": A,
        "atom_token": A,
        "token_index": A + B,
        "token_molecule": A + B,
    }
    arrays = {name: np.empty(length, np.int64) for name, length in lengths.items()}
    _index(N, num_atoms, *arrays.values())
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


class _Staging:
    """Zeroed arrays in one buffer, one after the other, so that they are transferred together."""

    def __init__(
        self,
        shapes: dict[str, tuple[type[np.generic], tuple[int, ...]]],
        device: torch.device,
    ) -> None:
        """``shapes``: dtype and shape of each array; items of 8 bytes first, then of 4, of 2 and of 1, for alignment."""
        self._device = device
        self._shapes = {name: shape for name, (_, shape) in shapes.items()}
        dtypes = [np.dtype(dtype) for dtype, _ in shapes.values()]
        sizes = [
            math.prod(shape) * dtype.itemsize
            for (_, shape), dtype in zip(shapes.values(), dtypes, strict=True)
        ]
        ends = list(itertools.accumulate(sizes))
        # From page-locked memory the copy runs in the background.
        self._buffer = torch.zeros(
            ends[-1], dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda"
        )
        host = self._buffer.numpy()
        self._parts = dict(zip(shapes, zip(dtypes, sizes, ends, strict=True), strict=True))
        self.arrays: dict[str, NDArray[Any]] = {
            name: host[end - size : end].view(dtype).reshape(self._shapes[name])
            for name, (dtype, size, end) in self._parts.items()
        }

    def send(self) -> dict[str, Tensor]:
        """The arrays as tensors on the device."""
        buffer = self._buffer.to(self._device, non_blocking=True)
        return {
            name: buffer[end - size : end].view(_TORCH_TYPES[dtype]).view(self._shapes[name])
            for name, (dtype, size, end) in self._parts.items()
        }


@kernel
def _index(  # type: ignore[no-untyped-def]
    most_atoms, num_atoms, graph_token, atom_index, atom_token, token_index, token_molecule
):
    """Fill the index arrays of :class:`MoleculeBatch`."""
    atom = 0
    for molecule in range(len(num_atoms)):
        token = atom + molecule
        graph_token[molecule] = token
        token_index[token] = molecule * (most_atoms + 1)
        token_molecule[token] = molecule
        for rank in range(num_atoms[molecule]):
            token += 1
            atom_index[atom] = molecule * most_atoms + rank
            atom_token[atom] = token
            token_index[token] = molecule * (most_atoms + 1) + rank + 1
            token_molecule[token] = molecule
            atom += 1


@kernel
def _pad_atoms(  # type: ignore[no-untyped-def]
    num_atoms, packed, positions, atom_mask, position_mask, atom_features, degrees
):
    """Copy the rows of the ``packed`` arrays (A, ...) into the zeroed (B, N, ...) ones."""
    packed_positions, packed_mask, packed_features, packed_degrees = packed
    atom = 0
    for molecule in range(len(num_atoms)):
        for rank in range(num_atoms[molecule]):
            atom_mask[molecule, rank] = True
            degrees[molecule, rank] = packed_degrees[atom]
            for column in range(packed_features.shape[1]):
                atom_features[molecule, rank, column] = packed_features[atom, column]
            # Missing coordinates may hold any value, even NaN; zero keeps the arithmetic finite.
            if packed_mask[atom]:
                position_mask[molecule, rank] = True
                for axis in range(3):
                    positions[molecule, rank, axis] = packed_positions[atom, axis]
            atom += 1


@kernel
def _pad_pairs(num_atoms, packed_spd, words, spd, path_codes):  # type: ignore[no-untyped-def]
    """Copy the packed pair arrays (P,) into the zeroed (B, N, N, ...) ones; path words as their bond codes."""
    pair = 0
    for molecule in range(len(num_atoms)):
        n = num_atoms[molecule]
        for a in range(n):
            for b in range(n):
                spd[molecule, a, b] = packed_spd[pair]
                word = words[pair]
                for hop in range(NUM_HOPS):
                    path_codes[molecule, a, b, hop] = word & _HOP_MASK
                    word >>= _HOP_BITS
                pair += 1
