"""One fine-tuning run: train on the training part, choose the epoch on validation, predict with what was chosen.

Nothing here sees the test part unless :func:`predict` is asked for it afterwards.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moleblend_ray.data.batch import MicroBatch, build_micro_batches
from moleblend_ray.data.block import MoleculeBlock
from moleblend_ray.errors import TrainingError
from moleblend_ray.evaluation.dataset import LabelledMolecules
from moleblend_ray.evaluation.property_model import Standardisation
from moleblend_ray.evaluation.scores import is_better, score, worst_score
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import Task, TaskKind
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.moleblend import MoleBlendModel, PropertyModel
from moleblend_ray.training.config import OptimConfig
from moleblend_ray.training.optim import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    learning_rate,
    set_learning_rate,
)

logger = logging.getLogger(__name__)

PREDICTION_CHUNK = 1024
"""Molecules whose relation matrices are in memory at once while predicting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartingPoint:
    """The encoder a run starts from; the same for all trials of a sweep."""

    model: ModelConfig
    """Architecture."""
    encoder: Mapping[str, Tensor] | None
    """State of its encoder, on the CPU; None draws new weights from each run's seed."""
    fingerprint: str | None
    """SHA-256 of those weights; None from scratch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochReport:
    """What is known after one epoch."""

    epoch: int
    """Counted from 1."""
    train_loss: float
    """Mean loss per known label over the epoch (dropout on)."""
    valid_score: float
    """The task's metric on the validation part."""
    best_valid_score: float
    """The best so far."""
    best_epoch: int
    """Where it was reached."""
    seconds: float
    """Since the start of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneResult:
    """A trained model as it was at its best validation epoch."""

    model: PropertyModel
    """In evaluation mode, on the CPU."""
    standardisation: Standardisation
    """From its outputs to the labels' unit."""
    history: tuple[EpochReport, ...]
    """Every epoch; the last one's ``best_valid_score`` is the run's validation score."""

    @property
    def valid_score(self) -> float:
        """The validation score by which the run is judged."""
        return self.history[-1].best_valid_score


def masked_loss(kind: TaskKind, outputs: Tensor, targets: Tensor) -> Tensor:
    """Sum over known labels of BCE (logits) or squared error; (B, T) each, NaN targets count nothing."""
    known = ~torch.isnan(targets)
    # A NaN times zero is NaN: unknown labels are replaced before the loss, not masked after it.
    targets = torch.where(known, targets, 0.0)
    if kind is TaskKind.CLASSIFICATION:
        losses = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
    else:
        losses = (outputs - targets) ** 2
    return torch.where(known, losses, 0.0).sum()


def build_pretrained(start: StartingPoint) -> MoleBlendModel:
    """A model with the starting encoder; its relation heads, which nothing here uses, are new."""
    model = MoleBlendModel(start.model)
    if start.encoder is not None:
        model.encoder.load_state_dict(start.encoder)
    return model


def build_model(
    start: StartingPoint, num_targets: int, settings: FinetuneSettings, seed: int
) -> PropertyModel:
    """The starting encoder with a new head, drawn from ``seed``."""
    torch.manual_seed(seed)
    return PropertyModel(build_pretrained(start), num_targets, settings.head_dropout)


def finetune_once(
    molecules: LabelledMolecules,
    train: NDArray[np.int64],
    valid: NDArray[np.int64],
    *,
    task: Task,
    start: StartingPoint,
    settings: FinetuneSettings,
    seed: int,
    device: torch.device,
    report: Callable[[EpochReport], None] | None = None,
) -> FinetuneResult:
    """Train on the molecules ``train`` until ``settings.epochs``, or until validation stops improving.

    Equal arguments give equal results on one kind of device: initialisation, order and dropout come from ``seed``.
    """
    started = time.monotonic()
    standardisation = Standardisation.fit(task.kind, molecules.labels[train], molecules.columns)
    targets = torch.from_numpy(standardisation.normalise(molecules.labels).astype(np.float32))
    model = build_model(start, len(molecules.columns), settings, seed).to(device)
    trainer = _Trainer(molecules.block, targets, train, model, task, settings, seed, device)
    history: list[EpochReport] = []
    best, best_epoch, best_state = worst_score(task.metric), 0, model.state_dict()
    for epoch in range(1, settings.epochs + 1):
        train_loss = trainer.run_epoch(epoch - 1)
        predictions = predict(model, molecules.block, valid, settings.micro_batch_size, device)
        valid_score = score(
            task.metric,
            standardisation.restore(predictions),
            molecules.labels[valid],
            molecules.columns,
        ).value
        if is_better(task.metric, valid_score, best):
            best, best_epoch = valid_score, epoch
            best_state = {
                name: value.detach().cpu().clone() for name, value in model.state_dict().items()
            }
        history.append(
            EpochReport(
                epoch=epoch,
                train_loss=train_loss,
                valid_score=valid_score,
                best_valid_score=best,
                best_epoch=best_epoch,
                seconds=time.monotonic() - started,
            )
        )
        if report is not None:
            report(history[-1])
        if epoch - best_epoch >= settings.patience:
            break
    model.load_state_dict(best_state)
    return FinetuneResult(
        model=model.cpu().eval(), standardisation=standardisation, history=tuple(history)
    )


