"""Settings of a plan: network, storage, failures and prices. All sizes are decimal: 1 GB is 10^9 bytes."""

from __future__ import annotations

from dataclasses import dataclass

from moleblend_ray.checks import above, at_least, check_all, within
from moleblend_ray.planning.goodput import RATES
from moleblend_ray.settings import typed


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSettings:
    """Networks between trainers, and between trainers and data. All values are assumptions."""

    within_node_gb_s: float = 300.0
    """Bandwidth from each GPU to the others of its node, GB/s in one direction."""
    between_nodes_gb_s: float = 45.0
    """Bandwidth from each GPU to other nodes, GB/s in one direction."""
    node_gb_s: float = 3.0
    """Bandwidth of the ordinary network of a node, which molecules come over, GB/s in one direction (25 Gbit/s are
    3)."""
    message_us: float = 30.0
    """Time per collective, whatever its size, microseconds."""
    overlap: float = 0.0
    """Share of the exchange between trainers that takes place during computing. With 0 the plan is the slowest that is
    to be expected, with 1 the fastest."""

    def __post_init__(self) -> None:
        check_all(
            *above(self, 0, "within_node_gb_s", "between_nodes_gb_s", "node_gb_s"),
            *at_least(self, 0, "message_us"),
            *within(self, 0, 1, "overlap"),
        )


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class StorageSettings:
    """Bandwidth of object storage. Both values are assumptions."""

    total_gb_s: float = 20.0
    """Bandwidth to all machines together, GB/s."""
    node_gb_s: float = 1.0
    """Bandwidth to one machine, GB/s."""

    def __post_init__(self) -> None:
        check_all(*above(self, 0, "total_gb_s", "node_gb_s"))


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class FailureSettings:
    """How often machines fail, and how soon they are replaced."""

    per_node_day: float = RATES["rsc1_jobs"]
    """Failures per day of a node with trainers. The default is the highest of four published rates (docs/scale.md);
    spot machines fail more often."""
    replacement_min: float = 10.0
    """Minutes from a failure until another node takes its place."""

    def __post_init__(self) -> None:
        check_all(*at_least(self, 0, "per_node_day", "replacement_min"))


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class PriceSettings:
    """Prices, all in the same currency. A cost whose price is null is left out of the sum, and the plan says so."""

    gpu_hour: float | None = None
    """Price per hour of one GPU with its share of the machine."""
    cpu_node_hour: float | None = None
    """Price per hour of one CPU node (or of the machine, in a plan for CPU workers)."""
    storage_gb_month: float | None = None
    """Price per GB and month in object storage."""
    storage_months: float = 1.0
    """Months that shards, checkpoints and vectors are kept."""
    egress_gb: float | None = None
    """Price per GB read from object storage: 0 in the same region, more across regions."""

    def __post_init__(self) -> None:
        prices = ("gpu_hour", "cpu_node_hour", "storage_gb_month", "egress_gb")
        check_all(*at_least(self, 0, *prices, "storage_months"))

    @property
    def any_given(self) -> bool:
        """Whether there is any price."""
        prices = (self.gpu_hour, self.cpu_node_hour, self.storage_gb_month, self.egress_gb)
        return any(price is not None for price in prices)
