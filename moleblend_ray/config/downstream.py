"""What `moleblend finetune`, `moleblend sweep` and `moleblend embed` start from, try and write."""

from __future__ import annotations

from dataclasses import dataclass, field

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.errors import check_all
from moleblend_ray.evaluation.settings import FinetuneSettings, SearchSpace
from moleblend_ray.evaluation.tasks import Metric, SplitKind, Task, TaskKind, resolve_task
from moleblend_ray.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """Which question, and the molecules that answer it."""

    name: str
    """A name of the task table (bbbp, esol, qm9_gap, ...), or any other name for a table of your own."""
    source: str
    """Molecules with labels: CSV, SDF or Parquet as for `prepare`, or a prepared dataset, which is used as it is."""
    columns: tuple[str, ...] = ()
    """Label columns; empty: the task table's (required for a table of your own)."""
    kind: TaskKind | None = None
    """Classification (0, 1, empty) or regression; null: the task table's (required for a table of your own)."""
    metric: Metric | None = None
    """Score by which configurations are chosen and reported; null: the task's usual one."""
    split: SplitKind | None = None
    """How molecules are divided 80/10/10; null: the task's usual way, scaffolds for a table of your own."""
    unit: str | None = None
    """Unit of the labels, for reports; null: the task table's."""
    smiles_column: str = "smiles"
    """Column with the SMILES in tables."""
    id_column: str | None = None
    """Column (or SDF property) with the molecule's id; null numbers the rows."""
    conformers: bool = True
    """Make one seeded conformer for each molecule whose source has no coordinates; otherwise it stays 2D."""
    max_atoms: int = 256
    """Larger molecules are left out, and counted."""

    def __post_init__(self) -> None:
        check_all((bool(self.source), "source: expected a path or URI, found an empty string"))
        self.resolve()

    def resolve(self) -> Task:
        """The task itself; a ConfigError if the name is unknown and not described."""
        return resolve_task(
            self.name,
            columns=self.columns,
            kind=self.kind,
            metric=self.metric,
            split=self.split,
            unit=self.unit,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineConfig:
    """The fingerprint baseline in the results table: ECFP4 and a random forest on the same split."""

    enabled: bool = True
    """Whether to compute it."""
    num_trees: int = 200
    """Trees of each forest; one forest for each label column and seed."""


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
    """Seed of the split where it has one (`random`, `scaffold_balanced`)."""
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    """The fingerprint baseline."""
    gpus_per_worker: float = 1.0
    """GPUs, or a share of one, that each training reserves when `cluster.use_gpu` is on."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the work runs. As many trainings run at once as fit into the cluster."""

    def _common_checks(self) -> tuple[tuple[bool, str], ...]:
        return (
            (bool(self.out), "out: expected a path or URI, found an empty string"),
            (
                self.gpus_per_worker > 0,
                f"gpus_per_worker: expected > 0, found {self.gpus_per_worker}",
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig(PropertyConfig):
    """A pretrained encoder (or a new one) -> a property model and its scores."""

    seeds: tuple[int, ...] = (0,)
    """One run each: initialisation of the head, order of the molecules, dropout. Each is reported."""

    def __post_init__(self) -> None:
        check_all(*self._common_checks(), *_seed_checks("seeds", self.seeds))


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig(PropertyConfig):
    """A search over hyper-parameters, judged on validation molecules, then test scores of the chosen one."""

    search: SearchSpace = field(default_factory=SearchSpace)
    """Ranges of the hyper-parameters that the search varies."""
    num_trials: int = 30
    """Configurations tried."""
    grace_epochs: int = 5
    """Epochs every trial gets before a worse half may be stopped."""
    search_seed: int = 0
    """Seed of the search (Optuna TPE) and of every trial's training."""
    final_seeds: tuple[int, ...] = (0, 1, 2)
    """The chosen configuration is trained once for each and scored once on the test molecules."""

    def __post_init__(self) -> None:
        check_all(
            *self._common_checks(),
            *_seed_checks("final_seeds", self.final_seeds),
            *_seed_checks("search_seed", (self.search_seed,)),
            (self.num_trials >= 1, f"num_trials: expected >= 1, found {self.num_trials}"),
            (self.grace_epochs >= 1, f"grace_epochs: expected >= 1, found {self.grace_epochs}"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig:
    """Molecules -> one vector each, in the source's order."""

    checkpoint: str
    """Pretraining run, checkpoint, exported or fine-tuned model."""
    source: str
    """Molecules as for `prepare` (SDF, CSV/TSV, Parquet), or a prepared dataset, which is used as it is."""
    out: str
    """Directory of the embeddings, as a path or URI that every worker reaches."""
    batch_size: int = 64
    """Molecules computed at once: memory and speed, not the result."""
    smiles_column: str = "smiles"
    """Column with the SMILES in tables."""
    id_column: str | None = None
    """Column (or SDF property) with the molecule's id; null numbers the rows."""
    conformers: bool = True
    """Make one seeded conformer for each molecule whose source has no coordinates; otherwise it stays 2D."""
    max_atoms: int = 256
    """Larger molecules are rejected, and listed."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the work runs: `num_data_actors` models of `cpus_per_worker` CPUs, each on a GPU with `use_gpu`."""

    def __post_init__(self) -> None:
        check_all(
            (bool(self.checkpoint), "checkpoint: expected a path or URI, found an empty string"),
            (bool(self.source), "source: expected a path or URI, found an empty string"),
            (bool(self.out), "out: expected a path or URI, found an empty string"),
            (self.batch_size >= 1, f"batch_size: expected >= 1, found {self.batch_size}"),
        )


def _seed_checks(name: str, seeds: tuple[int, ...]) -> tuple[tuple[bool, str], ...]:
    return (
        (len(seeds) >= 1, f"{name}: expected at least one seed, found none"),
        (len(set(seeds)) == len(seeds), f"{name}: expected distinct seeds, found {list(seeds)}"),
        # Of NumPy's and scikit-learn's generators.
        (
            all(0 <= seed < 2**32 for seed in seeds),
            f"{name}: expected 0 to 2**32 - 1, found {list(seeds)}",
        ),
    )
