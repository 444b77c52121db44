"""What pretraining is worth on MoleculeNet and QM9: the pretrained encoder against the same one from scratch.

    python benchmarks/moleculenet.py --data DIR --write-splits [--tasks esol,...] [--qm9 URI]
    python benchmarks/moleculenet.py --data DIR --checkpoint URI --out DIR [--tasks esol,...] [--qm9 URI] [--seeds 0,1,2]
                                     [--arms pretrained,scratch,...] [--device cpu|cuda] [--precision fp32|bf16]
                                     [--workers K] [--threads N] [fresh_blocks=1 learning_rate=3e-4 ...]

``--data`` holds a prepared dataset for each task (``DIR/esol``, ``DIR/bbbp``, ...), ``--qm9`` is one with the labels gap and
alpha, and adds the tasks qm9_gap and qm9_alpha. Scaffolds need RDKit, training does not: ``--write-splits`` writes each task's
split (its own kind, seed 0) to ``DIR/splits/TASK.npz`` with the fingerprint of its dataset; the second command reads these, and
refuses splits of other data. QM9 has a random split with 1,000 training and 500 validation labels. The arms forest, boosting and
descriptors are the baselines of `moleblend finetune` on the same splits, with the settings that validation prefers of each
grid; they need RDKit, and no checkpoint.

Both arms have the same settings (``SETTINGS``, changed by ``key=value`` with the names of `FinetuneSettings`), splits and seeds. Of
each run the epoch is chosen on validation; the test part is scored once, with the weights of that epoch. Each (task,
arm, seed) is a file in ``--out``; the command again runs what is missing or failed. ``--workers`` processes share the work,
on a GPU they share it, too. ``DIR/moleculenet.md`` is the table: mean and 95 % confidence interval (Student) over seeds, and the difference
paired by seed. Needs no Ray, and RDKit for descriptors and fingerprints alone. Prints one JSON line last; ends with status 1 if a run failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import json
import math
import platform
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from evidence import as_json, difference, finetune_and_score, interval, pretrained
from shared_work import Job, run_jobs, share_cores

from moleblend_ray.chemistry.scaffolds import Split, split_hash
from moleblend_ray.config.downstream import BaselineConfig
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.files import storage
from moleblend_ray.errors import ConfigError, DataError, MoleBlendError
from moleblend_ray.evaluation.models.baselines import FeatureKind
from moleblend_ray.evaluation.models.finetune import StartingPoint
from moleblend_ray.evaluation.molecules.dataset import LabelledMolecules, load_labelled
from moleblend_ray.evaluation.scoring.scores import best_candidate, score
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.splits.split import split_molecules, with_fewer_labels
from moleblend_ray.evaluation.tasks import Metric, Task, resolve_task
from moleblend_ray.settings import build

PRETRAINED: Final = "pretrained"
SCRATCH: Final = "scratch"
ARMS: Final = (PRETRAINED, SCRATCH)
"""Encoders."""
BASELINES: Final = ("forest", "boosting", "descriptors")
"""Models of fingerprints or descriptors, named as in `BaselineKind`."""

_2D: Final = {"learning_rate": 5e-4, "relations": "2d"}
_QM9: Final = {
    "learning_rate": 5e-4,
    "relations": "2d+3d",
    "atom_reference": True,
    "epochs": 60,
    "batch_size": 32,
}

SETTINGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "bbbp": {**_2D, "epochs": 20, "batch_size": 64},
    "tox21": {**_2D, "epochs": 12, "batch_size": 64},
    "toxcast": {**_2D, "epochs": 12, "batch_size": 64},
    "sider": {**_2D, "epochs": 20, "batch_size": 32},
    "clintox": {**_2D, "epochs": 20, "batch_size": 32},
    "muv": {**_2D, "epochs": 3, "batch_size": 128},
    "hiv": {**_2D, "epochs": 4, "batch_size": 128},
    "esol": {**_2D, "epochs": 30, "batch_size": 32},
    "lipophilicity": {**_2D, "epochs": 20, "batch_size": 64},
    "qm9_gap": _QM9,
    # Alpha grows with the molecule, nearly a sum over atoms.
    "qm9_alpha": {**_QM9, "readout": "sum"},
}
"""Of each task, for both arms alike; other settings are the defaults of `FinetuneSettings`."""

QM9_TASKS: Final = tuple(name for name in SETTINGS if name.startswith("qm9"))
QM9_LABELS: Final = {"train": 1000, "valid": 500}
QM9_TEST: Final = 10_000
"""Test molecules at most."""

SPLIT_SEED: Final = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one process needs for one result."""

    task: Task
    data: str
    """Prepared dataset of the task."""
    splits: str
    """Folder of split files."""
    arm: str
    seed: int
    settings: FinetuneSettings
    checkpoint: str | None
    """None for baselines alone."""
    device: str
    threads: int


