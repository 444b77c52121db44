"""Micro-batches: molecules of similar size with all their relations, packed in one contiguous buffer.

Layout of a buffer (native little-endian): a header of ``int64`` words (``_HEADER_FIELDS``), then the
sections of ``_sections``, each starting at a multiple of 8 bytes. A 15-atom molecule takes about 1.7 kB,
most of it the (N, N, 5) path codes. Reading a buffer copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moleblend_ray.data.block import NUM_ATOM_FEATURES, MoleculeBlock
from moleblend_ray.errors import ConfigError, DataError, MoleBlendError, TrainingError, check_all
from moleblend_ray.relations.topology import Topology, bond_degrees, num_pairs, topology
from moleblend_ray.vocabulary import NUM_HOPS

_MAGIC: Final = int.from_bytes(b"MOLBATCH", "little")
_VERSION: Final = 1
_HEADER_FIELDS: Final = (
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
_HEADER_BYTES: Final = 8 * len(_HEADER_FIELDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How micro-batches are made and how many processes make them."""

    micro_batch_size: int = 64
    """Molecules of a micro-batch: what one forward and backward pass sees."""

    steps_per_block: int = 8
    """Optimizer steps whose micro-batches of one stream travel together as one Ray block."""

    min_actors: int = 1
    """CPU actors that build micro-batches: fewest."""

    max_actors: int = 1
    """CPU actors that build micro-batches: most; Ray adds them while trainers wait for data."""

    actor_cpus: float = 1.0
    """CPUs that each building actor reserves."""

    cache_bytes: int = 512 * 2**20
    """Bytes of decoded row groups that each building actor keeps."""

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
                for name in ("micro_batch_size", "steps_per_block", "min_actors", "cache_bytes")
            ),
            (
                self.max_actors >= self.min_actors,
                f"max_actors: expected at least min_actors ({self.min_actors}), found {self.max_actors}",
            ),
            (self.actor_cpus > 0, f"actor_cpus: expected more than 0, found {self.actor_cpus}"),
        )


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

    path_codes: NDArray[np.uint8]
    """(P, 5) uint8, code of the h-th bond from a to b."""

    payload: NDArray[np.uint8] = field(repr=False)
    """(num_bytes,) uint8, header and all arrays: what travels between processes."""

    def __len__(self) -> int:
        return len(self.molecule_ids)


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
    step_of_row = np.repeat(np.arange(len(steps)), size)
    # The last key counts most; lexsort is stable.
    block = block.take(np.lexsort((block.num_atoms, step_of_row)))
    degrees = bond_degrees(block.num_atoms, block.num_bonds, block.bonds)
    cuts = np.linspace(0, size, num_micro_batches(size, micro_batch_size) + 1).astype(np.int64)
    atom_ends = np.concatenate([[0], np.cumsum(block.num_atoms, dtype=np.int64)])
    bond_ends = np.concatenate([[0], np.cumsum(block.num_bonds, dtype=np.int64)])
    micro_batches = []
    for offset, step in enumerate(steps):
        for index, (begin, end) in enumerate(pairwise(offset * size + cuts)):
            rows = slice(begin, end)
            atoms = slice(atom_ends[begin], atom_ends[end])
            bonds = slice(bond_ends[begin], bond_ends[end])
            micro = _allocate(step, stream, index, block.num_atoms[rows])
            micro.molecule_ids[:] = block.molecule_ids[rows]
            micro.atom_features[:] = block.atom_features[atoms]
            micro.degrees[:] = degrees[atoms]
            micro.positions[:] = block.positions[atoms]
            micro.position_mask[:] = block.position_mask[atoms]
            topology(
                block.num_atoms[rows],
                block.num_bonds[rows],
                block.bonds[bonds],
                block.bond_features[bonds],
                out=Topology(micro.spd, micro.path_codes),
            )
            micro_batches.append(micro)
    return micro_batches


def unpack_micro_batch(buffer: bytes | memoryview | pa.Buffer | NDArray[np.uint8]) -> MicroBatch:
    """The micro-batch that a payload holds, without copying; read-only if the buffer is."""
    payload = np.frombuffer(buffer, dtype=np.uint8)
    if payload.ctypes.data % 8:
        payload = payload.copy()
    header = _read_header(payload)
    micro = _view(payload, header)
    sizes = micro.num_atoms
    if (
        sizes.min(initial=1) < 1
        or int(sizes.sum(dtype=np.int64)) != header["num_atoms"]
        or num_pairs(sizes) != header["num_pairs"]
    ):
        raise DataError(
            f"a micro-batch buffer (step {micro.step}, stream {micro.stream}) is damaged: the atom counts of its "
            f"molecules do not add up to {header['num_atoms']} atoms and {header['num_pairs']} pairs"
        )
    return micro


