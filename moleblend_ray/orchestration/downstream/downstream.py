"""What fine-tuning and sweeps share on a Ray cluster: inputs, experiment, seeds, results."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray

from moleblend_ray.chemistry.scaffolds import Split, split_hash
from moleblend_ray.config.downstream import (
    PropertyConfig,
    RefitConfig,
    SweepConfig,
    TaskConfig,
)
from moleblend_ray.data.dataset.dataset_files import is_prepared
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.split_file import splits_of_file
from moleblend_ray.data.preparation.splits import SplitsOfData
from moleblend_ray.data.sources import SourceSet
from moleblend_ray.errors import (
    DataError,
    TrainingError,
    without_credentials,
)
from moleblend_ray.evaluation.models.finetune import StartingPoint
from moleblend_ray.evaluation.models.property_model import require_learnable
from moleblend_ray.evaluation.molecules.dataset import (
    LabelledMolecules,
    labels_of_task,
    load_labelled,
    only_used,
    require_numbers,
)
from moleblend_ray.evaluation.molecules.repeats import Repeats
from moleblend_ray.evaluation.molecules.replicates import Replicates, with_replicates
from moleblend_ray.evaluation.prediction.encoders import load_encoder
from moleblend_ray.evaluation.results.result_files import DATA_DIR
from moleblend_ray.evaluation.results.results import (
    SeedResult,
)
from moleblend_ray.evaluation.results.runs import (
    Experiment,
    finished_seed,
)
from moleblend_ray.evaluation.scoring.scores import require_scorable
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.splits.folds import fold_numbers, split_of_fold
from moleblend_ray.evaluation.splits.given_split import (
    groups_of_column,
    splits_of_column,
    times_of_column,
)
from moleblend_ray.evaluation.splits.split import split_molecules, with_fewer_labels
from moleblend_ray.evaluation.tasks import ReplicateRule, SplitKind, Task, TaskKind
from moleblend_ray.orchestration.cluster.cluster_checks import (
    Need,
    require_room,
    require_shared_paths,
    warn_of_unused_gpus,
)
from moleblend_ray.orchestration.cluster.placement import placed
from moleblend_ray.orchestration.downstream.workers import train_seed
from moleblend_ray.orchestration.identity import (
    check_claim,
    claim,
    question,
)
from moleblend_ray.orchestration.preparation.molecules import look_at_source, prepare_molecules
from moleblend_ray.orchestration.progress.progress import Progress, Reporter

logger = logging.getLogger(__name__)

K = TypeVar("K")
R = TypeVar("R", bound="Counted")

_MANY_MOLECULES: Final = 50_000
"""Molecules of which it takes seconds to find those that occur more than once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """The molecules and starting weights of a task, read once and shared with all Ray tasks."""

    data_uri: str
    """The prepared dataset."""
    experiment: Experiment
    """The experiment in the memory of the driver."""
    shared: Any
    """Reference to the experiment in the object store (``ray.ObjectRef``)."""
    split_hash: str
    """Hash of the split of all labelled molecules of the dataset."""
    repeats: Repeats
    """Molecules that occur more than once."""
    replicates: Replicates
    """Those of all labelled molecules that had several rows, and what became of these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What is read before Ray is started, which takes seconds: what is wrong with it needs no cluster to be found."""

    start: StartingPoint
    """Weights to start from."""
    named: SplitsOfData | None
    """Splits that come with the data."""
    sources: SourceSet | None
    """Files and columns of raw molecules; None for a prepared dataset."""


def read_inputs(config: PropertyConfig) -> Inputs:
    """The starting weights, the named splits and the columns of the source; a ConfigError or DataError if the source
    lacks one that the task needs, ``out`` is of something else, or settings do not fit the model or the labels."""
    # Molecules would be prepared into results of something else.
    check_claim(config.out, {"config": question(config)})
    return inputs_of(config)


