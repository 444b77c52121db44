"""Whether a molecule is similar to those that a model was trained on.

The similarity to the nearest training molecule tells where the predictions of a property model are good, for any model
and descriptors (Sheridan et al., J. Chem. Inf. Comput. Sci. 44, 1912 (2004)). Here it is the Tanimoto similarity of
ECFP4 fingerprints. The threshold comes from the training molecules: for 95 % of them the similarity to the nearest
other one is at least this high. (The 95th percentile of nearest-neighbour distances among training molecules is a usual
limit, see Sahigara et al., Molecules 17, 4791 (2012).)
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

from moleblend_ray.data.files import storage
from moleblend_ray.errors import CheckpointError, without_credentials
from moleblend_ray.evaluation.molecules.similarity import (
    NUM_BITS,
    RADIUS,
    nearest_similarity,
    packed_ecfp,
)

logger = logging.getLogger(__name__)

FINGERPRINTS_NAME: Final = "training_fingerprints.npz"
"""Name of the file beside a fine-tuned model. It holds fingerprints, not molecules."""

FINGERPRINT: Final = f"ecfp radius={RADIUS} bits={NUM_BITS}"

FORMAT_VERSION: Final = 1
"""Version of the file; it increases with every change that older code cannot read."""

PERCENTILE: Final = 5.0
"""Share of the training molecules, in percent, that would be outside if only the others were known."""

MAX_LEFT_OUT: Final = 10_000
"""Most training molecules that set the threshold, drawn at random from more: 2 * 10^8 pairs take 1 s."""

# Its fingerprint is in the file. An RDKit that makes another fingerprint of it cannot be compared.
_CONTROL: Final = "CC(=O)Oc1ccccc1C(=O)O"


@dataclass(frozen=True, kw_only=True, slots=True)
class ApplicabilityDomain:
    """The training molecules of a model as fingerprints, and how similar to them a molecule must be."""

    fingerprints: NDArray[np.uint64]
    """(M, 32) distinct ECFP4 fingerprints in ascending order, which hides the order and the number of molecules."""
    threshold: float
    """Least Tanimoto similarity, 0 to 1, of a molecule that is inside."""

    @classmethod
    def of(cls, smiles: Sequence[str]) -> ApplicabilityDomain:
        """The domain of a model trained on the molecules ``smiles``, without those that RDKit cannot read."""
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


def similarity_entry(training: Sequence[str], test: Sequence[str]) -> dict[str, float | int]:
    """The part of ``results.json`` about the similarity of each of the ``test`` molecules to the nearest ``training`` molecule:
    5th, 50th and 95th percentile, the threshold of the domain of a model trained on these, and how many are inside."""
    domain = ApplicabilityDomain.of(training)
    nearest = domain.similarity(packed_ecfp(test))
    low, median, high = np.percentile(nearest, (PERCENTILE, 50.0, 100.0 - PERCENTILE)).tolist()
    return {
        "percentile_5": low,
        "median": median,
        "percentile_95": high,
        "threshold": domain.threshold,
        "in_domain": int((nearest >= domain.threshold).sum()),
    }


def similarity_threshold(fingerprints: NDArray[np.uint64]) -> float:
    """The 5th percentile of the similarity of each of (M, W) distinct ``fingerprints`` to its nearest other.

    Of more than 10,000 fingerprints, 10,000 are drawn with a fixed seed. With fewer than two there is nothing to
    compare and the result is 1: only the training molecules are inside.
    """
    if len(fingerprints) < 2:
        return 1.0
    drawn = np.random.default_rng(0).permutation(len(fingerprints))[:MAX_LEFT_OUT]
    nearest = nearest_similarity(fingerprints[drawn], fingerprints, leave_out=drawn)
    return float(np.percentile(nearest, PERCENTILE))


def save_domain(domain: ApplicabilityDomain, uri: str) -> None:
    """Write ``training_fingerprints.npz`` to the model's directory ``uri``. Equal domains give equal bytes."""
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
    """The domain of the model in the directory ``uri``; None if it has none, or one of other fingerprints than here.

    The latter is logged. Raises CheckpointError if the file is damaged or of a later version.
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
            "%s: the fingerprints are of another kind, or of an RDKit with other fingerprints than the one here; "
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
    """Whether fingerprints made here can be compared with those stored."""
    same_kind = str(stored["fingerprint"]) == FINGERPRINT
    return same_kind and np.array_equal(stored["control"], packed_ecfp([_CONTROL]))


def _checked(words: NDArray[Any]) -> NDArray[np.uint64]:
    """The fingerprints. Raises ValueError if they are not rows of words."""
    if words.dtype != np.uint64 or words.ndim != 2:
        raise ValueError(
            f"expected rows of uint64 words, found shape {words.shape} of {words.dtype}"
        )
    return words
