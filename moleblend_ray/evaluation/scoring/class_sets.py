"""How well predicted probabilities go with each class, from the validation molecules (Mondrian inductive conformal prediction).

The p-value of a class is the share of the validation molecules of this class that look at most as typical of it as the new
molecule does, with a correction for their finite number. If the new molecule is of this class and could as well have been among
them, its p-value is at most e with a probability of at most e, for each class by itself and so also for rare ones, whatever the
model is (Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, Springer 2005; for property models: Norinder et
al., J. Chem. Inf. Model. 54, 1596 (2014)). The classes whose p-value is above 1 - coverage are the set of a molecule: one, both
(the models cannot tell) or neither (it is like none of the two). What reduces the share that is said for intervals of numbers
(:mod:`.intervals`) does so here.

Shape legend: M molecules, T properties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.evaluation.scoring.intervals import by_folds, on_validation
from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions
from moleblend_ray.evaluation.settings import COVERAGE

SET_NAMES: Final = ("neither", "0", "1", "both")
"""Words for a set of classes, by (0 is in it) + 2 * (1 is in it)."""


class PValues(NamedTuple):
    """For each class, how well molecules go with it."""

    of_0: NDArray[np.float64]
    """(M, T) p-values of class 0."""
    of_1: NDArray[np.float64]
    """(M, T) p-values of class 1."""

    def sets(self, coverage: float) -> NDArray[np.int64]:
        """(M, T) indices in :data:`SET_NAMES` of the sets that hold the share ``coverage`` (0 to 1) of each class."""
        # Neither 1 - 0.9 nor 1 / 10 is a tenth for a computer.
        least = 1.0 - coverage + 1e-9
        return (self.of_0 > least).astype(np.int64) + 2 * (self.of_1 > least)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassCalibration:
    """What the mean of some models gives for molecules whose class is known."""

    probabilities: tuple[tuple[NDArray[np.float64], NDArray[np.float64]], ...]
    """For each of T properties, the predicted probabilities of class 1 of the validation molecules of class 0, and of those of
    class 1, in ascending order."""

    @classmethod
    def of(cls, parts: Sequence[PartPredictions | None]) -> ClassCalibration | None:
        """From the validation molecules of all models of an ensemble (:func:`on_validation`); None if they do not tell."""
        mean = on_validation(parts)
        return None if mean is None else cls.of_mean(mean)

    @classmethod
    def of_mean(cls, valid: PartPredictions) -> ClassCalibration:
        """From the mean predictions for validation molecules."""
        columns = zip(valid.predictions.T, valid.labels.T, strict=True)
        return cls(
            probabilities=tuple(
                (np.sort(values[labels == 0]), np.sort(values[labels == 1]))
                for values, labels in columns
            )
        )

    def p_values(self, predictions: NDArray[np.float64]) -> PValues:
        """Those of molecules with (M, T) predicted probabilities of class 1."""
        of_0, of_1 = np.empty_like(predictions), np.empty_like(predictions)
        for index, (zeros, ones) in enumerate(self.probabilities):
            values = predictions[:, index]
            # As probable as the molecule itself counts as less typical, too, which makes p-values no smaller.
            above = len(zeros) - np.searchsorted(zeros, values, side="left")
            below = np.searchsorted(ones, values, side="right")
            of_0[:, index] = (above + 1) / (len(zeros) + 1)
            of_1[:, index] = (below + 1) / (len(ones) + 1)
        return PValues(of_0, of_1)

    @property
    def counts(self) -> NDArray[np.int64]:
        """(T, 2) validation molecules of class 0 and of class 1."""
        return np.array([[len(values) for values in both] for both in self.probabilities])

    def never_excluded(self, coverage: float) -> NDArray[np.bool_]:
        """(T, 2) which classes are in every set, as too few molecules tell what is unlike them: 9 are the fewest for 0.9."""
        excluded: NDArray[np.bool_] = 1 / (self.counts + 1) > 1.0 - coverage + 1e-9
        return excluded


def class_sets_entry(
    columns: Sequence[str],
    valid: Sequence[PartPredictions],
    test: PartPredictions,
    folds: Sequence[slice] = (),
) -> dict[str, Any] | None:
    """The part of ``results.json`` about the sets of classes that the mean of models gives: its predictions for the validation
    molecules are of ``valid``, those for the test molecules ``test``. None as for :meth:`ClassCalibration.of`.

    ``folds`` are those of a cross-validation (:func:`by_folds`).
    """
    mean = on_validation(valid)
    if mean is None:
        return None
    calibration = ClassCalibration.of_mean(mean)
    found = by_folds(mean, test, folds, _sets_of_each)
    counts = calibration.counts
    return {
        "coverage": COVERAGE,
        "columns": {
            name: {
                "valid_labels": counts[index].tolist(),
                **_on_test(found[:, index], test.labels[:, index]),
            }
            for index, name in enumerate(columns)
        },
    }


def _sets_of_each(valid: PartPredictions, test: PartPredictions) -> NDArray[np.int64]:
    """(M, T) indices in :data:`SET_NAMES` of the sets of the ``test`` molecules."""
    return ClassCalibration.of_mean(valid).p_values(test.predictions).sets(COVERAGE)


def _on_test(found: NDArray[np.int64], labels: NDArray[np.float64]) -> dict[str, Any]:
    """The sets of molecules with a label, and how many of each class are in theirs."""
    known = ~np.isnan(labels)
    classes = [labels == value for value in (0, 1)]
    return {
        "test_sets": {
            word: int((found[known] == code).sum()) for code, word in enumerate(SET_NAMES)
        },
        "test_labels": [int(own.sum()) for own in classes],
        "test_inside": [
            int((found[own] & (1 << value) > 0).sum()) for value, own in enumerate(classes)
        ],
    }