def inputs_of(config: PropertyConfig) -> Inputs:
    """:func:`read_inputs`, whatever ``out`` is of."""
    task = config.task.resolve()
    start = starting_point(config)
    for settings in settings_tried(config):
        settings.require_fitting(task.kind, start.model.num_layers)
    named = named_splits(config.task)
    sources = look_at_source(config.task, config.task.label_columns())
    if sources is None:
        labels_of_task(
            config.task.source,
            load_manifest(config.task.source),
            task,
            with_bounds=config.task.censored,
        )
    else:
        censored = config.task.censored
        require_numbers(config.task.source, sources, task, with_bounds=censored)
    return Inputs(start=start, named=named, sources=sources)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """The labelled molecules of a command, before they are divided into parts."""

    data_uri: str
    """The prepared dataset."""
    task: Task
    """The task, in the unit of the data."""
    molecules: LabelledMolecules
    """All that have a label."""
    replicates: Replicates
    """Those that had several rows, and what became of these."""
    start: StartingPoint
    """Weights to start from."""
    named: SplitsOfData | None
    """Splits that come with the data."""


def set_up(config: PropertyConfig, inputs: Inputs) -> Bench:
    """Prepare, load and split the molecules; check that ``out`` belongs to this question."""
    loaded = load(config, inputs)
    split = split_of(config, loaded)
    claim_for(config, loaded)
    return bench_of(config, loaded, split)


def load(config: PropertyConfig, inputs: Inputs) -> Loaded:
    """Prepare and load the molecules, and check that they have what the settings need."""
    check_cluster(config)
    task = config.task.resolve()
    data_uri = prepare_task(config, inputs.start.molecules, inputs.sources)
    molecules, replicates = _read_molecules(config.task, task, data_uri, inputs.named)
    require_coordinates(config, molecules)
    return Loaded(
        data_uri=data_uri,
        task=_in_unit_of_data(config.task, task, molecules.unit),
        molecules=molecules,
        replicates=replicates,
        start=inputs.start,
        named=inputs.named,
    )


def claim_for(config: PropertyConfig, loaded: Loaded) -> None:
    """Note in ``out`` the question that it is for, or check that it is."""
    identity = {
        "config": question(config),
        "data_fingerprint": loaded.molecules.fingerprint,
        "checkpoint_fingerprint": loaded.start.fingerprint,
        **split_identity(loaded.named),
    }
    claim(config.out, identity)


def bench_of(config: PropertyConfig, loaded: Loaded, split: Split) -> Bench:
    """The molecules in the parts of ``split`` (:func:`split_of`), shared with all Ray tasks."""
    task, molecules = loaded.task, loaded.molecules
    hash_of_split = split_hash(split)
    molecules, split = only_used(molecules, split)
    if len(molecules) >= _MANY_MOLECULES:
        logger.info("looking for molecules that occur more than once among %d", len(molecules))
    repeats = Repeats.of(molecules.smiles, molecules.block, split)
    _warn_of_seen(repeats, molecules, split)
    if may_read_descriptors(config):
        molecules = with_descriptors(molecules)
    experiment = Experiment(task=task, molecules=molecules, split=split, start=loaded.start)
    fold = "" if config.task.fold is None else f", fold {config.task.fold}"
    logger.info(
        "%s: %d molecules, split %s%s into %d / %d / %d",
        task.name,
        len(molecules),
        task.split.value,
        fold,
        len(split.train),
        len(split.valid),
        len(split.test),
    )
    return Bench(
        data_uri=loaded.data_uri,
        experiment=experiment,
        shared=ray.put(experiment),
        split_hash=hash_of_split,
        repeats=repeats,
        replicates=loaded.replicates,
    )


def with_descriptors(molecules: LabelledMolecules) -> LabelledMolecules:
    """The molecules with descriptors, which take some milliseconds each if they are not there."""
    if molecules.descriptors is None:
        logger.info("computing the descriptors of %d molecules", len(molecules))
    return molecules.with_descriptors()


def _read_molecules(
    config: TaskConfig, task: Task, data_uri: str, named: SplitsOfData | None
) -> tuple[LabelledMolecules, Replicates]:
    """The labelled molecules of the prepared dataset, one row for each if the task wants so; tells what is special about their
    labels."""
    molecules = load_labelled(
        data_uri, task, named, num_conformers=config.conformers, with_bounds=config.censored
    )
    _tell_of_bounds(config, task, molecules)
    molecules, replicates = with_replicates(
        molecules, task.kind, config.replicates, within_parts=task.split.is_of_data
    )
    _tell_of_replicates(task, replicates)
    return molecules, replicates


