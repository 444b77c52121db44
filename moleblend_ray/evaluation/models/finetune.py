"""One fine-tuning run: train on the training part, choose the epoch on validation, predict with the chosen weights.

The test part is not used unless :func:`predict` is called for it afterwards. :func:`refit_once` trains on all molecules, for as
long as such a run found to be best.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moleblend_ray.data.batches.batch import MicroBatch, build_micro_batches
from moleblend_ray.data.dataset.block import MoleculeBlock
from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.sources.classes import Exclusive
from moleblend_ray.errors import TrainingError
from moleblend_ray.evaluation.models.atom_reference import element_counts, fit_reference
from moleblend_ray.evaluation.models.layerwise_training import (
    freeze_lowest,
    lr_factors,
    renew_highest,
)
from moleblend_ray.evaluation.models.linear_model import LinearModel, fit_linear, linear_grid
from moleblend_ray.evaluation.models.losses import Targets, masked_loss, positive_weights
from moleblend_ray.evaluation.models.property_model import Standardisation, TrainedProperty
from moleblend_ray.evaluation.molecules.dataset import LabelledMolecules
from moleblend_ray.evaluation.molecules.descriptor_inputs import DescriptorInputs
from moleblend_ray.evaluation.scoring.scores import best_candidate, is_better, score, worst_score
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import Metric, Task, TaskKind
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.config import ModelConfig, ReadoutConfig
from moleblend_ray.model.moleblend import MoleBlendModel, PropertyModel
from moleblend_ray.training.config import OptimConfig
from moleblend_ray.training.mixed_precision import autocast
from moleblend_ray.training.optim import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    learning_rate,
    set_learning_rate,
)

_Loss = Callable[[Tensor, Tensor], Tensor]
"""Outputs and targets, (B, T) both -> sum over the known labels."""

LINEAR_SHARE: Final = 0.5
"""Share of the linear model of descriptors in a prediction. With small validation parts that differ from the test part,
as those by scaffold do, a share chosen by validation is worse than the mean."""

RESOLUTION: Final = 1e-6
"""Smallest scale of what an element reference leaves, as a share of the largest sum over atoms: some ten times the
rounding of float32."""

PREDICTION_CHUNK = 1024
"""Molecules whose relation matrices are in memory at once while predicting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartingPoint:
    """The encoder that a run starts from; the same for all trials of a sweep."""

    model: ModelConfig
    """Architecture."""
    encoder: Mapping[str, Tensor] | None
    """State of its encoder, on the CPU; None: new weights are drawn from the seed of each run."""
    fingerprint: str | None
    """SHA-256 of these weights; None if there are none."""
    molecules: MoleculeForm | None = None
    """The form of the molecules that they were trained on; None: unknown, or there are no weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochReport:
    """The state of a run after an epoch."""

    epoch: int
    """Number of the epoch, from 1."""
    train_loss: float
    """Mean loss per known label over the epoch (dropout on)."""
    valid_score: float
    """The task's metric on the validation part."""
    best_valid_score: float
    """Best validation score so far."""
    best_epoch: int
    """Epoch with that score."""
    seconds: float
    """Seconds since the start of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneResult:
    """A trained model with the weights of its best epoch by validation."""

    model: PropertyModel
    """The model, in evaluation mode on the CPU."""
    trained: TrainedProperty
    """What it predicts, and how its outputs become values in the labels' unit, or probabilities."""
    history: tuple[EpochReport, ...]
    """All epochs; ``best_valid_score`` of the last one is the validation score of the run."""

    @property
    def valid_score(self) -> float:
        """The validation score by which the run is judged."""
        return self.history[-1].best_valid_score


def build_pretrained(start: StartingPoint) -> MoleBlendModel:
    """A model with the starting encoder, on the CPU and in float32. Its relation heads are new; no property needs them."""
    with torch.device("cpu"):
        model = MoleBlendModel(start.model).float()
    if start.encoder is not None:
        model.encoder.load_state_dict(start.encoder)
    return model


