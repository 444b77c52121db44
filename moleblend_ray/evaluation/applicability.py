"""Whether a molecule resembles those that a model was trained on.

The similarity to the nearest training molecule separates what a property model predicts well from what it does not,
whatever the model and its descriptors (Sheridan et al., J. Chem. Inf. Comput. Sci. 44, 1912 (2004)). It is counted here
by ECFP4 and Tanimoto. The threshold comes from the training molecules: 95 % of them have a similarity to their
nearest other that is as high or higher. (The 95th percentile of nearest-neighbour distances among training molecules
is a usual limit, see Sahigara et al., Molecules 17, 4791 (2012).)
"""

from __future__ import annotations

import io
import logging
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.data import storage
from moleblend_ray.errors import CheckpointError, without_credentials
from moleblend_ray.evaluation.similarity import (
    NUM_BITS,
    RADIUS,
    nearest_similarity,
    packed_ecfp,
)

logger = logging.getLogger(__name__)

FINGERPRINTS_NAME: Final = "training_fingerprints.npz"
"""The file beside a fine-tuned model. It holds fingerprints, not molecules."""

FINGERPRINT: Final = f"ecfp radius={RADIUS} bits={NUM_BITS}"

FORMAT_VERSION: Final = 1
"""Raised whenever older code could not read the file."""

PERCENTILE: Final = 5.0
"""Share of the training molecules, in percent, that would themselves lie outside if the others alone were known."""

MAX_LEFT_OUT: Final = 10_000
"""Of more training molecules as many, drawn at random, stand for all when the threshold is set: 2 * 10^8 pairs take 1 s."""

# Its fingerprint goes into the file: another RDKit that makes another one of it cannot be compared.
_CONTROL: Final = "CC(=O)Oc1ccccc1C(=O)O"


@dataclass(frozen=True, kw_only=True, slots=True)
class ApplicabilityDomain:
    """The training molecules of a model as fingerprints, and how similar to one of them is similar enough."""

    fingerprints: NDArray[np.uint64]
    """(M, 32) distinct ECFP4 fingerprints, in ascending order: neither the order nor the number of molecules shows."""
    threshold: float
    """Tanimoto similarity, 0 to 1, from which on a molecule is inside."""

    @classmethod
    def of(cls, smiles: Sequence[str]) -> ApplicabilityDomain:
        """The domain of a model trained on the molecules ``smiles``; those that RDKit does not read do not count."""
        words = np.unique(packed_ecfp(smiles), axis=0)
        words = words[words.any(axis=1)]
        return cls(fingerprints=words, threshold=similarity_threshold(words))

    def similarity(self, fingerprints: NDArray[np.uint64]) -> NDArray[np.float64]:
        """(Q,) Tanimoto similarity of each of (Q, 32) ``fingerprints`` to the nearest training molecule."""
        return nearest_similarity(fingerprints, self.fingerprints)

    @property
    def checksum(self) -> str:
        """SHA-256 of the fingerprints and the threshold."""
        return storage.sha256_bytes(
            self.fingerprints.tobytes() + np.float64(self.threshold).tobytes()
        )


def similarity_threshold(fingerprints: NDArray[np.uint64]) -> float:
    """The 5th percentile of the similarity of each of (M, W) distinct ``fingerprints`` to its nearest other.

    Of more than 10,000 that of 10,000, drawn with a fixed seed. Where fewer than two leave
    nothing to compare, 1: only what was trained on is inside.
    """
    if len(fingerprints) < 2:
        return 1.0
    drawn = np.random.default_rng(0).permutation(len(fingerprints))[:MAX_LEFT_OUT]
    nearest = nearest_similarity(fingerprints[drawn], fingerprints, leave_out=drawn)
    return float(np.percentile(nearest, PERCENTILE))


def save_domain(domain: ApplicabilityDomain, uri: str) -> None:
    """Write ``training_fingerprints.npz`` into the model's directory ``uri``; equal domains give equal bytes."""
    sink = io.BytesIO()
    np.savez_compressed(
        sink,
        format_version=np.int64(FORMAT_VERSION),
        fingerprint=np.array(FINGERPRINT),
        control=packed_ecfp([_CONTROL]),
        fingerprints=domain.fingerprints,
        threshold=np.float64(domain.threshold),
    )
    storage.write_bytes(storage.join(uri, FINGERPRINTS_NAME), sink.getvalue())


def load_domain(uri: str) -> ApplicabilityDomain | None:
    """The domain of the model in the directory ``uri``; None if it has none, or one of fingerprints not made here.

    The latter is logged. A CheckpointError if the file is damaged or of a later version.
    """
    file = storage.join(uri, FINGERPRINTS_NAME)
    if not storage.exists(file):
        return None
    try:
        stored = _read(storage.read_bytes(file))
        version = int(stored["format_version"])
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{file} has format version {version}; this installation reads up to {FORMAT_VERSION}. "
                "Upgrade moleblend-ray"
            )
        comparable = _is_comparable(stored)
        domain = ApplicabilityDomain(
            fingerprints=_checked(stored["fingerprints"]), threshold=float(stored["threshold"])
        )
    except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(
            f"{file} is damaged: {error}. Copy the model again, or delete the file to predict without similarities"
        ) from error
    if not comparable:
        logger.warning(
            "%s: the fingerprints are of another kind, or of an RDKit that makes others than the one here; "
            "similarities to its molecules are not known",
            without_credentials(file),
        )
        return None
    return domain


def _read(content: bytes) -> dict[str, NDArray[Any]]:
    """Every array of the file; nothing in it is executed."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _is_comparable(stored: Mapping[str, NDArray[Any]]) -> bool:
    """Whether fingerprints made here mean the same as those stored."""
    same_kind = str(stored["fingerprint"]) == FINGERPRINT
    return same_kind and np.array_equal(stored["control"], packed_ecfp([_CONTROL]))


def _checked(words: NDArray[Any]) -> NDArray[np.uint64]:
    """The fingerprints; a ValueError if they are not rows of words."""
    if words.dtype != np.uint64 or words.ndim != 2:
        raise ValueError(
            f"expected rows of uint64 words, found shape {words.shape} of {words.dtype}"
        )
    return words