def step_batches(
    blocks: Iterable[pa.Table],
    *,
    rank: int,
    world_size: int,
    num_streams: int,
    num_micro: int,
    first_step: int | None = None,
) -> Iterator[StepBatch]:
    """Regroup the blocks that one rank receives into its steps, checking every tag.

    ``blocks`` are tables of :func:`pack_block`: block by block they hold the same run of consecutive steps for
    stream ``rank``, ``rank + world_size``, ... ``num_micro`` is the number of micro-batches of one (step,
    stream). A gap or a wrong order is a ``TrainingError``, never a wrong batch. With ``first_step`` None the first
    block says where the stream begins.
    """
    if num_streams % world_size:
        raise ConfigError(
            f"{num_streams} streams cannot be divided among {world_size} workers; "
            "choose a number of workers that divides num_streams"
        )
    streams = range(rank, num_streams, world_size)
    iterator = iter(blocks)
    step = first_step
    while group := [table for _, table in zip(streams, iterator, strict=False)]:
        if step is None:
            step = int(group[0].column("first_step")[0].as_py())
        payloads = [_payloads(table) for table in group]
        steps_in_group = len(payloads[0]) // num_micro
        for offset in range(steps_in_group):
            yield _step_batch(payloads, streams, offset, num_micro, step, rank)
            step += 1


def _step_batch(
    payloads: list[list[memoryview]],
    streams: range,
    offset: int,
    num_micro: int,
    step: int,
    rank: int,
) -> StepBatch:
    micro_batches = []
    for place, stream in enumerate(streams):
        for index in range(num_micro):
            expected = f"rank {rank} expected step {step}, stream {stream}, micro-batch {index}"
            row = offset * num_micro + index
            if place >= len(payloads) or row >= len(payloads[place]):
                raise TrainingError(f"{expected}, but the data stream ended before it")
            micro = unpack_micro_batch(payloads[place][row])
            if (micro.step, micro.stream, micro.index) != (step, stream, index):
                raise TrainingError(
                    f"{expected}, found step {micro.step}, stream {micro.stream}, micro-batch {micro.index}: "
                    "the data stream has a gap or a wrong order; restart from the last checkpoint"
                )
            micro_batches.append(micro)
    return StepBatch(step=step, micro_batches=tuple(micro_batches))


def _payloads(table: pa.Table) -> list[memoryview]:
    """The payloads of a packed block as views of its memory; the error of one that could not be built."""
    error = table.column("error")[0].as_py()
    if error is not None:
        raise DataError(
            f"micro-batches from step {table.column('first_step')[0]} of stream {table.column('stream')[0]} "
            f"could not be built: {error}"
        )
    payloads = table.column("payloads").combine_chunks().flatten()
    if isinstance(payloads, pa.ChunkedArray):
        payloads = payloads.combine_chunks()
    if not len(payloads):
        return []
    data = memoryview(payloads.buffers()[2])
    ends = np.frombuffer(payloads.buffers()[1], dtype=np.int64)
    ends = ends[payloads.offset : payloads.offset + len(payloads) + 1]
    return [data[begin:end] for begin, end in pairwise(ends)]


def pack_block(micro_batches: Sequence[MicroBatch]) -> pa.Table:
    """Micro-batches of one stream as a table of one row, ``first_step, stream, error, payloads``.

    One row a block, because Ray may cut a block of several rows in two but never a row.
    """
    data = np.concatenate([micro.payload for micro in micro_batches])
    ends = np.cumsum([0, *(len(micro.payload) for micro in micro_batches)], dtype=np.int64)
    payloads = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(micro_batches), [None, pa.py_buffer(ends), pa.py_buffer(data)]
    )
    return _block_row(micro_batches[0].step, micro_batches[0].stream, None, payloads)


def pack_error(error: MoleBlendError, first_step: int, stream: int) -> pa.Table:
    """A block that could not be built: :func:`step_batches` raises the error where the steps are consumed."""
    payloads = pa.array([], pa.large_binary())
    return _block_row(first_step, stream, f"{type(error).__name__}: {error}", payloads)


