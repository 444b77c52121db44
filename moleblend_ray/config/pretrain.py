"""What `moleblend pretrain` trains, on what, for how long, and where."""

from __future__ import annotations

from dataclasses import dataclass, field

from moleblend_ray.checks import check_all, locations
from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.data.config import OrderConfig, StreamConfig
from moleblend_ray.model.config import (
    BlendConfig,
    LossConfig,
    ModelConfig,
    check_objective,
)
from moleblend_ray.settings import run_checks, typed
from moleblend_ray.training.config import (
    CheckpointConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
)


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """A prepared dataset -> a pretrained encoder."""

    data: str
    """Directory of the prepared dataset, as a path or URI."""
    out: str
    """Directory of the run (checkpoints, metrics, export), as a path or URI that every worker reaches. The same
    command with the same directory continues the run."""
    seed: int = 0
    """Seed of initialisation, blending, noise and dropout; the data order has its own."""
    order: OrderConfig = field(default_factory=OrderConfig)
    """Which molecules each step sees."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """How they come to the workers."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Encoder and heads."""
    blend: BlendConfig = field(default_factory=BlendConfig)
    """Which relation each atom pair shows."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the heads."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, strategy and arithmetic."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the run is saved."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where its numbers go."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where it runs."""

    def __post_init__(self) -> None:
        run_checks(lambda: check_objective(self.model, self.loss), self._check_run)

    def reserved_cpus(self, num_actors: int, num_workers: int | None = None) -> float:
        """CPUs that ``num_workers`` (None: cluster.num_workers) and ``num_actors`` of the stream reserve together."""
        workers = self.cluster.num_workers if num_workers is None else num_workers
        return workers * self.cluster.cpus_per_worker + num_actors * self.stream.actor_cpus

    @property
    def worker_counts(self) -> tuple[int, ...]:
        """Numbers of workers that may train this run, ascending: one if it is not elastic."""
        most, fewest = self.cluster.num_workers, self.cluster.min_workers
        if fewest is None:
            return (most,)
        return tuple(
            count
            for count in range(fewest, most + 1)
            if self.order.num_streams % count == 0 and count % self.train.fsdp_replicas == 0
        )

    def _check_run(self) -> None:
        workers, streams = self.cluster.num_workers, self.order.num_streams
        reserved = self.reserved_cpus(self.stream.min_actors)
        local_cpus = self.cluster.local_cpus
        check_all(
            *locations(self, "data", "out"),
            (0 <= self.seed < 2**63, f"seed: expected 0 to 2**63 - 1, found {self.seed}"),
            (
                streams % workers == 0,
                f"cluster.num_workers: expected a divisor of order.num_streams ({streams}), found {workers}",
            ),
            (
                self.cluster.min_workers is None or len(self.worker_counts) > 1,
                f"cluster.min_workers: of the numbers from {self.cluster.min_workers} to {workers} only {workers} "
                f"divides order.num_streams ({streams}) into groups for train.fsdp_replicas "
                f"({self.train.fsdp_replicas}): lower it, or leave it null",
            ),
            (
                local_cpus is None or local_cpus >= reserved,
                f"cluster.local_cpus: expected null or at least {reserved:g}, which the workers and stream.min_actors "
                f"data actors reserve together, found {local_cpus}: they would wait for each other",
            ),
            (
                self.train.strategy != "none" or workers == 1,
                f"train.strategy: none trains one worker alone, found cluster.num_workers={workers}; "
                "use fsdp or ddp",
            ),
            (
                workers % self.train.fsdp_replicas == 0,
                f"train.fsdp_replicas: expected a divisor of cluster.num_workers ({workers}), "
                f"found {self.train.fsdp_replicas}",
            ),
            (
                self.checkpoint.keep_best == 0 or self.train.validate_every > 0,
                f"checkpoint.keep_best: expected 0 while train.validate_every is 0, found {self.checkpoint.keep_best}: "
                "without validations none is the best",
            ),
        )
