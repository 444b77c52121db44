"""Baselines to compare a model with: models on fingerprints and descriptors, and the same encoder without pretraining.

All are chosen and scored in the same way as the model, on the same split and with the same seeds.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray

from moleblend_ray.config.downstream import PropertyConfig, SweepConfig
from moleblend_ray.data.files import storage
from moleblend_ray.errors import TrainingError
from moleblend_ray.evaluation.models.baselines import (
    BaselineData,
    BaselineKind,
    FeatureKind,
    Settings,
    candidate_groups,
)
from moleblend_ray.evaluation.results.baseline_runs import (
    compute_features,
    fit_seed,
    fitted_seed,
    tried_settings,
    try_settings,
)
from moleblend_ray.evaluation.results.results import (
    BaselineResult,
    Baselines,
    Candidate,
    SeedResult,
    Training,
)
from moleblend_ray.evaluation.results.runs import Experiment
from moleblend_ray.evaluation.scoring.scores import best_candidate
from moleblend_ray.orchestration.cluster.placement import placed
from moleblend_ray.orchestration.downstream.downstream import Bench, LostWorkError, collect
from moleblend_ray.settings import to_dict

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=PropertyConfig)

_OF_PRETRAINED_BLOCKS: dict[str, Any] = {"frozen_blocks": None, "fresh_blocks": 0}
"""Settings without meaning for an encoder from scratch, and what it has: frozen blocks would keep random weights."""

SCRATCH_DIR = "scratch"
"""Folder in ``out`` for the search and the models of the encoder without pretraining."""

MOLECULES_PER_TASK = {FeatureKind.FINGERPRINTS: 8192, FeatureKind.DESCRIPTORS: 512}
"""Molecules per task that computes features: some seconds of work."""


def run_baselines(
    config: C,
    bench: Bench,
    seeds: Sequence[int],
    train: Callable[[C, Bench], Training],
    features: Features | None = None,
) -> Baselines:
    """Train and score every baseline that is asked for. ``train`` trains the encoder without pretraining, as it did the
    model. ``features`` keeps those of the molecules for other benches of the same ones.

    What an interrupted command had finished is not repeated. A baseline that cannot be trained is left out, with its
    reason. Raises LostWorkError if the cluster lost the work.
    """
    kinds = [kind for kind in config.baseline.kinds if kind is not BaselineKind.SCRATCH]
    results = _FeatureBaselines(config, bench, features or Features(config)).run(kinds, seeds)
    absent: dict[BaselineKind, str] = {}
    if BaselineKind.SCRATCH in config.baseline.kinds:
        if config.checkpoint is None:
            absent[BaselineKind.SCRATCH] = "the model itself starts from scratch"
        else:
            try:
                results.append(_train_from_scratch(config, bench, train))
            except LostWorkError:
                raise
            except TrainingError as error:
                logger.warning("no baseline from scratch: %s", error)
                absent[BaselineKind.SCRATCH] = str(error)
    return Baselines(results=tuple(results), absent=absent)


def from_scratch(config: C, bench: Bench) -> tuple[C, Bench]:
    """Configuration and bench of the model without pretraining: same architecture, data, settings or search, and seeds, but new
    weights, and a folder of its own."""
    experiment = bench.experiment
    start = dataclasses.replace(experiment.start, encoder=None, fingerprint=None)
    experiment = dataclasses.replace(experiment, start=start)
    scratch = dataclasses.replace(
        config,
        out=storage.join(config.out, SCRATCH_DIR),
        checkpoint=None,
        model=start.model,
        finetune=dataclasses.replace(config.finetune, **_OF_PRETRAINED_BLOCKS),
    )
    if isinstance(scratch, SweepConfig):
        search = scratch.search.without(_OF_PRETRAINED_BLOCKS)
        scratch = dataclasses.replace(scratch, search=search)
    return scratch, dataclasses.replace(bench, experiment=experiment, shared=ray.put(experiment))


def _train_from_scratch(
    config: C, bench: Bench, train: Callable[[C, Bench], Training]
) -> BaselineResult:
    logger.info("the same from scratch, to compare with")
    found = train(*from_scratch(config, bench))
    return BaselineResult(
        kind=BaselineKind.SCRATCH,
        chosen=to_dict(found.chosen),
        candidates=tuple(
            Candidate(settings=trial.settings, valid_score=trial.valid_score)
            for trial in found.trials
        ),
        seeds=tuple(
            dataclasses.replace(seed, model=f"{SCRATCH_DIR}/{seed.model}") for seed in found.final
        ),
    )


@dataclass(frozen=True, slots=True)
class _Shared:
    """References to :class:`BaselineData` in the object store, without and with the test molecules."""

    seen: Any
    whole: Any


def _options(config: PropertyConfig) -> dict[str, Any]:
    """What ``ray.remote`` takes for the tasks of baselines."""
    return {"num_cpus": config.cluster.cpus_per_worker, **placed(config.cluster.data_labels)}


class Features:
    """Features of molecules, computed on the cluster once for each SMILES."""

    def __init__(self, config: PropertyConfig) -> None:
        self._task = ray.remote(compute_features).options(**_options(config))
        self._rows: dict[FeatureKind, dict[str, int]] = {}
        self._values: dict[FeatureKind, NDArray[np.uint8 | np.float64]] = {}

    def of(self, kind: FeatureKind, experiment: Experiment) -> NDArray[np.uint8 | np.float64]:
        """(M, F) features of the molecules of an experiment."""
        molecules = experiment.molecules
        if kind is FeatureKind.DESCRIPTORS and molecules.descriptors is not None:
            return molecules.descriptors.values
        rows = self._rows.setdefault(kind, {})
        missing = [text for text in dict.fromkeys(molecules.smiles) if text not in rows]
        if missing:
            computed = self._compute(kind, missing, f"{experiment.task.name} {kind.value}")
            known = [self._values[kind]] if kind in self._values else []
            self._values[kind] = np.concatenate([*known, computed])
            rows.update(zip(missing, range(len(rows), len(rows) + len(missing)), strict=True))
        return self._values[kind][[rows[text] for text in molecules.smiles]]

    def _compute(
        self, kind: FeatureKind, smiles: Sequence[str], description: str
    ) -> NDArray[np.uint8 | np.float64]:
        size = MOLECULES_PER_TASK[kind]
        references = {
            self._task.remote(kind, smiles[first : first + size]): first
            for first in range(0, len(smiles), size)
        }
        parts = collect(references, description)
        return np.concatenate([parts[first] for first in sorted(parts)])


class _FeatureBaselines:
    """Baselines on fingerprints and descriptors. Features are computed once, and only if something is left to do."""

    def __init__(self, config: PropertyConfig, bench: Bench, features: Features) -> None:
        self._out = config.out
        self._options = _options(config)
        self._features = features
        self._num_jobs = config.cluster.threads_per_worker
        self._baseline = config.baseline
        self._experiment = bench.experiment
        self._shared: dict[FeatureKind, _Shared] = {}

    def run(self, kinds: Sequence[BaselineKind], seeds: Sequence[int]) -> list[BaselineResult]:
        metric = self._experiment.task.metric
        candidates = self._try(kinds, seeds[0])
        chosen = {
            kind: best_candidate(metric, found).settings for kind, found in candidates.items()
        }
        fitted = self._fit(chosen, seeds)
        return [
            BaselineResult(
                kind=kind, chosen=chosen[kind], candidates=tuple(found), seeds=fitted[kind]
            )
            for kind, found in candidates.items()
        ]

    def _try(self, kinds: Sequence[BaselineKind], seed: int) -> dict[BaselineKind, list[Candidate]]:
        """Every candidate of each kind, in the order of the grid."""
        groups = {
            (kind, number): group for kind in kinds for number, group in enumerate(self._grid(kind))
        }
        found = {
            key: tried_settings(key[0], group, seed, self._out) for key, group in groups.items()
        }
        task = ray.remote(try_settings).options(**self._options)
        references = {
            task.remote(
                self._data(kind).seen, kind, groups[kind, number], seed, self._num_jobs, self._out
            ): (kind, number)
            for (kind, number), known in found.items()
            if known is None
        }
        found |= collect(references, f"{self._experiment.task.name} settings of baselines")
        return {
            kind: [
                candidate
                for (of, _), candidates in found.items()
                if of is kind
                for candidate in candidates or ()
            ]
            for kind in kinds
        }

    def _fit(
        self, chosen: Mapping[BaselineKind, Settings], seeds: Sequence[int]
    ) -> dict[BaselineKind, tuple[SeedResult, ...]]:
        """Fit the chosen settings of each kind with every seed; a kind without randomness is fitted once."""
        found = {
            (kind, seed): fitted_seed(kind, settings, seed, self._out)
            for kind, settings in chosen.items()
            for seed in (seeds if kind.is_random else seeds[:1])
        }
        task = ray.remote(fit_seed).options(**self._options)
        references = {
            task.remote(
                self._data(kind).whole, kind, chosen[kind], seed, self._num_jobs, self._out
            ): (kind, seed)
            for (kind, seed), known in found.items()
            if known is None
        }
        found |= collect(references, f"{self._experiment.task.name} baselines")
        return {
            kind: tuple(
                dataclasses.replace(result, seed=seed)
                for seed in seeds
                if (result := found[kind, seed if kind.is_random else seeds[0]]) is not None
            )
            for kind in chosen
        }

    def _grid(self, kind: BaselineKind) -> list[list[Settings]]:
        experiment = self._experiment
        labels, bounds = experiment.molecules.labels, experiment.molecules.bounds
        return candidate_groups(
            kind,
            experiment.task.kind,
            (labels if bounds is None else bounds.filled(labels))[experiment.split.train],
            num_trees=self._baseline.num_trees,
            num_rounds=self._baseline.num_rounds,
            censored=bounds is not None,
        )

    def _data(self, kind: BaselineKind) -> _Shared:
        if kind.features not in self._shared:
            experiment = self._experiment
            data = BaselineData(
                task=experiment.task,
                mol_ids=experiment.molecules.mol_ids,
                smiles=experiment.molecules.smiles,
                features=self._features.of(kind.features, experiment),
                labels=experiment.molecules.labels,
                bounds=experiment.molecules.bounds,
                columns=experiment.molecules.columns,
                exclusive=experiment.molecules.exclusive,
                train=experiment.split.train,
                valid=experiment.split.valid,
                test=experiment.split.test,
            )
            self._shared[kind.features] = _Shared(ray.put(data.without_test()), ray.put(data))
        return self._shared[kind.features]
