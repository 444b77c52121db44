"""Hyper-parameters of fine-tuning and the ranges a sweep draws them from. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from moleblend_ray.errors import check_all


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSettings:
    """How one fine-tuning run trains."""

    learning_rate: float = 1e-4
    """Peak learning rate of Adam with decoupled weight decay."""
    weight_decay: float = 1e-6
    """Decoupled weight decay; none on biases and normalisation."""
    batch_size: int = 32
    """Molecules per optimizer step."""
    epochs: int = 40
    """Passes over the training molecules, at most."""
    patience: int = 10
    """Epochs without a better validation score after which the run stops."""
    warmup_fraction: float = 0.06
    """Share of all steps in which the learning rate rises linearly; it then falls to 0 along a cosine."""
    head_dropout: float = 0.1
    """Dropout in the property head."""
    clip_norm: float = 5.0
    """Largest gradient norm."""
    micro_batch_size: int = 32
    """Molecules computed at once: memory and speed; the result only through which dropout is drawn."""

    def __post_init__(self) -> None:
        check_all(
            (self.learning_rate > 0, f"learning_rate: expected > 0, found {self.learning_rate}"),
            (self.weight_decay >= 0, f"weight_decay: expected >= 0, found {self.weight_decay}"),
            (self.batch_size >= 1, f"batch_size: expected >= 1, found {self.batch_size}"),
            (self.epochs >= 1, f"epochs: expected >= 1, found {self.epochs}"),
            (self.patience >= 1, f"patience: expected >= 1, found {self.patience}"),
            (
                0 <= self.warmup_fraction < 1,
                f"warmup_fraction: expected 0 <= fraction < 1, found {self.warmup_fraction}",
            ),
            (
                0 <= self.head_dropout < 1,
                f"head_dropout: expected 0 <= rate < 1, found {self.head_dropout}",
            ),
            (self.clip_norm > 0, f"clip_norm: expected > 0, found {self.clip_norm}"),
            (
                self.micro_batch_size >= 1,
                f"micro_batch_size: expected >= 1, found {self.micro_batch_size}",
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """Ranges of the hyper-parameters a sweep varies (defaults: the published ones)."""

    learning_rate: tuple[float, float] = (1e-6, 1e-4)
    """Lowest and highest, drawn evenly in the logarithm."""
    weight_decay: tuple[float, float] = (1e-7, 1e-3)
    """Lowest and highest, drawn evenly in the logarithm."""
    batch_size: tuple[int, ...] = (32, 64, 128, 256)
    """Values to choose from."""
    epochs: tuple[int, int] | None = None
    """Fewest and most; null: the task's own range."""

    def __post_init__(self) -> None:
        check_all(
            _log_range("learning_rate", self.learning_rate),
            _log_range("weight_decay", self.weight_decay),
            (
                bool(self.batch_size) and min(self.batch_size, default=0) >= 1,
                f"batch_size: expected values >= 1, found {list(self.batch_size)}",
            ),
            (
                self.epochs is None or 1 <= self.epochs[0] <= self.epochs[1],
                f"epochs: expected 1 <= fewest <= most, found {self.epochs}",
            ),
        )


def _log_range(name: str, limits: tuple[float, float]) -> tuple[bool, str]:
    return (
        0 < limits[0] <= limits[1],
        f"{name}: expected 0 < lowest <= highest, found {list(limits)}",
    )
