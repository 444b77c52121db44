"""What `moleblend finetune`, `sweep`, `embed` and `predict` start from, try and write."""

from __future__ import annotations

from dataclasses import dataclass, field

from moleblend_ray.checks import Check, above, at_least, check_all, locations, within
from moleblend_ray.chemistry.config import MAX_ATOMS, MAX_CONFORMERS, SMILES_COLUMN
from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.data.sources.classes import class_checks, names_of_class_labels
from moleblend_ray.errors import ConfigError
from moleblend_ray.evaluation.models.baselines import BaselineKind
from moleblend_ray.evaluation.search import SearchSpace
from moleblend_ray.evaluation.settings import COVERAGE, FEWEST_FOLDS, MOST_FOLDS, FinetuneSettings
from moleblend_ray.evaluation.tasks import (
    Metric,
    ReplicateRule,
    SplitKind,
    Task,
    TaskKind,
    is_group,
    resolve_task,
    task_names,
)
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.settings import typed


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """Which question, or a group of questions, and the molecules that answer them."""

    name: str | tuple[str, ...]
    """A name of the task table (bbbp, esol, qm9_gap, ...), a group of them (moleculenet, moleculenet_small, qm9, ...), a
    list of both, or any other name for a table of your own."""
    source: str
    """Molecules with labels, in files as for `prepare`, or a prepared dataset, which is used as it is. Of a
    group: a directory that holds one for each task, found by name (bbbp.csv.gz, bbbp/), or one for all of them."""
    skip_missing: bool = False
    """Of a group: leave out tasks whose molecules are not in the source, instead of ending with an error."""
    columns: tuple[str, ...] = ()
    """Label columns; empty: the task table's (required for a table of your own)."""
    kind: TaskKind | None = None
    """Classification (0, 1, empty) or regression; null: the task table's (required for a table of your own)."""
    classes: tuple[str, ...] = ()
    """Words of classes that `columns` hold instead of 0 and 1, such as [inactive,active]: of two, the second is 1. Of more, each
    has a label, `COLUMN=CLASS`, and their probabilities add up to 1."""
    metric: Metric | None = None
    """Score by which configurations are chosen and reported; null: the task's usual one."""
    split: SplitKind | None = None
    """How molecules are divided 80/10/10; null: the task's usual way, scaffolds for a table of your own. butina: by clusters of
    similar molecules. time: test on the newest, by the dates or numbers in `split_column`. group: each group (project, plate,
    source) that `split_column` names in one part. given: as a prepared dataset is, or as `split_column` or `split_file` say."""
    split_column: str | None = None
    """Column (or SDF property) of the source that says train, valid or test, which makes the split given; with split=time, its
    dates (such as 2024-05-31) or numbers (such as years); with split=group, any names of groups."""
    split_file: str | None = None
    """File that says so by row or by id, as for `prepare`; it makes the split given."""
    folds: int | None = None
    """Cross-validation: divide the molecules into so many folds, by the kind of the split, and test on each once, with models that
    are chosen by the next fold and trained on the others. null: one split."""
    fold: int | None = None
    """Only this run of a cross-validation, 0 to folds - 1, with results of its own; null: all, with results together."""
    unit: str | None = None
    """Unit of the labels, for reports and predictions; null: the one that the data state for all columns (in Parquet the field
    metadata `unit`), else the task table's."""
    censored: bool = False
    """Train on labels of which the table tells only a bound, such as >10 or <0.5; otherwise they count as missing. For numbers
    of one task. A prepared dataset must have been made with `censored_labels`."""
    relation_column: str | None = None
    """With `censored`: column (or SDF property) with the relation of a row's labels (>, <, =), for tables that keep it apart
    from the number, as ChEMBL's do."""
    replicates: ReplicateRule = ReplicateRule.KEEP
    """What becomes of several rows of one molecule (equal canonical SMILES). keep: each counts. mean, median: one row with the
    mean or the median of their labels, of classes with the most frequent one."""
    smiles_column: str = SMILES_COLUMN
    """Column with the SMILES in tables."""
    id_column: str | None = None
    """Column (or SDF property) with the molecule's id; null numbers the rows."""
    conformers: int = 1
    """Conformers of each molecule: training draws one anew each epoch, predictions are the mean over all. Where the source
    has no coordinates so many are made, with seeds; 0 makes none, and such molecules stay 2D. Of those that the
    source has, the first so many are taken, and the first also with 0 (`finetune.relations=2d` hides it)."""
    max_atoms: int = MAX_ATOMS
    """Larger molecules are left out, and counted."""
    train_molecules: int | None = None
    """Train on so many molecules of the training part only, chosen by `split_seed`; a smaller number takes a part of what a
    larger one takes. The test part stays whole. null: all."""
    valid_molecules: int | None = None
    """Choose by so many molecules of the validation part only, likewise."""

    def __post_init__(self) -> None:
        by_user = self.split_column or self.split_file
        by_column = self.split in (SplitKind.TIME, SplitKind.GROUP)
        of_one_task = (
            ("columns", "kind", "classes", "unit", "split_file", "censored")
            if self.is_group
            else ()
        )
        check_all(
            *locations(self, "source", "split_file"),
            *within(self, 0, MAX_CONFORMERS, "conformers"),
            *at_least(self, 1, "train_molecules", "valid_molecules"),
            (
                len(set(self.columns)) == len(self.columns),
                f"columns: expected each once, found {list(self.columns)}",
            ),
            *class_checks(self.classes),
            (
                not self.classes or bool(self.columns),
                "classes: expected with columns, which say where they are; found without",
            ),
            (
                self.smiles_column not in self.columns,
                f"columns: expected columns of labels, found {self.smiles_column!r}, which has the SMILES",
            ),
            (
                not (self.split_column and self.split_file),
                "split_file: expected either it or split_column, found both",
            ),
            (
                by_column or not by_user or self.split in (None, SplitKind.GIVEN),
                f"split: expected given, time or group with split_column, given with split_file, found {self.split}",
            ),
            (
                self.split is not SplitKind.TIME or bool(self.split_column),
                "split_column: expected a column of dates or numbers with split=time, found none",
            ),
            (
                self.split is not SplitKind.GROUP or bool(self.split_column),
                "split_column: expected a column of groups, such as projects, with split=group, found none",
            ),
            *within(self, FEWEST_FOLDS, MOST_FOLDS, "folds"),
            (
                self.folds is None
                or self.split is SplitKind.GROUP
                or not (by_user or self.split in (SplitKind.GIVEN, SplitKind.TIME)),
                "folds: expected with a split by random, scaffold, scaffold_balanced, butina or group, found with a split that is "
                "given with the data. Leave out one of them",
            ),
            (
                self.fold is None or 0 <= self.fold < (self.folds or 0),
                f"fold: expected with folds, from 0 to folds - 1, found {self.fold} with folds={self.folds}",
            ),
            (
                not by_column or not self.is_group,
                f"split: expected {self.split} for one task only, found with a group of tasks",
            ),
            *(
                (not getattr(self, name), f"{name}: expected for one task only, found with a group")
                for name in of_one_task
            ),
        )
        kinds = {task.kind for task in self.tasks().values()}
        check_all(
            (
                not self.classes or kinds == {TaskKind.CLASSIFICATION},
                "classes: expected for classification only; found with regression",
            ),
            (
                not self.censored or kinds == {TaskKind.REGRESSION},
                "censored: expected for regression only, as classes have no bounds; found with classification",
            ),
            (
                self.censored or self.relation_column is None,
                f"relation_column: expected with censored=true only, found {self.relation_column!r} without",
            ),
        )

    @property
    def is_group(self) -> bool:
        """Whether several tasks are asked for, each with results of its own."""
        return is_group(self.name)

    @property
    def is_cross_validated(self) -> bool:
        """Whether all folds of a cross-validation are asked for."""
        return self.folds is not None and self.fold is None

    def sources(self) -> tuple[str, ...]:
        """``source`` as several, of which a task has one."""
        return (self.source,)

    def label_columns(self) -> tuple[str, ...] | None:
        """Columns of raw molecules that hold the labels of the task, which is none of a group; None: all of numbers."""
        return self.columns or self.resolve().columns or None

    def tasks(self) -> dict[str, Task]:
        """Every task that is asked for, by name, in order; a ConfigError if one is unknown and not described."""
        return {name: self._resolve(name) for name in task_names(self.name)}

    def resolve(self) -> Task:
        """The task itself, of one that is none of a group; a ConfigError if it is one."""
        if self.is_group:
            raise ConfigError(
                f"task.name: {self.name!r} is a group of tasks; expected one. Groups are for `moleblend sweep` and "
                "`finetune`, in Python sweep_tasks and finetune_tasks"
            )
        return next(iter(self.tasks().values()))

    def _resolve(self, name: str) -> Task:
        is_given = self.split_column is not None or self.split_file is not None
        return resolve_task(
            name,
            columns=tuple(
                label
                for column in self.columns
                for label in names_of_class_labels(column, self.classes)
            ),
            kind=self.kind,
            metric=self.metric,
            split=SplitKind.GIVEN if is_given and self.split is None else self.split,
            unit=self.unit,
        )


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineConfig:
    """What stands beside the model in the results: other models on the same split, with the same seeds."""

    kinds: tuple[BaselineKind, ...] = tuple(BaselineKind)
    """forest and boosting: ECFP4 with a random forest or gradient boosting. descriptors: RDKit's 2D descriptors with ridge
    or logistic regression. scratch: the same encoder without pretraining, trained in the same way, which takes as
    long again (only with a checkpoint). [] for none."""
    num_trees: int = 200
    """Trees of a forest, one forest for each label column, setting and seed; fewer for many labels."""
    num_rounds: int = 300
    """Most rounds of gradient boosting, likewise; how many are used is chosen on the validation part."""

    def __post_init__(self) -> None:
        check_all(
            (
                len(set(self.kinds)) == len(self.kinds),
                f"kinds: expected each at most once, found {[kind.value for kind in self.kinds]}",
            ),
            *at_least(self, 1, "num_trees", "num_rounds"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PropertyConfig:
    """What a fine-tuning and a sweep have in common."""

    task: TaskConfig
    """Question and molecules."""
    out: str
    """Directory of the results and of a search's state, as a path or URI that every worker reaches."""
    checkpoint: str | None = None
    """Pretraining run, checkpoint or exported model to start from; null: new weights, as `model` describes."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Encoder to train from scratch; a checkpoint brings its own."""
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    """Hyper-parameters; a sweep varies those of `search` and keeps the others."""
    split_seed: int = 0
    """Seed of the split where it has one (`random`, `scaffold_balanced`, `group`)."""
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    """Models to compare with."""
    gpus_per_worker: float = 1.0
    """GPUs, or a share of one, that each training reserves when `cluster.use_gpu` is on."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the work runs. As many trainings run at once as fit into the cluster."""

    def _common_checks(self) -> tuple[Check, ...]:
        return (*locations(self, "out", "checkpoint"), *above(self, 0, "gpus_per_worker"))


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig(PropertyConfig):
    """A pretrained encoder (or a new one) -> a property model and its scores."""

    seeds: tuple[int, ...] = (0,)
    """One run each: initialisation of the head, order of the molecules, dropout. Each is reported."""

    def __post_init__(self) -> None:
        check_all(*self._common_checks(), *_seed_checks("seeds", self.seeds))


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig(PropertyConfig):
    """A search over hyper-parameters, judged on validation molecules, then test scores of the chosen one."""

    search: SearchSpace = field(default_factory=SearchSpace)
    """Ranges of the hyper-parameters that the search varies."""
    num_trials: int = 30
    """Configurations tried."""
    grace_epochs: int = 5
    """Epochs that every trial gets before `search.scheduler` may stop it; asha then stops two of three."""
    search_seed: int = 0
    """Seed of the search (Optuna TPE) and of every trial's training."""
    final_seeds: tuple[int, ...] = (0, 1, 2)
    """The chosen configuration is trained once for each and scored once on the test molecules."""

    def __post_init__(self) -> None:
        check_all(
            *self._common_checks(),
            *_seed_checks("final_seeds", self.final_seeds),
            *_seed_checks("search_seed", (self.search_seed,)),
            *at_least(self, 1, "num_trials", "grace_epochs"),
        )


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class RefitConfig:
    """A finished fine-tuning or sweep -> models for use, trained on all of its molecules."""

    results: str
    """`out` of a finished fine-tuning, cross-validation or sweep, of one task or several: its molecules, settings, seeds, and how many
    epochs were best for each."""
    out: str
    """Directory of the models, as a path or URI that every worker reaches."""
    gpus_per_worker: float = 1.0
    """GPUs, or a share of one, that each training reserves when `cluster.use_gpu` is on."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the work runs. As many trainings run at once as fit into the cluster."""

    def __post_init__(self) -> None:
        check_all(
            *locations(self, "results", "out"),
            *above(self, 0, "gpus_per_worker"),
            (
                self.out != self.results,
                f"out: expected another directory than results, found {self.out}",
            ),
        )


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class LeaderboardConfig:
    """Results of many tasks -> tables, a page and a figure; of several directories, their models side by side."""

    run: str
    """Directory of results: the `out` of a sweep or fine-tuning of several tasks, or of one."""
    against: tuple[str, ...] = ()
    """Other such directories to compare with, as of another checkpoint. Equal baselines are shown once."""
    out: str | None = None
    """Directory of the leaderboard; null: that of `run`, required for a comparison."""

    def __post_init__(self) -> None:
        runs = (self.run, *self.against)
        check_all(
            *locations(self, "run", "out", *(("against",) if self.against else ())),
            (
                len(set(runs)) == len(runs),
                f"against: expected distinct directories, found {list(runs)}",
            ),
            (
                not self.against or self.out not in (None, *runs),
                f"out: expected a directory of its own for the comparison, found {self.out or 'null'}",
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LibraryConfig:
    """What embedding and prediction have in common: molecules that a model looks at."""

    source: str | tuple[str, ...]
    """Molecules as for `prepare` (SDF, CSV/TSV, SMILES, Parquet): file, directory or glob, or a list of them; or one prepared
    dataset, which is used as it is."""
    out: str
    """Directory of what is made of them, as a path or URI that every worker reaches."""
    batch_size: int | None = None
    """Molecules computed at once: memory and speed, not the result. null: 64 on CPUs and 1,024 on GPUs, whose hosts launch all
    kernels again for each."""
    smiles_column: str = SMILES_COLUMN
    """Column with the SMILES in tables."""
    id_column: str | None = None
    """Column (or SDF property) with the molecule's id; null numbers the rows."""
    max_atoms: int = MAX_ATOMS
    """Larger molecules are rejected, and listed."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the work runs: `num_data_actors` models of `cpus_per_worker` CPUs, each on a GPU with `use_gpu`."""

    def sources(self) -> tuple[str, ...]:
        """``source`` as several."""
        return (self.source,) if isinstance(self.source, str) else self.source

    def _library_checks(self) -> tuple[Check, ...]:
        return (*locations(self, "source", "out"), *at_least(self, 1, "batch_size"))


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig(LibraryConfig):
    """Molecules -> one vector each, in the source's order."""

    checkpoint: str
    """Pretraining run, checkpoint, exported or fine-tuned model."""
    conformers: bool | None = None
    """Make one seeded conformer for each molecule whose source has no coordinates; otherwise it stays 2D. null: as the
    model was fine-tuned (one tuned without coordinates does not see those of the source either); for a pretrained one,
    make them."""

    def __post_init__(self) -> None:
        check_all(*locations(self, "checkpoint"), *self._library_checks())


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig(LibraryConfig):
    """Molecules -> class probabilities or values, with their uncertainty, in the source's order."""

    models: str | tuple[str, ...]
    """Fine-tuned model (models/seed-N of a fine-tuning, sweep or refit), or a finished `out` of one, which means the models
    of all its seeds; or a list of these. Several models of one task are an ensemble. Those of several tasks, or the `out` of several,
    predict the properties of all in one table."""
    conformers: int | None = None
    """Conformers of each molecule over which predictions are averaged. Where the source has no coordinates so many
    are made, with seeds; of coordinates that are there, the first. 0: none, so the models see 2D relations alone. null:
    as many as the models were fine-tuned with, none for models that see 2D relations alone."""
    applicability: float | None = None
    """Tanimoto similarity (ECFP4) to the nearest training molecule from which on a molecule counts as in the
    models' domain; null: each model's own, the 5th percentile of its training molecules."""
    interval: float | None = COVERAGE
    """Share of the labels of molecules like those of validation that an interval (lower, upper) around the prediction of a
    number is to hold, or of each class that its set of classes is to hold; null: neither."""
    atom_contributions: bool = False
    """Also say what each atom adds to each prediction: how much it changes without the atom, in the unit or, of classes, in
    log-odds. Takes about as many times longer as a molecule has atoms."""
    csv: bool = False
    """Also write all predictions as one table, predictions.csv."""

    def model_uris(self) -> tuple[str, ...]:
        """Every path or URI of `models`."""
        return (self.models,) if isinstance(self.models, str) else self.models

    def __post_init__(self) -> None:
        check_all(
            *locations(self, "models"),
            *self._library_checks(),
            *within(self, 0, MAX_CONFORMERS, "conformers"),
            *within(self, 0, 1, "applicability"),
            (
                self.interval is None or 0 < self.interval < 1,
                f"interval: expected above 0 and below 1, found {self.interval}",
            ),
        )


def _seed_checks(name: str, seeds: tuple[int, ...]) -> tuple[Check, ...]:
    return (
        (len(seeds) >= 1, f"{name}: expected at least one seed, found none"),
        (len(set(seeds)) == len(seeds), f"{name}: expected distinct seeds, found {list(seeds)}"),
        # Of NumPy's and scikit-learn's generators.
        (
            all(0 <= seed < 2**32 for seed in seeds),
            f"{name}: expected 0 to 2**32 - 1, found {list(seeds)}",
        ),
    )
