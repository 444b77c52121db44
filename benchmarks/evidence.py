"""What benchmarks that compare encoders by fine-tuning share: one run and its scores, and intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch

from moleblend_ray.chemistry.scaffolds import Split
from moleblend_ray.evaluation.models.finetune import StartingPoint, finetune_once, predict_mean
from moleblend_ray.evaluation.molecules.dataset import LabelledMolecules
from moleblend_ray.evaluation.results.results import weights_fingerprint
from moleblend_ray.evaluation.scoring.scores import score
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import Task
from moleblend_ray.training.export import load_model

PREDICTED_AT_ONCE: Final = {"cpu": 128, "cuda": 512}
"""Molecules computed at once in validation and test, which keep nothing for a backward pass."""

PAIRS_AT_ONCE: Final = {"cpu": 1 << 22, "cuda": 1 << 24}
"""And pairs of atoms: a bias of 8 heads on as many takes 0.5 GiB on a GPU, which processes share."""


class Scores(NamedTuple):
    """What one fine-tuning run reached."""

    valid: float
    """Validation score of the best epoch."""
    test: float
    """Test score with the weights of that epoch."""
    best_epoch: int
    """Counted from 1."""


class Interval(NamedTuple):
    """Mean and 95 % confidence interval."""

    mean: float
    half_width: float
    """NaN of fewer than two values."""


def pretrained(checkpoint: str) -> StartingPoint:
    """The encoder of a run, of one of its checkpoints, or of a folder with ``model.safetensors`` and ``config.json``."""
    model = load_model(checkpoint)
    state = {name: value.detach().cpu() for name, value in model.encoder.state_dict().items()}
    return StartingPoint(model=model.config, encoder=state, fingerprint=weights_fingerprint(state))


def finetune_and_score(
    molecules: LabelledMolecules,
    split: Split,
    *,
    task: Task,
    start: StartingPoint,
    settings: FinetuneSettings,
    seed: int,
    device: torch.device,
) -> Scores:
    """Train, choose the epoch on validation, then score the test part: the only use of its labels."""
    at_once = predicted_at_once(molecules, split, settings.micro_batch_size, device)
    result = finetune_once(
        molecules,
        split.train,
        split.valid,
        task=task,
        start=start,
        settings=settings,
        seed=seed,
        device=device,
        predict_micro_batch_size=at_once,
    )
    model = result.model.to(device)
    values = predict_mean(model, result.trained, molecules, split.test, at_once, device)
    test = score(task.metric, values, molecules.labels[split.test], molecules.columns)
    return Scores(result.valid_score, test.value, result.history[-1].best_epoch)


def predicted_at_once(
    molecules: LabelledMolecules, split: Split, trained_at_once: int, device: torch.device
) -> int:
    """As many as fit if all were as large as the largest of them, and no fewer than in training."""
    largest = int(molecules.block.num_atoms[np.concatenate(split[1:])].max())
    fitting = PAIRS_AT_ONCE[device.type] // largest**2
    return max(trained_at_once, min(PREDICTED_AT_ONCE[device.type], fitting))


def interval(values: Sequence[float]) -> Interval:
    """Mean, and half the width of its 95 % confidence interval by Student's t."""
    if not values:
        return Interval(math.nan, math.nan)
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan)
    from scipy.stats import t  # of scikit-learn's dependencies; slow to import

    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, float(t.ppf(0.975, len(values) - 1)) * error)


def difference(values: Mapping[int, float], base: Mapping[int, float]) -> Interval:
    """Of ``values`` less ``base``, paired by seed; seeds that one of them lacks are left out."""
    return interval([value - base[seed] for seed, value in values.items() if seed in base])


def pooled_half_width(arms: Sequence[Mapping[int, float]]) -> float:
    """Half the width of the 95 % confidence interval of a difference of two arms' means, from the scatter in all arms.

    Each value is its arm's mean, plus a shift of its seed, plus noise of one variance in all arms (two-way analysis of
    variance). The noise has (arms - 1)(seeds - 1) degrees of freedom: 26 with 14 arms and 3 seeds, of which two arms alone
    have 2. Seeds that an arm lacks are left out. NaN of fewer than two arms or seeds.
    """
    seeds = sorted(set[int]().union(*arms).intersection(*arms)) if arms else []
    if len(arms) < 2 or len(seeds) < 2:
        return math.nan
    from scipy.stats import t

    values = np.array([[arm[seed] for seed in seeds] for arm in arms])
    shifts = values - values.mean(axis=1, keepdims=True)
    noise = shifts - shifts.mean(axis=0)
    freedom = (len(arms) - 1) * (len(seeds) - 1)
    variance = float((noise**2).sum()) / freedom
    return float(t.ppf(0.975, freedom)) * math.sqrt(2 * variance / len(seeds))


def as_json(found: Interval) -> dict[str, float | None]:
    """For JSON, which has no NaN."""
    return {
        "mean": None if math.isnan(found.mean) else found.mean,
        "half_width_95": None if math.isnan(found.half_width) else found.half_width,
    }
