"""Labels of which only a bound is known, such as ``>10`` of an assay whose range ends there (censored labels).

Training uses a bound as far as it tells something: a prediction that respects it is right, any other is as wrong as it is far
from it. For squared errors this is the limit of a Tobit model of little noise (Tobin, Econometrica 26, 24 (1958)), and
chemprop's `bounded-mse`. Errors in scores are counted in the same way, so that what is chosen by them may not predict anything
beyond the range of an assay. Correlations, scales and intervals come from measured labels alone: how far beyond a bound the
value lies, nobody knows.

Shape legend: M molecules, T properties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LabelBounds:
    """What is known of labels that were not measured as a number."""

    at_least: NDArray[np.float64]
    """(M, T) least value that a label can have; NaN where no such bound is known."""
    at_most: NDArray[np.float64]
    """(M, T) greatest value; NaN likewise."""

    @classmethod
    def joined(cls, parts: Sequence[LabelBounds]) -> LabelBounds:
        """Those of several parts of the molecules, in their order."""
        return cls(
            at_least=np.concatenate([part.at_least for part in parts]),
            at_most=np.concatenate([part.at_most for part in parts]),
        )

    @property
    def known(self) -> NDArray[np.bool_]:
        """(M, T) which labels have a bound."""
        return ~(np.isnan(self.at_least) & np.isnan(self.at_most))

    @property
    def values(self) -> NDArray[np.float64]:
        """(M, T) the bounds themselves, the middle between two; NaN where there is none."""
        low, high = np.fmin(self.at_least, self.at_most), np.fmax(self.at_least, self.at_most)
        middle: NDArray[np.float64] = low + (high - low) / 2
        return middle

    def filled(self, labels: NDArray[np.float64]) -> NDArray[np.float64]:
        """(M, T) ``labels`` with the bounds in their place where there are no labels."""
        return np.where(self.known, self.values, labels)

    def map(self, scale: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> LabelBounds:
        """The same on another scale, of which greater values are greater, too."""
        return LabelBounds(at_least=scale(self.at_least), at_most=scale(self.at_most))

    def __getitem__(self, index: Any) -> LabelBounds:
        """Those of some molecules or properties, chosen as NumPy does of (M, T)."""
        return LabelBounds(at_least=self.at_least[index], at_most=self.at_most[index])

    def within(self, predictions: NDArray[np.float64]) -> NDArray[np.float64]:
        """(M, T) the values nearest to ``predictions`` that the bounds allow; NaN where there is none."""
        nearest = np.fmin(np.fmax(predictions, self.at_least), self.at_most)
        return np.where(self.known, nearest, np.nan)

    def respected(self, predictions: NDArray[np.float64]) -> NDArray[np.bool_]:
        """(M, T) which predictions are where a bound says that the label is; False where there is no bound."""
        allowed: NDArray[np.bool_] = self.within(predictions) == predictions
        return allowed


def bounds_entry(
    columns: Sequence[str], bounds: LabelBounds, predictions: NDArray[np.float64]
) -> dict[str, dict[str, Any]]:
    """The part of ``results.json`` about the bounds of the test molecules: how many there are, how many ``predictions`` (M, T)
    respect them, and the root mean square of the distance to what they allow (0 if respected), in the labels' unit."""
    known, respected = bounds.known, bounds.respected(predictions)
    squares = (predictions - bounds.within(predictions)) ** 2
    return {
        name: {
            "test_bounds": int(known[:, index].sum()),
            "test_respected": int(respected[:, index].sum()),
            "test_distance": float(np.sqrt(np.nanmean(squares[:, index])))
            if known[:, index].any()
            else None,
        }
        for index, name in enumerate(columns)
    }
