"""What each part of the pretraining objective is worth, by what a small labelled set makes of the encoder.

    python benchmarks/ablations.py --data URI --labelled URI --out DIR [--tasks qm9_gap,qm9_alpha] [--arms default,...]
                                   [--preset small] [--steps 2000] [--batch 128] [--seeds 0,1,2] [--device cpu|cuda]
                                   [--precision fp32|bf16] [--compile] [--labels 1000] [--epochs 60] [--threads N]

Each arm changes one thing of the ``default`` arm and is pretrained once for each seed on the prepared dataset ``--data``, with
the same budget; ``scratch`` is not pretrained. Each encoder is then fine-tuned on each task of ``--labelled`` (prepared with
its labels) with ``--labels`` training and half as many validation molecules, the same fixed settings for all, and scored once
on the whole test part of a random split. The seed is that of weights, blends, data order and fine-tuning; the split is the same for all.

``DIR/<arm>-<seed>.json`` holds each result; the command again runs what is missing. ``DIR/ablations.md`` is the table: mean
and 95 % confidence interval (Student) over seeds, and the paired difference to ``default``. Needs neither Ray nor RDKit. Prints
one JSON line last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from train_step import preset

from moleblend_ray.data.batch import StepBatch, StreamConfig
from moleblend_ray.data.builder import local_step_batches
from moleblend_ray.data.order import OrderConfig
from moleblend_ray.data.shards import load_manifest
from moleblend_ray.evaluation.dataset import (
    LabelledMolecules,
    load_labelled,
    split_molecules,
    with_fewer_labels,
)
from moleblend_ray.evaluation.finetune import StartingPoint, finetune_once, predict
from moleblend_ray.evaluation.scores import score
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import SplitKind, Task, resolve_task
from moleblend_ray.model.config import BlendConfig, LossConfig, ModelConfig
from moleblend_ray.training.config import OptimConfig, TrainConfig
from moleblend_ray.training.distributed import Ranks
from moleblend_ray.training.loop import build_learner, fit
from moleblend_ray.training.metrics import Record

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


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    tasks = [resolve_task(name) for name in arguments.tasks.split(",")]
    sets = {task.name: load_labelled(arguments.labelled, task) for task in tasks}
    results = []
    for seed in (int(seed) for seed in arguments.seeds.split(",")):
        for name in arguments.arms.split(","):
            file = out / f"{name}-{seed}.json"
            if not file.exists():
                result = run(name, seed, tasks, sets, arguments)
                file.write_text(json.dumps(result, indent=1))
                print(json.dumps(result), flush=True)
            results.append(json.loads(file.read_text()))
    text, rows = table(results, tasks, arguments)
    (out / "ablations.md").write_text(text)
    print(text)
    line = {
        "benchmark": "ablations",
        **{name: value for name, value in vars(arguments).items() if name not in ("out", "data")},
        "rows": rows,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(line))


def run(
    name: str,
    seed: int,
    tasks: Sequence[Task],
    sets: Mapping[str, LabelledMolecules],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Pretrain one arm with one seed, then fine-tune it on each task."""
    arm = ARMS[name]
    model = dataclasses.replace(preset(arguments.preset), **arm.model)
    began = time.monotonic()
    if name == SCRATCH:
        start, losses = StartingPoint(model=model, encoder=None, fingerprint=None), {}
    else:
        start, losses = pretrain(arm, model, seed, arguments)
    pretrain_s = time.monotonic() - began
    scores = {task.name: finetune(task, sets[task.name], start, seed, arguments) for task in tasks}
    return {
        "arm": name,
        "seed": seed,
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
    fit(learner, batches(order, stream, arguments), report=records.append)
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


def finetune(
    task: Task,
    molecules: LabelledMolecules,
    start: StartingPoint,
    seed: int,
    arguments: argparse.Namespace,
) -> float:
    """Test score with the weights of the best validation epoch."""
    split = with_fewer_labels(
        split_molecules(molecules.smiles, SplitKind.RANDOM, 0),
        molecules.smiles,
        0,
        train=arguments.labels,
        valid=arguments.labels // 2,
    )
    device = torch.device(arguments.device)
    settings = FinetuneSettings(
        learning_rate=arguments.finetune_lr,
        batch_size=32,
        epochs=arguments.epochs,
        patience=arguments.epochs,
    )
    result = finetune_once(
        molecules,
        split.train,
        split.valid,
        task=task,
        start=start,
        settings=settings,
        seed=seed,
        device=device,
    )
    outputs = predict(result.model.to(device), molecules.block, split.test, 128, device)
    values = result.trained.readout(outputs)
    return score(task.metric, values, molecules.labels[split.test], molecules.columns).value


def table(
    results: Sequence[Mapping[str, Any]], tasks: Sequence[Task], arguments: argparse.Namespace
) -> tuple[str, list[dict[str, Any]]]:
    """The Markdown table, and its rows."""
    by_arm: dict[str, dict[int, Mapping[str, float]]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], {})[result["seed"]] = result["test"]
    heads = [
        f"{task.name} {task.metric.value}{f' ({task.unit})' if task.unit else ''}" for task in tasks
    ]
    lines = [
        f"Preset `{arguments.preset}`, {arguments.steps:,} steps of {arguments.batch} molecules; {arguments.labels:,} labels; "
        f"seeds {arguments.seeds}. Mean ± half width of the 95 % confidence interval; in brackets the difference to `{DEFAULT}`, "
        "paired by seed.",
        "",
        f"| arm | what it is | {' | '.join(heads)} |",
        "|---" * (len(heads) + 2) + "|",
    ]
    rows = []
    for name, by_seed in by_arm.items():
        cells, row = [], {"arm": name}
        for task in tasks:
            values = [scores[task.name] for scores in by_seed.values()]
            paired = [
                scores[task.name] - by_arm[DEFAULT][seed][task.name]
                for seed, scores in by_seed.items()
                if seed in by_arm.get(DEFAULT, {})
            ]
            mean, half = interval(values)
            difference, half_difference = interval(paired) if paired else (math.nan, math.nan)
            cell = f"{mean:.5g} ± {half:.2g}"
            cells.append(
                cell if name == DEFAULT else f"{cell} ({difference:+.2g} ± {half_difference:.2g})"
            )
            row[task.name] = {
                "values": values,
                "mean": mean,
                "half_width_95": half,
                "difference": difference,
                "difference_half_width_95": half_difference,
            }
        rows.append(row)
        lines.append(f"| {name} | {ARMS[name].says} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""]), rows


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval by Student's t."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan
    from scipy.stats import t  # of scikit-learn's dependencies; slow to import

    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, float(t.ppf(0.975, len(values) - 1)) * error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--labelled", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--tasks", default="qm9_gap,qm9_alpha")
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
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    unknown = set(arguments.arms.split(",")) - set(ARMS)
    if unknown:
        parser.error(f"--arms: unknown {sorted(unknown)}; known: {', '.join(ARMS)}")
    load_manifest(arguments.data)  # before hours of work
    return arguments


if __name__ == "__main__":
    main()
