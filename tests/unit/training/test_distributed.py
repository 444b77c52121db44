"""What FSDP shards by itself and in which types, and how often gradients are reduced; in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import toy
from torch.distributed.fsdp import MixedPrecisionPolicy

from moleblend_ray.model.losses import LossConfig
from moleblend_ray.model.moleblend import MoleBlendModel
from moleblend_ray.training import distributed
from moleblend_ray.training import step as step_module
from moleblend_ray.training.config import Precision
from moleblend_ray.training.learner import Learner, PretrainingObjective
from moleblend_ray.training.ranks import Ranks
from moleblend_ray.training.step import train_step

LAYERS = ["model.encoder.layers.0", "model.encoder.layers.1"]
ROOT = ""


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def policies(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, device: str
) -> dict[str, MixedPrecisionPolicy]:
    """The policy of each module that FSDP shards by itself, in the order of sharding."""
    with torch.device("meta"):
        model = MoleBlendModel(toy.MODEL)
        objective = PretrainingObjective(model, LossConfig())
    names = {module: name for name, module in objective.named_modules()}
    found: dict[str, MixedPrecisionPolicy] = {}

    def note(module: torch.nn.Module, *, mp_policy: MixedPrecisionPolicy, **others: Any) -> None:
        del others
        found[names[module]] = mp_policy

    monkeypatch.setattr(distributed, "fully_shard", note)
    ranks = Ranks(world_size=2, device=torch.device(device))
    mesh: Any = None
    distributed._shard(objective, model.encoder.layers, precision, ranks, mesh, reshard=True)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gpus_gather_layers_in_the_precision_and_add_gradients_in_float32(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = policies(monkeypatch, precision, "cuda")
    assert list(found) == [*LAYERS, ROOT]
    gathered = torch.bfloat16 if precision == "bf16" else None
    assert [found[name].param_dtype for name in found] == [gathered, gathered, None]
    assert {policy.reduce_dtype for policy in found.values()} == {torch.float32}
    assert not any(policy.cast_forward_inputs for policy in found.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cpus_gather_float32_and_add_gradients_in_float64(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = policies(monkeypatch, precision, "cpu")
    assert list(found) == [*LAYERS, ROOT]
    assert {policy.param_dtype for policy in found.values()} == {None}
    assert {policy.reduce_dtype for policy in found.values()} == {torch.float64}


@pytest.mark.usefixtures("alone")
def test_gradients_are_reduced_once_a_step_however_many_micro_batches_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backward = step_module._backward
    reduced: list[bool] = []

    def note(learner: Learner, *arguments: Any, **settings: Any) -> torch.Tensor:
        sums = backward(learner, *arguments, **settings)
        # Shards have gradients once these are reduced; before that, FSDP adds them up for whole layers.
        reduced.append(any(part.grad is not None for part in learner.model.parameters()))
        return sums

    monkeypatch.setattr(step_module, "_backward", note)
    learner = toy.learner(strategy="fsdp")
    train_step(learner, learner.prepare(next(toy.steps())))
    assert reduced == [False] * 7 + [True]
