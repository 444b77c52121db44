"""Micro-batches: molecules of similar size with all their relations, packed into one contiguous buffer.

A buffer (native little-endian) consists of a header of ``int64`` words (``HEADER_FIELDS``) and the ``SECTIONS``, each
of which begins at a multiple of 8 bytes. Reading a buffer copies nothing. A molecule with n atoms takes

====================  ==============  ==================
section               bytes           15 atoms
====================  ==============  ==================
molecule_ids          8               8
num_atoms             4               4
descriptors           432 or 0        432 or 0
positions             12 n            180
position_mask         n               15
atom_features         9 n             135
degrees               n               15
spd                   n * n           225
path_words            4 n * n         900
====================  ==============  ==================

which is 1,482 bytes for 15 atoms without descriptors, besides the header of 88 bytes per micro-batch. A path word holds
five bond codes of 6 bits each. Both directions of a pair are stored, as the first five bonds of a longer path differ by
direction.

Everything that is computed per atom works on the packed rows, without padding. Attention pads the molecules of a
micro-batch to the size of the largest. The molecules of one (step, stream) are sorted by size before they are cut into
micro-batches, so there is less padding the more molecules there are. Share of token pairs that are padding, with
micro-batches of 64:

===================  =========  ==========  ======
of a (step, stream)  PCQM4Mv2   ZINC        QM9
===================  =========  ==========  ======
64                   28 %       50 %        4 %
128                  17 %       35 %        4 %
256                  10 %       22 %        4 %
1024                 3 %        6 %         1 %
64, cut in 16s       9 %        19 %        4 %
===================  =========  ==========  ======

If ``global_batch_size`` / ``num_streams`` equals ``micro_batch_size``, sorting changes nothing: then fewer streams or
smaller micro-batches save time in attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.compilation import kernel
from moleblend_ray.data.dataset.block import BOND_ENDS, NUM_ATOM_FEATURES, NUM_AXES, MoleculeBlock
from moleblend_ray.errors import DataError
from moleblend_ray.relations.topology import (
    check_bond_arrays,
    damaged_bonds,
    num_pairs,
    relate_molecule,
    unpack_path_words,
    workspace,
)
from moleblend_ray.vocabulary import NUM_DESCRIPTORS, NUM_HOPS

if TYPE_CHECKING:  # benchmarks of the model need no pyarrow
    import pyarrow as pa

    BufferLike: TypeAlias = bytes | memoryview | pa.Buffer | NDArray[np.uint8]

_MAGIC: Final = int.from_bytes(b"MOLBATCH", "little")
_VERSION: Final = 3
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
    "num_described",
    "num_hops",
)
_WORD_BYTES: Final = 8
"""Bytes of a word of the header; sections begin at multiples of it."""
_HEADER_WORDS: Final = len(HEADER_FIELDS)
_HEADER_BYTES: Final = _WORD_BYTES * _HEADER_WORDS
_COUNTS: Final = [
    HEADER_FIELDS.index(name)
    for name in ("num_molecules", "num_atoms", "num_pairs", "num_described")
]


class Section(NamedTuple):
    """An array of a buffer."""

    name: str
    dtype: np.dtype[Any]
    rows: int
    """What it has one row for: ``_MOLECULES``, ``_ATOMS``, ``_PAIRS`` or ``_DESCRIBED``."""
    width: int
    """Items per row."""
    row_bytes: int
    """Bytes per row."""


def _section(name: str, dtype: type[np.generic], rows: int, width: int = 1) -> Section:
    kind: np.dtype[Any] = np.dtype(dtype)
    return Section(name, kind, rows, width, width * kind.itemsize)


_MOLECULES, _ATOMS, _PAIRS, _DESCRIBED = range(4)
SECTIONS: Final = (
    _section("molecule_ids", np.int64, _MOLECULES),
    _section("num_atoms", np.int32, _MOLECULES),
    # Enough digits for targets between -5 and 5.
    _section("descriptors", np.float16, _DESCRIBED, NUM_DESCRIPTORS),
    _section("positions", np.float32, _ATOMS, NUM_AXES),
    _section("position_mask", np.bool_, _ATOMS),
    _section("atom_features", np.uint8, _ATOMS, NUM_ATOM_FEATURES),
    _section("degrees", np.uint8, _ATOMS),
    _section("spd", np.uint8, _PAIRS),
    _section("path_words", np.uint32, _PAIRS),
)
"""The arrays of a buffer, in their order."""

_SECTION_NAMES: Final = tuple(section.name for section in SECTIONS)
# Places in `SECTIONS`, for the kernel.
_MOLECULE_IDS: Final = _SECTION_NAMES.index("molecule_ids")
_NUM_ATOMS: Final = _SECTION_NAMES.index("num_atoms")
_POSITIONS: Final = _SECTION_NAMES.index("positions")
_POSITION_MASK: Final = _SECTION_NAMES.index("position_mask")
_ATOM_FEATURES: Final = _SECTION_NAMES.index("atom_features")
_DEGREES: Final = _SECTION_NAMES.index("degrees")
_SPD: Final = _SECTION_NAMES.index("spd")
_PATH_WORDS: Final = _SECTION_NAMES.index("path_words")
_MAX_DEGREE: Final = np.iinfo(np.uint8).max


def mean_molecule_bytes(atom_counts: Mapping[int, int], *, described: bool) -> float:
    """Bytes per molecule of a buffer, from the number of molecules by their number of atoms; ``described``: with
    descriptors."""
    num_molecules = max(1, sum(atom_counts.values()))
    rows: list[float] = [
        sum(count * atoms**power for atoms, count in atom_counts.items()) / num_molecules
        for power in range(3)
    ]
    rows.append(float(described))
    return sum((rows[section.rows] * section.row_bytes for section in SECTIONS), 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """B molecules with A atoms and P ordered atom pairs in total; the arrays are views of ``payload``."""

    step: int
    """The optimizer step that the micro-batch belongs to."""

    stream: int
    """The stream of the data order that the micro-batch comes from."""

    index: int
    """Its index among the micro-batches of (step, stream), which are in the order of molecule size."""

    molecule_ids: NDArray[np.int64]
    """(B,) int64, position of each molecule within its split."""

    num_atoms: NDArray[np.int32]
    """(B,) int32."""

    descriptors: NDArray[np.float16]
    """(B, D) float16, targets of pretraining, NaN where unknown; (0, D) if the molecules have none."""

    atom_features: NDArray[np.uint8]
    """(A, 9) uint8 OGB codes, molecule-major."""

    degrees: NDArray[np.uint8]
    """(A,) uint8, number of neighbours among the kept atoms, at most 255."""

    positions: NDArray[np.float32]
    """(A, 3) float32, angstrom. Rows where ``position_mask`` is False are undefined."""

    position_mask: NDArray[np.bool_]
    """(A,) bool, True where the atom has coordinates."""

    spd: NDArray[np.uint8]
    """(P,) uint8, shortest-path distance in bonds; pair (a, b) of a molecule with n atoms is its row ``a * n + b``."""

    path_words: NDArray[np.uint32]
    """(P,) uint32, codes of the first five bonds from a to b, 6 bits each, the first bond in the lowest bits; see
    :func:`unpack_path_words`."""

    payload: NDArray[np.uint8] = field(repr=False)
    """(num_bytes,) uint8, the header and all arrays; this is what is sent between processes."""

    def __len__(self) -> int:
        return len(self.molecule_ids)

    @property
    def path_codes(self) -> NDArray[np.uint8]:
        """(P, 5) uint8, code of the h-th bond from a to b (a copy)."""
        return unpack_path_words(self.path_words)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """All micro-batches of one rank for one optimizer step."""

    step: int
    """The optimizer step."""

    micro_batches: tuple[MicroBatch, ...]
    """Sorted by stream, then by index."""


def num_micro_batches(num_molecules: int, micro_batch_size: int) -> int:
    """Micro-batches that ``num_molecules`` molecules of one (step, stream) are cut into."""
    return -(-num_molecules // micro_batch_size)


def build_micro_batches(
    block: MoleculeBlock, step: int, stream: int, micro_batch_size: int
) -> list[MicroBatch]:
    """Sort the molecules of one (step, stream) by size, and cut them into micro-batches of nearly equal counts.

    The result depends on the arguments only; molecules of equal size keep their order.
    """
    return build_steps(block, range(step, step + 1), stream, micro_batch_size)


def build_micro_batch(block: MoleculeBlock) -> MicroBatch:
    """All molecules of a block, at least one, in their order, as step 0 of stream 0."""
    begins = np.zeros(1, np.int64)
    described = block.descriptors.shape[1] > 0
    headers = _headers(range(1), 0, 1, begins, block.num_atoms, described=described)
    (micro,) = _pack(block, np.arange(len(block)), begins, headers)
    return micro


def build_steps(
    block: MoleculeBlock, steps: range, stream: int, micro_batch_size: int
) -> list[MicroBatch]:
    """The micro-batches of consecutive steps of one stream, whose molecules are in ``block`` step after step.

    Each step has ``len(block) / len(steps)`` molecules, which are cut as in :func:`build_micro_batches`.
    """
    size = len(block) // max(len(steps), 1)
    if size == 0 or size * len(steps) != len(block):
        raise DataError(
            f"{len(block)} molecules cannot be cut into {len(steps)} steps of equal, non-zero size "
            f"(steps {steps.start} to {steps.stop - 1}, stream {stream})"
        )
    # lexsort sorts by the last key first, and is stable.
    order = np.lexsort((block.num_atoms, np.repeat(np.arange(len(steps)), size)))
    cuts = np.linspace(0, size, num_micro_batches(size, micro_batch_size) + 1).astype(np.int64)
    begins = (np.arange(len(steps))[:, None] * size + cuts[:-1]).reshape(-1)
    described = block.descriptors.shape[1] > 0
    headers = _headers(
        steps, stream, len(cuts) - 1, begins, block.num_atoms[order], described=described
    )
    return _pack(block, order, begins, headers)


def _pack(
    block: MoleculeBlock,
    order: NDArray[np.int64],
    begins: NDArray[np.int64],
    headers: NDArray[np.int64],
) -> list[MicroBatch]:
    """Micro-batches, adjacent in one buffer, of the molecules ``order``; they begin at ``begins`` in that order."""
    check_bond_arrays(block.num_atoms, block.num_bonds, block.bonds, block.bond_features)
    num_bytes = headers[:, HEADER_FIELDS.index("num_bytes")]
    ends = np.cumsum(num_bytes)
    # Zeros, so that the padding between sections is the same every time.
    buffer = np.zeros(int(ends[-1]) // _WORD_BYTES, np.int64).view(np.uint8)
    wider = tuple(buffer.view(dtype) for dtype in (np.int64, np.int32, np.uint32, np.float32))
    sizes = (block.num_atoms, block.num_bonds)
    starts = ends - num_bytes
    sections = starts[:, None] + _section_begins(headers[:, _COUNTS])[:, :-1]
    damaged = _pack_kernel(
        order,
        np.append(begins, len(block)),
        headers,
        starts // _WORD_BYTES,
        sections // np.array([section.dtype.itemsize for section in SECTIONS]),
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
    micros = [
        _view(buffer[begin:end], header)
        for (begin, end), header in zip(cut, headers.tolist(), strict=True)
    ]
    if block.descriptors.shape[1]:
        # Not in the kernel: Numba knows no float16 on CPUs.
        for micro, begin in zip(micros, begins.tolist(), strict=True):
            micro.descriptors[:] = block.descriptors[order[begin : begin + len(micro)]]
    return micros


def _headers(
    steps: range,
    stream: int,
    num_micro: int,
    begins: NDArray[np.int64],
    num_atoms: NDArray[np.int32],
    *,
    described: bool,
) -> NDArray[np.int64]:
    """(micro-batches, fields), the headers of micro-batches that begin at ``begins`` in the sorted molecules."""
    atoms = num_atoms.astype(np.int64)
    headers = np.empty((len(begins), len(HEADER_FIELDS)), np.int64)
    num_molecules = np.diff(begins, append=len(atoms))
    columns: dict[str, Any] = {
        "magic": _MAGIC,
        "version": _VERSION,
        "num_bytes": 0,
        "step": np.repeat(np.arange(steps.start, steps.stop), num_micro),
        "stream": stream,
        "index": np.tile(np.arange(num_micro), len(steps)),
        "num_molecules": num_molecules,
        "num_atoms": np.add.reduceat(atoms, begins),
        "num_pairs": np.add.reduceat(atoms * atoms, begins),
        "num_described": num_molecules * described,
        "num_hops": NUM_HOPS,
    }
    for place, name in enumerate(HEADER_FIELDS):
        headers[:, place] = columns[name]
    headers[:, HEADER_FIELDS.index("num_bytes")] = _section_begins(headers[:, _COUNTS])[:, -1]
    return headers


def _section_begins(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n, sections + 1), the byte where each section begins, and last where the buffer ends.

    ``counts`` (n, 4) are the numbers of molecules, atoms, pairs and described molecules of n micro-batches.
    """
    rows = counts[:, [section.rows for section in SECTIONS]]
    begins = np.full((len(counts), len(SECTIONS) + 1), _HEADER_BYTES, np.int64)
    row_bytes = np.array([section.row_bytes for section in SECTIONS], np.int64)
    begins[:, 1:] += np.cumsum(_whole_words(rows * row_bytes), axis=1)
    return begins