def _in_unit_of_data(config: TaskConfig, task: Task, stated: str | None) -> Task:
    """The task in the unit that its data state, unless the user names one; tells if the task table has another."""
    is_class = task.kind is TaskKind.CLASSIFICATION
    if is_class or config.unit is not None or not stated or stated == task.unit:
        return task
    if task.unit:
        logger.warning(
            "%s: the labels of %s are in %s, and not in %s as in the table of tasks; scores and predictions are in %s, too. If "
            "both are names of one unit, set task.unit to the one that you want",
            task.name,
            without_credentials(config.source),
            stated,
            task.unit,
            stated,
        )
    return dataclasses.replace(task, unit=stated)


def _tell_of_bounds(config: TaskConfig, task: Task, molecules: LabelledMolecules) -> None:
    """Log how many bounds are used, or that there may be some that are not."""
    if molecules.bounds is not None:
        logger.info(
            "%s: %d labels, and %d bounds of others",
            task.name,
            int((~np.isnan(molecules.labels)).sum()),
            int(molecules.bounds.known.sum()),
        )
    elif molecules.num_unreadable and task.kind is TaskKind.REGRESSION:
        logger.warning(
            "%d labels of %s are no numbers and count as missing. If some are bounds, such as >10, task.censored=true trains "
            "on them",
            molecules.num_unreadable,
            without_credentials(config.source),
        )


def _tell_of_replicates(task: Task, replicates: Replicates) -> None:
    """Log how many molecules have several rows, and what became of these."""
    if not replicates.molecules:
        return
    became = "each counts (task.replicates=median makes one of them)"
    if replicates.rule is not ReplicateRule.KEEP:
        of_classes = task.kind is TaskKind.CLASSIFICATION
        merged = (
            "the more frequent class" if of_classes else f"the {replicates.rule} of their labels"
        )
        became = f"one each, with {merged}"
    logger.info(
        "%s: %d molecules have several rows, %d in all: %s",
        task.name,
        replicates.molecules,
        replicates.rows,
        became,
    )
    if replicates.dropped:
        logger.warning(
            "%s: %d molecules are left out, as the labels of their rows contradict each other",
            task.name,
            replicates.dropped,
        )


def folds_of(config: PropertyConfig, loaded: Loaded) -> NDArray[np.int64]:
    """(M,) the fold of each molecule, of a cross-validation."""
    assert config.task.folds is not None
    molecules = loaded.molecules
    return fold_numbers(
        molecules.smiles, loaded.task.split, config.split_seed, config.task.folds, molecules.groups
    )


def split_of(
    config: PropertyConfig, loaded: Loaded, folds: NDArray[np.int64] | None = None
) -> Split:
    """The parts of the molecules, by ``folds`` (M,) if the settings name one; an error if the task cannot be learned from or scored
    on them, which would be found in or after training otherwise."""
    task, molecules = loaded.task, loaded.molecules
    where = ""
    if config.task.fold is None or config.task.folds is None:
        split = split_molecules(
            molecules.smiles, task.split, config.split_seed, molecules.parts, molecules.groups
        )
    else:
        where = f"fold-{config.task.fold} "
        numbers = folds_of(config, loaded) if folds is None else folds
        split = split_of_fold(numbers, config.task.fold, config.task.folds)
    split = with_fewer_labels(
        split,
        molecules.smiles,
        config.split_seed,
        train=config.task.train_molecules,
        valid=config.task.valid_molecules,
    )
    require_learnable(task.kind, molecules.labels[split.train], molecules.columns)
    for part, rows in (("validation", split.valid), ("test", split.test)):
        require_scorable(task.metric, molecules.labels[rows], molecules.columns, where + part)
    return split


def _warn_of_seen(repeats: Repeats, molecules: LabelledMolecules, split: Split) -> None:
    """Say that scores may be too good, as molecules of the test or validation part are in an earlier part, too."""
    if repeats.example is None:
        return
    shown, other = (
        f"{molecules.mol_ids[row]!r} ({molecules.smiles[row]})" for row in repeats.example
    )
    logger.warning(
        "%d of %d test molecules are also in the training or validation part, and %d of %d validation molecules in the "
        "training part, as they are or as another salt, protonation state or tautomer: %s is %s. Their scores may be "
        "better than those of new molecules. Keep one row of each molecule, or put all its rows into one part by "
        "task.split_column or task.split_file",
        repeats.test_seen,
        len(split.test),
        repeats.valid_seen,
        len(split.valid),
        shown,
        other,
    )


