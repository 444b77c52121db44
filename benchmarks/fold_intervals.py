"""How often intervals of the scores of a cross-validation hold what they should, where the score on many more molecules is known.

    python benchmarks/fold_intervals.py TABLE.csv.gz --column NAME [--split scaffold] [--folds 5] [--molecules 300] [--tables 100]

Many times, a small table is drawn of a large one and cross-validated with two baselines (ECFP4 with a forest of 50 trees, RDKit
descriptors with a linear model), in the folds of ``moleblend_ray/evaluation/splits/folds.py``. The true score of the models of a fold is that on all
molecules that are not in the small table, with folds by scaffold on those whose scaffold they were not trained on. It is counted
how often the interval of the mean over folds holds the mean of these, and the interval of the difference the true difference
(``moleblend_ray/evaluation/scoring/resampling.py``). Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

import numpy as np
from numpy.typing import NDArray
from rdkit import rdBase
from score_intervals import KINDS, Rows, read_table

from moleblend_ray.chemistry.scaffolds import murcko_scaffold
from moleblend_ray.evaluation.models.baselines import (
    BaselineData,
    BaselineKind,
    candidate_groups,
    predict_group,
)
from moleblend_ray.evaluation.results.baseline_runs import compute_features
from moleblend_ray.evaluation.scoring.resampling import LEVEL, Resampling, gains
from moleblend_ray.evaluation.scoring.scores import score
from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions, joined
from moleblend_ray.evaluation.splits.folds import fold_numbers, split_of_fold
from moleblend_ray.evaluation.tasks import SplitKind, Task, TaskKind, resolve_task


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Collection:
    """The large table."""

    task: Task
    smiles: tuple[str, ...]
    scaffolds: Rows
    """(M,) number of the scaffold of each molecule; one without rings has its own."""
    labels: NDArray[np.float64]
    features: dict[BaselineKind, NDArray[np.uint8 | np.float64]]
    split: SplitKind
    folds: int

    def predicted(self, kind: BaselineKind, train: Rows, test: Rows) -> PartPredictions:
        """The predictions of a baseline with the settings in the middle of its grid."""
        data = BaselineData(
            task=self.task,
            mol_ids=self.smiles,
            smiles=self.smiles,
            features=self.features[kind],
            labels=self.labels,
            columns=self.task.columns,
            train=train,
            valid=train[:0],
            test=test,
        )
        groups = candidate_groups(
            kind, self.task.kind, self.labels[train], num_trees=50, num_rounds=50
        )
        middle = groups[0][len(groups[0]) // 2]
        (predictions,) = predict_group(data, kind, [middle], test, 0, 1)
        names = tuple(self.smiles[row] for row in test)
        return PartPredictions(
            mol_ids=names, smiles=names, labels=self.labels[test], predictions=predictions
        )

    def score(self, part: PartPredictions) -> float:
        return score(self.task.metric, part.predictions, part.labels, self.task.columns).value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table")
    parser.add_argument("--column", required=True)
    parser.add_argument("--kind", choices=[kind.value for kind in TaskKind], default="regression")
    parser.add_argument("--split", choices=["random", "scaffold"], default="scaffold")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--molecules", type=int, default=300, help="molecules of a small table")
    parser.add_argument("--tables", type=int, default=100, help="number of small tables")
    parser.add_argument("--most", type=int, default=4000, help="molecules in all")
    asked = parser.parse_args()
    # Rows that are no molecules are left out.
    with rdBase.BlockLogs():
        smiles, labels = read_table(asked.table, asked.column, asked.most)
    collection = Collection(
        task=resolve_task("own", columns=(asked.column,), kind=TaskKind(asked.kind)),
        smiles=smiles,
        scaffolds=np.unique([murcko_scaffold(t) or t for t in smiles], return_inverse=True)[1],
        labels=labels[:, None],
        features={kind: compute_features(kind.features, smiles) for kind in KINDS},
        split=SplitKind(asked.split),
        folds=asked.folds,
    )
    generator = np.random.default_rng(0)
    tables = [
        generator.choice(len(smiles), asked.molecules, replace=False) for _ in range(asked.tables)
    ]
    found = [judged(collection, rows) for rows in tables]
    known = [one for one in found if one is not None]
    print(
        json.dumps(
            {
                "benchmark": "fold_intervals",
                "column": asked.column,
                "metric": collection.task.metric.value,
                "split": asked.split,
                "folds": asked.folds,
                "molecules": asked.molecules,
                "tables": asked.tables,
                "with_intervals": len(known),
                "level": LEVEL,
                "held": {
                    name: round(float(np.mean([one[name] for one in known])), 3)
                    for name in ("forest", "linear", "difference")
                },
            }
        )
    )


def judged(collection: Collection, rows: Rows) -> dict[str, bool] | None:
    """Whether the intervals of a small table hold the true scores of its models; None if there are none."""
    smiles = [collection.smiles[row] for row in rows]
    numbers = fold_numbers(smiles, collection.split, 0, collection.folds)
    tested: list[list[PartPredictions]] = [[] for _ in KINDS]
    true: list[list[float]] = [[] for _ in KINDS]
    others = np.setdiff1d(np.arange(len(collection.smiles)), rows)
    for fold in range(collection.folds):
        split = split_of_fold(numbers, fold, collection.folds)
        train, test = rows[split.train], rows[split.test]
        new = others
        if collection.split is SplitKind.SCAFFOLD:
            new = others[~np.isin(collection.scaffolds[others], collection.scaffolds[train])]
        for index, kind in enumerate(KINDS):
            part = collection.predicted(kind, train, np.concatenate([test, new]))
            tested[index].append(_taken(part, slice(0, len(test))))
            true[index].append(collection.score(_taken(part, slice(len(test), None))))
    return _held(collection, tested, [float(np.mean(scores)) for scores in true])


def _held(
    collection: Collection, tested: list[list[PartPredictions]], true: list[float]
) -> dict[str, bool] | None:
    """As :func:`judged`, from the predictions of each model for each fold and its true mean score."""
    metric, columns = collection.task.metric, collection.task.columns
    sizes = [len(part.smiles) for part in tested[0]]
    # As results of a cross-validation have it.
    resampling = Resampling.of(joined(tested[0]).smiles, most_of_one=min(sizes) // 2)
    ends = np.cumsum(sizes).tolist()
    rows = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    draws = [
        np.mean(
            [
                resampling.scores(metric, [part], columns, own)
                for part, own in zip(parts, rows, strict=True)
            ],
            axis=0,
        )
        for parts in tested
    ]
    found = [float(np.mean([collection.score(part) for part in parts])) for parts in tested]
    limits = [resampling.interval(*pair) for pair in zip(draws, found, strict=True)]
    limits.append(resampling.interval(gains(metric, *draws), gains(metric, *found)))
    names = ("forest", "linear", "difference")
    truth = (*true, gains(metric, *true))
    held = {
        name: pair[0] <= value <= pair[1]
        for name, pair, value in zip(names, limits, truth, strict=True)
        if pair is not None
    }
    return held if len(held) == len(names) else None


def _taken(part: PartPredictions, rows: slice) -> PartPredictions:
    return PartPredictions(
        mol_ids=part.mol_ids[rows],
        smiles=part.smiles[rows],
        labels=part.labels[rows],
        predictions=part.predictions[rows],
    )


if __name__ == "__main__":
    main()
