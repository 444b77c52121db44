"""A model in training: weights and optimizer spread over the ranks, and the losses that it learns from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moleblend_ray.data.batches.batch import StepBatch
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.blending import Blend, BlendConfig
from moleblend_ray.model.losses import (
    LOSS_NAMES,
    LossConfig,
    loss_means,
    pretraining_loss_sums,
    total_loss,
)
from moleblend_ray.model.moleblend import ModelConfig, MoleBlendModel
from moleblend_ray.training.config import OptimConfig, TrainConfig
from moleblend_ray.training.distributed import distribute
from moleblend_ray.training.host_memory import keep_freed_memory
from moleblend_ray.training.metrics import TOTAL_LOSS, Record
from moleblend_ray.training.optim import CutInvariantAdamW, build_optimizer
from moleblend_ray.training.prefetch import DeviceStep, prepare_step
from moleblend_ray.training.ranks import Ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Learner:
    """A model in training, spread over the ranks, with all that decides its updates."""

    objective: nn.Module
    """Forward gives the losses; wrapped by FSDP or DDP."""
    model: MoleBlendModel
    """The model inside ``objective``."""
    optimizer: CutInvariantAdamW
    ranks: Ranks
    train: TrainConfig
    optim: OptimConfig
    blend: BlendConfig
    loss: LossConfig
    seed: int
    """Of initial weights, blends and dropout."""

    def prepare(self, batch: StepBatch) -> DeviceStep:
        """Copy a step to the device and make its random choices."""
        return prepare_step(
            batch, self.ranks.device, blend=self.blend, loss=self.loss, seed=self.seed
        )


class PretrainingObjective(nn.Module):
    """The model with its losses: one module, so that FSDP and DDP see plain tensors come out."""

    def __init__(self, model: MoleBlendModel, loss: LossConfig) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: MoleculeBatch, blend: Blend, counts: Tensor) -> tuple[Tensor, Tensor]:
        """() this micro-batch's part of the step's loss, and (7,) float64 its sums in order of LOSS_NAMES, detached."""
        sums = pretraining_loss_sums(self.model(batch, blend), batch, blend, self.loss)
        detached = torch.stack([sums[name].detach().double() for name in LOSS_NAMES])
        return total_loss(sums, counts, self.loss), detached


def build_learner(
    model: ModelConfig,
    *,
    train: TrainConfig,
    optim: OptimConfig,
    blend: BlendConfig,
    loss: LossConfig,
    seed: int,
    ranks: Ranks,
) -> Learner:
    """A new model, with the same weights at every world size, ready for its first step."""
    if ranks.device.type == "cpu":
        keep_freed_memory()
    with torch.device("meta"):
        new_model = MoleBlendModel(model)
    new_model.encoder.recompute_blocks(enabled=train.activation_checkpointing)
    if train.compile:
        new_model.encoder.compile_blocks()
    torch.manual_seed(seed)
    objective = distribute(
        PretrainingObjective(new_model, loss),
        new_model.encoder.layers,
        draw_weights=new_model.init_weights,
        strategy=train.strategy,
        precision=train.precision,
        ranks=ranks,
        replicas=train.fsdp_replicas,
        reshard=train.fsdp_reshard,
    )
    return Learner(
        objective=objective,
        model=new_model,
        optimizer=build_optimizer(new_model, optim),
        ranks=ranks,
        train=train,
        optim=optim,
        blend=blend,
        loss=loss,
        seed=seed,
    )


def named_losses(learner: Learner, sums: Tensor, counts: Tensor) -> Record:
    """The optimised loss and each head's own mean; a head without any target is left out, not called 0."""
    means = loss_means(dict(zip(LOSS_NAMES, sums, strict=True)), counts)
    model = learner.model
    optional = {
        "direction": model.direction_head,
        "distance": model.distance_head,
        "environment": model.environment_head,
        "descriptor": model.descriptor_head,
    }
    lacking = {name for name, head in optional.items() if head is None}
    total = sum(learner.loss.weight(name) * float(mean) for name, mean in means.items())
    heads = {
        f"{TOTAL_LOSS}_{name}": float(means[name])
        for name, count in zip(LOSS_NAMES, counts.tolist(), strict=True)
        if count > 0 and name not in lacking
    }
    return {TOTAL_LOSS: float(total), **heads}
