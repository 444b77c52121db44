"""The CPUs and the GPU that Ray has reserved for this process."""

from __future__ import annotations

import torch

from moleblend_ray.config.cluster import ClusterConfig


def use_reserved(cluster: ClusterConfig) -> torch.device:
    """Limit torch to the CPUs that this process reserved, and return the device that it may use."""
    torch.set_num_threads(cluster.threads_per_worker)
    return torch.device("cuda" if cluster.use_gpu else "cpu")