_Bytes = TypeVar("_Bytes", int, NDArray[np.int64])


def _whole_words(num_bytes: _Bytes) -> _Bytes:
    """Rounded up to a multiple of the word size."""
    return -(-num_bytes // _WORD_BYTES) * _WORD_BYTES


@kernel
def _pack_kernel(  # type: ignore[no-untyped-def]
    order, begins, headers, header_words, sections, u8, wider, molecules, atoms, graph, space
):
    """Write headers and sections of all micro-batches; returns the first molecule with a damaged bond, or -1.

    ``u8`` and ``wider`` are views of the buffer. ``header_words`` and ``sections`` say where in the view of the right
    type each header and each section begins.
    """
    i64, i32, u32, f32 = wider
    molecule_ids, num_atoms, num_bonds, atom_starts, bond_starts = molecules
    positions, position_mask, atom_features = atoms
    bonds, bond_features = graph
    for micro in range(headers.shape[0]):
        section, header = sections[micro], header_words[micro]
        i64[header : header + _HEADER_WORDS] = headers[micro]
        atom, pair = np.int64(0), np.int64(0)
        for place in range(begins[micro], begins[micro + 1]):
            molecule = order[place]
            slot = place - begins[micro]
            n = np.int64(num_atoms[molecule])
            i64[section[_MOLECULE_IDS] + slot] = molecule_ids[molecule]
            i32[section[_NUM_ATOMS] + slot] = n
            source = atom_starts[molecule]
            for a in range(n):
                position = section[_POSITIONS] + NUM_AXES * (atom + a)
                for axis in range(NUM_AXES):
                    f32[position + axis] = positions[source + a, axis]
                u8[section[_POSITION_MASK] + atom + a] = position_mask[source + a]
                features = section[_ATOM_FEATURES] + NUM_ATOM_FEATURES * (atom + a)
                for feature in range(NUM_ATOM_FEATURES):
                    u8[features + feature] = atom_features[source + a, feature]
            begin = bond_starts[molecule]
            end = begin + num_bonds[molecule]
            spd, words = section[_SPD] + pair, section[_PATH_WORDS] + pair
            if not relate_molecule(
                n,
                bonds[begin:end],
                bond_features[begin:end],
                u8[spd : spd + n * n],
                u32[words : words + n * n],
                space,
            ):
                return molecule
            first_degree = section[_DEGREES] + atom
            degrees = u8[first_degree : first_degree + n]
            for bond in range(begin, end):
                for side in range(BOND_ENDS):
                    degree = degrees[bonds[bond, side]]
                    degrees[bonds[bond, side]] = degree + (degree < _MAX_DEGREE)
            atom += n
            pair += n * n
    return -1


def unpack_micro_batch(buffer: BufferLike) -> MicroBatch:
    """The micro-batch in a buffer, without copying; its arrays are read-only if the buffer is."""
    payload = np.frombuffer(buffer, dtype=np.uint8)
    if payload.__array_interface__["data"][0] % _WORD_BYTES:
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
    is_described = header["num_described"] in (0, header["num_molecules"])
    if min(counts) < 0 or header["num_hops"] != NUM_HOPS or not is_described:
        raise DataError(f"a micro-batch buffer has a damaged header: {header}")
    expected = _HEADER_BYTES + sum(_section_bytes(section, counts) for section in SECTIONS)
    if not header["num_bytes"] == expected == len(payload):
        raise DataError(
            f"a micro-batch buffer has {len(payload)} bytes; its header says {header['num_bytes']} and its "
            f"sections take {expected}: it was cut off or damaged"
        )
    return words


def _section_bytes(section: Section, counts: list[int]) -> int:
    """Bytes of a section, including its padding."""
    return _whole_words(counts[section.rows] * section.row_bytes)


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