def build_model(
    start: StartingPoint,
    num_targets: int,
    settings: FinetuneSettings,
    seed: int,
    *,
    num_descriptors: int = 0,
) -> PropertyModel:
    """The starting encoder with a new property head, drawn from ``seed``."""
    torch.manual_seed(seed)
    rates = {
        name: rate
        for name in ("attention_dropout", "activation_dropout", "drop_path")
        if (rate := getattr(settings, name)) is not None
    }
    start = dataclasses.replace(start, model=dataclasses.replace(start.model, **rates))
    readout = ReadoutConfig(
        relations=settings.relations, readout=settings.readout, dropout=settings.head_dropout
    )
    model = PropertyModel(
        build_pretrained(start), num_targets, readout, num_descriptors=num_descriptors
    )
    renew_highest(model, settings.fresh_blocks)
    return model


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
    after_step: Callable[[], None] | None = None,
    predict_micro_batch_size: int | None = None,
) -> FinetuneResult:
    """Train on the molecules ``train`` until ``settings.epochs``, or until validation stops improving.

    Equal arguments give equal results on one kind of device: initialisation, order and dropout come from ``seed``.
    ``report`` is called after each epoch, ``after_step`` after each of its ``settings.steps_per_epoch``.
    ``predict_micro_batch_size`` is for validation, which needs less memory than training; None: as in training. Raises
    ConfigError as :meth:`FinetuneSettings.require_fitting`.
    """
    started = time.monotonic()
    trainer, molecules, trained = _begin(
        molecules,
        train,
        (ChoiceRows(train, valid),),
        task=task,
        start=start,
        settings=settings,
        seed=seed,
        device=device,
        after_step=after_step,
    )
    model = trainer.model
    micro_batch_size = predict_micro_batch_size or settings.micro_batch_size
    known = molecules.known(valid)
    history: list[EpochReport] = []
    best = _BestEpoch(model, task.metric)
    for epoch in range(1, settings.epochs + 1):
        train_loss = trainer.run_epoch(epoch - 1)
        predictions = predict_mean(model, trained, molecules, valid, micro_batch_size, device)
        found = score(task.metric, predictions, *known)
        # Where one class is rare, all are decided for the other one in many epochs, in which the order gets better.
        order = score(Metric.ROC_AUC, predictions, *known).value if task.metric.decides else 0.0
        best.offer(epoch, found.value, order)
        history.append(
            EpochReport(
                epoch=epoch,
                train_loss=train_loss,
                valid_score=found.value,
                best_valid_score=best.score,
                best_epoch=best.epoch,
                seconds=time.monotonic() - started,
            )
        )
        if report is not None:
            report(history[-1])
        if epoch - best.epoch >= settings.patience:
            break
    best.restore()
    return FinetuneResult(model=model.cpu().eval(), trained=trained, history=tuple(history))


class ChoiceRows(NamedTuple):
    """The molecules of a run that chose its settings."""

    train: NDArray[np.int64]
    """(K,) those that it was trained on."""
    valid: NDArray[np.int64]
    """(L,) those of validation."""


def refit_once(
    molecules: LabelledMolecules,
    *,
    epochs: int,
    chosen_on: Sequence[ChoiceRows],
    task: Task,
    start: StartingPoint,
    settings: FinetuneSettings,
    seed: int,
    device: torch.device,
    after_step: Callable[[], None] | None = None,
) -> tuple[PropertyModel, TrainedProperty]:
    """Train on all ``molecules`` for ``epochs`` instead of ``settings.epochs``, without validation.

    The learning rate falls to its end within them. Stopped in the middle of its way, as the best epoch of a run is, the weights are
    less settled. ``chosen_on`` are the parts of such runs: with ``settings.descriptors``, where there must be at least one, they choose
    the penalty of the linear model again; otherwise they are not read. The model is in evaluation mode on the CPU; other arguments as for :func:`finetune_once`.
    """
    everything = np.arange(len(molecules), dtype=np.int64)
    settings = dataclasses.replace(settings, epochs=epochs)
    trainer, _, trained = _begin(
        molecules,
        everything,
        chosen_on,
        task=task,
        start=start,
        settings=settings,
        seed=seed,
        device=device,
        after_step=after_step,
    )
    for epoch in range(epochs):
        trainer.run_epoch(epoch)
    return trainer.model.cpu().eval(), trained


def _begin(
    molecules: LabelledMolecules,
    train: NDArray[np.int64],
    chosen_on: Sequence[ChoiceRows],
    *,
    task: Task,
    start: StartingPoint,
    settings: FinetuneSettings,
    seed: int,
    device: torch.device,
    after_step: Callable[[], None] | None,
) -> tuple[_Trainer, LabelledMolecules, TrainedProperty]:
    """A run before its first step, its molecules, with descriptors if it reads them, and what its model predicts."""
    settings.require_fitting(task.kind, start.model.num_layers)
    if settings.descriptors:
        molecules = molecules.with_descriptors()
    model, trained = _new_model(molecules, train, chosen_on, task, start, settings, seed)
    normalise = trained.standardisation.normalise
    bounds = molecules.bounds and molecules.bounds.map(normalise)
    trainer = _Trainer(
        molecules=molecules,
        targets=Targets.of(normalise(molecules.labels), bounds, molecules.exclusive),
        train=train,
        model=model.to(device),
        loss=_loss_function(task, settings, molecules.labels[train], molecules.exclusive, device),
        settings=settings,
        seed=seed,
        device=device,
        after_step=after_step or (lambda: None),
    )
    return trainer, molecules, trained