def settings_tried(config: PropertyConfig) -> list[FinetuneSettings]:
    """The settings of a fine-tuning, or examples of those of a sweep (:meth:`SearchSpace.tried`)."""
    if isinstance(config, SweepConfig):
        return config.search.tried(config.finetune)
    return [config.finetune]


def may_read_descriptors(config: PropertyConfig) -> bool:
    """Whether a model of this command reads descriptors, which are then computed once for all."""
    return any(settings.descriptors for settings in settings_tried(config))


def require_coordinates(config: PropertyConfig, molecules: LabelledMolecules) -> None:
    """Raise DataError if a model of this command sees distances alone, and no molecule has coordinates; warn if some have
    none."""
    if not any(settings.relations == "3d" for settings in settings_tried(config)):
        return
    lacking = np.flatnonzero(~molecules.has_coordinates)
    if len(lacking) == len(molecules):
        raise DataError(
            f"finetune.relations=3d: none of the {len(molecules)} molecules of {config.task.source} has coordinates, and a "
            "model of distances alone cannot tell isomers apart without. Make some (task.conformers=1; for a prepared data "
            "set featurize.conformers.generate=true), or take other relations"
        )
    if len(lacking):
        logger.warning(
            "%d of %d molecules have no coordinates, such as %r: a model of distances alone (finetune.relations=3d) sees only "
            "their elements, and scores count them",
            len(lacking),
            len(molecules),
            molecules.mol_ids[lacking[0]],
        )


def check_cluster(config: PropertyConfig) -> None:
    """Refuse a cluster on which the trainings would wait forever, or on which each machine would write to its own disk."""
    cluster = config.cluster
    need = {"CPU": cluster.cpus_per_worker}
    if cluster.use_gpu:
        need["GPU"] = config.gpus_per_worker
    require_room(
        Need("one training", need, cluster.worker_labels, "worker_labels"),
        Need("molecules and baselines", {}, cluster.data_labels, "data_labels"),
    )
    # The checkpoint and prepared molecules are read by this process alone, and sent to the others.
    source = config.task.source
    raw = {} if is_prepared(source) else {"task.source": source}
    require_shared_paths({"out": config.out, **raw})
    warn_of_unused_gpus(cluster)


def prepare_task(
    config: PropertyConfig, form: MoleculeForm | None, sources: SourceSet | None = None
) -> str:
    """URI of the task's prepared molecules; ``form`` and ``sources`` as in :func:`prepare_molecules`."""
    task = config.task
    return prepare_molecules(
        task,
        storage.join(config.out, DATA_DIR),
        label_columns=task.label_columns(),
        conformers=task.conformers,
        form=form,
        cluster=config.cluster,
        sources=sources,
    )


def named_splits(task: TaskConfig) -> SplitsOfData | None:
    """The splits that the column or the file of the task names; None if it has neither."""
    if task.split_column is None:
        return None if task.split_file is None else splits_of_file(task.split_file)
    if task.split is SplitKind.TIME:
        return times_of_column(task.source, task.split_column)
    if task.split is SplitKind.GROUP:
        return groups_of_column(task.source, task.split_column)
    return splits_of_column(task.source, task.split_column)


def split_identity(named: SplitsOfData | None) -> dict[str, str | None]:
    """What the note of ``out`` says of splits that come with the data."""
    return {} if named is None else {"split_fingerprint": named.digest}


def starting_point(config: PropertyConfig) -> StartingPoint:
    """The checkpoint's encoder, or the description of a new one."""
    if config.checkpoint is None:
        return StartingPoint(model=config.model, encoder=None, fingerprint=None)
    return load_encoder(config.checkpoint).start


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedRun:
    """One training of a model with one seed."""

    config: PropertyConfig
    """Where it runs, and where its results go."""
    bench: Bench
    """Its molecules and starting weights."""
    settings: FinetuneSettings
    """Its hyper-parameters."""
    seed: int
    """Its seed."""

    @property
    def num_steps(self) -> int:
        """Most optimizer steps."""
        return self.settings.num_steps(len(self.bench.experiment.split.train))


