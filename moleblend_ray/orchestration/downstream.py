"""What fine-tuning, sweeps and embedding share on a Ray cluster: molecules, weights, seeds, results."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import ray

from moleblend_ray.chemistry.config import ConformerConfig, FeaturizeConfig
from moleblend_ray.chemistry.scaffolds import split_hash
from moleblend_ray.config.builder import to_dict
from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.describe import redact
from moleblend_ray.config.downstream import EmbedConfig, PredictConfig, PropertyConfig, TaskConfig
from moleblend_ray.config.prepare import PrepareConfig
from moleblend_ray.data import storage
from moleblend_ray.data.shards import MANIFEST_NAME, load_manifest
from moleblend_ray.data.splits import NamedSplits
from moleblend_ray.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    StorageError,
    TrainingError,
    without_credentials,
)
from moleblend_ray.evaluation.dataset import (
    load_labelled,
    only_used,
    split_molecules,
    with_fewer_labels,
)
from moleblend_ray.evaluation.finetune import StartingPoint
from moleblend_ray.evaluation.given_split import splits_of_column, splits_of_file
from moleblend_ray.evaluation.property_model import (
    SavedProperty,
    is_property_model,
    load_property_model,
)
from moleblend_ray.evaluation.results import (
    RESULTS_NAME,
    RESULTS_VERSION,
    Baselines,
    SeedResult,
    Training,
    baseline_entry,
    data_entry,
    seeds_entry,
    task_entry,
    versions,
    weights_fingerprint,
)
from moleblend_ray.evaluation.runs import (
    Experiment,
    finished_seed,
    read_test_predictions,
)
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import SplitKind
from moleblend_ray.orchestration.local import require_labels
from moleblend_ray.orchestration.placement import placed
from moleblend_ray.orchestration.prepare import prepare
from moleblend_ray.orchestration.progress import Progress
from moleblend_ray.orchestration.workers import train_seed
from moleblend_ray.training.export import load_model

logger = logging.getLogger(__name__)

K = TypeVar("K")

IDENTITY_NAME = "config.json"
"""What the directory is for; a different question needs a different directory."""

DATA_DIR = "data"
"""Where a raw source is prepared within ``out``."""

ROWS_PER_CHUNK = 256
"""Rows per task when preparing labelled molecules: sets are small, and conformers cost about 0.1 s each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """A task's molecules and starting weights, read once and shared with every task of the cluster."""

    data_uri: str
    """The prepared dataset."""
    experiment: Experiment
    """On the driver."""
    shared: Any
    """The experiment in the object store (``ray.ObjectRef``)."""
    split_hash: str
    """Of the split of all labelled molecules of the dataset."""


def set_up(config: PropertyConfig) -> Bench:
    """Prepare and load the molecules, split them, load the starting weights; check that ``out`` is for this."""
    require_labels("worker_labels", config.cluster.worker_labels)
    require_labels("data_labels", config.cluster.data_labels)
    task = config.task.resolve()
    start = starting_point(config)
    data_uri = prepare_task(config)
    named = named_splits(config.task)
    molecules = load_labelled(data_uri, task, named, num_conformers=config.task.conformers)
    split = with_fewer_labels(
        split_molecules(molecules.smiles, task.split, config.split_seed, molecules.parts),
        molecules.smiles,
        config.split_seed,
        train=config.task.train_molecules,
        valid=config.task.valid_molecules,
    )
    identity = {
        "config": question(config),
        "data_fingerprint": molecules.fingerprint,
        "checkpoint_fingerprint": start.fingerprint,
        **_split_identity(named),
    }
    claim(config.out, identity)
    hash_of_split = split_hash(split)
    molecules, split = only_used(molecules, split)
    experiment = Experiment(task=task, molecules=molecules, split=split, start=start)
    logger.info(
        "%s: %d molecules, split %s into %d / %d / %d",
        task.name,
        len(molecules),
        task.split.value,
        len(split.train),
        len(split.valid),
        len(split.test),
    )
    return Bench(
        data_uri=data_uri,
        experiment=experiment,
        shared=ray.put(experiment),
        split_hash=hash_of_split,
    )