class _Trainer:
    """The optimizer steps of one run."""

    def __init__(
        self,
        block: MoleculeBlock,
        targets: Tensor,
        train: NDArray[np.int64],
        model: PropertyModel,
        task: Task,
        settings: FinetuneSettings,
        seed: int,
        device: torch.device,
    ) -> None:
        self._block = block
        self._targets = targets
        self._train = train
        self._model = model
        self._task = task
        self._settings = settings
        self._seed = seed
        self._device = device
        self._steps_per_epoch = -(-len(train) // settings.batch_size)
        self._num_steps = self._steps_per_epoch * settings.epochs
        self._optim = OptimConfig(
            learning_rate=settings.learning_rate,
            warmup_steps=round(settings.warmup_fraction * self._num_steps),
            weight_decay=settings.weight_decay,
            clip_norm=settings.clip_norm,
        )
        self._optimizer = build_optimizer(model, self._optim)
        self._parameters = [
            parameter for parameter in model.parameters() if parameter.requires_grad
        ]
        # The model may be shared code with other draws in this process: dropout gets a stream of its own.
        torch.manual_seed(seed)

    def run_epoch(self, epoch: int) -> float:
        """One pass over the training molecules in an order of (seed, epoch); mean loss per known label."""
        self._model.train()
        order = np.random.default_rng((self._seed, epoch)).permutation(self._train)
        total, known = 0.0, 0
        for index in range(self._steps_per_epoch):
            start = index * self._settings.batch_size
            indices = order[start : start + self._settings.batch_size]
            loss, count = self._step(epoch * self._steps_per_epoch + index, indices)
            total, known = total + loss, known + count
        return total / max(1, known)

    def _step(self, step: int, indices: NDArray[np.int64]) -> tuple[float, int]:
        known = int((~torch.isnan(self._targets[torch.from_numpy(indices)])).sum())
        if known == 0:
            return 0.0, 0
        micro_batches = build_micro_batches(
            self._block.take(indices), step, 0, self._settings.micro_batch_size
        )
        self._optimizer.zero_grad(set_to_none=True)
        loss = sum(self._backward(micro, known) for micro in micro_batches)
        norm = gradient_norm(self._parameters)
        if not np.isfinite(loss) or not torch.isfinite(norm):
            raise TrainingError(
                f"fine-tuning step {step}: loss {loss:g}, gradient norm {float(norm):g}; molecules "
                f"{indices[:8].tolist()} ... of the training data. Lower finetune.learning_rate"
            )
        clip_gradients(self._parameters, norm, self._settings.clip_norm)
        set_learning_rate(self._optimizer, learning_rate(step, self._optim, self._num_steps))
        self._optimizer.step()
        return loss, known

    def _backward(self, micro: MicroBatch, known: int) -> float:
        outputs = self._model(MoleculeBatch.from_micro_batch(micro, device=self._device))
        targets = self._targets[torch.from_numpy(micro.molecule_ids)].to(self._device)
        loss = masked_loss(self._task.kind, outputs.float(), targets)
        torch.autograd.backward(loss / known)
        return float(loss.detach())


@torch.no_grad()
def predict(
    model: PropertyModel,
    block: MoleculeBlock,
    indices: NDArray[np.int64],
    micro_batch_size: int,
    device: torch.device,
) -> NDArray[np.float64]:
    """Raw outputs (K, T) for the molecules at ``indices`` (K,): logits, or standardised numbers.

    Always the stored conformer, never a random one, so equal input gives equal output.
    """
    model.eval()
    by_size = indices[np.argsort(block.num_atoms[indices], kind="stable")]
    place = {int(index): row for row, index in enumerate(indices)}
    rows: list[NDArray[np.int64]] = []
    outputs: list[NDArray[np.float64]] = []
    for start in range(0, len(by_size), PREDICTION_CHUNK):
        chunk = block.take(by_size[start : start + PREDICTION_CHUNK])
        for micro in build_micro_batches(chunk, 0, 0, micro_batch_size):
            output = model(MoleculeBatch.from_micro_batch(micro, device=device))
            rows.append(np.array([place[int(index)] for index in micro.molecule_ids]))
            outputs.append(output.double().cpu().numpy())
    predictions = np.empty((len(indices), outputs[0].shape[1]))
    predictions[np.concatenate(rows)] = np.concatenate(outputs)
    return predictions
