"""Cross-validation on a Ray cluster: a fine-tuning or sweep for each fold, in a folder of its own, and results of all together.

The folder of a fold is what a command for this fold alone (``task.fold``) would write. The molecules are prepared and loaded once.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np

from moleblend_ray.chemistry.scaffolds import Split
from moleblend_ray.config.accept import accepted
from moleblend_ray.config.describe import redact
from moleblend_ray.config.downstream import FinetuneConfig, PropertyConfig, SweepConfig
from moleblend_ray.data.files import storage
from moleblend_ray.errors import ConfigError, TrainingError
from moleblend_ray.evaluation.models.baselines import BaselineKind
from moleblend_ray.evaluation.molecules.repeats import Repeats
from moleblend_ray.evaluation.results.cross_validation import (
    Fold,
    combine_folds,
    split_hash_of,
    write_out_of_fold,
)
from moleblend_ray.evaluation.results.result_files import RESULTS_NAME, fold_path
from moleblend_ray.evaluation.results.results import (
    RESULTS_VERSION,
    Training,
    data_entry,
    labels_entry,
    task_entry,
    versions,
)
from moleblend_ray.orchestration.downstream.baselines import Features, from_scratch
from moleblend_ray.orchestration.downstream.downstream import (
    Bench,
    Inputs,
    Loaded,
    LostWorkError,
    SeedRun,
    bench_of,
    claim_for,
    folds_of,
    load,
    may_read_descriptors,
    split_of,
    train_runs,
    with_descriptors,
)
from moleblend_ray.orchestration.downstream.finetune import (
    FinetuneSummary,
    answer,
    finish,
    summarise,
    train,
)
from moleblend_ray.orchestration.downstream.result_writing import has_results
from moleblend_ray.orchestration.downstream.sweep import check_search, search_and_train
from moleblend_ray.settings import to_dict

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=PropertyConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossValidationSummary(FinetuneSummary):
    """What a cross-validation found, and where it is. Scores are means over folds, ``test_std`` is their standard deviation, and
    ``ensemble_score`` is None: no molecule is new to all models."""

    folds: int
    """Number of folds."""
    fold_scores: tuple[float, ...]
    """Test score of each fold, mean over seeds."""


def cross_validate(config: FinetuneConfig | SweepConfig) -> CrossValidationSummary:
    """Fine-tune or sweep with each of ``task.folds`` as the test part, and write ``results.json`` of all together.

    The run of each fold is in ``<out>/folds/fold-K``, with a report of its own. A sweep searches in each fold anew (nested
    cross-validation). Repeating the command continues as :func:`finetune` and :func:`sweep` do, for further seeds and
    baselines, too. InUseError if another command works on the same results.
    """
    config = accepted(config, SweepConfig if isinstance(config, SweepConfig) else FinetuneConfig)
    if not config.task.is_cross_validated:
        raise ConfigError(
            "task.folds: expected a number of folds for a cross-validation, without task.fold"
        )
    if isinstance(config, SweepConfig):
        check_search(config)
        results, already_finished = answer(config, _work_for(config.final_seeds, search_and_train))
    else:
        results, already_finished = answer(config, _work_for(config.seeds, train))
    shared = summarise(config.out, results, already_finished=already_finished)
    return CrossValidationSummary(
        **{field.name: getattr(shared, field.name) for field in dataclasses.fields(shared)},
        folds=len(results["folds"]),
        fold_scores=tuple(results["final"]["test"]["values"]),
    )


def _work_for(
    seeds: Sequence[int], train_fold: Callable[[C, Bench], Training]
) -> Callable[[C, Inputs, Callable[[], None]], dict[str, Any]]:
    """What makes the results of all folds, in a Ray session."""

    def work(config: C, inputs: Inputs, confirm: Callable[[], None]) -> dict[str, Any]:
        began = time.monotonic()
        loaded = load(config, inputs)
        configs = _fold_configs(config)
        numbers = folds_of(config, loaded)
        splits = {fold: split_of(own, loaded, numbers) for fold, own in configs.items()}
        claim_for(config, loaded)
        _run_folds(configs, loaded, splits, seeds, train_fold, confirm)
        confirm()
        return _write_together(config, len(configs), loaded, seconds=time.monotonic() - began)

    return work


def _fold_configs(config: C) -> dict[int, C]:
    """The configuration of each fold by its number: its task, its folder."""
    assert config.task.folds is not None
    return {
        fold: dataclasses.replace(
            config,
            task=dataclasses.replace(config.task, fold=fold),
            out=storage.join(config.out, fold_path(fold)),
        )
        for fold in range(config.task.folds)
    }


def _run_folds(
    configs: Mapping[int, C],
    loaded: Loaded,
    splits: Mapping[int, Split],
    seeds: Sequence[int],
    train_fold: Callable[[C, Bench], Training],
    confirm: Callable[[], None],
) -> None:
    """Train, test and write the results of the folds that have none."""
    for config in configs.values():
        # A fold that was finished by a command of its own may be of other molecules, weights or seeds.
        claim_for(config, loaded)
    missing = {fold: config for fold, config in configs.items() if not has_results(config)}
    if len(missing) < len(configs):
        logger.info(
            "%d of %d folds were finished before", len(configs) - len(missing), len(configs)
        )
    if any(map(may_read_descriptors, missing.values())):
        loaded = dataclasses.replace(loaded, molecules=with_descriptors(loaded.molecules))
    benches = {fold: bench_of(config, loaded, splits[fold]) for fold, config in missing.items()}
    _train_ahead(missing, benches)
    features: Features | None = None
    for fold, config in missing.items():
        began = time.monotonic()
        features = features or Features(config)
        finish(
            config,
            benches.pop(fold),
            seeds,
            train_fold,
            began=began,
            confirm=confirm,
            features=features,
        )
        logger.info("%s: fold %d of %d has results", config.task.name, fold, len(configs))


def _train_ahead(configs: Mapping[int, PropertyConfig], benches: Mapping[int, Bench]) -> None:
    """Train the models of all folds at the same time, where no search has to come first; each fold finds its own then.

    One fold after the other would leave nodes without work, as there are often no more than three seeds.
    """
    pairs = [(config, benches[fold]) for fold, config in configs.items()]
    runs = [run for config, bench in pairs for run in _runs_of(config, bench)]
    if not runs:
        return
    task = runs[0].bench.experiment.task.name
    train_runs(runs, f"{task} folds", "models")
    if not _has_scratch(runs[0].config):
        return
    scratch = [run for pair in pairs for run in _runs_of(*from_scratch(*pair))]
    try:
        train_runs(scratch, f"{task} folds from scratch", "models")
    except LostWorkError:
        raise
    except TrainingError as error:
        # Each fold says so in its results, as a single split does.
        logger.debug("a model from scratch cannot be trained: %s", error)


def _runs_of(config: PropertyConfig, bench: Bench) -> list[SeedRun]:
    if not isinstance(config, FinetuneConfig):
        return []
    return [
        SeedRun(config=config, bench=bench, settings=config.finetune, seed=seed)
        for seed in config.seeds
    ]


def _has_scratch(config: PropertyConfig) -> bool:
    return BaselineKind.SCRATCH in config.baseline.kinds and config.checkpoint is not None


def _write_together(
    config: PropertyConfig, num_folds: int, loaded: Loaded, *, seconds: float
) -> dict[str, Any]:
    """Write the results of all folds: predictions, the report, then ``results.json``, whose presence means that everything is done."""
    folds = [Fold.read(config.out, fold) for fold in range(num_folds)]
    groups = loaded.molecules.groups
    if groups is not None:
        groups = groups[np.argsort(folds_of(config, loaded), kind="stable")]
    found = combine_folds(config.out, folds, groups)
    chosen = to_dict(config.finetune) if isinstance(config, FinetuneConfig) else None
    results = redact(
        {
            "results_version": RESULTS_VERSION,
            "config": to_dict(config),
            "task": task_entry(loaded.task, loaded.molecules),
            "data": _data_part(config, loaded, folds),
            "checkpoint": folds[0].results["checkpoint"],
            "chosen": chosen,
            "trials": [],
            **found.entries,
            "versions": versions(),
            "seconds": seconds,
        }
    )
    # Not above: it takes matplotlib and scikit-learn, which only the end of a command needs.
    from moleblend_ray.evaluation.reports.cross_validation_report import (
        write_cross_validation_report,
    )

    write_out_of_fold(config.out, found, loaded.molecules.columns)
    write_cross_validation_report(config.out, results, found.predictions, found.rows)
    storage.write_json(storage.join(config.out, RESULTS_NAME), results)
    return cast(dict[str, Any], results)


def _data_part(config: PropertyConfig, loaded: Loaded, folds: Sequence[Fold]) -> dict[str, Any]:
    """What ``results.json`` says of the molecules, their labels and the folds."""
    molecules = loaded.molecules
    everything = np.arange(len(molecules), dtype=np.int64)
    of_split = {
        "fractions": None,
        "folds": len(folds),
        "seed": config.split_seed,
        "hash": split_hash_of(folds),
        "test": len(molecules),
    }
    nothing = everything[:0]
    alone = Repeats.of(molecules.smiles, molecules.block, Split(everything, nothing, nothing))
    return {
        **data_entry(loaded.data_uri, molecules, loaded.task, of_split),
        "repeats": {
            "distinct": alone.distinct,
            **{
                name: sum(fold.results["data"]["repeats"][name] for fold in folds)
                for name in ("test_seen", "valid_seen")
            },
        },
        "replicates": loaded.replicates.to_json(),
        "labels": labels_entry(loaded.task.kind, molecules, {"test": everything}),
    }
