"""Settings of training. Without torch, so that configurations compose fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moleblend_ray.checks import above, at_least, check_all
from moleblend_ray.settings import typed

Strategy = Literal["fsdp", "ddp", "none"]
Precision = Literal["fp32", "bf16"]


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """How parameters follow their gradients: AdamW, linear warm-up, cosine."""

    learning_rate: float = 2e-4
    """Peak learning rate, reached at the end of the warm-up."""

    final_learning_rate: float = 0.0
    """Learning rate that the cosine reaches after the last step."""

    warmup_steps: int = 1000
    """Optimizer steps of linear warm-up from 0; a shorter run only warms up."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's first and second moment."""

    eps: float = 1e-8
    """Term added to the denominator of Adam's update."""

    weight_decay: float = 0.0
    """Decoupled weight decay per unit learning rate, on matrices only: no bias, norm or embedding."""

    clip_norm: float = 5.0
    """Largest global L2 norm of the gradient; a longer one is scaled down to it."""

    def __post_init__(self) -> None:
        peak, final = self.learning_rate, self.final_learning_rate
        check_all(
            *above(self, 0, "learning_rate", "eps", "clip_norm"),
            *at_least(self, 0, "warmup_steps", "weight_decay"),
            (
                0 <= final <= peak,
                f"final_learning_rate: expected 0 to learning_rate ({peak}), found {final}",
            ),
            (
                all(0 <= beta < 1 for beta in self.betas),
                f"betas: expected two numbers in [0, 1), found {self.betas}",
            ),
        )


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long and on what arithmetic the loop runs."""

    num_steps: int = 200_000
    """Optimizer steps of the whole run."""

    strategy: Strategy = "fsdp"
    """fsdp: parameters, gradients and moments sharded over workers (FSDP2); ddp: a copy on each worker; none:
    one worker alone."""

    fsdp_replicas: int = 1
    """Copies of the model under fsdp, each sharded over the workers / this number of them (HSDP). With the number of nodes,
    parameters are gathered within a node, and only gradients of a shard cross between nodes."""

    fsdp_reshard: bool = True
    """Free the gathered parameters of a block after its forward pass, and gather them again for the backward pass, in each
    micro-batch. false: keep them until the step ends, which takes the memory of a whole model (2 bytes a parameter with bf16
    on GPUs, else 4) and gathers once a step. The numbers stay the same."""

    precision: Precision = "fp32"
    """bf16: matrix products (and FSDP's gathering of layers) in bfloat16; weights and reductions stay float32."""

    compile: bool = False
    """Fuse the inside of the blocks with torch.compile, on GPUs: it takes about a minute at the start, and a C++ compiler. Random
    choices of dropout then are others than without it."""

    activation_checkpointing: bool = False
    """Keep only the input of each block for the backward pass and compute its inside again: a third more time in the
    blocks, a fraction of their memory. The numbers stay the same."""

    prefetch_steps: int = 2
    """Steps that are unpacked and copied to the device ahead of the one that computes; more bridges uneven data,
    and takes device memory."""

    log_every: int = 1
    """Steps between reports to tracker and progress display; the run's own JSON lines hold every step."""

    profile: bool = False
    """Write a profiler trace of a few early steps of the first worker to `profile/` under the run."""

    on_non_finite: Literal["stop", "skip"] = "stop"
    """What to do about a step whose loss or gradient is not finite: stop: end the run before the update; skip: leave the step's
    update out and go on. Both write its molecules to `anomalies/` under the run."""

    max_skipped_steps: int = 10
    """Steps that a run may skip in all; one more ends it."""

    spike_deviations: float | None = 10.0
    """Losses that lie more standard deviations than this above the median of the last 200 steps are logged, and the step's
    molecules written to `anomalies/` under the run; null: no look-out for them."""

    max_failures: int = 3
    """Losses of workers (killed, out of memory, storage out of reach) without a new checkpoint after which the run ends with an
    error. After each, all workers start again from the newest checkpoint. A loss that is not finite ends the run at
    once; nodes that announce that they go do not count."""

    validate_every: int = 1000
    """Steps between validations (one more at the end); 0 for none."""

    validation_molecules: int = 2048
    """Molecules of the valid split that a validation sees, always the same, from places all over the split; fewer if the split
    has fewer."""

    def __post_init__(self) -> None:
        check_all(
            *at_least(
                self,
                1,
                "num_steps",
                "fsdp_replicas",
                "prefetch_steps",
                "max_skipped_steps",
                "log_every",
                "validation_molecules",
            ),
            *at_least(self, 0, "max_failures", "validate_every"),
            *above(self, 0, "spike_deviations"),
            (
                self.fsdp_replicas == 1 or self.strategy == "fsdp",
                f"fsdp_replicas: {self.fsdp_replicas} copies are for strategy fsdp, found strategy {self.strategy}",
            ),
            (
                self.fsdp_reshard or self.strategy == "fsdp",
                f"fsdp_reshard: false is for strategy fsdp, found strategy {self.strategy}",
            ),
        )


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the state of a run is committed, and how much of its past is kept."""

    every_steps: int = 1000
    """Optimizer steps between checkpoints; there is always one at the end."""

    asynchronous: bool = True
    """Train on while a checkpoint is written: a step waits only for a copy of the state in the memory of the host (12 bytes a
    parameter for each copy of the model: over the workers under fsdp, in each of them under ddp). false: no copy, and the
    step waits for the whole save."""

    max_failed_saves: int = 3
    """Saves in a row that may fail (storage out of reach, disk full) while training goes on; the next tries again with
    newer state. One more, or a failure of the last save, counts as a loss of workers (train.max_failures)."""

    keep_last: int = 3
    """Newest checkpoints kept; older ones are deleted after a newer one is committed, but for those below."""

    keep_every_steps: int | None = None
    """Checkpoints whose step is a multiple of this are kept for good; null for none."""

    keep_best: int = 0
    """Checkpoints with the lowest validation loss that are kept. Only those count that were validated at their own step: let
    `every_steps` divide `train.validate_every`, or the other way round."""

    def __post_init__(self) -> None:
        check_all(
            *at_least(self, 1, "every_steps", "keep_last", "keep_every_steps"),
            *at_least(self, 0, "max_failed_saves", "keep_best"),
            (
                self.every_steps < 1
                or self.keep_every_steps is None
                or self.keep_every_steps % self.every_steps == 0,
                f"keep_every_steps: expected null or a multiple of every_steps ({self.every_steps}), "
                f"found {self.keep_every_steps}",
            ),
        )


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where the numbers of a run go besides its own JSON lines."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    """offline: wandb files in `dir` for a later `wandb sync`; online: to the server; disabled: no wandb."""

    project: str = "moleblend"
    """wandb project."""

    name: str | None = None
    """Name of the run in wandb; null: the last part of the run's URI."""

    dir: str = "runs/wandb"
    """Local folder of the wandb files, on the machine of the first worker."""
