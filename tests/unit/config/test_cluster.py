"""A cluster on which the job would wait for ever is refused before it is started."""

from __future__ import annotations

import pytest

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.data.batch import StreamConfig
from moleblend_ray.errors import ConfigError


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
    assert PretrainConfig(data="data", out="out", stream=stream, cluster=cluster)