def _new_model(
    molecules: LabelledMolecules,
    train: NDArray[np.int64],
    chosen_on: Sequence[ChoiceRows],
    task: Task,
    start: StartingPoint,
    settings: FinetuneSettings,
    seed: int,
) -> tuple[PropertyModel, TrainedProperty]:
    """The model before its first step, and what it predicts; validation chooses the penalty of a linear model."""
    inputs = None
    if settings.descriptors:
        assert molecules.descriptors is not None
        inputs = DescriptorInputs.fit(molecules.descriptors.take(train))
    num_descriptors = len(inputs.names) if inputs else 0
    model = build_model(
        start, len(molecules.columns), settings, seed, num_descriptors=num_descriptors
    )
    trained = TrainedProperty.of(
        task,
        molecules.columns,
        _scale_labels(model, molecules, train, task, settings),
        conformers=molecules.num_conformers,
        molecules=molecules.form,
        descriptors=inputs,
        alternatives=molecules.alternatives,
    )
    if inputs is not None:
        balanced = settings.class_weights == "balanced"
        linear = _linear_model(model, trained, molecules, train, chosen_on, task, balanced=balanced)
        # A column of one class teaches no linear model: there the encoder decides alone.
        share = LINEAR_SHARE * linear.weight.any(axis=1)
        model.set_linear(*map(torch.from_numpy, (linear.weight, linear.bias, share)))
    return model, trained


def _linear_model(
    model: PropertyModel,
    trained: TrainedProperty,
    molecules: LabelledMolecules,
    train: NDArray[np.int64],
    chosen_on: Sequence[ChoiceRows],
    task: Task,
    *,
    balanced: bool,
) -> LinearModel:
    """The linear model of descriptors, fitted to ``train`` with the penalty that validation prefers, over all of ``chosen_on``."""
    descriptors = descriptors_of(trained, molecules)
    assert descriptors is not None
    inputs = descriptors.double().numpy()
    # What the model adds by itself is not the linear model's to tell.
    known = element_counts(molecules.block) @ model.reference.double().numpy()

    def rest(values: NDArray[np.float64]) -> NDArray[np.float64]:
        beside: NDArray[np.float64] = trained.standardisation.normalise(values) - known
        return beside

    labels, bounds = rest(molecules.labels), molecules.bounds and molecules.bounds.map(rest)

    def fitted(rows: NDArray[np.int64], penalty: Mapping[str, float]) -> LinearModel:
        return fit_linear(
            task.kind,
            inputs[rows],
            labels[rows],
            penalty,
            balanced=balanced,
            bounds=bounds and bounds[rows],
            exclusive=molecules.exclusive,
        )

    candidates = []
    for penalty in linear_grid(task.kind):
        fits = [fitted(rows.train, penalty) for rows in chosen_on]
        scores = []
        for linear, (_, valid) in zip(fits, chosen_on, strict=True):
            predictions = trained.readout(linear(inputs[valid]) + known[valid])
            scores.append(score(task.metric, predictions, *molecules.known(valid)).value)
        candidates.append(_LinearCandidate(penalty, fits[0], float(np.mean(scores))))
    best = best_candidate(task.metric, candidates)
    return best.first if chosen_on[0].train is train else fitted(train, best.penalty)


class _LinearCandidate(NamedTuple):
    penalty: Mapping[str, float]
    first: LinearModel
    """That of the first rows that choose."""
    valid_score: float


def _scale_labels(
    model: PropertyModel,
    molecules: LabelledMolecules,
    train: NDArray[np.int64],
    task: Task,
    settings: FinetuneSettings,
) -> Standardisation:
    """The scaling of labels for the head, fitted to the training part; sets the element reference of the model."""
    labels = molecules.labels[train]
    if not settings.atom_reference:
        return Standardisation.fit(task.kind, labels, molecules.columns)
    counts = element_counts(molecules.block.take(train))
    reference = fit_reference(counts, labels)
    sums = counts @ reference
    rest = Standardisation.fit(task.kind, labels - sums, molecules.columns)
    # Of a column that the elements explain (as they do few labels), rounding is left. On its scale the sums over atoms,
    # in float32, would err by many times 1, and the loss of this column would drown all others.
    least = RESOLUTION * np.abs(sums).max(axis=0)
    standardisation = dataclasses.replace(rest, std=np.maximum(rest.std, least))
    model.reference.copy_(torch.from_numpy(reference / standardisation.std))
    return standardisation


