"""Micro-batches: molecules of similar size with all their relations, packed in one contiguous buffer.

Layout of a buffer (native little-endian): a header of ``int64`` words (``HEADER_FIELDS``), then the
``SECTIONS``, each starting at a multiple of 8 bytes. Reading a buffer copies nothing. Of a molecule with n atoms
it holds

====================  ==============  ==================
section               bytes           15 atoms
====================  ==============  ==================
molecule_ids          8               8
num_atoms             4               4
positions             12 n            180
position_mask         n               15
atom_features         9 n             135
degrees               n               15
spd                   n * n           225
path_words            4 n * n         900
====================  ==============  ==================

together 1,482 bytes and its share of a header of 80. The path words hold five bond codes of 6 bits each. Both
directions of a pair are kept: a path back is the path reversed, but its first five bonds are not.

Everything done atom by atom runs on the packed rows, without padding. Attention pads each molecule of a
micro-batch to the largest. The molecules of one (step, stream) are ordered by size before they are cut, so what
is padded depends on how many of these there are; share of token pairs that are padding, micro-batches of 64:

===================  =========  ==========  ======
of a (step, stream)  PCQM4Mv2   ZINC        QM9
===================  =========  ==========  ======
64                   28 %       50 %        4 %
128                  17 %       35 %        4 %
256                  10 %       22 %        4 %
1024                 3 %        6 %         1 %
64, cut in 16s       9 %        19 %        4 %
===================  =========  ==========  ======

With ``global_batch_size`` / ``num_streams`` equal to ``micro_batch_size`` there is nothing to order: fewer streams or
smaller micro-batches save attention work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moleblend_ray.data.block import NUM_ATOM_FEATURES, MoleculeBlock
from moleblend_ray.errors import DataError, check_all
from moleblend_ray.relations.topology import (
    check_bond_arrays,
    damaged_bonds,
    num_pairs,
    relate_molecule,
    unpack_path_words,
    workspace,
)
from moleblend_ray.vocabulary import NUM_HOPS

if TYPE_CHECKING:  # benchmarks of the model need no pyarrow
    import pyarrow as pa

    BufferLike: TypeAlias = bytes | memoryview | pa.Buffer | NDArray[np.uint8]

_MAGIC: Final = int.from_bytes(b"MOLBATCH", "little")
_VERSION: Final = 2
HEADER_FIELDS: Final = (
    "magic",
    "version",
    "num_bytes",
    "step",
    "stream",
    "index",
    "num_molecules",
    "num_atoms",
    "num_pairs",
    "num_hops",
)
_HEADER_BYTES: Final = 8 * len(HEADER_FIELDS)
_COUNTS: Final = [HEADER_FIELDS.index(name) for name in ("num_molecules", "num_atoms", "num_pairs")]


class Section(NamedTuple):
    """An array of a buffer."""

    name: str
    dtype: np.dtype[Any]
    rows: int
    """What it has a row for: 0 molecules, 1 atoms, 2 pairs."""
    width: int
    """Items of a row."""
    row_bytes: int
    """Bytes of a row."""


def _section(name: str, dtype: type[np.generic], rows: int, width: int) -> Section:
    kind: np.dtype[Any] = np.dtype(dtype)
    return Section(name, kind, rows, width, width * kind.itemsize)


SECTIONS: Final = (
    _section("molecule_ids", np.int64, 0, 1),
    _section("num_atoms", np.int32, 0, 1),
    _section("positions", np.float32, 1, 3),
    _section("position_mask", np.bool_, 1, 1),
    _section("atom_features", np.uint8, 1, NUM_ATOM_FEATURES),
    _section("degrees", np.uint8, 1, 1),
    _section("spd", np.uint8, 2, 1),
    _section("path_words", np.uint32, 2, 1),
)
"""The arrays of a buffer, in their order."""


def mean_molecule_bytes(atom_counts: Mapping[int, int]) -> float:
    """Bytes of a buffer that a molecule takes on average, from the number of molecules by their number of atoms."""
    num_molecules = max(1, sum(atom_counts.values()))
    rows: list[float] = [
        sum(count * atoms**power for atoms, count in atom_counts.items()) / num_molecules
        for power in range(3)
    ]
    return sum((rows[section.rows] * section.row_bytes for section in SECTIONS), 0.0)


_BLOCKS_PER_STREAM: Final = 6
# A block costs Ray some 20 ms of CPU time whatever its size: little beside the 100 ms that this one takes to build.
_BLOCK_BYTES: Final = 12 << 20
_MAX_BLOCK_STEPS: Final = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How micro-batches are made and how many processes make them."""

    micro_batch_size: int = 64
    """Molecules of a micro-batch: what one forward and backward pass sees."""

    steps_per_block: int | None = None
    """Optimizer steps whose micro-batches of one stream travel together as one Ray block; null: as many as give
    a block of about 12 MiB, less if six blocks of each stream would not fit into object_store_gib, at most 64 steps."""

    min_actors: int = 1
    """CPU actors that build micro-batches: fewest."""

    max_actors: int | None = None
    """CPU actors that build micro-batches: most; null: as many as the CPUs that the workers leave free. How many
    there are follows from the measured rates of building and training."""

    actor_cpus: float = 1.0
    """CPUs that each building actor reserves."""

    cache_bytes: int = 512 * 2**20
    """Bytes of decoded row groups that the building actors of a machine keep, together."""

    object_store_gib: float | None = None
    """Most memory of Ray's object store that micro-batches on their way take, in GiB over the whole cluster, besides
    the one block of each stream that is being trained on; null: three tenths of the store. Building waits while it
    is full."""

    random_rotation: bool = False
    """Rotate each conformer at random, anew each step, keyed by (seed, step, molecule id)."""

    def __post_init__(self) -> None:
        """Refuse sizes that make no stream."""
        check_all(
            *(
                (
                    getattr(self, name) >= 1,
                    f"{name}: expected at least 1, found {getattr(self, name)}",
                )
                for name in ("micro_batch_size", "min_actors", "cache_bytes")
            ),
            (
                self.steps_per_block is None or self.steps_per_block >= 1,
                f"steps_per_block: expected null or at least 1, found {self.steps_per_block}",
            ),
            (
                self.max_actors is None or self.max_actors >= self.min_actors,
                f"max_actors: expected null or at least min_actors ({self.min_actors}), found {self.max_actors}",
            ),
            (
                self.object_store_gib is None or self.object_store_gib > 0,
                f"object_store_gib: expected null or more than 0, found {self.object_store_gib}",
            ),
            (self.actor_cpus > 0, f"actor_cpus: expected more than 0, found {self.actor_cpus}"),
        )

    def block_steps(self, num_streams: int, step_bytes: float, budget: int) -> int:
        """Steps of a block, where one stream has ``step_bytes`` of each and the object store ``budget`` bytes for all."""
        if self.steps_per_block is not None:
            return self.steps_per_block
        block_bytes = min(_BLOCK_BYTES, budget / (_BLOCKS_PER_STREAM * num_streams))
        steps = min(max(1, int(block_bytes // step_bytes)), _MAX_BLOCK_STEPS)
        return 1 << steps.bit_length() - 1  # divides more numbers of steps


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """B molecules with A atoms and P ordered atom pairs in all; arrays are views of ``payload``."""

    step: int
    """Optimizer step this micro-batch belongs to."""

    stream: int
    """Stream of the data order it comes from."""

    index: int
    """Its place among the micro-batches of (step, stream); sizes ascend with it."""

    molecule_ids: NDArray[np.int64]
    """(B,) int64, position of each molecule within its split."""

    num_atoms: NDArray[np.int32]
    """(B,) int32."""

    atom_features: NDArray[np.uint8]
    """(A, 9) uint8 OGB codes, molecule-major."""

    degrees: NDArray[np.uint8]
    """(A,) uint8, neighbours in the kept graph."""

    positions: NDArray[np.float32]
    """(A, 3) float32, angstrom. Rows where ``position_mask`` is False are undefined."""

    position_mask: NDArray[np.bool_]
    """(A,) bool, True where the atom has coordinates."""

    spd: NDArray[np.uint8]
    """(P,) uint8, shortest-path distance in bonds; pair (a, b) of a molecule is row ``a * n + b`` of its part."""

    path_words: NDArray[np.uint32]
    """(P,) uint32, codes of the first five bonds from a to b, 6 bits each, the first the lowest; see
    :func:`unpack_path_words`."""

    payload: NDArray[np.uint8] = field(repr=False)
    """(num_bytes,) uint8, header and all arrays: what travels between processes."""

    def __len__(self) -> int:
        return len(self.molecule_ids)

    @property
    def path_codes(self) -> NDArray[np.uint8]:
        """(P, 5) uint8, code of the h-th bond from a to b; a copy."""
        return unpack_path_words(self.path_words)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """All micro-batches of one rank for one optimizer step."""

    step: int
    """Optimizer step."""

    micro_batches: tuple[MicroBatch, ...]
    """By stream, then by index."""


def num_micro_batches(num_molecules: int, micro_batch_size: int) -> int:
    """Micro-batches that ``num_molecules`` molecules of one (step, stream) are cut into."""
    return -(-num_molecules // micro_batch_size)


def build_micro_batches(
    block: MoleculeBlock, step: int, stream: int, micro_batch_size: int
) -> list[MicroBatch]:
    """Cut one (step, stream)'s molecules, ordered by size, into micro-batches of nearly equal counts.

    The result depends on the block alone; molecules of equal size keep their order.
    """
    return build_steps(block, range(step, step + 1), stream, micro_batch_size)


def build_steps(
    block: MoleculeBlock, steps: range, stream: int, micro_batch_size: int
) -> list[MicroBatch]:
    """The micro-batches of consecutive steps of one stream, whose molecules follow each other in ``block``.

    Each step has ``len(block) / len(steps)`` molecules and is cut as :func:`build_micro_batches` says.
    """
    size = len(block) // max(len(steps), 1)
    if size == 0 or size * len(steps) != len(block):
        raise DataError(
            f"{len(block)} molecules cannot be cut into {len(steps)} steps of equal, non-zero size "
            f"(steps {steps.start} to {steps.stop - 1}, stream {stream})"
        )
    # The last key counts most; lexsort is stable.
    order = np.lexsort((block.num_atoms, np.repeat(np.arange(len(steps)), size)))
    cuts = np.linspace(0, size, num_micro_batches(size, micro_batch_size) + 1).astype(np.int64)
    begins = (np.arange(len(steps))[:, None] * size + cuts[:-1]).reshape(-1)
    headers = _headers(steps, stream, len(cuts) - 1, begins, block.num_atoms[order])
    return _pack(block, order, begins, headers)


def _pack(
    block: MoleculeBlock,
    order: NDArray[np.int64],
    begins: NDArray[np.int64],
    headers: NDArray[np.int64],
) -> list[MicroBatch]:
    """The molecules at ``order``, in micro-batches that begin at ``begins`` of it, one behind the other in a buffer."""
    check_bond_arrays(block.num_atoms, block.num_bonds, block.bonds, block.bond_features)
    num_bytes = headers[:, HEADER_FIELDS.index("num_bytes")]
    ends = np.cumsum(num_bytes)
    # Zeros, so that the padding between sections is the same every time.
    buffer = np.zeros(int(ends[-1]) // 8, np.int64).view(np.uint8)
    wider = tuple(buffer.view(dtype) for dtype in (np.int64, np.int32, np.uint32, np.float32))
    sizes = (block.num_atoms, block.num_bonds)
    damaged = _pack_kernel(
        order,
        np.append(begins, len(block)),
        headers,
        (ends - num_bytes)[:, None] + _section_begins(headers[:, _COUNTS]),
        buffer,
        wider,
        (block.molecule_ids, *sizes, *(np.cumsum(n, dtype=np.int64) - n for n in sizes)),
        (block.positions, block.position_mask, block.atom_features),
        (block.bonds, block.bond_features),
        workspace(*sizes),
    )
    if damaged >= 0:
        raise damaged_bonds(int(damaged), *sizes, block.bonds, block.bond_features)
    cut = pairwise([0, *ends.tolist()])
    return [
        _view(buffer[begin:end], header)
        for (begin, end), header in zip(cut, headers.tolist(), strict=True)
    ]


def _headers(
    steps: range,
    stream: int,
    num_micro: int,
    begins: NDArray[np.int64],
    num_atoms: NDArray[np.int32],
) -> NDArray[np.int64]:
    """(micro-batches, fields) the headers of micro-batches that begin at ``begins`` of the ordered molecules."""
    atoms = num_atoms.astype(np.int64)
    headers = np.empty((len(begins), len(HEADER_FIELDS)), np.int64)
    columns: dict[str, Any] = {
        "magic": _MAGIC,
        "version": _VERSION,
        "num_bytes": 0,
        "step": np.repeat(np.arange(steps.start, steps.stop), num_micro),
        "stream": stream,
        "index": np.tile(np.arange(num_micro), len(steps)),
        "num_molecules": np.diff(begins, append=len(atoms)),
        "num_atoms": np.add.reduceat(atoms, begins),
        "num_pairs": np.add.reduceat(atoms * atoms, begins),
        "num_hops": NUM_HOPS,
    }
    for place, name in enumerate(HEADER_FIELDS):
        headers[:, place] = columns[name]
    headers[:, HEADER_FIELDS.index("num_bytes")] = _section_begins(headers[:, _COUNTS])[:, -1]
    return headers


def _section_begins(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Byte where each section begins, and last where the buffer ends, from (n, 3) molecules, atoms and pairs."""
    rows = counts[:, [section.rows for section in SECTIONS]]
    begins = np.full((len(counts), len(SECTIONS) + 1), _HEADER_BYTES, np.int64)
    row_bytes = np.array([section.row_bytes for section in SECTIONS], np.int64)
    begins[:, 1:] += np.cumsum(-(-rows * row_bytes // 8) * 8, axis=1)
    return begins


@njit(cache=True, nogil=True)
def _pack_kernel(  # type: ignore[no-untyped-def]
    order, begins, headers, sections, u8, wider, molecules, atoms, graph, space
):
    """Write headers and sections of all micro-batches; the first molecule with a damaged bond, or -1."""
    i64, i32, u32, f32 = wider
    molecule_ids, num_atoms, num_bonds, atom_starts, bond_starts = molecules
    positions, position_mask, atom_features = atoms
    bonds, bond_features = graph
    for micro in range(headers.shape[0]):
        section = sections[micro]
        header = (section[0] - 8 * headers.shape[1]) // 8
        i64[header : header + headers.shape[1]] = headers[micro]
        atom, pair = np.int64(0), np.int64(0)
        for place in range(begins[micro], begins[micro + 1]):
            molecule = order[place]
            slot = place - begins[micro]
            n = np.int64(num_atoms[molecule])
            i64[section[0] // 8 + slot] = molecule_ids[molecule]
            i32[section[1] // 4 + slot] = n
            source = atom_starts[molecule]
            for a in range(n):
                for axis in range(3):
                    f32[section[2] // 4 + 3 * (atom + a) + axis] = positions[source + a, axis]
                u8[section[3] + atom + a] = position_mask[source + a]
                for feature in range(NUM_ATOM_FEATURES):
                    u8[section[4] + NUM_ATOM_FEATURES * (atom + a) + feature] = atom_features[
                        source + a, feature
                    ]
            begin = bond_starts[molecule]
            end = begin + num_bonds[molecule]
            spd, words = section[6] + pair, section[7] // 4 + pair
            if not relate_molecule(
                n,
                bonds[begin:end],
                bond_features[begin:end],
                u8[spd : spd + n * n],
                u32[words : words + n * n],
                space,
            ):
                return molecule
            degrees = u8[section[5] + atom : section[5] + atom + n]
            for bond in range(begin, end):
                for side in range(2):
                    # Saturating, as `bond_degrees`.
                    degree = degrees[bonds[bond, side]]
                    degrees[bonds[bond, side]] = degree + (degree < 255)
            atom += n
            pair += n * n
    return -1


def unpack_micro_batch(buffer: BufferLike) -> MicroBatch:
    """The micro-batch that a payload holds, without copying; read-only if the buffer is."""
    payload = np.frombuffer(buffer, dtype=np.uint8)
    if payload.__array_interface__["data"][0] % 8:
        payload = payload.copy()
    micro = _view(payload, _read_header(payload))
    sizes = micro.num_atoms
    atoms, pairs = len(micro.degrees), len(micro.spd)
    if (
        sizes.min(initial=1) < 1
        or int(sizes.sum(dtype=np.int64)) != atoms
        or num_pairs(sizes) != pairs
    ):
        raise DataError(
            f"a micro-batch buffer (step {micro.step}, stream {micro.stream}) is damaged: the atom counts of its "
            f"molecules do not add up to {atoms} atoms and {pairs} pairs"
        )
    return micro


def _read_header(payload: NDArray[np.uint8]) -> list[int]:
    if len(payload) < _HEADER_BYTES:
        raise DataError(
            f"a micro-batch buffer has {len(payload)} bytes, fewer than its header of {_HEADER_BYTES}"
        )
    words: list[int] = payload[:_HEADER_BYTES].view(np.int64).tolist()
    header = dict(zip(HEADER_FIELDS, words, strict=True))
    if header["magic"] != _MAGIC:
        raise DataError("a buffer is not a micro-batch: it does not begin with the mark MOLBATCH")
    if header["version"] != _VERSION:
        raise DataError(
            f"a micro-batch buffer has version {header['version']}, this program reads {_VERSION}; "
            "all nodes must run the same version of moleblend-ray"
        )
    counts = [words[place] for place in _COUNTS]
    if min(counts) < 0 or header["num_hops"] != NUM_HOPS:
        raise DataError(f"a micro-batch buffer has a damaged header: {header}")
    expected = _HEADER_BYTES + sum(_section_bytes(section, counts) for section in SECTIONS)
    if not header["num_bytes"] == expected == len(payload):
        raise DataError(
            f"a micro-batch buffer has {len(payload)} bytes; its header says {header['num_bytes']} and its "
            f"sections take {expected}: it was cut off or damaged"
        )
    return words


def _section_bytes(section: Section, counts: list[int]) -> int:
    """Bytes of a section, rounded up to a multiple of 8."""
    return -(-counts[section.rows] * section.row_bytes // 8) * 8


def _view(payload: NDArray[np.uint8], header: list[int]) -> MicroBatch:
    counts = [header[place] for place in _COUNTS]
    arrays: dict[str, NDArray[Any]] = {}
    start = _HEADER_BYTES
    for section in SECTIONS:
        rows = counts[section.rows]
        shape = (rows,) if section.width == 1 else (rows, section.width)
        arrays[section.name] = np.ndarray(shape, section.dtype, buffer=payload, offset=start)
        start += _section_bytes(section, counts)
    return MicroBatch(
        step=header[HEADER_FIELDS.index("step")],
        stream=header[HEADER_FIELDS.index("stream")],
        index=header[HEADER_FIELDS.index("index")],
        payload=payload,
        **arrays,
    )