class TaskSplit(NamedTuple):
    """A split as its file has it."""

    split: Split
    """Rows of the task's labelled molecules."""
    num_molecules: int
    """How many of these there are."""

    @property
    def hash(self) -> str:
        return split_hash(self.split)

    @property
    def sizes(self) -> list[int]:
        return [len(part) for part in self.split]


def main() -> None:
    arguments = parse_arguments()
    try:
        if arguments.write_splits:
            write_splits(arguments)
        elif not evaluate(arguments):
            sys.exit(1)
    except MoleBlendError as error:
        sys.exit(f"error: {error}")


def evaluate(arguments: argparse.Namespace) -> bool:
    """Run what is missing, then write the table; whether every run has a result."""
    began = time.monotonic()
    out = Path(arguments.out)
    threads = share_cores(arguments.threads, arguments.workers)
    start = pretrained(arguments.checkpoint) if arguments.checkpoint else None
    jobs = plan(arguments, start, threads)
    progress = functools.partial(print_progress, len(jobs))
    documents = run_jobs(jobs, run, out, workers=arguments.workers, report=progress)
    rows = table_rows(documents)
    devices = sorted({document["device"] for document in documents if "device" in document})
    text = markdown(rows, jobs, start, devices, arguments)
    (out / "moleculenet.md").write_text(text)
    print(text)
    line = {
        "benchmark": "moleculenet",
        "checkpoint": start.fingerprint if start else None,
        "devices": devices,
        "precision": arguments.precision,
        "seeds": arguments.seeds,
        "changes": arguments.changes,
        "workers": arguments.workers,
        "torch": torch.__version__,
        "rows": rows,
        "wins": wins(rows),
        "failed": [f"{d['task']}-{d['arm']}-{d['seed']}" for d in documents if "error" in d],
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(line, allow_nan=False))
    return not line["failed"]


def plan(arguments: argparse.Namespace, start: StartingPoint | None, threads: int) -> list[Job]:
    """Every run; raises before the first of them if settings are wrong, or a dataset or its split is not there."""
    jobs = []
    for name in arguments.tasks:
        task, data = resolve_task(name), data_uri(name, arguments)
        settings = settings_of(name, arguments.precision, arguments.changes)
        fingerprint = load_manifest(data).fingerprint
        split = read_split(splits_uri(arguments), name, fingerprint)
        for arm in arguments.arms:
            for seed in arguments.seeds:
                payload = Run(
                    task=task,
                    data=data,
                    splits=splits_uri(arguments),
                    arm=arm,
                    seed=seed,
                    settings=settings,
                    checkpoint=arguments.checkpoint,
                    device=arguments.device,
                    threads=threads,
                )
                identity = {
                    **(encoder_identity(arm, start, settings) if start and arm in ARMS else {}),
                    "split_hash": split.hash,
                    "split_sizes": split.sizes,
                    "data_fingerprint": fingerprint,
                }
                job = Job(
                    name=f"{name}-{arm}-{seed}",
                    labels={"task": name, "arm": arm, "seed": seed, "metric": task.metric.value},
                    identity=identity,
                    cost=settings.epochs * len(split.split.train),
                    payload=payload,
                )
                jobs.append(job)
    return jobs


def encoder_identity(arm: str, start: StartingPoint, settings: FinetuneSettings) -> dict[str, Any]:
    return {
        "checkpoint": start.fingerprint if arm == PRETRAINED else None,
        "model": dataclasses.asdict(start.model),
        "settings": dataclasses.asdict(settings),
    }


def settings_of(name: str, precision: str, changes: Mapping[str, Any]) -> FinetuneSettings:
    """Those of the table with ``changes``; ConfigError if one of these is no setting or has a wrong value."""
    values = {**SETTINGS[name], "precision": precision, **changes}
    # No early stop: the learning rate falls until the last epoch, and the best one on validation counts.
    implied = {"patience": values["epochs"], "micro_batch_size": values["batch_size"]}
    return build(FinetuneSettings, {**implied, **values})


