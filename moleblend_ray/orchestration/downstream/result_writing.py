"""What `finetune` and `sweep` write last, and how a repeated command finds it: ``results.json`` and the report beside it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from moleblend_ray.config.describe import redact
from moleblend_ray.config.downstream import PropertyConfig
from moleblend_ray.data.files import storage
from moleblend_ray.data.sources.classes import Exclusive
from moleblend_ray.errors import without_credentials
from moleblend_ray.evaluation.molecules.applicability import similarity_entry
from moleblend_ray.evaluation.molecules.censoring import bounds_entry
from moleblend_ray.evaluation.molecules.dataset import LabelledMolecules
from moleblend_ray.evaluation.results.additions import missing_in
from moleblend_ray.evaluation.results.result_files import DATA_DIR, RESULTS_NAME
from moleblend_ray.evaluation.results.results import (
    RESULTS_VERSION,
    Baselines,
    SeedResult,
    Spread,
    Training,
    baseline_entry,
    data_entry,
    ensemble_entry,
    labels_entry,
    repeats_entry,
    require_version,
    seeds_entry,
    task_entry,
    versions,
)
from moleblend_ray.evaluation.results.runs import read_of_results
from moleblend_ray.evaluation.scoring.alternatives import alternatives_entry
from moleblend_ray.evaluation.scoring.class_sets import class_sets_entry
from moleblend_ray.evaluation.scoring.intervals import intervals_entry, mean_of
from moleblend_ray.evaluation.scoring.resampling import Resampling, Scored
from moleblend_ray.evaluation.scoring.stored_predictions import PartPredictions
from moleblend_ray.evaluation.tasks import Metric, SplitKind, Task, TaskKind
from moleblend_ray.orchestration.downstream.downstream import (
    Bench,
    named_splits,
    prepare_task,
    split_identity,
    starting_point,
)
from moleblend_ray.orchestration.identity import check_finished, data_inputs, question
from moleblend_ray.settings import to_dict

logger = logging.getLogger(__name__)


def write_results(
    config: PropertyConfig,
    bench: Bench,
    model: Training,
    baselines: Baselines,
    *,
    seconds: float,
) -> dict[str, Any]:
    """Write the report, then ``results.json``, whose presence means that everything is done."""
    experiment, start = bench.experiment, bench.experiment.start
    name = "from scratch" if config.checkpoint is None else "fine-tuned"
    columns, exclusive = experiment.molecules.columns, experiment.molecules.exclusive
    valid, test = (
        read_of_results(config.out, model.final, part, columns) for part in ("valid", "test")
    )
    groups = experiment.molecules.groups
    resampling = Resampling.of(
        test[0].smiles, groups=None if groups is None else groups[experiment.split.test]
    )
    final = seeds_entry(f"MoleBLEND, {name}", model.final)
    metric = experiment.task.metric

    def scored(seeds: Sequence[SeedResult]) -> Scored:
        return _scored(config.out, seeds, metric, columns, resampling, exclusive)

    of_model = scored(model.final)
    results: dict[str, Any] = {
        "results_version": RESULTS_VERSION,
        "config": to_dict(config),
        "task": task_entry(experiment.task, experiment.molecules),
        "data": _data_part(config, bench),
        "checkpoint": {
            "uri": config.checkpoint,
            "fingerprint": start.fingerprint,
            "model": to_dict(start.model),
        },
        "chosen": to_dict(model.chosen),
        "trials": [dataclasses.asdict(trial) for trial in model.trials],
        "final": {
            **final,
            "test_interval": resampling.interval(of_model.draws, of_model.score),
            **_together(experiment.task, columns, valid, test, resampling, exclusive),
            **_of_alternatives(experiment.molecules, test),
        },
        "baselines": [
            {
                **baseline_entry(result),
                **resampling.comparison(metric, of_model, scored(result.seeds)),
            }
            for result in baselines.results
        ],
        "resampling": resampling.to_json(),
        "baselines_absent": {kind.value: reason for kind, reason in baselines.absent.items()},
        "versions": versions(),
        "seconds": seconds,
    }
    results = redact(results)
    # Not above: it takes matplotlib and scikit-learn, which only the end of a command needs.
    from moleblend_ray.evaluation.reports.report import write_report

    mean = mean_of(test)
    write_report(config.out, results, mean.labels, mean.predictions, mean.bounds)
    storage.write_json(storage.join(config.out, RESULTS_NAME), results)
    return results


def _scored(
    out: str,
    seeds: Sequence[SeedResult],
    metric: Metric,
    columns: Sequence[str],
    resampling: Resampling,
    exclusive: Exclusive,
) -> Scored:
    """A model or a baseline on the test molecules, mean over its ``seeds``."""
    test = read_of_results(out, seeds, "test", columns)
    mean = Spread.of([seed.test_score for seed in seeds]).mean
    return Scored(mean, resampling.scores(metric, test, columns, exclusive=exclusive))


def _data_part(config: PropertyConfig, bench: Bench) -> dict[str, Any]:
    """What ``results.json`` says of the molecules, their labels and their split."""
    experiment = bench.experiment
    task, molecules, split = experiment.task, experiment.molecules, experiment.split
    of_split = {
        "seed": config.split_seed,
        "hash": bench.split_hash,
        **({"fractions": None} if _is_divided_otherwise(config, task) else {}),
        **(
            {}
            if config.task.fold is None
            else {"folds": config.task.folds, "fold": config.task.fold}
        ),
        **{part: len(getattr(split, part)) for part in ("train", "valid", "test")},
    }
    return {
        **data_entry(bench.data_uri, molecules, task, of_split),
        "repeats": repeats_entry(bench.repeats),
        "replicates": bench.replicates.to_json(),
        "labels": labels_entry(task.kind, molecules, split._asdict()),
        "similarity": similarity_entry(
            *([molecules.smiles[row] for row in part] for part in (split.train, split.test))
        ),
    }


def _is_divided_otherwise(config: PropertyConfig, task: Task) -> bool:
    """Whether the sizes of the parts are not the usual ones."""
    return task.split is SplitKind.GIVEN or config.task.folds is not None


def _together(
    task: Task,
    columns: Sequence[str],
    valid: Sequence[PartPredictions],
    test: Sequence[PartPredictions],
    resampling: Resampling,
    exclusive: Exclusive = (),
) -> dict[str, Any]:
    """What ``results.json`` says of the mean of all models, which `moleblend predict` gives: its score, if there are several,
    of numbers the intervals, of classes the sets, and of censored labels the bounds that it respects."""
    mean = mean_of(test)
    found: dict[str, Any] = {}
    if len(test) > 1:
        together = ensemble_entry(task, columns, mean_of(valid), mean, exclusive)
        draws = resampling.scores(task.metric, [mean], columns, exclusive=exclusive)
        found["ensemble"] = {
            **together,
            "test_interval": resampling.interval(draws, together["test"]),
        }
    if task.kind is TaskKind.REGRESSION:
        found["intervals"] = intervals_entry(columns, valid, mean)
    else:
        found["class_sets"] = class_sets_entry(columns, valid, mean)
    if mean.bounds is not None:
        found["bounds"] = bounds_entry(columns, mean.bounds, mean.predictions)
    return found


def _of_alternatives(
    molecules: LabelledMolecules, test: Sequence[PartPredictions]
) -> dict[str, Any]:
    """What ``results.json`` says of the most probable class, if classes have words."""
    if not molecules.alternatives:
        return {}
    found = alternatives_entry(molecules.alternatives, molecules.columns, mean_of(test))
    return {"alternatives": found}


def has_results(config: PropertyConfig, out: str | None = None) -> bool:
    """Whether ``out``, by default that of ``config``, holds results with all seeds and baselines of ``config``."""
    uri = storage.join(config.out if out is None else out, RESULTS_NAME)
    return storage.exists(uri) and not missing_in(
        storage.read_object(uri, {"config": dict[str, Any]})["config"], question(config)
    )


def tell_of_additions(config: PropertyConfig) -> None:
    """Log what is added to results, if there are some."""
    uri = storage.join(config.out, RESULTS_NAME)
    if storage.exists(uri):
        stored = storage.read_object(uri, {"config": dict[str, Any]})["config"]
        missing = missing_in(stored, question(config))
        listed = ", ".join(f"{name}={values}" for name, values in missing.items())
        logger.info("%s has results; adding %s to them", config.out, listed)


def finished_results(config: PropertyConfig) -> dict[str, Any] | None:
    """The stored results if ``out`` holds those of all seeds and baselines of this question.

    Raises ConfigError if they are of another question, which differs in more than further seeds and baselines.
    """
    uri = storage.join(config.out, RESULTS_NAME)
    if not storage.exists(uri):
        return None
    results = storage.read_object(uri, {"results_version": Any})
    require_version(uri, results)
    storage.require_members(uri, results, {"config": dict[str, Any]})
    data_uri = storage.join(config.out, DATA_DIR)

    def inputs() -> dict[str, str | None]:
        start = starting_point(config)
        return {
            **data_inputs(
                config.task.sources(), data_uri, lambda: prepare_task(config, start.molecules)
            ),
            "checkpoint_fingerprint": start.fingerprint,
            **split_identity(named_splits(config.task)),
        }

    check_finished(config.out, question(config), inputs)
    if missing_in(results["config"], question(config)):
        return None
    logger.info("%s is finished: %s", config.out, without_credentials(uri))
    return results