def prepare_task(config: PropertyConfig) -> str:
    """URI of the task's prepared molecules."""
    task = config.task
    return prepare_molecules(
        task,
        storage.join(config.out, DATA_DIR),
        label_columns=task.resolve().columns or None,
        rows_per_chunk=ROWS_PER_CHUNK,
        cluster=config.cluster,
    )


def prepare_molecules(
    molecules: TaskConfig | EmbedConfig | PredictConfig,
    out: str,
    *,
    label_columns: tuple[str, ...] | None,
    rows_per_chunk: int,
    cluster: ClusterConfig,
) -> str:
    """URI of the prepared dataset: the source itself if it is one, else ``out``, made (or completed) now.

    All molecules are in one split, in the source's order.
    """
    if storage.exists(storage.join(molecules.source, MANIFEST_NAME)):
        return molecules.source
    prepare(
        PrepareConfig(
            source=molecules.source,
            out=out,
            smiles_column=molecules.smiles_column,
            id_column=molecules.id_column,
            label_columns=label_columns,
            featurize=FeaturizeConfig(
                max_atoms=molecules.max_atoms,
                conformers=_conformers(int(molecules.conformers)),
            ),
            rows_per_chunk=rows_per_chunk,
            valid_fraction=0.0,
            # The workers' CPUs are idle until the molecules are there.
            cluster=dataclasses.replace(
                cluster, num_data_actors=max(cluster.num_data_actors, cluster.num_workers)
            ),
        )
    )
    return out


def _conformers(count: int) -> ConformerConfig:
    """So many conformers for each molecule without coordinates; their time limit grows with their number."""
    usual = ConformerConfig()
    most = max(1, count)
    return ConformerConfig(generate=count > 0, count=most, timeout_s=usual.timeout_s * most)


def named_splits(task: TaskConfig) -> NamedSplits | None:
    """The splits that the task's column or file gives by name; None if it has neither."""
    if task.split_column is not None:
        return splits_of_column(task.source, task.split_column)
    return None if task.split_file is None else splits_of_file(task.split_file)


def _split_identity(named: NamedSplits | None) -> dict[str, str | None]:
    return {} if named is None else {"split_fingerprint": named.digest}


def starting_point(config: PropertyConfig) -> StartingPoint:
    """The checkpoint's encoder, or the description of a new one."""
    if config.checkpoint is None:
        return StartingPoint(model=config.model, encoder=None, fingerprint=None)
    return load_encoder(config.checkpoint).start


class LoadedEncoder(NamedTuple):
    """A checkpoint's encoder, and what its property head predicts if it has a trained one."""

    start: StartingPoint
    """The encoder's architecture, weights and fingerprint."""
    fine_tuned: SavedProperty | None
    """The whole model, if it is a fine-tuned one."""


def load_encoder(checkpoint: str) -> LoadedEncoder:
    """From a pretraining run, one of its checkpoints, an exported model, or a fine-tuned model's folder."""
    fine_tuned = load_property_model(checkpoint) if is_property_model(checkpoint) else None
    model = load_model(checkpoint) if fine_tuned is None else fine_tuned.model
    state = {name: value.detach().cpu() for name, value in model.encoder.state_dict().items()}
    start = StartingPoint(model=model.config, encoder=state, fingerprint=weights_fingerprint(state))
    return LoadedEncoder(start, fine_tuned)


