"""What may be sent to a cluster with a job, and how it is typed."""

from __future__ import annotations

from typing import Any

import pytest

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.compose import load_config
from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.config.submit import (
    SubmitConfig,
    check_job,
    environment,
    losses,
    options_help,
    parse_arguments,
)
from moleblend_ray.errors import ConfigError
from moleblend_ray.settings import build
from moleblend_ray.training.config import TrackingConfig

URL = "http://127.0.0.1:8265"


def pretraining(**changes: Any) -> PretrainConfig:
    settings = {"data": "s3://bucket/data", "out": "s3://bucket/run", **changes}
    return PretrainConfig(**settings)


def test_options_are_the_submission_s_and_all_else_the_job_s_in_any_order() -> None:
    words = ["pretrain", "data=s3://b/d", "--address", URL, "out=s3://b/r", "--detach"]
    words += ["--env", "A=1", "--env=B", "--stop-wait-s=30", "model=tiny"]
    config = build(SubmitConfig, parse_arguments(words))
    assert config == SubmitConfig(
        job="pretrain",
        overrides=("data=s3://b/d", "out=s3://b/r", "model=tiny"),
        address=URL,
        detach=True,
        env=("A=1", "B"),
        stop_wait_s=30,
    )


def test_flags_of_a_job_stay_with_the_job() -> None:
    given = parse_arguments(["data", "s3://b/d", "--verify", "--detach"], {"--verify"})
    assert given == {"job": "data", "overrides": ["s3://b/d", "--verify"], "detach": True}


def test_a_job_named_by_another_setting_is_not_guessed() -> None:
    with pytest.raises(ConfigError, match="job: expected a job to submit"):
        build(SubmitConfig, {"address": URL})
    with pytest.raises(ConfigError, match="found follow and stop"):
        SubmitConfig(follow="pretrain-run-1", stop="pretrain-run-1")
    with pytest.raises(ConfigError, match="overrides: there is no job"):
        build(SubmitConfig, parse_arguments(["data=s3://b/d", "--follow", "x"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "--adress", URL], "--adress.*did you mean --address"),
        (["data", "--address"], "--address: expected one argument"),
        (["data", "--stop-wait-s", "soon"], "--stop-wait-s: invalid int value: 'soon'"),
        (["data", "--detac"], "did you mean --detach"),
    ],
)
def test_an_option_that_is_none_is_refused_with_the_nearest(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arguments(words)


def test_every_option_is_explained() -> None:
    shown = "\n".join(options_help())
    assert "--address: str or null = null" in shown
    assert "--code: one of package, image = package" in shown


@pytest.mark.parametrize("address", ["ray://head:10001", "head:6379", "auto", "http://"])
def test_an_address_that_is_not_the_dashboard_s_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"address: expected http://HOST:8265"):
        SubmitConfig(job="data", address=address)


@pytest.mark.parametrize(
    "text",
    [
        "AWS_SECRET_ACCESS_KEY=hunter2",
        "AWS_ACCESS_KEY_ID",
        "WANDB_API_KEY=hunter2",
        "HF_TOKEN",
        "RAY_AUTH_TOKEN=hunter2",
        "DB_PASSWORD=hunter2",
        "PROXY=http://me:hunter2@proxy:3128",
    ],
)
def test_secrets_are_not_sent_in_the_environment_nor_shown_in_the_error(text: str) -> None:
    with pytest.raises(ConfigError, match="looks like a secret") as refused:
        SubmitConfig(job="data", env=(text,))
    assert "hunter2" not in str(refused.value)


