"""How often intervals of test scores hold what they should, where the score on many more molecules is known.

    python benchmarks/score_intervals.py TABLE.csv.gz --column NAME [--kind classification] [--train 1000] [--most 6000] [--test 200] \\
      [--draws 300]

Two baselines (ECFP4 with a random forest, RDKit descriptors with a linear model) are fitted to the first molecules of the table in
random order, and predict all others. Their score on all others stands for the true one. Then, many times, a small test part is
drawn of these, and it is counted how often its 95 % interval holds the true score, and the interval of the difference the true
difference (``moleblend_ray/evaluation/scoring/resampling.py``). Test parts are drawn by molecules, and by whole scaffolds, whose molecules are
not independent of each other. Intervals come from draws of scaffolds, and for comparison from draws of molecules. Also: how often those
of two scores overlap where that of the difference does not contain 0. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rdkit import Chem, rdBase

from moleblend_ray.chemistry.scaffolds import murcko_scaffold
from moleblend_ray.evaluation.models.baselines import (
    BaselineData,
    BaselineKind,
    candidate_groups,
    predict_group,
)
from moleblend_ray.evaluation.results.baseline_runs import compute_features
from moleblend_ray.evaluation.scoring.resampling import DRAWS, LEVEL, Resampling, gains
from moleblend_ray.evaluation.scoring.scores import score
from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions
from moleblend_ray.evaluation.tasks import Task, TaskKind, resolve_task

KINDS = (BaselineKind.FOREST, BaselineKind.DESCRIPTORS)

Rows = NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table")
    parser.add_argument("--column", required=True)
    parser.add_argument("--kind", choices=[kind.value for kind in TaskKind], default="regression")
    parser.add_argument("--train", type=int, default=1000, help="molecules to fit to")
    parser.add_argument("--most", type=int, default=6000, help="molecules in all")
    parser.add_argument("--test", type=int, default=200, help="molecules of a small test part")
    parser.add_argument("--draws", type=int, default=300, help="number of small test parts")
    asked = parser.parse_args()
    # Rows that are no molecules are left out.
    with rdBase.BlockLogs():
        smiles, labels = read_table(asked.table, asked.column, asked.most)
    task = resolve_task("own", columns=(asked.column,), kind=TaskKind(asked.kind))
    models = [fitted(kind, task, smiles, labels, asked.train) for kind in KINDS]
    generator = np.random.default_rng(0)
    # Molecules without rings are no series.
    series = np.unique(
        [murcko_scaffold(text) or text for text in models[0].smiles], return_inverse=True
    )[1]
    ways = {
        "parts_by_molecules": [
            generator.choice(len(series), asked.test, replace=False) for _ in range(asked.draws)
        ],
        "parts_by_scaffolds": [
            whole_scaffolds(series, asked.test, generator) for _ in range(asked.draws)
        ],
    }
    found = {
        way: {
            "draws_of_scaffolds": held(task, models, parts, Resampling.of),
            "draws_of_molecules": held(task, models, parts, one_by_one),
        }
        for way, parts in ways.items()
    }
    figures = {
        "benchmark": "score_intervals",
        "column": asked.column,
        "metric": task.metric.value,
        "level": LEVEL,
        "resamples": DRAWS,
        "molecules": len(series),
        "series": int(series.max()) + 1,
        "scores": [round(score_of(task, model), 4) for model in models],
        **found,
    }
    print(json.dumps(figures))


def read_table(path: str, column: str, most: int) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """At most so many molecules with a label (M,) in random order, each SMILES once."""
    table = pd.read_csv(path)[["smiles", column]].dropna()
    table["smiles"] = [_canonical(text) for text in table["smiles"]]
    table = table.dropna().drop_duplicates("smiles").sample(frac=1.0, random_state=0)[:most]
    return tuple(table["smiles"]), table[column].to_numpy(np.float64)


def _canonical(smiles: str) -> str | None:
    mol: Chem.Mol | None = Chem.MolFromSmiles(smiles)
    return None if mol is None else Chem.MolToSmiles(mol)


def fitted(
    kind: BaselineKind, task: Task, smiles: tuple[str, ...], labels: NDArray[np.float64], train: int
) -> PartPredictions:
    """The predictions, for all molecules but those for training, of a baseline with the settings in the middle of its grid."""
    rows = np.arange(len(smiles))
    data = BaselineData(
        task=task,
        mol_ids=smiles,
        smiles=smiles,
        features=compute_features(kind.features, smiles),
        labels=labels[:, None],
        columns=task.columns,
        train=rows[:train],
        valid=rows[:0],
        test=rows[train:],
    )
    groups = candidate_groups(kind, task.kind, data.labels[:train], num_trees=200, num_rounds=300)
    middle = groups[0][len(groups[0]) // 2]
    (predictions,) = predict_group(data, kind, [middle], data.test, 0, 1)
    names = smiles[train:]
    return PartPredictions(
        mol_ids=names, smiles=names, labels=data.labels[train:], predictions=predictions
    )


def whole_scaffolds(scaffolds: Rows, least: int, generator: np.random.Generator) -> Rows:
    """Rows of all molecules of scaffolds that are drawn until there are at least so many."""
    chosen: list[Rows] = []
    for scaffold in generator.permutation(scaffolds.max() + 1):
        if sum(map(len, chosen)) >= least:
            break
        chosen.append(np.flatnonzero(scaffolds == scaffold))
    return np.concatenate(chosen)


def one_by_one(smiles: Sequence[str]) -> Resampling:
    """Draws of molecules as if they were independent."""
    return Resampling(units=np.arange(len(smiles)), of_units="molecules")


def held(
    task: Task,
    models: list[PartPredictions],
    parts: Sequence[Rows],
    resampling: Callable[[Sequence[str]], Resampling],
) -> dict[str, float]:
    """Shares of test parts whose intervals hold the scores on all molecules, and the difference of both."""
    true = [np.array([score_of(task, model)]) for model in models]
    true_gain = float(gains(task.metric, *true)[0])
    inside: list[tuple[bool, bool, bool, bool]] = []
    for rows in parts:
        tested = [taken(model, rows) for model in models]
        resampled = resampling(tested[0].smiles)
        draws = [resampled.scores(task.metric, [part], task.columns) for part in tested]
        found = [score_of(task, part) for part in tested]
        limits = [resampled.interval(*pair) for pair in zip(draws, found, strict=True)]
        difference = resampled.interval(gains(task.metric, *draws), gains(task.metric, *found))
        if difference is None or None in limits:
            continue
        first, second = (pair for pair in limits if pair is not None)
        inside.append(
            (
                first[0] <= true[0][0] <= first[1],
                second[0] <= true[1][0] <= second[1],
                difference[0] <= true_gain <= difference[1],
                max(first[0], second[0]) <= min(first[1], second[1])
                and not difference[0] <= 0 <= difference[1],
            )
        )
    names = ("forest", "linear", "difference", "surer_than_scores")
    return {
        "parts": len(inside),
        **{
            name: round(float(np.mean(values)), 3)
            for name, values in zip(names, zip(*inside, strict=True), strict=True)
        },
    }


def taken(model: PartPredictions, rows: Rows) -> PartPredictions:
    """The predictions for some molecules."""
    names = tuple(model.smiles[row] for row in rows)
    return PartPredictions(
        mol_ids=names, smiles=names, labels=model.labels[rows], predictions=model.predictions[rows]
    )


def score_of(task: Task, model: PartPredictions) -> float:
    """The score of all molecules."""
    return score(task.metric, model.predictions, model.labels, task.columns).value


if __name__ == "__main__":
    main()