def train_seeds(
    config: PropertyConfig,
    bench: Bench,
    settings: FinetuneSettings,
    seeds: Sequence[int],
) -> list[SeedResult]:
    """Train and test ``settings`` with each seed, in parallel as resources allow; finished seeds are kept."""
    found = {seed: finished_seed(config.out, seed, settings) for seed in seeds}
    missing = [seed for seed in seeds if found[seed] is None]
    if len(missing) < len(seeds):
        logger.info("%d of %d seeds were trained before", len(seeds) - len(missing), len(seeds))
    options = {**worker_resources(config), **placed(config.cluster.worker_labels)}
    task = ray.remote(train_seed).options(**options)
    references = {
        task.remote(bench.shared, settings, seed, config.out, config.cluster): seed
        for seed in missing
    }
    found |= collect(references, f"{bench.experiment.task.name} seeds")
    return [result for seed in seeds if (result := found[seed]) is not None]


class LostWorkError(TrainingError):
    """Work was lost for a reason outside of it, such as a node that went: the same command may well succeed."""


def collect(references: Mapping[Any, K], description: str) -> dict[K, Any]:
    """Results of the tasks by key, with progress; the first error stops the rest and is raised as itself.

    LostWorkError if a worker process or its node is lost.
    """
    found: dict[K, Any] = {}
    waiting = list(references)
    if not waiting:
        return found
    with Progress(description, unit="run", total=len(waiting)) as progress:
        try:
            while waiting:
                done, waiting = ray.wait(waiting, num_returns=1)
                result = ray.get(done[0])
                found[references[done[0]]] = result
                values: dict[str, float | int | str] = {
                    "done": len(found),
                    "total": len(references),
                }
                if isinstance(result, SeedResult):
                    values["valid"] = result.valid_score
                progress.reporter(values)
        except ray.exceptions.RayTaskError as error:
            for reference in waiting:
                ray.cancel(reference, force=True)
            raise error.cause from error
        except ray.exceptions.RayError as error:
            raise LostWorkError(f"{description}: a worker was lost: {error}") from error
    return found


def worker_resources(config: PropertyConfig) -> dict[str, float]:
    """What one training reserves, as arguments of ``ray.remote``; its nodes are those of ``cluster.worker_labels``."""
    gpus = config.gpus_per_worker if config.cluster.use_gpu else 0.0
    return {"num_cpus": config.cluster.cpus_per_worker, "num_gpus": gpus}


def write_results(
    config: PropertyConfig,
    bench: Bench,
    model: Training,
    baselines: Baselines,
    *,
    seconds: float,
) -> dict[str, Any]:
    """Write the report, then ``results.json``, whose presence means that all is done."""
    experiment, split = bench.experiment, bench.experiment.split
    start = experiment.start
    name = "from scratch" if config.checkpoint is None else "fine-tuned"
    parts = {part: len(getattr(split, part)) for part in ("train", "valid", "test")}
    results: dict[str, Any] = {
        "results_version": RESULTS_VERSION,
        "config": to_dict(config),
        "task": task_entry(experiment.task, experiment.molecules),
        "data": data_entry(
            bench.data_uri,
            experiment.molecules,
            experiment.task,
            {
                "seed": config.split_seed,
                "hash": bench.split_hash,
                **({"fractions": None} if experiment.task.split is SplitKind.GIVEN else {}),
                **parts,
            },
        ),
        "checkpoint": {
            "uri": config.checkpoint,
            "fingerprint": start.fingerprint,
            "model": to_dict(start.model),
        },
        "chosen": to_dict(model.chosen),
        "trials": [dataclasses.asdict(trial) for trial in model.trials],
        "final": seeds_entry(f"MoleBLEND, {name}", model.final),
        "baselines": [baseline_entry(result) for result in baselines.results],
        "baselines_absent": {kind.value: reason for kind, reason in baselines.absent.items()},
        "versions": versions(),
        "seconds": seconds,
    }
    results = redact(results)
    # Not above: every process of these jobs imports this module, and would bring matplotlib and scikit-learn.
    from moleblend_ray.evaluation.report import write_report

    write_report(config.out, results, *read_test_predictions(config.out, model.final[0].seed))
    storage.write_json(storage.join(config.out, RESULTS_NAME), results)
    return results


