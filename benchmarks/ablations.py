"""What each part of the pretraining objective is worth, by what a small labelled set makes of the encoder.

    python benchmarks/ablations.py --data URI --labelled URI --out DIR [--tasks qm9_gap,qm9_alpha,qm9_gap:2d] [--arms default,...]
                                   [--preset small] [--steps 2000] [--batch 128] [--seeds 0,1,2] [--device cpu|cuda]
                                   [--precision fp32|bf16] [--compile] [--labels 1000] [--epochs 60]
                                   [--workers K] [--threads N]

Each arm changes one thing of the ``default`` arm and is pretrained once for each seed on the prepared dataset ``--data``, with
the same budget; ``scratch`` is not pretrained. Each encoder is then fine-tuned on each task of ``--labelled`` (prepared with
its labels) with ``--labels`` training and half as many validation molecules, the settings of moleculenet.py for all, and scored
once on the whole test part of a random split. A task is ``NAME`` or ``NAME:RELATIONS``, which says what the fine-tuned encoder is
shown (2d, 3d or 2d+3d). The seed is that of weights, blends, data order and fine-tuning; the split is the same for all.

``DIR/<arm>-<seed>.json`` holds each result; the command again runs what is missing or failed. ``--workers`` processes share the
work, on a GPU they share it, too. ``DIR/ablations.md`` is the table: mean and 95 % confidence interval (Student) over seeds, and
the difference to ``default`` with an interval from the scatter in all pretrained arms. Needs neither Ray nor RDKit. Prints one JSON line last; ends with status 1 if a run failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from evidence import as_json, difference, finetune_and_score, interval, pooled_half_width
from moleculenet import SETTINGS, SPLIT_SEED, settings_of
from shared_work import Job, run_jobs, share_cores
from train_step import preset

from moleblend_ray.chemistry.scaffolds import Split
from moleblend_ray.data.batches.batch import StepBatch
from moleblend_ray.data.batches.builder import local_step_batches
from moleblend_ray.data.config import OrderConfig, StreamConfig
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.errors import ConfigError, MoleBlendError
from moleblend_ray.evaluation.models.finetune import StartingPoint
from moleblend_ray.evaluation.molecules.dataset import LabelledMolecules, load_labelled
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.splits.split import split_molecules, with_fewer_labels
from moleblend_ray.evaluation.tasks import SplitKind, Task, resolve_task
from moleblend_ray.model.config import BlendConfig, LossConfig, ModelConfig
from moleblend_ray.training.config import OptimConfig, TrainConfig
from moleblend_ray.training.learner import build_learner
from moleblend_ray.training.loop import Hooks, fit
from moleblend_ray.training.metrics import Record
from moleblend_ray.training.ranks import Ranks

SCRATCH: Final = "scratch"
DEFAULT: Final = "default"


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """Changes of the default objective."""

    says: str
    model: Mapping[str, Any] = field(default_factory=dict)
    blend: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)
    stream: Mapping[str, Any] = field(default_factory=dict)


_DISTANCE: Final = {"distance_head": True, "direction_head": False}
_BOTH: Final = {"distance_head": True}
_DISTANCE_LOSS: Final = {"distance_weight": 0.5, "direction_weight": 0.0}
_BOTH_LOSS: Final = {"distance_weight": 0.5}
_VIEWS: Final = {"view_probabilities": (0.4, 0.3, 0.1, 0.2)}
_ENVIRONMENTS: Final = {"environment_bins": 512}
_ENVIRONMENT_LOSS: Final = {"environment_weight": 0.2}
_TURNED: Final = {"random_rotation": True}

ARMS: Final = {
    DEFAULT: Arm(says="pairs blended 0.2 / 0.2 / 0.6 a molecule, direction target, denoising"),
    "rotation": Arm(says="direction target, conformers turned at random", stream=_TURNED),
    "distance": Arm(says="distance target", model=_DISTANCE, loss=_DISTANCE_LOSS),
    "distance-rotation": Arm(
        says="distance target, conformers turned at random",
        model=_DISTANCE,
        loss=_DISTANCE_LOSS,
        stream=_TURNED,
    ),
    "both": Arm(says="direction and distance targets", model=_BOTH, loss=_BOTH_LOSS),
    "both-rotation": Arm(
        says="direction and distance targets, conformers turned at random",
        model=_BOTH,
        loss=_BOTH_LOSS,
        stream=_TURNED,
    ),
    "even-blend": Arm(
        says="pairs blended 1/3 each", blend={"pair_probabilities": (1 / 3, 1 / 3, 1 / 3)}
    ),
    "2d-blend": Arm(
        says="pairs blended 0.4 / 0.4 / 0.2", blend={"pair_probabilities": (0.4, 0.4, 0.2)}
    ),
    "no-blend": Arm(
        says="every pair and atom shows all relations",
        blend={"view_probabilities": (0.0, 0.0, 0.0, 1.0)},
    ),
    "views": Arm(says="some molecules show 2D, 3D or all relations", blend=_VIEWS),
    "environments": Arm(
        says="the graph token predicts atom environments",
        model=_ENVIRONMENTS,
        loss=_ENVIRONMENT_LOSS,
    ),
    "views-environments": Arm(
        says="both of these", model=_ENVIRONMENTS, loss=_ENVIRONMENT_LOSS, blend=_VIEWS
    ),
    "no-denoising": Arm(says="no denoising loss", loss={"denoise_weight": 0.0}),
    "batch-blend": Arm(says="one blend a step for all molecules", blend={"per_batch": True}),
    SCRATCH: Arm(says="no pretraining"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """A task, and how an encoder is fine-tuned on it."""

    name: str
    """As on the command line."""
    task: Task
    settings: FinetuneSettings


def main() -> None:
    arguments = parse_arguments()
    arguments.threads = share_cores(arguments.threads, arguments.workers)
    out = Path(arguments.out)
    began = time.monotonic()
    try:
        measures = measures_of(arguments)
        for measure in measures:
            labelled(arguments.labelled, measure.task, arguments.labels)  # before hours of work
        results = run_jobs(
            jobs(arguments), run, out, workers=arguments.workers, report=print_result
        )
    except MoleBlendError as error:
        sys.exit(f"error: {error}")
    failed = [f"{result['arm']}-{result['seed']}" for result in results if "error" in result]
    text, rows = table([result for result in results if "error" not in result], measures, arguments)
    (out / "ablations.md").write_text(text)
    print(text)
    line = {
        "benchmark": "ablations",
        **{name: value for name, value in vars(arguments).items() if name not in ("out", "data")},
        "rows": rows,
        "failed": failed,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(line, allow_nan=False))
    sys.exit(1 if failed else 0)


def jobs(arguments: argparse.Namespace) -> list[Job]:
    """Every arm with every seed, all arms of one seed first."""
    left_out = ("out", "data", "labelled", "arms", "seeds", "workers", "threads")
    identity = {
        **{name: value for name, value in vars(arguments).items() if name not in left_out},
        "data_fingerprint": load_manifest(arguments.data).fingerprint,
        "labelled_fingerprint": load_manifest(arguments.labelled).fingerprint,
    }
    return [
        Job(
            name=f"{name}-{seed}",
            labels={"arm": name, "seed": seed},
            identity=identity,
            cost=float(name != SCRATCH),
            payload=Run(name=name, seed=seed, arguments=arguments),
        )
        for seed in (int(seed) for seed in arguments.seeds.split(","))
        for name in arguments.arms.split(",")
    ]


def print_result(_: int, result: Mapping[str, Any]) -> None:
    shown = {name: value for name, value in result.items() if name not in ("identity", "traceback")}
    print(json.dumps(shown), flush=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one process needs for one result."""

    name: str
    """Of the arm."""
    seed: int
    arguments: argparse.Namespace


