"""Which molecules an optimizer step sees: a pure function of (number of molecules, settings, step).

There is no state, no shuffle buffer and no table of indices. Global position ``p`` belongs to epoch ``p // N``. Its
offset within the epoch goes through two keyed bijections:

1. The offset is shuffled within its window of ``shuffle_window`` consecutive offsets: the rows of a window are mixed,
   and a reader of the window still needs few row groups.
2. The result is an offset in the epoch's sequence of chunks. A chunk is ``chunk_rows`` consecutive molecules; the
   chunks are permuted and concatenated. The last chunk of a collection may be shorter than the others; it can be
   anywhere in the sequence, and the chunks after it begin accordingly earlier. Chunks and windows need not be aligned.

The bijections are Feistel networks on the smallest even number of bits that contains the domain, with cycle walking:
the network is applied until the value is inside the domain. The cost does not depend on N, up to 10^12.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.compilation import kernel
from moleblend_ray.data.config import OrderConfig
from moleblend_ray.errors import ConfigError, DataError
from moleblend_ray.relations.hashing import keyed_hash, mix

MAX_MOLECULES: Final = 10**12
"""Largest collection for which the integer arithmetic is tested."""

_ROUNDS: Final = 8
_ROUND_KEYS: Final = np.arange(_ROUNDS, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
_mix_word = kernel(mix)
# First key words, which make the two bijections of an epoch independent.
_CHUNKS: Final = 1
_WINDOW: Final = 2


@dataclass(frozen=True, slots=True)
class DataOrder:
    """Molecule numbers 0 ... N-1 in training order, without end; each occurs exactly once per epoch.

    The molecules that step ``s`` of a run saw are ``DataOrder(N, order).global_batch(s)``, with the run's settings.
    """

    num_molecules: int
    """N, the number of molecules in the split."""

    config: OrderConfig
    """Batch size, streams and shuffle."""

    def __post_init__(self) -> None:
        """DataError for an empty or too large collection."""
        if not 1 <= self.num_molecules <= MAX_MOLECULES:
            raise DataError(
                f"a data order needs 1 to {MAX_MOLECULES} molecules, found {self.num_molecules}; "
                "check that the split was prepared and is not empty"
            )

    def global_batch(self, step: int) -> NDArray[np.int64]:
        """(global_batch_size,) int64, the molecules of ``step`` over all streams, stream after stream."""
        size = self.config.global_batch_size
        return self.molecules_at(np.arange(step * size, (step + 1) * size, dtype=np.int64))

    def stream_batches(self, first_step: int, num_steps: int, stream: int) -> NDArray[np.int64]:
        """(num_steps, global_batch_size / num_streams) int64, the molecules of one stream in consecutive steps."""
        if not 0 <= stream < self.config.num_streams:
            raise ConfigError(
                f"stream {stream} does not exist; num_streams is {self.config.num_streams}"
            )
        size = self.config.stream_batch_size
        steps = np.arange(first_step, first_step + num_steps, dtype=np.int64)[:, None]
        rows = stream * size + np.arange(size, dtype=np.int64)
        return self.molecules_at(steps * self.config.global_batch_size + rows)

    def molecules_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The molecule at each global position; an array of any shape, without negative positions."""
        epoch, offset = np.divmod(positions.ravel(), self.num_molecules)
        return self._chunk_sequence(epoch, self._shuffle_window(epoch, offset)).reshape(
            positions.shape
        )

    def _shuffle_window(
        self, epoch: NDArray[np.int64], offset: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        window = offset // self.config.shuffle_window
        start = window * self.config.shuffle_window
        size = np.minimum(self.config.shuffle_window, self.num_molecules - start)
        key = keyed_hash(self.config.seed, _WINDOW, epoch, window)
        return start + permute(offset - start, size, key)

    def _chunk_sequence(
        self, epoch: NDArray[np.int64], offset: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The molecule at each ``offset`` in the concatenated chunks of the epoch."""
        rows = self.config.chunk_rows
        chunks = -(-self.num_molecules // rows)
        last_rows = self.num_molecules - (chunks - 1) * rows
        epochs, which = np.unique(epoch, return_inverse=True)
        key = keyed_hash(self.config.seed, _CHUNKS, epochs)
        size = np.full(len(epochs), chunks, np.int64)
        last_slot = unpermute(size - 1, size, key)[which]
        # As if the short chunk were full: offsets behind it grow by the rows that it lacks.
        behind = offset >= last_slot * rows + last_rows
        slot, row = np.divmod(offset + np.where(behind, rows - last_rows, 0), rows)
        chunk = permute(slot, size[which], key[which])
        return chunk * rows + row


def streams_of_rank(rank: int, world_size: int, num_streams: int) -> range:
    """The streams that a rank trains on, of ``num_streams``; ConfigError if they cannot be divided equally."""
    if num_streams % world_size:
        raise ConfigError(
            f"{num_streams} streams cannot be divided among {world_size} workers; "
            "choose a number of workers that divides num_streams"
        )
    return range(rank, num_streams, world_size)


def permute(
    index: NDArray[np.int64], size: NDArray[np.int64], key: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """The image of each index under the keyed bijection of 0 ... size-1; all arrays (n,), 0 <= index < size."""
    image = np.empty(len(index), np.int64)
    _walk(index, size, key, False, image)
    return image


def unpermute(
    index: NDArray[np.int64], size: NDArray[np.int64], key: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """The inverse of :func:`permute`."""
    image = np.empty(len(index), np.int64)
    _walk(index, size, key, True, image)
    return image


# In the kernels every operand is a uint64, as Numba turns operations on a uint64 and an int64 into floats.


@kernel
def _walk(index, size, key, backwards, image):  # type: ignore[no-untyped-def]
    """Apply the bijection of the next power of four until the value is below ``size``."""
    for i in range(index.shape[0]):
        domain = np.uint64(size[i])
        half = np.uint64(1)
        while (np.uint64(1) << (half + half)) < domain:
            half += np.uint64(1)
        value = _feistel(np.uint64(index[i]), half, key[i], backwards)
        while value >= domain:
            value = _feistel(value, half, key[i], backwards)
        image[i] = value


@kernel
def _feistel(value, half, key, backwards):  # type: ignore[no-untyped-def]
    """A bijection of words with ``2 * half`` bits, whose halves scramble each other in turn."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for turn in range(_ROUNDS):
        if backwards:
            round_key = key + _ROUND_KEYS[_ROUNDS - 1 - turn]
            left, right = right ^ (_mix_word(left + round_key) & mask), left
        else:
            round_key = key + _ROUND_KEYS[turn]
            left, right = right, left ^ (_mix_word(right + round_key) & mask)
    return (left << half) | right
