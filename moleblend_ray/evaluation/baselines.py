"""What a chemist would try first: circular fingerprints and a random forest, on the same split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.chemistry.fingerprints import ecfp
from moleblend_ray.evaluation.tasks import Task, TaskKind

BASELINE_NAME = "ECFP4 + random forest"
"""How reports call the baseline."""


def baseline_predictions(
    task: Task,
    smiles: Sequence[str],
    labels: NDArray[np.float64],
    train: NDArray[np.int64],
    *,
    seed: int,
    num_trees: int,
    num_jobs: int = 1,
) -> NDArray[np.float64]:
    """Predictions (M, T) for all molecules of one forest a column, each fitted on that column's known labels.

    Classes are predicted as the probability of 1. A column whose training labels are all missing predicts 0, and
    one whose training labels are all equal predicts that label: both score as chance.
    """
    # Imported here: it takes seconds, and workers that train models import this module too.
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    fingerprints = ecfp(smiles)
    predictions = np.zeros(labels.shape, dtype=np.float64)
    for column in range(labels.shape[1]):
        rows = train[~np.isnan(labels[train, column])]
        targets = labels[rows, column]
        if len(rows) == 0 or targets.min() == targets.max():
            predictions[:, column] = targets[0] if len(rows) else 0.0
        elif task.kind is TaskKind.CLASSIFICATION:
            forest = RandomForestClassifier(num_trees, random_state=seed, n_jobs=num_jobs)
            forest.fit(fingerprints[rows], targets.astype(np.int64))
            predictions[:, column] = forest.predict_proba(fingerprints)[:, 1]
        else:
            forest = RandomForestRegressor(num_trees, random_state=seed, n_jobs=num_jobs)
            forest.fit(fingerprints[rows], targets)
            predictions[:, column] = forest.predict(fingerprints)
    return predictions