def train_seeds(
    config: PropertyConfig,
    bench: Bench,
    settings: FinetuneSettings,
    seeds: Sequence[int],
) -> list[SeedResult]:
    """Train and test ``settings`` with each seed, in parallel as resources allow; finished seeds are kept."""
    runs = [SeedRun(config=config, bench=bench, settings=settings, seed=seed) for seed in seeds]
    return train_runs(runs, f"{bench.experiment.task.name} seeds", "seeds")


def train_runs(runs: Sequence[SeedRun], description: str, unit: str) -> list[SeedResult]:
    """The result of each run, which is trained in parallel with the others as resources allow; finished ones are kept.

    The progress display of ``description`` counts their steps, and the runs as ``unit``.
    """
    found = [finished_seed(run.config.out, run.seed, run.settings) for run in runs]
    missing = {
        number: run
        for number, (run, known) in enumerate(zip(runs, found, strict=True))
        if known is None
    }
    if 0 < len(missing) < len(runs):
        logger.info("%d of %d %s were trained before", len(runs) - len(missing), len(runs), unit)
    for number, result in run_all(missing, _start, description, unit).items():
        found[number] = result
    return [result for result in found if result is not None]


class Counted(Protocol):
    """A training whose steps are counted."""

    @property
    def num_steps(self) -> int:
        """Most optimizer steps."""


def run_all(
    runs: Mapping[int, R], start: Callable[[R, Reporter], Any], description: str, unit: str
) -> dict[int, Any]:
    """The results of these runs by their keys, in parallel as resources allow; shows the steps of all of them.

    ``start`` gives a reference to the result of a run, which counts its steps by the reporter.
    """
    if not runs:
        return {}
    total = sum(run.num_steps for run in runs.values())
    with Progress(description, unit="step", total=total) as progress:
        report = progress.reporter
        done = 0

        def tell(finished: int, number: int, result: Any) -> None:
            nonlocal done
            done += runs[number].num_steps
            of_all = f"{finished}/{len(runs)}"
            report({"done": done, "total": total, unit: of_all, **_valid_score(result)})

        report({"done": 0, "total": total, unit: f"0/{len(runs)}"})
        references = {start(run, report): number for number, run in runs.items()}
        return _gather(references, description, tell)


def _valid_score(result: Any) -> dict[str, float]:
    """What the display says of a result."""
    return {"valid": result.valid_score} if isinstance(result, SeedResult) else {}


def _start(run: SeedRun, report: Reporter) -> Any:
    """A reference to the result of the run, which begins as soon as there are resources for it."""
    cluster = run.config.cluster
    options = {**worker_resources(run.config), **placed(cluster.worker_labels)}
    task = ray.remote(train_seed).options(**options)
    return task.remote(run.bench.shared, run.settings, run.seed, run.config.out, cluster, report)


class LostWorkError(TrainingError):
    """Work was lost for an external reason, such as the loss of a node: the same command may succeed."""


def collect(references: Mapping[Any, K], description: str) -> dict[K, Any]:
    """Results of the tasks by key, with their number as progress; errors as in :func:`_gather`."""
    if not references:
        return {}
    total = len(references)
    with Progress(description, unit="run", total=total) as progress:

        def tell(finished: int, _key: K, result: Any) -> None:
            progress.reporter({"done": finished, "total": total, **_valid_score(result)})

        return _gather(references, description, tell)


def _gather(
    references: Mapping[Any, K], description: str, tell: Callable[[int, K, Any], None]
) -> dict[K, Any]:
    """Results of the tasks by key; ``tell`` is called with the number of those that are there, and the key and result of the
    newest.

    The first error of a task stops the others and is raised unchanged. Raises LostWorkError, and stops the others, if a
    worker process or its node is lost.
    """
    found: dict[K, Any] = {}
    waiting = list(references)
    try:
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            result = ray.get(done[0])
            key = references[done[0]]
            found[key] = result
            tell(len(found), key, result)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise LostWorkError(f"{description}: a worker was lost: {error}") from error
    finally:
        # Whatever ended this: what comes next needs their CPUs.
        for reference in waiting:
            ray.cancel(reference, force=True)
    return found


def worker_resources(config: PropertyConfig | RefitConfig) -> dict[str, float]:
    """Resources that one training reserves, as arguments of ``ray.remote``, on nodes with ``cluster.worker_labels``."""
    gpus = config.gpus_per_worker if config.cluster.use_gpu else 0.0
    return {"num_cpus": config.cluster.cpus_per_worker, "num_gpus": gpus}