def run(what: Run) -> dict[str, Any]:
    """Fine-tune and score one arm with one seed."""
    torch.set_num_threads(what.threads)
    molecules, split = task_data(what.data, what.splits, what.task)
    if what.arm in BASELINES:
        found = fit_baseline(what, molecules, split)
        return {**found, "device": device_name("cpu")}
    assert what.checkpoint is not None, "arguments without it are refused"
    start = starting_point(what.checkpoint)
    if what.arm == SCRATCH:
        start = StartingPoint(model=start.model, encoder=None, fingerprint=None)
    scores = finetune_and_score(
        molecules,
        split,
        task=what.task,
        start=start,
        settings=what.settings,
        seed=what.seed,
        device=torch.device(what.device),
    )
    # Not of the run's identity: what one machine has begun another may finish.
    return {**scores._asdict(), "device": device_name(what.device)}


def fit_baseline(what: Run, molecules: LabelledMolecules, split: Split) -> dict[str, Any]:
    """Of the grid what validation prefers, then its test score."""
    from moleblend_ray.evaluation.models import baselines
    from moleblend_ray.evaluation.results.results import Candidate

    kind, grid = baselines.BaselineKind(what.arm), BaselineConfig()
    task, seed, threads = what.task, what.seed, what.threads
    data = baselines.BaselineData(
        task=task,
        mol_ids=molecules.mol_ids,
        smiles=molecules.smiles,
        features=features_of(kind.features, what.data, what.splits, task),
        labels=molecules.labels,
        columns=molecules.columns,
        **split._asdict(),
    )
    groups = baselines.candidate_groups(
        kind,
        task.kind,
        data.labels[split.train],
        num_trees=grid.num_trees,
        num_rounds=grid.num_rounds,
    )
    chosen = [
        Candidate(settings=settings, valid_score=value)
        for group in groups
        for settings, value in zip(
            group,
            baselines.validation_scores(data.without_test(), kind, group, seed, threads),
            strict=True,
        )
    ]
    best = best_candidate(task.metric, chosen)
    (values,) = baselines.predict_group(data, kind, [best.settings], split.test, seed, threads)
    test = score(task.metric, values, data.labels[split.test], data.columns).value
    return {"valid": best.valid_score, "test": test, "chosen": dict(best.settings)}


@functools.lru_cache(maxsize=2)
def task_data(data: str, splits: str, task: Task) -> tuple[LabelledMolecules, Split]:
    """A task's molecules and split, which its runs in one process share."""
    molecules = load_labelled(data, task)
    found = read_split(splits, task.name, molecules.fingerprint)
    if found.num_molecules != len(molecules):
        raise DataError(
            f"the split of {task.name} is of {found.num_molecules} molecules, {data} has {len(molecules)} with labels; "
            "write it again (--write-splits)"
        )
    return molecules, found.split


@functools.lru_cache(maxsize=2)
def features_of(kind: FeatureKind, data: str, splits: str, task: Task) -> Any:
    """What a baseline knows of a task's molecules; its runs in one process share it, as it can take longer than they do."""
    from moleblend_ray.evaluation.results.baseline_runs import compute_features  # needs RDKit

    return compute_features(kind, task_data(data, splits, task)[0].smiles)


@functools.lru_cache(maxsize=1)
def starting_point(checkpoint: str) -> StartingPoint:
    return pretrained(checkpoint)


def write_splits(arguments: argparse.Namespace) -> None:
    """Compute the split of each task and write it beside the data."""
    for name in arguments.tasks:
        task, data = resolve_task(name), data_uri(name, arguments)
        molecules = load_labelled(data, task)
        split = split_molecules(molecules.smiles, task.split, SPLIT_SEED)
        if name in QM9_TASKS:
            split = with_fewer_labels(split, molecules.smiles, SPLIT_SEED, **QM9_LABELS)
            split = split._replace(test=some(split.test, QM9_TEST))
        uri = save_split(splits_uri(arguments), name, molecules.fingerprint, split, len(molecules))
        sizes = " / ".join(f"{len(part):,}" for part in split)
        print(f"{uri}: {task.split.value}, {sizes}, {split_hash(split)}", flush=True)


def some(rows: np.ndarray[Any, np.dtype[np.int64]], most: int) -> Any:
    """At most this many of the rows, the same ones whenever it is asked."""
    chosen = np.random.default_rng(SPLIT_SEED).permutation(len(rows))[:most]
    return rows[np.sort(chosen)]


