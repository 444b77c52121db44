"""The predictions for validation and test molecules that lie beside a fine-tuned model or a baseline, with the labels.

Shape legend: M molecules of a part, T properties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moleblend_ray.data.dataset.shards import AT_LEAST_PREFIX, AT_MOST_PREFIX, LABEL_PREFIX
from moleblend_ray.data.files import storage
from moleblend_ray.errors import CheckpointError
from moleblend_ray.evaluation.molecules.censoring import LabelBounds

PREDICTIONS_NAME: Final = "predictions.parquet"
"""Name of the file. It holds SMILES and labels, so it may be absent where these must stay unknown."""

_PREDICTION_PREFIX: Final = "prediction:"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PartPredictions:
    """Labels and predictions of the molecules of one part."""

    mol_ids: tuple[str | None, ...]
    """(M,) ids of the source."""
    smiles: tuple[str, ...]
    """(M,) canonical SMILES."""
    labels: NDArray[np.float64]
    """(M, T), NaN where unknown."""
    predictions: NDArray[np.float64]
    """(M, T) numbers in the unit of the labels, or probabilities of class 1."""
    bounds: LabelBounds | None = None
    """Bounds of labels that have no number; None if the models were trained without."""

    def is_about_the_same(self, other: PartPredictions) -> bool:
        """Whether molecules and labels are equal, in the same order."""
        return (
            self.mol_ids == other.mol_ids
            and self.smiles == other.smiles
            and np.array_equal(self.labels, other.labels, equal_nan=True)
        )

    def take(self, rows: NDArray[np.int64]) -> PartPredictions:
        """The molecules at ``rows``."""
        return PartPredictions(
            mol_ids=tuple(self.mol_ids[row] for row in rows),
            smiles=tuple(self.smiles[row] for row in rows),
            labels=self.labels[rows],
            predictions=self.predictions[rows],
            bounds=None if self.bounds is None else self.bounds[rows],
        )


def joined(parts: Sequence[PartPredictions]) -> PartPredictions:
    """Several parts, at least one, as one, in their order; all have bounds, or none has."""
    bounds = [part.bounds for part in parts if part.bounds is not None]
    return PartPredictions(
        mol_ids=tuple(mol_id for part in parts for mol_id in part.mol_ids),
        smiles=tuple(text for part in parts for text in part.smiles),
        labels=np.concatenate([part.labels for part in parts]),
        predictions=np.concatenate([part.predictions for part in parts]),
        bounds=LabelBounds.joined(bounds) if bounds else None,
    )


class Labelled(Protocol):
    """Molecules with labels, as fine-tuning and baselines have them."""

    @property
    def mol_ids(self) -> tuple[str, ...]:
        """(M,) ids as in the source."""

    @property
    def smiles(self) -> tuple[str, ...]:
        """(M,) canonical SMILES."""

    @property
    def labels(self) -> NDArray[np.float64]:
        """(M, T), NaN where unknown."""

    @property
    def columns(self) -> tuple[str, ...]:
        """(T,) names of the labels."""

    @property
    def bounds(self) -> LabelBounds | None:
        """Bounds of labels that have no number; None if they count as missing."""


class Parts(Protocol):
    """Rows of the molecules that were predicted."""

    @property
    def valid(self) -> NDArray[np.int64]:
        """Those of validation."""

    @property
    def test(self) -> NDArray[np.int64]:
        """Those of the test part."""


def write_predictions(
    folder: str, molecules: Labelled, split: Parts, predictions: NDArray[np.float64]
) -> None:
    """Write the rows of validation and test molecules of ``predictions``, which has a row for each of ``molecules``."""
    rows = np.concatenate([split.valid, split.test])
    columns: dict[str, object] = {
        "mol_id": [molecules.mol_ids[row] for row in rows],
        "smiles": [molecules.smiles[row] for row in rows],
        "part": ["valid"] * len(split.valid) + ["test"] * len(split.test),
    }
    bounds = molecules.bounds and molecules.bounds[rows]
    columns |= label_columns(molecules.columns, molecules.labels[rows], predictions[rows], bounds)
    write_table(storage.join(folder, PREDICTIONS_NAME), columns)


def write_validation(folder: str, part: PartPredictions, columns: Sequence[str]) -> None:
    """Write predictions for molecules of validation as those of the model in ``folder``."""
    values: dict[str, object] = {
        "mol_id": list(part.mol_ids),
        "smiles": list(part.smiles),
        "part": ["valid"] * len(part.smiles),
        **label_columns(columns, part.labels, part.predictions, part.bounds),
    }
    write_table(storage.join(folder, PREDICTIONS_NAME), values)


def label_columns(
    names: Sequence[str],
    labels: NDArray[np.float64],
    predictions: NDArray[np.float64],
    bounds: LabelBounds | None,
) -> dict[str, object]:
    """Columns of a table with (M, T) labels, bounds if there are some, and predictions of the properties ``names``."""
    columns: dict[str, object] = {}
    for index, name in enumerate(names):
        columns[LABEL_PREFIX + name] = pa.array(labels[:, index], from_pandas=True)
        if bounds is not None:
            at_least, at_most = bounds.at_least[:, index], bounds.at_most[:, index]
            columns[AT_LEAST_PREFIX + name] = pa.array(at_least, from_pandas=True)
            columns[AT_MOST_PREFIX + name] = pa.array(at_most, from_pandas=True)
        columns[_PREDICTION_PREFIX + name] = predictions[:, index]
    return columns


def write_table(uri: str, columns: Mapping[str, object]) -> None:
    """Write columns as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(dict(columns)), sink)
    storage.write_bytes(uri, sink.getvalue().to_pybytes())


def read_predictions(
    folder: str, part: Literal["valid", "test"], columns: Sequence[str]
) -> PartPredictions | None:
    """What :func:`write_predictions` wrote into ``folder`` for a part, of these properties; None if there is no such file.

    Raises CheckpointError if the file cannot be read or lacks a column.
    """
    uri = storage.join(folder, PREDICTIONS_NAME)
    if not storage.exists(uri):
        return None
    content = storage.read_bytes(uri)
    try:
        table = pq.read_table(pa.BufferReader(content))
        table = table.filter(pc.equal(table["part"], part))
        return PartPredictions(
            mol_ids=tuple(table["mol_id"].to_pylist()),
            smiles=tuple(table["smiles"].to_pylist()),
            labels=_stacked(table, LABEL_PREFIX, columns),
            predictions=_stacked(table, _PREDICTION_PREFIX, columns),
            bounds=_bounds(table, columns),
        )
    # A damaged footer raises whatever its bytes happen to mean.
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{uri} is damaged: {error}. Copy the model again, or delete the file to predict without intervals"
        ) from error


def _stacked(table: pa.Table, prefix: str, columns: Sequence[str]) -> NDArray[np.float64]:
    """(M, T) values of the columns with this prefix; null is NaN."""
    values = [
        table[prefix + name].to_numpy(zero_copy_only=False).astype(np.float64) for name in columns
    ]
    return np.stack(values, axis=1)


def _bounds(table: pa.Table, columns: Sequence[str]) -> LabelBounds | None:
    if AT_LEAST_PREFIX + columns[0] not in table.column_names:
        return None
    return LabelBounds(
        at_least=_stacked(table, AT_LEAST_PREFIX, columns),
        at_most=_stacked(table, AT_MOST_PREFIX, columns),
    )
