"""The promise users ask for most: kill the command anywhere, type it again, get the undisturbed run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from commands import finish, kill_when, moleblend

from moleblend_ray.training.commits import committed_steps
from moleblend_ray.training.metrics import read_records

NUM_STEPS = 40
CHECKPOINT_EVERY = 10


def pretrain(data: str, out: str, work: Path) -> subprocess.Popen[str]:
    return moleblend(
        "pretrain",
        f"data={data}",
        f"out={out}",
        "model=tiny",
        "order.global_batch_size=32",
        "order.num_streams=2",
        f"train.num_steps={NUM_STEPS}",
        f"checkpoint.every_steps={CHECKPOINT_EVERY}",
        "tracking.mode=disabled",
        "cluster.num_workers=2",
        work=work,
    )


@pytest.mark.ray
@pytest.mark.shared_data
@pytest.mark.slow
def test_a_killed_pretraining_on_s3_ends_as_the_undisturbed_one(
    shared_data: Path, s3_uri: str, tmp_path: Path
) -> None:
    data = f"{s3_uri}/data"
    source = shared_data / "pcqm4mv2_2k.parquet"
    finish(moleblend("prepare", f"source={source}", f"out={data}", work=tmp_path))
    finish(pretrain(data, f"{s3_uri}/undisturbed", tmp_path))

    run = f"{s3_uri}/killed"
    driver = pretrain(data, run, tmp_path)
    kill_when(lambda: bool(committed_steps(run)), driver, interval_s=0.2)
    assert max(committed_steps(run)) < NUM_STEPS, "the kill came too late to prove anything"
    finish(pretrain(data, run, tmp_path))

    expected, found = read_records(f"{s3_uri}/undisturbed"), read_records(run)
    assert [record["step"] for record in found] == list(range(NUM_STEPS))
    for one, other in zip(expected, found, strict=True):
        assert other["molecules_checksum"] == one["molecules_checksum"]
        losses = {name: value for name, value in one.items() if name.startswith("loss")}
        assert {name: other[name] for name in losses} == pytest.approx(losses, abs=1e-5)
