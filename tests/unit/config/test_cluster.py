"""A cluster on which the job would wait for ever is refused before it is started."""

from __future__ import annotations

import pytest

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.data.config import StreamConfig
from moleblend_ray.errors import ConfigError
from moleblend_ray.training.config import TrainConfig


def test_a_private_cluster_without_room_for_a_worker_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^local_cpus: expected .*\(4\), found 3"):
        ClusterConfig(local_cpus=3, cpus_per_worker=4.0)


def test_a_private_cluster_without_room_for_workers_and_a_data_actor_is_refused() -> None:
    stream = StreamConfig(actor_cpus=0.5)
    cluster = ClusterConfig(num_workers=2, local_cpus=2)
    with pytest.raises(
        ConfigError, match=r"^cluster\.local_cpus: expected .*at least 2\.5, .*found 2"
    ):
        PretrainConfig(data="data", out="out", stream=stream, cluster=cluster)
    cluster = ClusterConfig(num_workers=2, local_cpus=3)
    config = PretrainConfig(data="data", out="out", stream=stream, cluster=cluster)
    assert config.cluster == cluster


def test_every_data_actor_that_must_start_is_counted() -> None:
    stream = StreamConfig(min_actors=3, max_actors=3)
    with pytest.raises(ConfigError, match=r"at least 5, which the workers and stream\.min_actors"):
        PretrainConfig(data="data", out="out", stream=stream, cluster=ClusterConfig(local_cpus=4))


def test_a_seed_that_no_generator_takes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^seed: expected 0 to 2\*\*63 - 1"):
        PretrainConfig(data="data", out="out", seed=2**64)


def test_replicas_that_the_workers_cannot_form_are_refused() -> None:
    train = TrainConfig(fsdp_replicas=3)
    with pytest.raises(ConfigError, match=r"^train\.fsdp_replicas: expected a divisor .*\(2\)"):
        PretrainConfig(data="data", out="out", train=train, cluster=ClusterConfig(num_workers=2))
    with pytest.raises(ConfigError, match=r"^fsdp_replicas: 2 copies are for strategy fsdp"):
        TrainConfig(strategy="ddp", fsdp_replicas=2)


def test_parameters_that_are_never_gathered_cannot_stay_gathered() -> None:
    with pytest.raises(ConfigError, match=r"^fsdp_reshard: false is for strategy fsdp"):
        TrainConfig(strategy="ddp", fsdp_reshard=False)
