"""The results of a cross-validation from those of its folds.

A score is the mean over the folds: predictions of different models need not be on one scale, so ranks over all of them would mean
little (Forman and Scholz, SIGKDD Explor. 12, 49 (2010)). Its interval is that of :mod:`~moleblend_ray.evaluation.scoring.resampling`, with one draw of all molecules for
all folds. It takes the trained models as they are. That other molecules would have trained other models comes on top, and cannot be
estimated without bias from one cross-validation (Bengio and Grandvalet, J. Mach. Learn. Res. 5, 1089 (2004)).

Shape legend: M molecules, T properties, D draws.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from moleblend_ray.data.files import storage
from moleblend_ray.data.sources.classes import Alternatives, Exclusive, exclusive_places
from moleblend_ray.evaluation.molecules.censoring import bounds_entry
from moleblend_ray.evaluation.results.result_files import OUT_OF_FOLD_NAME, RESULTS_NAME, fold_path
from moleblend_ray.evaluation.results.results import Spread
from moleblend_ray.evaluation.results.runs import read_of_folders
from moleblend_ray.evaluation.scoring.class_sets import class_sets_entry
from moleblend_ray.evaluation.scoring.intervals import intervals_entry, mean_of
from moleblend_ray.evaluation.scoring.resampling import Array, Resampling, Scored
from moleblend_ray.evaluation.scoring.stored_predictions import (
    PartPredictions,
    joined,
    label_columns,
    write_table,
)
from moleblend_ray.evaluation.tasks import Metric, TaskKind

_RESULTS: Final[Mapping[str, Any]] = {
    "task.columns": list[str],
    "task.metric": str,
    "task.kind": str,
    "data.split": dict[str, Any],
    "data.repeats": dict[str, int],
    "final": dict[str, Any],
    "baselines": list[dict[str, Any]],
    "baselines_absent": dict[str, str],
    "checkpoint": dict[str, Any],
    "chosen": dict[str, Any],
    "trials": list[Any],
}
"""What is read of the results of a fold."""

_MODEL: Final[Mapping[str, Any]] = {
    "name": str,
    "valid.mean": float,
    "test.mean": float,
    "test_others": dict[str, Any],
    "seeds": list[dict[str, Any]],
}
"""What is read of each model in them, fine-tuned or a baseline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """A finished run of a cross-validation."""

    number: int
    """Number of the fold that it was tested on."""
    folder: str
    """Folder of its results within ``out``."""
    results: Mapping[str, Any]
    """Its ``results.json``."""

    @classmethod
    def read(cls, out: str, number: int) -> Fold:
        """The run for a fold of the cross-validation in ``out``; DataError if its results were changed or damaged."""
        uri = storage.join(out, fold_path(number), RESULTS_NAME)
        results = storage.read_object(uri, _RESULTS)
        for entry in (results["final"], *results["baselines"]):
            storage.require_members(uri, entry, _MODEL)
        return cls(number=number, folder=fold_path(number), results=results)

    def baseline(self, kind: str) -> Mapping[str, Any] | None:
        """What its results say of a baseline; None if it is absent there."""
        return next((entry for entry in self.results["baselines"] if entry["kind"] == kind), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossValidation:
    """What all folds give together."""

    entries: Mapping[str, Any]
    """The parts of ``results.json`` about scores: ``final``, ``baselines``, ``baselines_absent``, ``resampling`` and ``folds``."""
    predictions: PartPredictions
    """Labels and predictions (mean over seeds) of all molecules, each by models that it had no part in, fold by fold."""
    sizes: tuple[int, ...]
    """Number of molecules in each fold."""

    @property
    def rows(self) -> list[slice]:
        """Those of each fold in ``predictions``."""
        return _rows_of(self.sizes)


def combine_folds(
    out: str, folds: Sequence[Fold], groups: NDArray[np.int64] | None = None
) -> CrossValidation:
    """The results of all ``folds``, in order, whose predictions are in their folders of ``out``.

    ``groups`` (M,): number of the group of each molecule, fold by fold, of folds that keep groups together. Raises DataError if predictions are gone or damaged.
    """
    task = folds[0].results["task"]
    columns = tuple(task["columns"])
    finals = [fold.results["final"] for fold in folds]
    tested = [_parts(out, fold, fold.results["final"], "test", columns) for fold in folds]
    chosen_by = [_parts(out, fold, fold.results["final"], "valid", columns) for fold in folds]
    sizes = tuple(len(parts[0].mol_ids) for parts in tested)
    together = joined([mean_of(parts) for parts in tested])
    scoring = _Scoring(
        metric=Metric(task["metric"]),
        columns=columns,
        # What is most of a fold would leave it without most of its molecules in a third of the draws.
        resampling=Resampling.of(together.smiles, most_of_one=min(sizes) // 2, groups=groups),
        sizes=sizes,
        exclusive=exclusive_places(
            [
                Alternatives.of_words(column, found["classes"])
                for column, found in finals[0].get("alternatives", {}).items()
            ],
            columns,
        ),
    )
    final = _model_entry(folds, finals)
    model = Scored(final["test"]["mean"], scoring.draws(tested))
    final |= {
        "test_interval": scoring.resampling.interval(model.draws, model.score),
        **_uncertainties(TaskKind(task["kind"]), columns, chosen_by, together, _rows_of(sizes)),
        **_alternatives(folds),
    }
    baselines, absent = _baselines(out, folds, scoring, model)
    return CrossValidation(
        entries={
            "final": final,
            "baselines": baselines,
            "baselines_absent": absent,
            "resampling": scoring.resampling.to_json(),
            "folds": [_fold_entry(fold) for fold in folds],
        },
        predictions=together,
        sizes=sizes,
    )


def split_hash_of(folds: Sequence[Fold]) -> str:
    """16 hexadecimal digits that identify the folds: they are equal if the splits of all are."""
    hashes = [fold.results["data"]["split"]["hash"] for fold in folds]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]


def write_out_of_fold(out: str, found: CrossValidation, columns: Sequence[str]) -> str:
    """Write labels and predictions of all molecules to ``out``, and return where."""
    part = found.predictions
    values: dict[str, object] = {
        "mol_id": list(part.mol_ids),
        "smiles": list(part.smiles),
        "fold": np.repeat(np.arange(len(found.sizes)), found.sizes),
        **label_columns(columns, part.labels, part.predictions, part.bounds),
    }
    uri = storage.join(out, OUT_OF_FOLD_NAME)
    write_table(uri, values)
    return uri


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scoring:
    """How models are scored on draws of the molecules of all folds."""

    metric: Metric
    columns: tuple[str, ...]
    resampling: Resampling
    sizes: tuple[int, ...]
    exclusive: Exclusive

    def draws(self, folds: Sequence[Sequence[PartPredictions]]) -> Array:
        """(D,) mean score over the folds for each draw, of the predictions of all seeds for each fold."""
        found = [
            self.resampling.scores(self.metric, parts, self.columns, rows, exclusive=self.exclusive)
            for parts, rows in zip(folds, _rows_of(self.sizes), strict=True)
        ]
        mean: Array = np.mean(found, axis=0)
        return mean


def _rows_of(sizes: Sequence[int]) -> list[slice]:
    """The rows of parts of these sizes that follow one another."""
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _parts(
    out: str,
    fold: Fold,
    entry: Mapping[str, Any],
    part: Literal["valid", "test"],
    columns: Sequence[str],
) -> list[PartPredictions]:
    """The predictions of all seeds of a model or a baseline."""
    paths = [str(seed.get("predictions") or seed["model"]) for seed in entry["seeds"]]
    return read_of_folders(storage.join(out, fold.folder), paths, part, columns)


def _model_entry(folds: Sequence[Fold], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The part of ``results.json`` for one model: as for a single split, with a value for each fold instead of each seed."""
    others = [
        name for name in entries[0]["test_others"] if all(name in e["test_others"] for e in entries)
    ]
    return {
        "name": entries[0]["name"],
        "valid": _spread([entry["valid"]["mean"] for entry in entries]),
        "test": _spread([entry["test"]["mean"] for entry in entries]),
        "test_others": {
            name: _spread([entry["test_others"][name]["mean"] for entry in entries])
            for name in others
        },
        "seeds": [
            {"fold": fold.number, **seed, **_moved(fold, seed)}
            for fold, entry in zip(folds, entries, strict=True)
            for seed in entry["seeds"]
        ],
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return dataclasses.asdict(Spread.of(values))


def _moved(fold: Fold, seed: Mapping[str, Any]) -> dict[str, str]:
    """The folders of a seed, relative to the ``out`` of all folds."""
    return {
        name: f"{fold.folder}/{seed[name]}" for name in ("model", "predictions") if seed.get(name)
    }


def _uncertainties(
    kind: TaskKind,
    columns: Sequence[str],
    valid: Sequence[Sequence[PartPredictions]],
    test: PartPredictions,
    folds: Sequence[slice],
) -> dict[str, Any]:
    """What ``results.json`` says of the intervals or sets of classes that all models together give, and of how many labels those
    from the other ``folds`` hold."""
    of_all = [part for parts in valid for part in parts]
    found: dict[str, Any] = {}
    if kind is TaskKind.REGRESSION:
        found["intervals"] = intervals_entry(columns, of_all, test, folds)
    else:
        found["class_sets"] = class_sets_entry(columns, of_all, test, folds)
    if test.bounds is not None:
        found["bounds"] = bounds_entry(columns, test.bounds, test.predictions)
    return found


def _alternatives(folds: Sequence[Fold]) -> dict[str, Any]:
    """What ``results.json`` says of the most probable class, if classes have words: the sums over the ``folds``, as each
    molecule is tested once."""
    entries = [fold.results["final"].get("alternatives", {}) for fold in folds]
    found = {
        column: {
            "classes": first["classes"],
            "test_confusion": np.sum(
                [entry[column]["test_confusion"] for entry in entries], axis=0
            ).tolist(),
        }
        for column, first in entries[0].items()
    }
    return {"alternatives": found} if found else {}


def _baselines(
    out: str,
    folds: Sequence[Fold],
    scoring: _Scoring,
    model: Scored,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The baselines that all folds have, and why the others are missing."""
    kinds = dict.fromkeys(entry["kind"] for fold in folds for entry in fold.results["baselines"])
    absent = {
        kind: f"in fold {fold.number}: {reason}" if kind in kinds else reason
        for fold in reversed(folds)
        for kind, reason in fold.results["baselines_absent"].items()
    }
    found = []
    for kind in kinds:
        if kind in absent:
            continue
        entries = [entry for fold in folds if (entry := fold.baseline(kind)) is not None]
        parts = [
            _parts(out, fold, entry, "test", scoring.columns)
            for fold, entry in zip(folds, entries, strict=True)
        ]
        entry = {"kind": kind, **_model_entry(folds, entries)}
        own = Scored(entry["test"]["mean"], scoring.draws(parts))
        found.append({**entry, **scoring.resampling.comparison(scoring.metric, model, own)})
    return found, absent


def _fold_entry(fold: Fold) -> dict[str, Any]:
    """The part of ``results.json`` for one fold; everything else is in its own."""
    split = fold.results["data"]["split"]
    models = (fold.results["final"], *fold.results["baselines"])
    return {
        "fold": fold.number,
        "results": fold.folder,
        **{name: split[name] for name in ("train", "valid", "test", "hash")},
        "chosen": fold.results["chosen"],
        "trials": len(fold.results["trials"]),
        "test_scores": {entry["name"]: entry["test"]["mean"] for entry in models},
    }
