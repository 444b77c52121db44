"""The steps of baselines: features, candidates judged on validation, then one fit per seed, scored once on the test
part.

Every finished step writes a file, so a repeated command does not repeat it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.chemistry.descriptors import descriptors
from moleblend_ray.chemistry.fingerprints import ecfp
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.documents import require_types
from moleblend_ray.errors import DataError
from moleblend_ray.evaluation.models.baselines import (
    BaselineData,
    BaselineKind,
    FeatureKind,
    Settings,
    predict_group,
    validation_scores,
)
from moleblend_ray.evaluation.results.result_files import BASELINES_DIR
from moleblend_ray.evaluation.results.results import (
    Candidate,
    SeedResult,
    read_seed_result,
    write_seed_result,
)
from moleblend_ray.evaluation.scoring.scores import other_scores, score
from moleblend_ray.evaluation.scoring.stored_predictions import PREDICTIONS_NAME, write_predictions


def compute_features(kind: FeatureKind, smiles: Sequence[str]) -> NDArray[np.uint8 | np.float64]:
    """(M, F) features of the molecules; 0.2 ms (fingerprints) or 5 ms (descriptors) per drug-like molecule."""
    return ecfp(smiles) if kind is FeatureKind.FINGERPRINTS else descriptors(smiles)


def try_settings(
    data: BaselineData,
    kind: BaselineKind,
    group: Sequence[Settings],
    seed: int,
    num_jobs: int,
    out: str,
) -> list[Candidate]:
    """Judge the settings of a group; ``data`` needs no test molecules, see :meth:`BaselineData.without_test`."""
    scores = validation_scores(data, kind, group, seed, num_jobs)
    found = [
        Candidate(settings=settings, valid_score=value)
        for settings, value in zip(group, scores, strict=True)
    ]
    storage.write_json(
        _candidates_uri(out, kind, group, seed),
        [dataclasses.asdict(candidate) for candidate in found],
    )
    return found


def tried_settings(
    kind: BaselineKind, group: Sequence[Settings], seed: int, out: str
) -> list[Candidate] | None:
    """What :func:`try_settings` found in an earlier, interrupted command; None if it did not finish."""
    uri = _candidates_uri(out, kind, group, seed)
    if not storage.exists(uri):
        return None
    try:
        found = [Candidate(**value) for value in storage.read_json(uri)]
        for candidate in found:
            require_types(candidate)
    except TypeError as error:
        raise DataError(
            f"{uri} does not hold the scores of settings ({error}): it was changed, or another version wrote it. Delete it, and "
            "the same command makes it again"
        ) from error
    return found


def fit_seed(
    data: BaselineData, kind: BaselineKind, settings: Settings, seed: int, num_jobs: int, out: str
) -> SeedResult:
    """Fit the chosen settings with one seed, store its predictions, and score the test part."""
    began = time.monotonic()
    rows = np.concatenate([data.valid, data.test])
    (predictions,) = predict_group(data, kind, [settings], rows, seed, num_jobs)
    first, metric = len(data.valid), data.task.metric
    valid = score(metric, predictions[:first], *data.known(data.valid))
    outcome = metric, predictions[first:], *data.known(data.test)
    test = score(*outcome)
    found = SeedResult(
        seed=seed,
        valid_score=valid.value,
        test_score=test.value,
        test_columns=test.columns,
        columns_left_out=test.columns_left_out,
        epochs=0,
        best_epoch=0,
        seconds=time.monotonic() - began,
        model=None,
        test_others=other_scores(*outcome),
        predictions=_seed_path(kind, seed),
    )
    of_all = np.full(data.labels.shape, np.nan)
    of_all[rows] = predictions
    write_predictions(storage.join(out, _seed_path(kind, seed)), data, data, of_all)
    # Last: with this file the seed is done.
    write_seed_result(_seed_uri(out, kind, seed), settings, found)
    return found


def fitted_seed(kind: BaselineKind, settings: Settings, seed: int, out: str) -> SeedResult | None:
    """What :func:`fit_seed` found with these settings in an earlier, interrupted command, if its predictions are there (earlier
    versions did not store them)."""
    found = read_seed_result(_seed_uri(out, kind, seed), settings)
    stored = storage.join(out, _seed_path(kind, seed), PREDICTIONS_NAME)
    return found if found is not None and storage.exists(stored) else None


def _candidates_uri(out: str, kind: BaselineKind, group: Sequence[Settings], seed: int) -> str:
    key = json.dumps([list(map(dict, group)), seed], sort_keys=True).encode()
    name = f"candidates-{storage.sha256_bytes(key)[:16]}.json"
    return storage.join(out, BASELINES_DIR, kind.value, name)


def _seed_path(kind: BaselineKind, seed: int) -> str:
    return f"{BASELINES_DIR}/{kind.value}/seed-{seed}"


def _seed_uri(out: str, kind: BaselineKind, seed: int) -> str:
    return f"{storage.join(out, _seed_path(kind, seed))}.json"
