"""Fine-tuning on a Ray cluster: each seed is trained in its own task and scored once on the test molecules."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from moleblend_ray.config.accept import accepted
from moleblend_ray.config.downstream import FinetuneConfig, PropertyConfig
from moleblend_ray.data.dataset.lease import leased
from moleblend_ray.data.files import storage
from moleblend_ray.errors import ConfigError, without_credentials
from moleblend_ray.evaluation.results.result_files import REPORT_NAME, RESULTS_NAME
from moleblend_ray.evaluation.results.results import Training
from moleblend_ray.evaluation.sources import source_of_task
from moleblend_ray.orchestration.cluster.session import ray_session
from moleblend_ray.orchestration.downstream.baselines import Features, run_baselines
from moleblend_ray.orchestration.downstream.downstream import (
    Bench,
    Inputs,
    read_inputs,
    set_up,
    train_seeds,
)
from moleblend_ray.orchestration.downstream.result_writing import (
    finished_results,
    has_results,
    tell_of_additions,
    write_results,
)

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=PropertyConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSummary:
    """What fine-tuning found, and where it is."""

    out: str
    """Directory of the results."""
    results: str
    """URI of ``results.json``."""
    report: str
    """URI of ``report.md``, the same for reading."""
    task: str
    """Name of the task."""
    metric: str
    """Metric of the task."""
    unit: str | None
    """Unit of score and labels; None for classification, and if the task names none."""
    molecules: int
    """Molecules with labels, all parts together."""
    valid_score: float
    """Validation score, mean over seeds."""
    test_score: float
    """Test score, mean over seeds."""
    test_std: float
    """Test score, standard deviation over seeds; 0 for a single seed."""
    test_interval: tuple[float, float] | None
    """95 % interval of the mean test score, as far as it is chance which molecules were tested
    (:mod:`moleblend_ray.evaluation.scoring.resampling`); None where it would look surer than it is, such as with too few of them, and for
    results of earlier versions."""
    ensemble_score: float | None
    """Test score of the mean of the predictions of all seeds, which :func:`moleblend_ray.predict` gives; None with one seed."""
    baselines: dict[str, float]
    """Test score of each baseline by its name, mean over seeds."""
    seconds: float
    """Wall time of the command that wrote the results."""
    already_finished: bool
    """True if an earlier command had written the results and this one did nothing."""


def finetune(config: FinetuneConfig) -> FinetuneSummary:
    """Train a property model for each seed, score each once on the test molecules, write ``results.json``.

    Repeating a finished command does nothing; repeating an interrupted one, or one with further seeds or baselines, trains
    those that are missing. InUseError if another command works on the same results.
    """
    config = accepted(config, FinetuneConfig)
    results, already_finished = compute_results(config, config.seeds, train)
    return summarise(config.out, results, already_finished=already_finished)


def compute_results(
    config: C, seeds: Sequence[int], train: Callable[[C, Bench], Training]
) -> tuple[dict[str, Any], bool]:
    """The results of ``train`` with its baselines, and whether an earlier command had finished them.

    The baselines are trained with each of ``seeds``.
    """
    if config.task.is_cross_validated:
        raise ConfigError(
            f"task.folds={config.task.folds} asks for a cross-validation; in Python call cross_validate, or name one of its folds "
            "with task.fold"
        )

    began = time.monotonic()

    def work(config: C, inputs: Inputs, confirm: Callable[[], None]) -> dict[str, Any]:
        return finish(config, set_up(config, inputs), seeds, train, began=began, confirm=confirm)

    return answer(config, work)


def answer(
    config: C, work: Callable[[C, Inputs, Callable[[], None]], dict[str, Any]]
) -> tuple[dict[str, Any], bool]:
    """The results in ``out``, and whether an earlier command had finished them; otherwise ``work`` makes them.

    It gets the configuration, what was read before Ray is started, and what to call before it writes: InUseError if another
    command took over meanwhile. It runs in a Ray session.
    """
    config = _with_own_source(config)
    if (stored := finished_results(config)) is not None:
        return stored, True
    inputs = read_inputs(config)
    with leased(config.out, partial(has_results, config)) as lease:
        # The command that held the lease before may have finished the work.
        if (stored := finished_results(config)) is not None:
            return stored, True
        tell_of_additions(config)
        with ray_session(config.cluster):
            return work(config, inputs, lease.confirm), False


def finish(
    config: C,
    bench: Bench,
    seeds: Sequence[int],
    train: Callable[[C, Bench], Training],
    *,
    began: float,
    confirm: Callable[[], None],
    features: Features | None = None,
) -> dict[str, Any]:
    """Train the model and its baselines, and write the results, which took since ``began`` of the monotonic clock."""
    model = train(config, bench)
    baselines = run_baselines(config, bench, seeds, train, features)
    confirm()
    return write_results(config, bench, model, baselines, seconds=time.monotonic() - began)


def _with_own_source(config: C) -> C:
    """With the table of the task, if the source is a directory with those of other tasks, whose molecules would all be prepared."""
    source = source_of_task(config.task.source, config.task.resolve())
    if source == config.task.source:
        return config
    logger.info(
        "the molecules of %s are those of %s", config.task.name, without_credentials(source)
    )
    return dataclasses.replace(config, task=dataclasses.replace(config.task, source=source))


def train(config: FinetuneConfig, bench: Bench) -> Training:
    """Train and test the given settings with each seed."""
    final = train_seeds(config, bench, config.finetune, config.seeds)
    return Training(chosen=config.finetune, final=tuple(final))


def summarise(out: str, results: Mapping[str, Any], *, already_finished: bool) -> FinetuneSummary:
    """The most important figures of ``results``."""
    return FinetuneSummary(
        out=out,
        results=storage.join(out, RESULTS_NAME),
        report=storage.join(out, REPORT_NAME),
        task=results["task"]["name"],
        metric=results["task"]["metric"],
        unit=results["task"]["unit"] or None,
        molecules=results["data"]["molecules"],
        valid_score=results["final"]["valid"]["mean"],
        test_score=results["final"]["test"]["mean"],
        test_std=results["final"]["test"]["std"],
        test_interval=_pair(results["final"].get("test_interval")),
        # Results of earlier versions lack it.
        ensemble_score=results["final"].get("ensemble", {}).get("test"),
        baselines={entry["name"]: entry["test"]["mean"] for entry in results["baselines"]},
        seconds=results["seconds"],
        already_finished=already_finished,
    )


def _pair(values: Sequence[float] | None) -> tuple[float, float] | None:
    """The limits of an interval, of which JSON makes a list."""
    return None if values is None else (values[0], values[1])