def run(what: Run) -> dict[str, Any]:
    """Pretrain one arm with one seed, then fine-tune it on each task."""
    arguments = what.arguments
    torch.set_num_threads(arguments.threads)
    arm = ARMS[what.name]
    model = dataclasses.replace(preset(arguments.preset), **arm.model)
    began = time.monotonic()
    losses: dict[str, float] = {}
    if what.name == SCRATCH:
        start = StartingPoint(model=model, encoder=None, fingerprint=None)
    else:
        start, losses = pretrain(arm, model, what.seed, arguments)
    pretrain_s = time.monotonic() - began
    scores = {
        measure.name: finetune(measure, start, what.seed, arguments)
        for measure in measures_of(arguments)
    }
    return {
        "losses": losses,
        "test": scores,
        "pretrain_s": round(pretrain_s, 1),
        "finetune_s": round(time.monotonic() - began - pretrain_s, 1),
    }


def pretrain(
    arm: Arm, model: ModelConfig, seed: int, arguments: argparse.Namespace
) -> tuple[StartingPoint, dict[str, float]]:
    """The encoder, and each loss as the mean over the last tenth of the steps."""
    stream = StreamConfig(micro_batch_size=min(64, arguments.batch), **arm.stream)
    loss = LossConfig(**arm.loss)
    learner = build_learner(
        model,
        train=TrainConfig(
            num_steps=arguments.steps,
            strategy="none",
            precision=arguments.precision,
            compile=arguments.compile,
        ),
        optim=OptimConfig(learning_rate=arguments.lr, warmup_steps=arguments.steps // 20),
        blend=BlendConfig(**arm.blend),
        loss=loss,
        seed=seed,
        ranks=Ranks(device=torch.device(arguments.device)),
    )
    order = OrderConfig(global_batch_size=arguments.batch, num_streams=1, seed=seed)
    records: list[Record] = []
    fit(learner, batches(order, stream, arguments), hooks=Hooks(report=records.append))
    late = records[-max(1, len(records) // 10) :]
    names = [name for name in late[0] if name.startswith("loss")]
    losses = {name: float(np.mean([float(record[name]) for record in late])) for name in names}
    state = {name: value.cpu() for name, value in learner.model.encoder.state_dict().items()}
    return StartingPoint(model=model, encoder=state, fingerprint=None), losses


def batches(
    order: OrderConfig, stream: StreamConfig, arguments: argparse.Namespace
) -> Iterator[StepBatch]:
    steps = arguments.steps
    return local_step_batches(arguments.data, order, stream, first_step=0, num_steps=steps)


def measures_of(arguments: argparse.Namespace) -> list[Measure]:
    """Of ``--tasks``; ConfigError if one of them is unknown or shows unknown relations."""
    measures = []
    for name in arguments.tasks.split(","):
        task, _, relations = name.partition(":")
        if task not in SETTINGS:
            raise ConfigError(f"--tasks: {task!r} is not one of {', '.join(SETTINGS)}")
        changes: dict[str, Any] = {
            "epochs": arguments.epochs,
            "learning_rate": arguments.finetune_lr,
        }
        if relations:
            changes["relations"] = relations
        settings = settings_of(task, "fp32", changes)
        measures.append(Measure(name=name, task=resolve_task(task), settings=settings))
    return measures


@functools.cache
def labelled(uri: str, task: Task, labels: int) -> tuple[LabelledMolecules, Split]:
    """A task's molecules and split, which the runs of one process share."""
    molecules = load_labelled(uri, task)
    split = with_fewer_labels(
        split_molecules(molecules.smiles, SplitKind.RANDOM, SPLIT_SEED),
        molecules.smiles,
        SPLIT_SEED,
        train=labels,
        valid=labels // 2,
    )
    return molecules, split


def finetune(
    measure: Measure, start: StartingPoint, seed: int, arguments: argparse.Namespace
) -> float:
    """Test score with the weights of the best validation epoch."""
    molecules, split = labelled(arguments.labelled, measure.task, arguments.labels)
    return finetune_and_score(
        molecules,
        split,
        task=measure.task,
        start=start,
        settings=measure.settings,
        seed=seed,
        device=torch.device(arguments.device),
    ).test


def table(
    results: Sequence[Mapping[str, Any]], measures: Sequence[Measure], arguments: argparse.Namespace
) -> tuple[str, list[dict[str, Any]]]:
    """The Markdown table, and its rows."""
    by_arm: dict[str, dict[int, Mapping[str, float]]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], {})[result["seed"]] = result["test"]
    rows: list[dict[str, Any]] = [{"arm": name} for name in by_arm]
    for measure in measures:
        scores = {
            name: {seed: found[measure.name] for seed, found in by_seed.items()}
            for name, by_seed in by_arm.items()
        }
        for row in rows:
            row[measure.name] = compare(row["arm"], scores)
    heads = [
        f"{name} {task.metric.shown_name}{f' ({task.unit})' if task.unit else ''}"
        for name, task in ((measure.name, measure.task) for measure in measures)
    ]
    lines = [
        f"Preset `{arguments.preset}`, {arguments.steps:,} steps of {arguments.batch} molecules; {arguments.labels:,} labels; "
        f"seeds {arguments.seeds}. Mean ± half width of the 95 % confidence interval; in brackets the difference to `{DEFAULT}` "
        "with its interval, from the scatter in all pretrained arms (of `scratch`: paired by seed). Bold: outside it.",
        "",
        f"| arm | what it is | {' | '.join(heads)} |",
        "|---" * (len(heads) + 2) + "|",
    ]
    for row in rows:
        name = row["arm"]
        cells = [shown(row[measure.name], is_default=name == DEFAULT) for measure in measures]
        lines.append(f"| {name} | {ARMS[name].says} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""]), rows


def compare(name: str, scores: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """An arm on one task, and its difference to the default arm, given all arms' scores by seed."""
    values, base = scores[name], scores.get(DEFAULT, {})
    change = difference(values, base)
    if name != SCRATCH:
        # Without pretraining seeds scatter more: it does not belong to what is pooled.
        complete = {
            arm: by_seed
            for arm, by_seed in scores.items()
            if arm != SCRATCH and base.keys() <= by_seed.keys()
        }
        half = pooled_half_width(list(complete.values())) if name in complete else math.nan
        change = change._replace(half_width=half)
    return {
        "by_seed": dict(values),
        **as_json(interval(list(values.values()))),
        "difference": as_json(change),
    }


def shown(found: Mapping[str, Any], *, is_default: bool) -> str:
    """A cell of the table."""
    cell = plus_minus(found, ".5g")
    change = found["difference"]
    if is_default or change["mean"] is None:
        return cell
    half = change["half_width_95"]
    text = f"({plus_minus(change, '+.2g')})"
    return f"{cell} {f'**{text}**' if half is not None and abs(change['mean']) > half else text}"


def plus_minus(found: Mapping[str, Any], style: str) -> str:
    half = found["half_width_95"]
    return f"{found['mean']:{style}}" + ("" if half is None else f" ± {half:.2g}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--labelled", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--tasks", default="qm9_gap,qm9_alpha,qm9_gap:2d")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--preset", default="small")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--labels", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--finetune-lr", type=float, default=5e-4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    unknown = set(arguments.arms.split(",")) - set(ARMS)
    if unknown:
        parser.error(f"--arms: unknown {sorted(unknown)}; known: {', '.join(ARMS)}")
    if arguments.workers < 1:
        parser.error(f"--workers: expected >= 1, found {arguments.workers}")
    return arguments


if __name__ == "__main__":
    main()
