"""Batch prediction on a Ray cluster: values of fine-tuned models for every molecule, with their uncertainty."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch

from moleblend_ray.config.accept import accepted
from moleblend_ray.config.downstream import PredictConfig
from moleblend_ray.data.dataset.dataset_files import prepared_source
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.ahead import mapped_ahead
from moleblend_ray.data.files.scratch import scratch_folder
from moleblend_ray.errors import ConfigError
from moleblend_ray.evaluation.prediction.ensemble import load_members
from moleblend_ray.evaluation.prediction.panel import Panel, build_predictor
from moleblend_ray.evaluation.prediction.prediction import Predictor
from moleblend_ray.evaluation.results.result_files import PREDICT
from moleblend_ray.orchestration.library.part_writer import PartsJob
from moleblend_ray.orchestration.library.parts import run_parts

CSV_NAME = "predictions.csv"
"""File with all parts as one table, written if asked for."""

_THREADS: Final = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictSummary:
    """What became of the molecules, and where the predictions are."""

    out: str
    """Directory of the predictions."""
    predictions: int
    """Molecules with a prediction."""
    rejected: int
    """Source rows without a prediction; each is in ``rejected.parquet`` with its reason."""
    rejected_by_reason: dict[str, int]
    """Number of these rows by the reason."""
    columns: tuple[str, ...]
    """Names of the predicted properties."""
    unit: str
    """Unit of the predictions, of several tasks all of them; empty for classes, for which the probability of class 1 is predicted."""
    models: int
    """Number of models."""
    half_widths: dict[str, float | None]
    """Property -> half of the width of its intervals, in the unit; None if not known. Empty for classes, and without intervals."""
    parts: int
    """Number of Parquet files."""
    parts_reused: int
    """Parts that an earlier, interrupted command had made."""
    molecules_per_s: float | None
    """Molecules per second that the command predicted, including the start of its actors; None if all parts were
    there."""
    seconds: float
    """Wall time of the command that finished the work."""
    already_finished: bool
    """True if an earlier command had finished the work; then this one at most wrote a missing CSV file."""


def predict(config: PredictConfig) -> PredictSummary:
    """Write predictions with uncertainty to ``<out>/parts/part-NNNNN.parquet``, rows in the order of the source.

    Repeating a finished command does nothing; repeating an interrupted one makes the parts that are missing.
    """
    config = accepted(config, PredictConfig)
    if config.atom_contributions and (prepared := prepared_source(config.sources())) is not None:
        _require_canonical_order(prepared)
    outcome = run_parts(predict_job(config))
    summary = outcome.summary
    csv = storage.join(config.out, CSV_NAME)
    if config.csv and not (outcome.already_finished and storage.exists(csv)):
        _write_csv(config.out, summary)
    return PredictSummary(
        out=config.out,
        predictions=summary["predictions"],
        rejected=summary["rejected"],
        # Summaries of earlier versions do not tell.
        rejected_by_reason=dict(summary.get("rejected_by_reason", {})),
        columns=tuple(summary["columns"]),
        unit=summary["unit"],
        models=len(summary["models"]),
        # Neither do they tell of intervals, which they had none of.
        half_widths=dict(summary.get("half_widths", {})),
        parts=len(summary["parts"]),
        parts_reused=summary["parts_reused"],
        molecules_per_s=summary["molecules_per_s"],
        seconds=summary["seconds"],
        already_finished=outcome.already_finished,
    )


def _require_canonical_order(source: str) -> None:
    """Raise ConfigError if the atoms of a prepared data set have another order than its SMILES."""
    if not MoleculeForm.of_options(load_manifest(source).options).canonical_order:
        raise ConfigError(
            f"atom_contributions: the atoms of {source} have the order of the files that it was prepared from, so contributions "
            "could not be told by its SMILES. Give these files, or prepare them with featurize.canonical_order=true"
        )


def predict_job(config: PredictConfig) -> PartsJob:
    """The job with which :func:`predict` makes predictions from shards."""
    return PartsJob(
        kind=PREDICT,
        config=config,
        model=", ".join(config.model_uris()),
        load=partial(load_predictor, config),
        other_settings=("csv",),
    )


def load_predictor(config: PredictConfig, device: torch.device) -> Predictor | Panel:
    """Load all models to ``device``."""
    return build_predictor(
        load_members(config.model_uris()),
        conformers=config.conformers,
        threshold=config.applicability,
        interval=config.interval,
        atom_contributions=config.atom_contributions,
        batch_size=config.batch_size,
        device=device,
    )


def _write_csv(out: str, summary: Mapping[str, Any]) -> None:
    """Write ``predictions.csv`` from the parts, with a few of them in memory at a time.

    ``source_row`` counts the rows of one file; if there are several, a column ``source_uri`` tells them apart.
    """

    def read(part: Mapping[str, Any]) -> pa.Table:
        content = storage.read_bytes(storage.join(out, part["path"]))
        return _without_lists(pq.read_table(pa.BufferReader(content)))

    parts = summary["parts"]
    # Summaries of earlier versions do not tell.
    files = {part.get("source_uri") for part in parts}
    with scratch_folder("csv") as folder:
        path = folder / CSV_NAME
        with path.open("wb") as file:
            tables = mapped_ahead(read, parts, _THREADS)
            for index, (part, table) in enumerate(zip(parts, tables, strict=True)):
                if len(files) > 1:
                    uris = pa.repeat(pa.scalar(part["source_uri"], pa.string()), len(table))
                    table = table.add_column(1, "source_uri", uris)
                options = pa.csv.WriteOptions(include_header=index == 0)
                pa.csv.write_csv(table, file, options)
        storage.upload(path, storage.join(out, CSV_NAME))


def _without_lists(table: pa.Table) -> pa.Table:
    """The table with lists of numbers as text, in JSON: a cell of a CSV file holds no list."""
    for place, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            texts = [
                None if row is None else json.dumps([float(f"{value:.6g}") for value in row])
                for row in table[place].to_pylist()
            ]
            table = table.set_column(place, field.name, pa.array(texts, pa.string()))
    return table
