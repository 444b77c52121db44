"""Prediction intervals for numbers, from the errors on the validation molecules (split conformal prediction).

An interval is the prediction plus or minus a half width: the error that a stated share of the validation molecules does
not exceed, with a correction for their finite number. If models have wholly different validation molecules, as the folds of a
cross-validation do, the error of each of these is that of the models which have it (cross-conformal prediction: Vovk, Ann. Math.
Artif. Intell. 74, 9 (2015)); all models together are hardly worse. A new molecule that could as well have been among them has its label
inside with at least this probability, whatever the model is (Lei et al., J. Am. Stat. Assoc. 113, 1094 (2018); for property
models: Norinder et al., J. Chem. Inf. Model. 54, 1596 (2014)). Two things make it less: molecules unlike them, and that epoch
and settings were chosen on them. How much less, the share of test labels inside tells, which had no part in this.

Shape legend: M molecules, T properties.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions, joined
from moleblend_ray.evaluation.settings import COVERAGE

N = TypeVar("N", np.float64, np.int64)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Calibration:
    """How wrong the mean of some models is."""

    errors: tuple[NDArray[np.float64], ...]
    """For each of T properties the absolute errors of the validation molecules with a label, in ascending order."""

    @classmethod
    def of(cls, parts: Sequence[PartPredictions | None]) -> Calibration | None:
        """From the validation molecules of all models of an ensemble (:func:`on_validation`); None if they do not tell."""
        mean = on_validation(parts)
        return None if mean is None else cls.of_mean(mean)

    @classmethod
    def of_mean(cls, valid: PartPredictions) -> Calibration:
        """From the mean predictions for validation molecules."""
        errors = np.abs(valid.predictions - valid.labels)
        return cls(errors=tuple(np.sort(column[~np.isnan(column)]) for column in errors.T))

    def half_widths(self, coverage: float) -> NDArray[np.float64]:
        """(T,) half of the width of intervals that hold the share ``coverage`` (0 to 1) of labels; NaN where there are too few
        labels to tell: 9 are the fewest for 0.9."""
        return np.array([_half_width(errors, coverage) for errors in self.errors])


def on_validation(parts: Sequence[PartPredictions | None]) -> PartPredictions | None:
    """The validation molecules of several models, each with the mean of the predictions of those models that have the same ones;
    None if they are not known of a model, or if some have only a part of theirs in common, or other labels for them."""
    groups: list[list[PartPredictions]] = []
    for part in parts:
        if part is None:
            return None
        own = next((group for group in groups if group[0].is_about_the_same(part)), None)
        if own is None:
            groups.append([part])
        else:
            own.append(part)
    known = Counter(text for group in groups for text in set(group[0].smiles))
    if not groups or max(known.values(), default=1) > 1:
        return None
    return joined(list(map(mean_of, groups)))


def mean_of(parts: Sequence[PartPredictions]) -> PartPredictions:
    """The mean of the predictions of several models for the same molecules."""
    first = parts[0]
    return PartPredictions(
        mol_ids=first.mol_ids,
        smiles=first.smiles,
        labels=first.labels,
        predictions=np.mean([part.predictions for part in parts], axis=0),
        bounds=first.bounds,
    )


def intervals_entry(
    columns: Sequence[str],
    valid: Sequence[PartPredictions],
    test: PartPredictions,
    folds: Sequence[slice] = (),
) -> dict[str, Any] | None:
    """The part of ``results.json`` about the intervals of the mean of models, of which ``valid`` are the predictions for the
    validation molecules and ``test`` the mean for the test molecules; None as for :meth:`Calibration.of`.

    ``folds`` are those of a cross-validation (:func:`by_folds`). Labels count as tested where there is a width.
    """
    mean = on_validation(valid)
    if mean is None:
        return None
    calibration = Calibration.of_mean(mean)
    widths = calibration.half_widths(COVERAGE)
    of_test = by_folds(mean, test, folds, _widths_of_each)
    inside = np.abs(test.predictions - test.labels) <= of_test
    known = ~np.isnan(test.labels) & (~np.isnan(of_test) | np.isnan(widths))
    return {
        "coverage": COVERAGE,
        "columns": {
            name: {
                "half_width": None if math.isnan(widths[index]) else float(widths[index]),
                "valid_labels": len(calibration.errors[index]),
                "test_labels": int(known[:, index].sum()),
                "test_inside": int(inside[known[:, index], index].sum()),
            }
            for index, name in enumerate(columns)
        },
    }


def by_folds(
    valid: PartPredictions,
    test: PartPredictions,
    folds: Sequence[slice],
    of: Callable[[PartPredictions, PartPredictions], NDArray[N]],
) -> NDArray[N]:
    """(M, T) what ``of`` gives for the ``test`` molecules from the ``valid`` ones.

    In a cross-validation all molecules are both. Those of each of ``folds``, rows of ``test``, are then judged by the
    validation molecules of the other folds: what a label had a part in, it cannot test.
    """
    if not folds:
        return of(valid, test)
    every, found = np.arange(len(test.smiles), dtype=np.int64), []
    for rows in folds:
        asked = test.take(every[rows])
        own = set(asked.smiles)
        others = np.flatnonzero([text not in own for text in valid.smiles])
        found.append(of(valid.take(others), asked))
    return np.concatenate(found)


def _widths_of_each(valid: PartPredictions, test: PartPredictions) -> NDArray[np.float64]:
    """(M, T) half widths of the intervals of each of the ``test`` molecules."""
    widths = Calibration.of_mean(valid).half_widths(COVERAGE)
    return np.tile(widths, (len(test.smiles), 1))


def _half_width(errors: NDArray[np.float64], coverage: float) -> float:
    # Some products, such as 100 * 0.55, come out a little above the whole number that they are.
    rank = math.ceil((len(errors) + 1) * coverage - 1e-9)
    return float(errors[rank - 1]) if rank <= len(errors) else math.nan
