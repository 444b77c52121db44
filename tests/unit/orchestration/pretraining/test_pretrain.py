"""What the driver of pretraining decides before it starts workers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from synthetic import write_dataset

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.data.config import CPU_MICRO_BATCH, GPU_MICRO_BATCH, OrderConfig, StreamConfig
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.orchestration.pretraining import pretrain as module
from moleblend_ray.orchestration.pretraining.pretrain_group import WorkerOutcome
from moleblend_ray.training.config import TrainConfig
from moleblend_ray.training.metrics import write_records

TINY = ModelConfig(num_layers=1, dim=16, ffn_dim=16, num_heads=2, num_kernels=4, pair_dim=2)


class StartedError(Exception):
    """Workers were started."""


@pytest.mark.parametrize(
    ("use_gpu", "asked", "given"),
    [
        (False, None, CPU_MICRO_BATCH),
        (True, None, GPU_MICRO_BATCH),
        (False, 7, 7),
        (True, 4096, 4096),
    ],
)
def test_micro_batches_fit_the_device_that_trains(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    use_gpu: bool,
    asked: int | None,
    given: int,
) -> None:
    write_dataset(str(tmp_path / "data"), 20)
    seen: list[StreamConfig] = []

    def start(config: PretrainConfig, *_: object) -> None:
        seen.append(config.stream)
        raise StartedError

    monkeypatch.setattr(module, "_train_on_workers", start)
    stream = StreamConfig(micro_batch_size=asked, max_actors=3)
    config = PretrainConfig(
        data=str(tmp_path / "data"),
        out=str(tmp_path / "out"),
        model=TINY,
        order=OrderConfig(global_batch_size=16, num_streams=2),
        train=TrainConfig(num_steps=2),
        cluster=ClusterConfig(num_workers=2, use_gpu=use_gpu),
        stream=stream,
    )
    with pytest.raises(StartedError):
        module.pretrain(config)
    assert seen == [dataclasses.replace(stream, micro_batch_size=given)]
    assert seen[0].num_at_once == given


@pytest.mark.parametrize("lost", [False, True], ids=["whole", "lost"])
def test_a_run_that_lost_numbers_of_its_steps_counts_all_molecules_and_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lost: bool
) -> None:
    write_dataset(str(tmp_path / "data"), 20)
    out = str(tmp_path / "out")
    written: list[dict[str, float | int]] = [
        {"step": step, "loss": 1.0, "molecules": 16, "step_s": 0.5} for step in range(6)
    ]

    def train(*_: object) -> WorkerOutcome:
        write_records(out, written[4:] if lost else written, 4 if lost else 0, 6)
        return WorkerOutcome(step=6, world_size=1, stopped_by="sigterm")

    monkeypatch.setattr(module, "_train_on_workers", train)
    summary = module.pretrain(
        PretrainConfig(
            data=str(tmp_path / "data"),
            out=out,
            model=TINY,
            order=OrderConfig(global_batch_size=16, num_streams=2),
            train=TrainConfig(num_steps=9),
        )
    )
    assert (summary.molecules, summary.molecules_per_s) == (96, 32.0)
    told = f"{out}/metrics holds the numbers of 2 of the 6 steps"
    assert (told in caplog.text) == lost


def test_a_stream_that_no_device_is_known_of_has_the_micro_batches_of_cpus() -> None:
    assert StreamConfig().num_at_once == CPU_MICRO_BATCH
    assert StreamConfig(micro_batch_size=9).num_at_once == 9