def save_split(folder: str, task: str, fingerprint: str, split: Split, num_molecules: int) -> str:
    content = io.BytesIO()
    np.savez_compressed(
        content,
        task=np.array(task),
        data_fingerprint=np.array(fingerprint),
        num_molecules=np.array(num_molecules),
        hash=np.array(split_hash(split)),
        train=split.train,
        valid=split.valid,
        test=split.test,
    )
    uri = storage.join(folder, f"{task}.npz")
    storage.write_bytes(uri, content.getvalue())
    return uri


def read_split(folder: str, task: str, fingerprint: str) -> TaskSplit:
    """The task's split; DataError if there is none, or if it is of another dataset than that of ``fingerprint``."""
    uri = storage.join(folder, f"{task}.npz")
    if not storage.exists(uri):
        raise DataError(
            f"there is no split {uri}; write it with --write-splits on a machine that has RDKit"
        )
    try:
        with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as file:
            values = {name: file[name] for name in file.files}
        split = Split(values["train"], values["valid"], values["test"])
        of_task, of_data, written = (
            str(values[name]) for name in ("task", "data_fingerprint", "hash")
        )
        num_molecules = int(values["num_molecules"])
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{uri} is no split ({error!r}); write it again with --write-splits"
        ) from error
    if of_task != task or of_data != fingerprint:
        raise DataError(
            f"{uri} is the split of {of_task} of the dataset {of_data[:16]}, but the dataset of {task} is {fingerprint[:16]}: "
            "its rows would be other molecules. Write it again with --write-splits, or give the data it was made of"
        )
    if written != split_hash(split):
        raise DataError(f"{uri} is damaged: its parts do not have the hash {written} that it names")
    return TaskSplit(split, num_molecules)


def data_uri(task: str, arguments: argparse.Namespace) -> str:
    uri: str = arguments.qm9 if task in QM9_TASKS else storage.join(arguments.data, task)
    return uri


def splits_uri(arguments: argparse.Namespace) -> str:
    return storage.join(arguments.data, "splits")


def print_progress(total: int, done: int, document: Mapping[str, Any]) -> None:
    head = f"{done}/{total} {document['task']} {document['arm']} seed {document['seed']}"
    if "error" in document:
        found = f"failed: {document['error'].splitlines()[0]}"
    else:
        found = f"valid {document['valid']:.4g} test {document['test']:.4g}"
        if "best_epoch" in document:
            found += f" (epoch {document['best_epoch']})"
    print(f"{head}: {found}, {document['seconds']:.0f} s", flush=True)