def _loss_function(
    task: Task,
    settings: FinetuneSettings,
    labels: NDArray[np.float64],
    exclusive: Exclusive,
    device: torch.device,
) -> _Loss:
    """:func:`masked_loss` as the settings ask for it; ``labels`` (M, T) are those of the training part."""
    weights = None
    if task.kind is TaskKind.CLASSIFICATION and settings.class_weights == "balanced":
        found = positive_weights(labels, exclusive).astype(np.float32)
        weights = torch.from_numpy(found).to(device)
    return functools.partial(
        masked_loss,
        task.kind,
        positive_weight=weights,
        regression_loss=settings.regression_loss,
        exclusive=exclusive,
    )


class _BestEpoch:
    """The epoch with the best validation score so far, and its weights."""

    def __init__(self, model: PropertyModel, metric: Metric) -> None:
        self.epoch = 0
        self.score = worst_score(metric)
        self._order = -np.inf
        self._model = model
        self._metric = metric
        # Not a copy: if no epoch has a score, the weights of the last one stay.
        self._state = model.state_dict()

    def offer(self, epoch: int, score: float, order: float) -> None:
        """Keep the present weights of the model if ``score`` is better than that of all earlier epochs, or as good as the best one
        with a greater ``order``."""
        is_ordered_better = score == self.score and order > self._order
        if is_ordered_better or is_better(self._metric, score, self.score):
            self.epoch, self.score, self._order = epoch, score, order
            self._state = {
                name: value.detach().cpu().clone()
                for name, value in self._model.state_dict().items()
            }

    def restore(self) -> None:
        """Give the model the weights of the best epoch."""
        self._model.load_state_dict(self._state)


class _Trainer:
    """The optimizer steps of one run."""

    def __init__(
        self,
        *,
        molecules: LabelledMolecules,
        targets: Targets,
        train: NDArray[np.int64],
        model: PropertyModel,
        loss: _Loss,
        settings: FinetuneSettings,
        seed: int,
        device: torch.device,
        after_step: Callable[[], None],
    ) -> None:
        self._molecules = molecules
        self._targets = targets
        self._train = train
        self.model = model
        self._loss = loss
        self._settings = settings
        self._seed = seed
        self._device = device
        self._after_step = after_step
        self._steps_per_epoch = settings.steps_per_epoch(len(train))
        self._num_steps = settings.num_steps(len(train))
        self._optim = OptimConfig(
            learning_rate=settings.learning_rate,
            warmup_steps=round(settings.warmup_fraction * self._num_steps),
            weight_decay=settings.weight_decay,
            clip_norm=settings.clip_norm,
        )
        freeze_lowest(model, settings.frozen_blocks)
        self._optimizer = build_optimizer(model, self._optim, lr_factors(model, settings))
        self._parameters = [
            parameter for parameter in model.parameters() if parameter.requires_grad
        ]
        # Other code in this process may have drawn random numbers; dropout must depend on the seed only.
        torch.manual_seed(seed)

    def run_epoch(self, epoch: int) -> float:
        """One pass over the training molecules in the order of (seed, epoch); returns the mean loss per known label."""
        self.model.train()
        generator = np.random.default_rng((self._seed, epoch))
        order = generator.permutation(self._train)
        numbers = None
        if self._molecules.conformers is not None:
            numbers = generator.integers(self._molecules.conformers.counts[order])
        total, known = 0.0, 0
        with _head_alone(self.model, enabled=epoch < self._settings.head_warmup_epochs):
            for index in range(self._steps_per_epoch):
                start = index * self._settings.batch_size
                part = slice(start, start + self._settings.batch_size)
                loss, count = self._step(
                    epoch * self._steps_per_epoch + index,
                    order[part],
                    None if numbers is None else numbers[part],
                )
                total, known = total + loss, known + count
                self._after_step()
        return total / max(1, known)

    def _step(
        self, step: int, indices: NDArray[np.int64], numbers: NDArray[np.int64] | None
    ) -> tuple[float, int]:
        known = self._targets.num_known(indices)
        if known == 0:
            return 0.0, 0
        micro_batches = build_micro_batches(
            self._molecules.posed(indices, numbers), step, 0, self._settings.micro_batch_size
        )
        self._optimizer.zero_grad()
        loss = float(sum(self._backward(micro, known) for micro in micro_batches))
        norm = gradient_norm(self._parameters)
        if not np.isfinite(loss) or not torch.isfinite(norm):
            raise TrainingError(
                f"fine-tuning step {step}: loss {loss:g}, gradient norm {float(norm):g}; molecules "
                f"{[self._molecules.mol_ids[index] for index in indices[:8]]} ... of the training data. "
                "Lower finetune.learning_rate"
            )
        clip_gradients(self._parameters, norm, self._settings.clip_norm)
        set_learning_rate(self._optimizer, learning_rate(step, self._optim, self._num_steps))
        self._optimizer.step()
        return loss, known

    def _backward(self, micro: MicroBatch, known: int) -> Tensor:
        """Add the gradients of a micro-batch; its loss, summed over labels, stays on the device, for which nothing waits here."""
        batch = MoleculeBatch.from_micro_batch(micro, device=self._device)
        with autocast(self._settings.precision, self._device):
            outputs = self.model(batch)
        outputs = outputs.float()
        loss = self._loss(outputs, self._targets.for_outputs(outputs, micro.molecule_ids))
        torch.autograd.backward(loss / known)
        return loss.detach().double()


