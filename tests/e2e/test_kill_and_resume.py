"""The promise users ask for most: kill the command anywhere, type it again, get the undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import finish, kill_when, moleblend
from in_process import prepare_in_process, pretrain_in_process

from moleblend_ray.config.compose import load_config
from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.sources import ColumnConfig
from moleblend_ray.training.commits import committed_steps
from moleblend_ray.training.metrics import read_records

NUM_STEPS = 40
CHECKPOINT_EVERY = 10


def words(data: str, out: str) -> list[str]:
    return [
        f"data={data}",
        f"out={out}",
        "model=tiny",
        "order.global_batch_size=32",
        "order.num_streams=2",
        f"train.num_steps={NUM_STEPS}",
        f"checkpoint.every_steps={CHECKPOINT_EVERY}",
        "tracking.mode=disabled",
        "cluster.num_workers=2",
    ]


@pytest.mark.ray
@pytest.mark.shared_data
@pytest.mark.slow
def test_a_killed_pretraining_on_s3_ends_as_the_undisturbed_one(
    shared_data: Path, s3_uri: str, tmp_path: Path
) -> None:
    data, run = f"{s3_uri}/data", f"{s3_uri}/run"
    source = shared_data / "pcqm4mv2_2k.parquet"
    prepare_in_process(str(source), data, ConvertOptions(columns=ColumnConfig()))
    command = ["pretrain", *words(data, run)]

    driver = moleblend(*command, work=tmp_path)
    kill_when(lambda: bool(committed_steps(run)), driver, interval_s=0.2)
    assert max(committed_steps(run)) < NUM_STEPS, "the kill came too late to prove anything"
    driver = moleblend(*command, work=tmp_path)
    # Meanwhile, as one core often has nothing to do while processes start one after the other.
    expected = pretrain_in_process(load_config(PretrainConfig, "pretrain", command[1:]))
    finish(driver)

    found = read_records(run)
    assert [record["step"] for record in found] == list(range(NUM_STEPS))
    for one, other in zip(expected, found, strict=True):
        assert other["molecules_checksum"] == one["molecules_checksum"]
        losses = {name: value for name, value in one.items() if name.startswith("loss")}
        assert {name: other[name] for name in losses} == pytest.approx(losses, abs=1e-5)
