"""The split of each molecule: by a hash of the molecule, by the source's own split file, by time, or by groups."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.data.dataset.dataset_files import SPLITS
from moleblend_ray.errors import ConfigError, DataError, without_credentials

logger = logging.getLogger(__name__)

UNNAMED: Final = 255
"""Code of a molecule that the split file does not name; the other codes are indices of ``SPLITS``."""

_TRAIN, _VALID, _TEST = (SPLITS.index(name) for name in ("train", "valid", "test"))
_CODE_OF_NAME: Final = {
    "train": _TRAIN,
    "training": _TRAIN,
    "valid": _VALID,
    "validation": _VALID,
    "val": _VALID,
    "dev": _VALID,
    "test": _TEST,
    "testing": _TEST,
}

_MOST_ROWS_PER_NAMED: Final = 1000
"""Most rows of a source for each that a file names, which may be those of a small test part. Ids that are numbers would need more."""
_ALWAYS_ROWS: Final = 1 << 28
"""So many rows a source may have, whatever is named: their codes take 256 MiB."""

_TEST_PARTS: Final = ("test-", "test_")


def text_hashes(texts: Sequence[str], key: bytes = b"") -> NDArray[np.uint64]:
    """(M,), 64 bits of the keyed BLAKE2b hash of each text."""
    keyed = hashlib.blake2b(digest_size=8, key=key)
    digests = []
    for text in texts:
        state = keyed.copy()  # cheaper than hashing the key for each text
        state.update(text.encode())
        digests.append(state.digest())
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def seed_key(seed: int) -> bytes:
    """A seed as the key of :func:`text_hashes`."""
    return seed.to_bytes(8, "little", signed=True)


def hashed_splits(
    smiles: Sequence[str], valid_fraction: float, test_fraction: float, seed: int
) -> NDArray[np.uint8]:
    """Split codes (M,) that depend on the molecule, the fractions and the seed only.

    Which molecules are in ``valid`` does not depend on ``test_fraction``.
    """
    hashes = text_hashes(smiles, seed_key(seed))
    ends = (math.ceil(end * 2.0**64) for end in (valid_fraction, valid_fraction + test_fraction))
    in_valid, before_test_ends = (hashes < np.uint64(end) for end in ends)
    return np.where(in_valid, _VALID, np.where(before_test_ends, _TEST, _TRAIN)).astype(np.uint8)


class NamedSplits:
    """The splits that a file names, by row of the source or by id of the molecule."""

    wanted = "train, valid or test"
    """What to give a molecule that is in no part."""
    unnamed = UNNAMED
    """Code of such a molecule."""

    def __init__(
        self,
        by_row: Mapping[str, NDArray[np.int64]] | None,
        by_id: Mapping[str, str] | None,
        uri: str,
    ) -> None:
        """From the rows of each split, no row in two of them, or the split of each id.

        DataError for numbers that are too large for rows, ConfigError if the name of a split is not train, valid (validation, val,
        dev) or test (testing, test-...).
        """
        self._uri = uri
        self._codes = _row_codes(by_row, uri) if by_row is not None else None
        self._by_id = (
            {mol_id: _code(name, uri) for mol_id, name in by_id.items()}
            if by_id is not None
            else None
        )

    @property
    def digest(self) -> str:
        """Digest of the splits, equal for equal splits whatever the format of the file."""
        digest = hashlib.blake2b(digest_size=16)
        if self._codes is not None:
            digest.update(self._codes.tobytes())
        for mol_id, code in sorted((self._by_id or {}).items()):
            digest.update(f"{len(mol_id)}:{mol_id}:{code}".encode())
        return digest.hexdigest()

    @property
    def names_rows(self) -> bool:
        """Whether molecules are named by their row, which is only possible for a source of one file."""
        return self._codes is not None

    def codes(self, rows: NDArray[np.int64], mol_ids: Sequence[str]) -> NDArray[np.uint8]:
        """Split codes (M,) of the molecules with these rows (M,) and ids, ``UNNAMED`` where the file names none."""
        found = np.full(len(rows), UNNAMED, dtype=np.uint8)
        if self._codes is not None:
            inside = rows < len(self._codes)
            found[inside] = self._codes[rows[inside]]
        if self._by_id is not None:
            found[:] = [self._by_id.get(mol_id, UNNAMED) for mol_id in mol_ids]
        return found

    def warn_of_rows_beyond(self, num_rows: int) -> None:
        """Log if rows are named that a source of ``num_rows`` does not have: the split may be of another version of it."""
        beyond = 0 if self._codes is None else int((self._codes[num_rows:] != UNNAMED).sum())
        if beyond:
            logger.warning(
                "%s names %d rows after the last of the source, which has %d. If rows were taken out of the source, others have "
                "their numbers now, and are in wrong parts: name molecules by id (as texts), or make the split anew",
                without_credentials(self._uri),
                beyond,
                num_rows,
            )

    def unnamed_error(self, where: str, mol_id: str) -> DataError:
        """The error for a molecule that the split file does not name."""
        by_id = "" if self.names_rows else "set id_column to the column that holds the ids, "
        return DataError(
            f"split_file: {self._uri} names no split for {where} ({mol_id}). Complete the file, {by_id}or set "
            "split_file_unnamed=train or split_file_unnamed=quarantine."
        )


class TimeSplit:
    """The newest molecules are for testing, those before them for validation.

    This is the split of prospective use (Sheridan, J. Chem. Inf. Model. 53, 783 (2013)). Molecules of one time stay together, in the
    newer part where the limit divides them.
    """

    names_rows = True
    """Rows have times, and ids have not."""
    wanted = "a date or a number"
    """What to give a molecule that is in no part."""
    unnamed = UNNAMED
    """Code of such a molecule."""

    def __init__(self, times: NDArray[np.float64], fractions: tuple[float, float, float]) -> None:
        """From the time (R,) of each row of the source, in any unit, NaN where there is none, and the shares of the parts."""
        self._times = times
        self._fractions = fractions

    @property
    def digest(self) -> str:
        """Digest of the order of the rows, equal for equal orders however times are written."""
        _, ranks = np.unique(self._times, return_inverse=True)
        ordered = np.where(np.isnan(self._times), -1, ranks).astype("<i8")
        return hashlib.blake2b(ordered.tobytes(), digest_size=16).hexdigest()

    def codes(self, rows: NDArray[np.int64], _mol_ids: Sequence[str]) -> NDArray[np.uint8]:
        """Split codes (M,) of the molecules of these rows (M,), all that there are; ``UNNAMED`` where a row has no time."""
        times = np.full(len(rows), np.nan)
        inside = rows < len(self._times)
        times[inside] = self._times[rows[inside]]
        known = np.sort(times[~np.isnan(times)])
        if not len(known):
            return np.full(len(rows), UNNAMED, np.uint8)
        ends = np.cumsum(self._fractions[:2]) * len(known)
        limits = known[np.minimum(np.round(ends).astype(np.int64), len(known) - 1)]
        codes = np.searchsorted(limits, times, side="right").astype(np.uint8)
        return np.where(np.isnan(times), np.uint8(UNNAMED), codes)


class MoleculeGroups:
    """Groups of molecules that a split keeps together, such as projects, plates or sources."""

    names_rows = True
    """Rows are in groups, and ids are not."""
    wanted = "a group"
    """What to give a molecule that is in none."""
    unnamed = -1
    """Code of such a molecule."""

    def __init__(self, numbers: NDArray[np.int64]) -> None:
        """From the number (R,) of the group of each row of the source, and -1 where there is none. Groups are numbered from 0 in the
        order of their first rows."""
        self._numbers = numbers

    @property
    def digest(self) -> str:
        """Digest of who is with whom, equal for equal groups whatever their names."""
        return hashlib.blake2b(self._numbers.astype("<i8").tobytes(), digest_size=16).hexdigest()

    def codes(self, rows: NDArray[np.int64], _mol_ids: Sequence[str]) -> NDArray[np.int64]:
        """The numbers (M,) of the groups of these rows (M,), -1 where a row has none."""
        found = np.full(len(rows), self.unnamed, dtype=np.int64)
        inside = rows < len(self._numbers)
        found[inside] = self._numbers[rows[inside]]
        return found


SplitsOfData: TypeAlias = NamedSplits | TimeSplit | MoleculeGroups
"""What data say of the parts of their molecules, beside the molecules themselves."""


def _row_codes(by_row: Mapping[str, NDArray[np.int64]], uri: str) -> NDArray[np.uint8]:
    """The code of each row, up to the last row that the file names."""
    size = 1 + max((int(rows.max()) for rows in by_row.values() if len(rows)), default=-1)
    named = sum(map(len, by_row.values()))
    if size > _MOST_ROWS_PER_NAMED * named + _ALWAYS_ROWS:
        raise DataError(
            f"split_file: {uri} names row {size - 1}, but only {named} rows in all. Numbers are rows of the source, counted from "
            "0. If these are ids of molecules, write them as texts, or as column 'id' of a table"
        )
    codes = np.full(size, UNNAMED, dtype=np.uint8)
    for name, rows in by_row.items():
        codes[rows] = _code(name, uri)
    return codes


def is_split_name(name: str) -> bool:
    """Whether a word names a split: train, valid (validation, val, dev) or test (testing, test-...)."""
    folded = name.strip().lower()
    return folded in _CODE_OF_NAME or folded.startswith(_TEST_PARTS)


def _code(name: str, uri: str) -> int:
    if not is_split_name(name):
        raise ConfigError(
            f"split_file: {uri} has a split {name!r}; expected train, valid (validation, val, dev) or test "
            "(also test-dev and the like)."
        )
    return _CODE_OF_NAME.get(name.strip().lower(), _TEST)
