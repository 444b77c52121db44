"""Pretrain molecular encoders at scale on Ray by the MoleBLEND method, and fine-tune them into property models.

Names are imported on first use: `import moleblend_ray` costs nothing, and training from prepared shards never
imports RDKit.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moleblend_ray.config.downstream import EmbedConfig, FinetuneConfig, SweepConfig
    from moleblend_ray.config.prepare import PrepareConfig
    from moleblend_ray.config.pretrain import PretrainConfig
    from moleblend_ray.model.moleblend import MoleBlendModel as MoleBlend
    from moleblend_ray.orchestration.embed import embed
    from moleblend_ray.orchestration.finetune import finetune
    from moleblend_ray.orchestration.prepare import prepare
    from moleblend_ray.orchestration.pretrain import pretrain
    from moleblend_ray.orchestration.sweep import sweep

__version__ = "0.1.0"

__all__ = [
    "EmbedConfig",
    "FinetuneConfig",
    "MoleBlend",
    "PrepareConfig",
    "PretrainConfig",
    "SweepConfig",
    "__version__",
    "embed",
    "finetune",
    "prepare",
    "pretrain",
    "sweep",
]

_HOMES = {
    "EmbedConfig": ("moleblend_ray.config.downstream", "EmbedConfig"),
    "FinetuneConfig": ("moleblend_ray.config.downstream", "FinetuneConfig"),
    "MoleBlend": ("moleblend_ray.model.moleblend", "MoleBlendModel"),
    "PrepareConfig": ("moleblend_ray.config.prepare", "PrepareConfig"),
    "PretrainConfig": ("moleblend_ray.config.pretrain", "PretrainConfig"),
    "SweepConfig": ("moleblend_ray.config.downstream", "SweepConfig"),
    "embed": ("moleblend_ray.orchestration.embed", "embed"),
    "finetune": ("moleblend_ray.orchestration.finetune", "finetune"),
    "prepare": ("moleblend_ray.orchestration.prepare", "prepare"),
    "pretrain": ("moleblend_ray.orchestration.pretrain", "pretrain"),
    "sweep": ("moleblend_ray.orchestration.sweep", "sweep"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
