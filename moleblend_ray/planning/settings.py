"""What a plan is told of machines, network, storage, failures and prices. All sizes are decimal: 1 GB is 10^9 bytes."""

from __future__ import annotations

from dataclasses import dataclass

from moleblend_ray.errors import check_all
from moleblend_ray.planning.goodput import RATES


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSettings:
    """What trainers reach among each other and from the data; assumptions, all of them."""

    within_node_gb_s: float = 300.0
    """From each GPU to the others of its node, GB/s in one direction."""
    between_nodes_gb_s: float = 45.0
    """From each GPU to other nodes, GB/s."""
    node_gb_s: float = 3.0
    """Ordinary network of a node, over which molecules come, GB/s in one direction (25 Gbit/s are 3)."""
    message_us: float = 30.0
    """Time that a collective takes whatever it sends, microseconds."""
    overlap: float = 0.0
    """Share of the exchange between trainers that is hidden behind computing: 0 is the lower end of what to expect,
    1 the upper end."""

    def __post_init__(self) -> None:
        names = ("within_node_gb_s", "between_nodes_gb_s", "node_gb_s")
        check_all(
            *(_positive(self, name) for name in names),
            _at_least_zero(self, "message_us"),
            (0.0 <= self.overlap <= 1.0, f"overlap: expected 0 to 1, found {self.overlap}"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageSettings:
    """What object storage gives; assumptions."""

    total_gb_s: float = 20.0
    """To all machines together, GB/s."""
    node_gb_s: float = 1.0
    """To one machine, GB/s."""

    def __post_init__(self) -> None:
        check_all(*(_positive(self, name) for name in ("total_gb_s", "node_gb_s")))


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureSettings:
    """How often machines fail, and how soon there is another one."""

    per_node_day: float = RATES["rsc1_jobs"]
    """Failures a day of a node with trainers. The default is the worst of four published rates (docs/scale.md); spot
    machines are worse."""
    replacement_min: float = 10.0
    """Minutes from a failure to another node in its place."""

    def __post_init__(self) -> None:
        check_all(
            _at_least_zero(self, "per_node_day"),
            _at_least_zero(self, "replacement_min"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PriceSettings:
    """Prices in any one currency; null leaves a cost out of the sum, and the plan says so."""

    gpu_hour: float | None = None
    """One GPU with its share of the machine, an hour."""
    cpu_node_hour: float | None = None
    """One CPU node (or the machine of a plan for CPU workers), an hour."""
    storage_gb_month: float | None = None
    """A GB in object storage for a month."""
    storage_months: float = 1.0
    """Months that shards, checkpoints and vectors are kept."""
    egress_gb: float | None = None
    """A GB read from object storage: 0 in the same region, more across regions."""

    def __post_init__(self) -> None:
        names = ("gpu_hour", "cpu_node_hour", "storage_gb_month", "egress_gb")
        check_all(
            *(
                (
                    getattr(self, name) is None or getattr(self, name) >= 0,
                    f"{name}: expected null or at least 0, found {getattr(self, name)}",
                )
                for name in names
            ),
            _at_least_zero(self, "storage_months"),
        )

    @property
    def any_given(self) -> bool:
        """Whether there is anything to add up."""
        prices = (self.gpu_hour, self.cpu_node_hour, self.storage_gb_month, self.egress_gb)
        return any(price is not None for price in prices)


def _positive(settings: object, name: str) -> tuple[bool, str]:
    value = getattr(settings, name)
    return value > 0, f"{name}: expected more than 0, found {value}"


def _at_least_zero(settings: object, name: str) -> tuple[bool, str]:
    value = getattr(settings, name)
    return value >= 0, f"{name}: expected at least 0, found {value}"
