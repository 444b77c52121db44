"""Names within the ``out`` of fine-tuning, sweeps, embeddings and predictions that several modules know, and whose it is.

They are apart from what writes these files, as reading them must not take the import of torch, RDKit and Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from moleblend_ray.errors import ConfigError

IDENTITY_NAME: Final = "config.json"
"""What question the results in a directory answer; another question needs another directory."""

RESULTS_NAME: Final = "results.json"
"""The results of a fine-tuning or sweep; its presence means that everything is done."""

REPORT_NAME: Final = "report.md"
"""The results for people, beside them."""

DATA_DIR: Final = "data"
"""Folder into which fine-tuning and sweeps prepare a raw source."""

MODELS_DIR: Final = "models"
"""Folder of the models, one per seed."""

SEED_RESULT_NAME: Final = "result.json"
"""The result of a seed, beside its model; written last."""

REFIT_NAME: Final = "refit.json"
"""Which models were trained on all molecules, and how; its presence means that all of them are there."""

BASELINES_DIR: Final = "baselines"
"""Folder of the results of baselines, by kind."""

FOLDS_DIR: Final = "folds"
"""Folder of the runs of a cross-validation, one for each fold."""

OUT_OF_FOLD_NAME: Final = "out_of_fold.parquet"
"""The predictions of a cross-validation: for each molecule, those of the models that it had no part in."""

TUNE_DIR: Final = "tune"
"""Folder of everything about trials."""

EPOCHS_DIR: Final = f"{TUNE_DIR}/epochs"
"""Folder of the reported epochs, with a file for each trial."""

LEADERBOARD_NAME: Final = "leaderboard"
"""Name of the files ``leaderboard.json``, ``.csv``, ``.md`` and ``.html`` without ending."""

PREPARED_DIR: Final = "prepared"
"""Folder into which embeddings and predictions prepare a raw source."""

PARTS_DIR: Final = "parts"
"""Folder of the parts of embeddings and predictions."""


def fold_path(fold: int) -> str:
    """Folder of a run of a cross-validation, relative to its ``out``."""
    return f"{FOLDS_DIR}/fold-{fold}"


class PartsKind(NamedTuple):
    """A command whose results are parts, one per shard of molecules."""

    command: str
    counted: str
    """Key of the number of molecules in its summary."""

    @property
    def summary_name(self) -> str:
        """File with every part, its rows, bytes and checksum; written last."""
        return f"{self.counted}.json"


EMBED: Final = PartsKind("embed", "embeddings")
PREDICT: Final = PartsKind("predict", "predictions")


def command_of(settings: Any) -> str | None:
    """The command of `moleblend` whose settings these are, as ``config.json`` states them; None if they do not tell."""
    if not isinstance(settings, Mapping):
        return None
    if "job" in settings:
        return str(settings["job"]).removesuffix("Config").lower()
    # A pretraining run states its settings alone.
    return "pretrain" if "order" in settings else None


def require_command(out: str, stored: Any, command: str) -> None:
    """Raise ConfigError if ``out``, with the settings ``stored``, holds what another command than this one has made."""
    theirs = command_of(stored)
    if theirs not in (None, command):
        raise ConfigError(
            f"out: {out} holds results of `moleblend {theirs}`. Give another `out` for `moleblend {command}`"
        )