@contextlib.contextmanager
def _head_alone(model: PropertyModel, *, enabled: bool) -> Iterator[None]:
    """Within the body only the head has gradients."""
    trained = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    for parameter in trained if enabled else ():
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained if enabled else ():
            parameter.requires_grad_(True)


def predict_mean(
    model: PropertyModel,
    trained: TrainedProperty,
    molecules: LabelledMolecules,
    indices: NDArray[np.int64],
    micro_batch_size: int,
    device: torch.device,
) -> NDArray[np.float64]:
    """(K, T) values in the labels' unit, or probabilities, for the molecules at ``indices`` (K,): means over
    conformers.

    For classes probabilities are averaged, not logits, as in later predictions.
    """
    descriptors = descriptors_of(trained, molecules)
    if molecules.conformers is None:
        outputs = predict(
            model, molecules.block, indices, micro_batch_size, device, descriptors=descriptors
        )
        return trained.readout(outputs)
    counts = molecules.conformers.counts[indices]
    total: NDArray[np.float64] | float = 0.0
    for number in range(int(counts.max())):
        having = np.flatnonzero(counts > number)
        block = molecules.posed(indices[having], np.full(len(having), number))
        rows = np.arange(len(having), dtype=np.int64)
        block = dataclasses.replace(block, molecule_ids=rows)
        values = np.zeros((len(indices), model.num_targets))
        shown = None if descriptors is None else descriptors[torch.from_numpy(indices[having])]
        outputs = predict(model, block, rows, micro_batch_size, device, descriptors=shown)
        values[having] = trained.readout(outputs)
        total = total + values
    return np.asarray(total / counts[:, None])


def descriptors_of(trained: TrainedProperty, molecules: LabelledMolecules) -> Tensor | None:
    """(M, D) the descriptors that a model reads of all molecules; None if it reads none."""
    if trained.descriptors is None:
        return None
    table = molecules.with_descriptors().descriptors
    assert table is not None
    return torch.from_numpy(trained.descriptors.of(table))


def _shown(descriptors: Tensor | None, micro: MicroBatch, device: torch.device) -> Tensor | None:
    """Those of the molecules of a micro-batch."""
    if descriptors is None:
        return None
    return descriptors[torch.from_numpy(micro.molecule_ids)].to(device)


@torch.no_grad()
def predict(
    model: PropertyModel,
    block: MoleculeBlock,
    indices: NDArray[np.int64],
    micro_batch_size: int,
    device: torch.device,
    *,
    descriptors: Tensor | None = None,
) -> NDArray[np.float64]:
    """Raw outputs (K, T) for the molecules at ``indices`` (K,): logits, or standardised numbers.

    ``descriptors`` (M, D) are the inputs of all molecules, for a model that reads them.

    The stored conformer is used, never a random one, so equal input gives equal output.
    """
    model.eval()
    by_size = indices[np.argsort(block.num_atoms[indices], kind="stable")]
    place = {int(index): row for row, index in enumerate(indices)}
    rows: list[NDArray[np.int64]] = []
    outputs: list[NDArray[np.float64]] = []
    for start in range(0, len(by_size), PREDICTION_CHUNK):
        chunk = block.take(by_size[start : start + PREDICTION_CHUNK])
        for micro in build_micro_batches(chunk, 0, 0, micro_batch_size):
            batch = MoleculeBatch.from_micro_batch(micro, device=device)
            output = model(batch, _shown(descriptors, micro, device))
            rows.append(np.array([place[int(index)] for index in micro.molecule_ids]))
            outputs.append(output.double().cpu().numpy())
    predictions = np.empty((len(indices), outputs[0].shape[1]))
    predictions[np.concatenate(rows)] = np.concatenate(outputs)
    return predictions
