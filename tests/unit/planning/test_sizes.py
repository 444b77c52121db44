"""Sizes by formula are those of the models, files and messages themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moleblend_ray.config.compose import compose, group_choices
from moleblend_ray.model.config import BlendConfig, LossConfig, ModelConfig
from moleblend_ray.model.moleblend import MoleBlendModel
from moleblend_ray.planning.sizes import checkpoint_bytes, exchange, gathered_bytes, model_size
from moleblend_ray.settings import build
from moleblend_ray.training.checkpoint import training_state
from moleblend_ray.training.config import CheckpointConfig, OptimConfig, TrainConfig
from moleblend_ray.training.learner import build_learner
from moleblend_ray.training.ranks import Ranks
from moleblend_ray.training.saving import CheckpointWriter


def preset(name: str) -> ModelConfig:
    return build(ModelConfig, compose("plan", [f"model={name}"]).get("model", {}))


ODD = ModelConfig(
    num_layers=2,
    dim=24,
    ffn_dim=40,
    num_heads=3,
    num_kernels=7,
    pair_dim=5,
    num_spd_classes=4,
    edge_other_class=False,
    direction_head=False,
    distance_head=True,
    environment_bins=6,
    descriptor_head=True,
)


@pytest.mark.parametrize(
    "config", [*map(preset, group_choices("model")), ODD], ids=[*group_choices("model"), "odd"]
)
def test_parameters_by_formula_are_those_of_the_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = MoleBlendModel(config)
    found = model_size(config)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.layer_parameters == sum(p.numel() for p in model.encoder.layers.parameters())
    assert found.tensors == len(list(model.parameters()))


@pytest.mark.parametrize("config", [preset("tiny"), ODD], ids=["tiny", "odd"])
def test_a_real_checkpoint_has_the_predicted_bytes(config: ModelConfig, tmp_path: Path) -> None:
    learner = build_learner(
        config,
        train=TrainConfig(num_steps=1, strategy="none"),
        optim=OptimConfig(),
        blend=BlendConfig(),
        loss=LossConfig(direction_weight=0.0),
        seed=0,
        ranks=Ranks(),
    )
    for parameter in learner.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    state = training_state(learner.model, learner.optimizer)
    with CheckpointWriter(
        CheckpointConfig(asynchronous=False),
        str(tmp_path),
        Ranks(),
        identity={},
        config_fingerprint="",
        start_step=0,
    ) as writer:
        writer.commit(1, state, [])
    folder = tmp_path / "checkpoints" / "step-00000001"
    written = sum(file.stat().st_size for file in folder.iterdir() if file.name != "COMMIT.json")
    assert checkpoint_bytes(config) == pytest.approx(written, rel=0.01)


def test_the_recorded_checkpoint_of_base_has_the_predicted_bytes() -> None:
    # benchmarks/results/checkpoint-2026-11-26.json: 515.3 MiB
    assert checkpoint_bytes(ModelConfig()) == pytest.approx(515.3 * 2**20, rel=0.0002)


def test_traffic_is_what_the_scaling_benchmark_counted() -> None:
    """benchmarks/results/scaling-2026-11-26.json: MiB that both workers of a step of base sent, by theory."""
    for strategy, mib in (("fsdp", 676.3), ("ddp", 342.6)):
        found = exchange(ModelConfig(), 2, strategy=strategy, precision="fp32", on_gpu=False)  # type: ignore[arg-type]
        assert 2 * (found.within_bytes + found.across_bytes) == pytest.approx(mib * 2**20, rel=1e-3)


def test_one_worker_sends_nothing_and_copies_keep_traffic_within_their_node() -> None:
    model = ModelConfig()
    assert exchange(model, 1, strategy="fsdp", precision="bf16").within_bytes == 0
    whole = exchange(model, 64, strategy="fsdp", precision="bf16")
    copies = exchange(model, 64, strategy="fsdp", precision="bf16", replicas=8)
    assert whole.across_bytes == 0
    # One byte a parameter of eight crosses between nodes, as docs/performance.md says.
    parameters = model_size(model).parameters
    assert copies.across_bytes == pytest.approx(2 * 7 / 8 * 4 * parameters / 8)
    assert copies.across_bytes < whole.within_bytes / 7


def test_parameters_that_stay_gathered_cross_once_and_take_the_memory_of_a_model() -> None:
    model = ModelConfig()
    layers, parameters = model_size(model).layer_parameters, model_size(model).parameters
    twice, once = (
        exchange(model, 8, strategy="fsdp", precision="bf16", reshard=reshard)
        for reshard in (True, False)
    )
    assert twice.within_bytes - once.within_bytes == pytest.approx(7 / 8 * 2 * layers)
    groups = model.num_layers + 1
    assert (twice.messages, once.messages) == (3 * groups, 2 * groups)
    kept = gathered_bytes(model, precision="bf16", on_gpu=True)
    assert sum(kept) == 2 * layers + 4 * (parameters - layers)


def test_bfloat16_halves_what_is_gathered_on_gpus_alone() -> None:
    model = replace(ModelConfig(), num_layers=6)
    sent = {
        (precision, on_gpu): exchange(
            model, 8, strategy="fsdp", precision=precision, on_gpu=on_gpu
        ).within_bytes
        for precision in ("bf16", "fp32")
        for on_gpu in (True, False)
    }
    layers = model_size(model).layer_parameters
    assert sent["fp32", True] - sent["bf16", True] == pytest.approx(7 / 8 * 4 * layers)
    assert sent["fp32", False] == sent["bf16", False]
