"""The class of a molecule among those of one column: the most probable one, and how often it is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.data.sources.classes import Alternatives
from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions


def most_probable(
    one: Alternatives, columns: Sequence[str], probabilities: NDArray[np.float64]
) -> NDArray[np.int64]:
    """(M,) index of the most probable class of each molecule, from the ``probabilities`` (M, T) of all ``columns``; of equal
    ones the first."""
    found: NDArray[np.int64] = _of_classes(one, columns, probabilities).argmax(axis=1)
    return found


def alternatives_entry(
    alternatives: Sequence[Alternatives], columns: Sequence[str], part: PartPredictions
) -> dict[str, Any]:
    """What ``results.json`` says of each column of classes: its classes, and how many molecules of each (rows) got which
    (columns) as the most probable one. Molecules of which the class is not known, or repeats contradict each other, are left out.
    """
    return {
        one.column: {
            "classes": list(one.words),
            "test_confusion": _confusion(one, columns, part).tolist(),
        }
        for one in alternatives
    }


def _confusion(
    one: Alternatives, columns: Sequence[str], part: PartPredictions
) -> NDArray[np.int64]:
    labels = _of_classes(one, columns, part.labels)
    known = (labels == 1).sum(axis=1) == 1
    true = labels[known].argmax(axis=1)
    found = most_probable(one, columns, part.predictions[known])
    counts = np.zeros((len(one.words), len(one.words)), dtype=np.int64)
    np.add.at(counts, (true, found), 1)
    return counts


def _of_classes(
    one: Alternatives, columns: Sequence[str], values: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(M, K) labels or probabilities of the K classes, from those (M, T) of all ``columns``."""
    found = values[:, one.places(columns)]
    return found if one.is_exclusive else np.concatenate([1.0 - found, found], axis=1)