def _block_row(first_step: int, stream: int, error: str | None, payloads: pa.Array) -> pa.Table:
    return pa.table(
        {
            "first_step": pa.array([first_step], pa.int64()),
            "stream": pa.array([stream], pa.int64()),
            "error": pa.array([error], pa.string()),
            "payloads": pa.ListArray.from_arrays([0, len(payloads)], payloads),
        }
    )


def _sections(header: dict[str, int]) -> list[tuple[str, type[np.generic], tuple[int, ...]]]:
    """Name, dtype and shape of each array of a payload, in its order."""
    molecules, atoms, pairs = header["num_molecules"], header["num_atoms"], header["num_pairs"]
    return [
        ("molecule_ids", np.int64, (molecules,)),
        ("num_atoms", np.int32, (molecules,)),
        ("positions", np.float32, (atoms, 3)),
        ("position_mask", np.bool_, (atoms,)),
        ("atom_features", np.uint8, (atoms, NUM_ATOM_FEATURES)),
        ("degrees", np.uint8, (atoms,)),
        ("spd", np.uint8, (pairs,)),
        ("path_codes", np.uint8, (pairs, header["num_hops"])),
    ]


def _section_bytes(dtype: type[np.generic], shape: tuple[int, ...]) -> int:
    """Bytes of a section, rounded up to a multiple of 8."""
    size = np.dtype(dtype).itemsize
    for length in shape:
        size *= length
    return -(-size // 8) * 8


def _allocate(step: int, stream: int, index: int, num_atoms: NDArray[np.int32]) -> MicroBatch:
    """A micro-batch with its header and atom counts written, the rest zero."""
    header = {
        "magic": _MAGIC,
        "version": _VERSION,
        "num_bytes": 0,
        "step": step,
        "stream": stream,
        "index": index,
        "num_molecules": len(num_atoms),
        "num_atoms": int(num_atoms.sum(dtype=np.int64)),
        "num_pairs": num_pairs(num_atoms),
        "num_hops": NUM_HOPS,
    }
    sizes = [_section_bytes(dtype, shape) for _, dtype, shape in _sections(header)]
    header["num_bytes"] = _HEADER_BYTES + sum(sizes)
    # Zeros, so that the padding between sections is the same every time.
    payload = np.zeros(header["num_bytes"] // 8, np.int64).view(np.uint8)
    payload[:_HEADER_BYTES].view(np.int64)[:] = [header[name] for name in _HEADER_FIELDS]
    micro = _view(payload, header)
    micro.num_atoms[:] = num_atoms
    return micro


def _read_header(payload: NDArray[np.uint8]) -> dict[str, int]:
    if len(payload) < _HEADER_BYTES:
        raise DataError(
            f"a micro-batch buffer has {len(payload)} bytes, fewer than its header of {_HEADER_BYTES}"
        )
    words = payload[:_HEADER_BYTES].view(np.int64).tolist()
    header = dict(zip(_HEADER_FIELDS, words, strict=True))
    if header["magic"] != _MAGIC:
        raise DataError("a buffer is not a micro-batch: it does not begin with the mark MOLBATCH")
    if header["version"] != _VERSION:
        raise DataError(
            f"a micro-batch buffer has version {header['version']}, this program reads {_VERSION}; "
            "all nodes must run the same version of moleblend-ray"
        )
    counts = [header[name] for name in ("num_molecules", "num_atoms", "num_pairs")]
    if min(counts) < 0 or header["num_hops"] != NUM_HOPS:
        raise DataError(f"a micro-batch buffer has a damaged header: {header}")
    expected = _HEADER_BYTES + sum(_section_bytes(d, shape) for _, d, shape in _sections(header))
    if not header["num_bytes"] == expected == len(payload):
        raise DataError(
            f"a micro-batch buffer has {len(payload)} bytes; its header says {header['num_bytes']} and its "
            f"sections take {expected}: it was cut off or damaged"
        )
    return header


def _view(payload: NDArray[np.uint8], header: dict[str, int]) -> MicroBatch:
    arrays: dict[str, NDArray[Any]] = {}
    start = _HEADER_BYTES
    for name, dtype, shape in _sections(header):
        size = _section_bytes(dtype, shape)
        arrays[name] = np.ndarray(shape, dtype, buffer=payload, offset=start)
        start += size
    return MicroBatch(
        step=header["step"],
        stream=header["stream"],
        index=header["index"],
        payload=payload,
        **arrays,
    )