def table_rows(documents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each task: scores by arm, their means and intervals, and the paired difference of the arms."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    metrics = {document["task"]: document["metric"] for document in documents}
    for document in documents:
        by_arm = found.setdefault(document["task"], {})
        if "error" not in document:
            by_arm.setdefault(document["arm"], {})[document["seed"]] = document["test"]
    rows = []
    for task, by_arm in found.items():
        row: dict[str, Any] = {"task": task, "metric": metrics[task]}
        for arm, by_seed in by_arm.items():
            row[arm] = {"by_seed": by_seed, **as_json(interval(list(by_seed.values())))}
        gain = difference(by_arm.get(PRETRAINED, {}), by_arm.get(SCRATCH, {}))
        row["difference"] = as_json(gain)
        row["better"] = better(Metric(metrics[task]), gain.mean)
        row["beyond_interval"] = abs(gain.mean) > gain.half_width
        rows.append(row)
    return rows


def better(metric: Metric, gain: float) -> str | None:
    """The arm with the better mean; None if they are equal, or one has no score."""
    if math.isnan(gain) or gain == 0:
        return None
    return PRETRAINED if (gain > 0) == metric.higher_is_better else SCRATCH


def wins(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """How many tasks each arm is better on, and on how many of these the interval of the difference leaves out 0."""
    return {
        arm: {
            "better": sum(row["better"] == arm for row in rows),
            "beyond_interval": sum(row["better"] == arm and row["beyond_interval"] for row in rows),
        }
        for arm in ARMS
    }


def markdown(
    rows: Sequence[Mapping[str, Any]],
    jobs: Sequence[Job],
    start: StartingPoint | None,
    devices: Sequence[str],
    arguments: argparse.Namespace,
) -> str:
    """The table of scores, and that of settings."""
    counts = wins(rows)
    compared = [row for row in rows if row["difference"]["mean"] is not None]
    others = [name for name in BASELINES if any(name in row for row in rows)]
    checkpoint = f"`{start.fingerprint[:16]}`" if start and start.fingerprint else "none"
    lines = [
        f"Checkpoint {checkpoint}, computed on {' and '.join(devices)} in {arguments.precision}; "
        f"seeds {', '.join(map(str, arguments.seeds))}. Test score: mean ± half width of the 95 % confidence interval over seeds "
        f"(Student); difference: pretrained less scratch, paired by seed; in bold: its interval leaves out 0.",
        "",
        "| task | metric | pretrained | from scratch | difference | better | "
        + "".join(f"{name} | " for name in others)
        + "seeds, pretrained | seeds, from scratch |",
        "|---" * (8 + len(others)) + "|",
    ]
    for row in rows:
        task = resolve_task(row["task"])
        metric = task.metric.shown_name + (f", {task.unit}" if task.unit else "")
        winner = row["better"] or "—"
        cells = [
            row["task"],
            metric,
            *(shown(row.get(arm)) for arm in ARMS),
            shown(row["difference"], sign="+"),
            f"**{winner}**" if row["beyond_interval"] else winner,
            *(shown(row.get(name)) for name in others),
            *(listed(row.get(arm)) for arm in ARMS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        *(
            f"- {arm}: better on {counts[arm]['better']} of {len(compared)} tasks, beyond the interval on {counts[arm]['beyond_interval']}"
            for arm in ARMS
            if compared
        ),
        "",
        "| task | split | train / valid / test | epochs | batch | learning rate | relations | readout |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for job in {job.labels["task"]: job for job in jobs}.values():
        settings: FinetuneSettings = job.payload.settings
        sizes = " / ".join(f"{size:,}" for size in job.identity["split_sizes"])
        lines.append(
            f"| {job.labels['task']} | {job.payload.task.split.value} `{job.identity['split_hash']}` | {sizes} | {settings.epochs} | "
            f"{settings.batch_size} | {settings.learning_rate:g} | {settings.relations} | {settings.readout} |"
        )
    if arguments.changes:
        changed = ", ".join(f"{name}={value}" for name, value in arguments.changes.items())
        lines += ["", f"Changed for all tasks: {changed}."]
    return "\n".join([*lines, ""])


def shown(found: Mapping[str, Any] | None, sign: str = "") -> str:
    if found is None or found["mean"] is None:
        return "—"
    half = found["half_width_95"]
    return f"{found['mean']:{sign}.4g}" + ("" if half is None else f" ± {half:.2g}")


def listed(found: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{value:.4g}" for value in found["by_seed"].values()) if found else "—"


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"


def changed_settings(words: Sequence[str]) -> dict[str, Any]:
    """``key=value`` words as values: what is not JSON (1e-3, true, null) is text. ConfigError without ``=``."""
    changes: dict[str, Any] = {}
    for word in words:
        name, separator, text = word.partition("=")
        if not separator:
            raise ConfigError(f"expected key=value, found {word!r}")
        try:
            changes[name] = json.loads(text)
        except ValueError:
            changes[name] = text
    return changes


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--qm9")
    parser.add_argument("--write-splits", action="store_true")
    parser.add_argument("--checkpoint")
    parser.add_argument("--out")
    parser.add_argument("--tasks", type=lambda text: text.split(","))
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS))
    parser.add_argument(
        "--seeds", type=lambda text: [int(s) for s in text.split(",")], default="0,1,2"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="of each process; 0: OMP_NUM_THREADS, else its share of the cores",
    )
    parser.add_argument("changes", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args(words)
    if arguments.tasks is None:
        arguments.tasks = [name for name in SETTINGS if arguments.qm9 or name not in QM9_TASKS]
    for option, known in (("tasks", list(SETTINGS)), ("arms", [*ARMS, *BASELINES])):
        given = getattr(arguments, option)
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"--{option}: unknown {unknown}; known: {', '.join(known)}")
        setattr(arguments, option, [name for name in known if name in given])
    if not arguments.qm9 and (needing := set(arguments.tasks) & set(QM9_TASKS)):
        parser.error(f"--tasks: {', '.join(sorted(needing))} needs --qm9")
    if not arguments.write_splits and not arguments.out:
        parser.error("--out is needed (or --write-splits)")
    if not (arguments.write_splits or arguments.checkpoint) and set(arguments.arms) & set(ARMS):
        parser.error(f"--checkpoint is needed: {' and '.join(ARMS)} are its model")
    if arguments.workers < 1:
        parser.error(f"--workers: expected >= 1, found {arguments.workers}")
    try:
        arguments.changes = changed_settings(arguments.changes)
    except ConfigError as error:
        parser.error(str(error))
    return arguments


if __name__ == "__main__":
    main()