def test_variables_are_taken_from_here_by_name_and_checked_again() -> None:
    config = SubmitConfig(job="data", env=("NCCL_DEBUG=INFO", "AWS_ENDPOINT_URL", "EMPTY="))
    here = {"AWS_ENDPOINT_URL": "https://minio.example.org", "OTHER": "x"}
    assert environment(config, here) == {
        "NCCL_DEBUG": "INFO",
        "AWS_ENDPOINT_URL": "https://minio.example.org",
        "EMPTY": "",
    }
    with pytest.raises(ConfigError, match=r"env: AWS_ENDPOINT_URL is not set here"):
        environment(config, {})
    with pytest.raises(ConfigError, match="looks like a secret") as refused:
        environment(config, {"AWS_ENDPOINT_URL": "https://me:hunter2@minio.example.org"})
    assert "hunter2" not in str(refused.value)


def test_paths_of_this_machine_are_refused_all_at_once_unless_allowed() -> None:
    job = pretraining(data="prepared", out="/tmp/run")
    with pytest.raises(ConfigError) as refused:
        check_job(SubmitConfig(job="pretrain"), job)
    lines = str(refused.value).splitlines()
    assert [line.partition("=")[0] for line in lines] == ["data", "out"]
    assert "file:///PATH for a folder mounted on all" in lines[0]
    allowed = SubmitConfig(job="pretrain", allow_local_paths=True)
    # The job's own folder would be its place, which is deleted after the job.
    with pytest.raises(ConfigError, match=r"^data=prepared: .*Write the whole path: /.*/prepared$"):
        check_job(allowed, job)
    check_job(allowed, pretraining(data="/tmp/prepared", out="/tmp/run"))
    check_job(SubmitConfig(job="pretrain"), pretraining(out="file:///mnt/runs/first"))


def test_offline_files_that_the_job_leaves_in_its_own_folder_are_told_of() -> None:
    (line,) = losses(pretraining())
    assert "tracking.dir=runs/wandb" in line
    assert losses(pretraining(tracking=TrackingConfig(mode="disabled"))) == []
    assert losses(pretraining(tracking=TrackingConfig(dir="/mnt/wandb"))) == []
    assert losses(object()) == []


def test_a_secret_in_the_command_is_refused_and_not_repeated() -> None:
    overrides = ("data=s3://key:hunter2@bucket/data", "out=s3://bucket/run")
    with pytest.raises(
        ConfigError, match=r"data=s3://\*\*\*@bucket/data: holds a secret"
    ) as refused:
        check_job(SubmitConfig(job="pretrain", overrides=overrides), pretraining())
    assert "hunter2" not in str(refused.value)


def test_a_job_that_would_start_a_cluster_of_its_own_on_the_head_is_refused() -> None:
    for address in ("local", "other:6379"):
        job = pretraining(cluster=ClusterConfig(address=address))
        with pytest.raises(ConfigError, match=rf"cluster\.address={address}"):
            check_job(SubmitConfig(job="pretrain"), job)
    kuberay = load_config(
        PretrainConfig, "pretrain", ["data=s3://b/d", "out=s3://b/r", "cluster=kuberay"]
    )
    check_job(SubmitConfig(job="pretrain"), kuberay)


def test_labels_that_no_node_can_carry_are_refused() -> None:
    for labels in ({"role": "a b"}, {"-x": "y"}, {"role": "!gpu"}, {"role": ""}):
        with pytest.raises(ConfigError, match="data_labels: expected a label"):
            ClusterConfig(data_labels=labels)
    ClusterConfig(data_labels={"ray.io/accelerator-type": "A100"}, worker_labels={})


def test_the_labels_of_kuberay_can_be_left_out() -> None:
    overrides = ["data=s3://b/d", "out=s3://b/r", "cluster=kuberay"]
    config = load_config(PretrainConfig, "pretrain", overrides)
    assert config.cluster.data_labels == {"moleblend-role": "data"}
    assert config.cluster.worker_labels == {"moleblend-role": "train"}
    free = ["cluster.data_labels=null", "cluster.worker_labels=null"]
    config = load_config(PretrainConfig, "pretrain", [*overrides, *free])
    assert config.cluster.data_labels is config.cluster.worker_labels is None
