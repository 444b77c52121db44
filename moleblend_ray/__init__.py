"""Pretrain molecular encoders at scale on Ray by the MoleBLEND method, and fine-tune them into property models.

Names are imported on first use: `import moleblend_ray` costs nothing, and training from prepared shards never
imports RDKit.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moleblend_ray.chemistry.config import ConformerConfig, FeaturizeConfig
    from moleblend_ray.config.cluster import ClusterConfig
    from moleblend_ray.config.compose import collection_preset, model_preset
    from moleblend_ray.config.download import DownloadConfig
    from moleblend_ray.config.downstream import (
        BaselineConfig,
        EmbedConfig,
        FinetuneConfig,
        LeaderboardConfig,
        PredictConfig,
        RefitConfig,
        SweepConfig,
        TaskConfig,
    )
    from moleblend_ray.config.inspect import CheckpointsConfig, InspectConfig
    from moleblend_ray.config.plan import PlanConfig
    from moleblend_ray.config.prepare import PrepareConfig
    from moleblend_ray.config.pretrain import PretrainConfig
    from moleblend_ray.config.status import StatusConfig
    from moleblend_ray.config.tools import ExportConfig, SamplesConfig
    from moleblend_ray.data.config import OrderConfig, StreamConfig
    from moleblend_ray.data.files.download import Collection, RemoteFile
    from moleblend_ray.data.files.transfer import TransferOptions
    from moleblend_ray.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        MoleBlendError,
        StorageError,
        TrainingError,
    )
    from moleblend_ray.evaluation.models.baselines import BaselineKind
    from moleblend_ray.evaluation.search import SearchSpace
    from moleblend_ray.evaluation.settings import FinetuneSettings
    from moleblend_ray.evaluation.tasks import Metric, ReplicateRule, SplitKind, TaskKind
    from moleblend_ray.inference import MoleculeEncoder, PropertyPredictor
    from moleblend_ray.model.batch import MoleculeBatch
    from moleblend_ray.model.config import BlendConfig, LossConfig, ModelConfig
    from moleblend_ray.model.moleblend import MoleBlendModel as MoleBlend
    from moleblend_ray.orchestration.checkpoints import inspect_checkpoints
    from moleblend_ray.orchestration.data import inspect_data
    from moleblend_ray.orchestration.download import download
    from moleblend_ray.orchestration.downstream.cross_validation import cross_validate
    from moleblend_ray.orchestration.downstream.finetune import finetune
    from moleblend_ray.orchestration.downstream.refit import refit, refit_tasks
    from moleblend_ray.orchestration.downstream.sweep import sweep
    from moleblend_ray.orchestration.downstream.task_groups import finetune_tasks, sweep_tasks
    from moleblend_ray.orchestration.export import export
    from moleblend_ray.orchestration.leaderboard import leaderboard
    from moleblend_ray.orchestration.library.embed import embed
    from moleblend_ray.orchestration.library.predict import predict
    from moleblend_ray.orchestration.plan import plan
    from moleblend_ray.orchestration.preparation.prepare import prepare
    from moleblend_ray.orchestration.pretraining.pretrain import pretrain
    from moleblend_ray.orchestration.samples import samples
    from moleblend_ray.orchestration.status import status
    from moleblend_ray.planning.settings import (
        FailureSettings,
        NetworkSettings,
        PriceSettings,
        StorageSettings,
    )
    from moleblend_ray.training.config import (
        CheckpointConfig,
        OptimConfig,
        TrackingConfig,
        TrainConfig,
    )
    from moleblend_ray.training.export import load_model

__version__ = "0.1.0"

__all__ = [
    "BaselineConfig",
    "BaselineKind",
    "BlendConfig",
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointsConfig",
    "ClusterConfig",
    "Collection",
    "ConfigError",
    "ConformerConfig",
    "DataError",
    "DownloadConfig",
    "EmbedConfig",
    "ExportConfig",
    "FailureSettings",
    "FeaturizeConfig",
    "FinetuneConfig",
    "FinetuneSettings",
    "InspectConfig",
    "LeaderboardConfig",
    "LossConfig",
    "Metric",
    "ModelConfig",
    "MoleBlend",
    "MoleBlendError",
    "MoleculeBatch",
    "MoleculeEncoder",
    "NetworkSettings",
    "OptimConfig",
    "OrderConfig",
    "PlanConfig",
    "PredictConfig",
    "PrepareConfig",
    "PretrainConfig",
    "PriceSettings",
    "PropertyPredictor",
    "RefitConfig",
    "RemoteFile",
    "ReplicateRule",
    "SamplesConfig",
    "SearchSpace",
    "SplitKind",
    "StatusConfig",
    "StorageError",
    "StorageSettings",
    "StreamConfig",
    "SweepConfig",
    "TaskConfig",
    "TaskKind",
    "TrackingConfig",
    "TrainConfig",
    "TrainingError",
    "TransferOptions",
    "__version__",
    "collection_preset",
    "cross_validate",
    "download",
    "embed",
    "export",
    "finetune",
    "finetune_tasks",
    "inspect_checkpoints",
    "inspect_data",
    "leaderboard",
    "load_model",
    "model_preset",
    "plan",
    "predict",
    "prepare",
    "pretrain",
    "refit",
    "refit_tasks",
    "samples",
    "status",
    "sweep",
    "sweep_tasks",
]

# Name -> module and, where it differs, the name there.
_HOMES = {
    "BaselineConfig": "config.downstream",
    "BaselineKind": "evaluation.models.baselines",
    "BlendConfig": "model.config",
    "CheckpointConfig": "training.config",
    "CheckpointError": "errors",
    "CheckpointsConfig": "config.inspect",
    "ClusterConfig": "config.cluster",
    "Collection": "data.files.download",
    "ConfigError": "errors",
    "ConformerConfig": "chemistry.config",
    "DataError": "errors",
    "DownloadConfig": "config.download",
    "EmbedConfig": "config.downstream",
    "ExportConfig": "config.tools",
    "FailureSettings": "planning.settings",
    "FeaturizeConfig": "chemistry.config",
    "FinetuneConfig": "config.downstream",
    "FinetuneSettings": "evaluation.settings",
    "InspectConfig": "config.inspect",
    "LeaderboardConfig": "config.downstream",
    "LossConfig": "model.config",
    "Metric": "evaluation.tasks",
    "ModelConfig": "model.config",
    "MoleBlend": "model.moleblend:MoleBlendModel",
    "MoleBlendError": "errors",
    "MoleculeBatch": "model.batch",
    "MoleculeEncoder": "inference",
    "NetworkSettings": "planning.settings",
    "OptimConfig": "training.config",
    "OrderConfig": "data.config",
    "PlanConfig": "config.plan",
    "PredictConfig": "config.downstream",
    "PrepareConfig": "config.prepare",
    "PretrainConfig": "config.pretrain",
    "PriceSettings": "planning.settings",
    "PropertyPredictor": "inference",
    "RefitConfig": "config.downstream",
    "RemoteFile": "data.files.download",
    "ReplicateRule": "evaluation.tasks",
    "SamplesConfig": "config.tools",
    "SearchSpace": "evaluation.search",
    "SplitKind": "evaluation.tasks",
    "StatusConfig": "config.status",
    "StorageError": "errors",
    "StorageSettings": "planning.settings",
    "StreamConfig": "data.config",
    "SweepConfig": "config.downstream",
    "TaskConfig": "config.downstream",
    "TaskKind": "evaluation.tasks",
    "TrackingConfig": "training.config",
    "TrainConfig": "training.config",
    "TrainingError": "errors",
    "TransferOptions": "data.files.transfer",
    "collection_preset": "config.compose",
    "cross_validate": "orchestration.downstream.cross_validation",
    "download": "orchestration.download",
    "embed": "orchestration.library.embed",
    "export": "orchestration.export",
    "finetune": "orchestration.downstream.finetune",
    "finetune_tasks": "orchestration.downstream.task_groups",
    "inspect_checkpoints": "orchestration.checkpoints",
    "inspect_data": "orchestration.data",
    "leaderboard": "orchestration.leaderboard",
    "load_model": "training.export",
    "model_preset": "config.compose",
    "plan": "orchestration.plan",
    "predict": "orchestration.library.predict",
    "prepare": "orchestration.preparation.prepare",
    "pretrain": "orchestration.pretraining.pretrain",
    "refit": "orchestration.downstream.refit",
    "refit_tasks": "orchestration.downstream.refit",
    "samples": "orchestration.samples",
    "status": "orchestration.status",
    "sweep": "orchestration.downstream.sweep",
    "sweep_tasks": "orchestration.downstream.task_groups",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