def finished_results(config: PropertyConfig) -> dict[str, Any] | None:
    """The stored results if ``out`` holds finished ones for this question; a ConfigError if for another."""
    uri = storage.join(config.out, RESULTS_NAME)
    if not storage.exists(uri):
        return None
    results: dict[str, Any] = storage.read_json(uri)
    _check_version(uri, results)
    data_uri = storage.join(config.out, DATA_DIR)

    def inputs() -> dict[str, str | None]:
        return {
            **data_inputs(config.task.source, data_uri, lambda: prepare_task(config)),
            "checkpoint_fingerprint": starting_point(config).fingerprint,
            **_split_identity(named_splits(config.task)),
        }

    check_finished(config.out, question(config), inputs)
    logger.info("%s is finished: %s", config.out, without_credentials(uri))
    return results


def _check_version(uri: str, results: Mapping[str, Any]) -> None:
    version = results.get("results_version")
    if version != RESULTS_VERSION:
        raise ConfigError(
            f"{uri} has layout version {version}, and this release of moleblend-ray reads {RESULTS_VERSION}: the results "
            "there were made by another release, with other baselines. Its models and predictions stay usable. Give another `out` to compute "
            "the results of this release"
        )


def question(config: PropertyConfig) -> dict[str, Any]:
    """The settings that decide the results: not where they are computed or stored."""
    settings = to_dict(config)
    for name in ("out", "cluster", "gpus_per_worker"):
        settings.pop(name)
    return {"job": type(config).__name__, **settings}


def claim(out: str, identity: Mapping[str, Any]) -> None:
    """Mark ``out`` as being for this question, or find it so marked; credentials in it are hidden."""
    uri = storage.join(out, IDENTITY_NAME)
    if storage.exists(uri):
        _compare(out, storage.read_json(uri), identity)
    else:
        storage.write_json(uri, redact(identity))


def check_finished(
    out: str, question: Mapping[str, Any], inputs: Callable[[], Mapping[str, str | None]]
) -> None:
    """A ConfigError if the finished ``out`` is for another question, or of data or weights that changed since.

    ``inputs`` gives the present fingerprints. Inputs that are gone do not make finished results less finished.
    """
    stored = storage.read_json(storage.join(out, IDENTITY_NAME))
    _compare(out, stored["config"], question)
    try:
        present = inputs()
    except (StorageError, DataError, CheckpointError) as error:
        logger.warning("cannot check whether the inputs of %s changed: %s", out, error)
        return
    _compare(out, {name: stored[name] for name in present}, present)


def data_inputs(source: str, data_uri: str, prepare: Callable[[], str]) -> dict[str, str | None]:
    """The present fingerprint of ``source``: a prepared dataset, or one that was prepared into ``data_uri``.

    Empty if the user has deleted what was prepared. ``prepare`` compares it with the source, and refuses a change.
    """
    if not any(storage.exists(storage.join(uri, MANIFEST_NAME)) for uri in (source, data_uri)):
        return {}
    return {"data_fingerprint": load_manifest(prepare()).fingerprint}


def _compare(out: str, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    # Credentials may differ between a command and its repetition; neither shows them.
    differing = _differences(redact(stored), redact(asked))
    if differing:
        raise ConfigError(
            f"{out} holds results of other settings or inputs; they differ in {'; '.join(differing)}. "
            "Give another `out`, or repeat settings and inputs as they were"
        )


def _differences(stored: Any, asked: Any, path: str = "") -> list[str]:
    if isinstance(stored, Mapping) and isinstance(asked, Mapping):
        return [
            line
            for name in dict.fromkeys((*stored, *asked))
            for line in _differences(
                stored.get(name), asked.get(name), f"{path}.{name}" if path else name
            )
        ]
    return [] if stored == asked else [f"{path}: {stored!r} there, {asked!r} here"]
