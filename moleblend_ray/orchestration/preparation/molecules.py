"""The molecules of a downstream command: a prepared data set, or raw files that are prepared on the way."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final

from moleblend_ray.chemistry.config import ConformerConfig, FeaturizeConfig
from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.downstream import (
    EmbedConfig,
    LibraryConfig,
    PredictConfig,
    TaskConfig,
)
from moleblend_ray.config.prepare import PrepareConfig
from moleblend_ray.data.dataset.dataset_files import prepared_source
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.preparation.claim import rows_per_chunk_of
from moleblend_ray.data.sources import ColumnConfig, SourceSet, find_sources, inspect_sources
from moleblend_ray.data.sources.columns import ColumnError
from moleblend_ray.errors import ConfigError, without_credentials
from moleblend_ray.host import available_cpus
from moleblend_ray.orchestration.cluster.session import is_private, logical_cpus
from moleblend_ray.orchestration.preparation.prepare import prepare

logger = logging.getLogger(__name__)

_WANTED_CHUNKS: Final = 64
"""Chunks of a library that is neither small nor large: more than most machines have CPUs."""
_FEWEST_ROWS: Final = 64
"""Of a chunk: some seconds of work with conformers, and none to speak of for the files of a chunk."""
_MOST_ROWS: Final = 4096
_BYTES_WITH_ATOMS: Final = 2048
"""Usual bytes of a record that holds its atoms, such as an SD record."""
_BYTES_OF_SMILES: Final = 48
_BYTES_OF_CELL: Final = 4

_TASK_SETTINGS: Final = {
    "smiles_column": "task.smiles_column",
    "id_column": "task.id_column",
    "label_columns": "task.columns",
    "relation_column": "task.relation_column",
}
"""What the settings of `prepare` are called where a task has its own."""

RAW_SETTINGS: Final[Mapping[str, Any]] = {
    field.name: field.default
    for field in dataclasses.fields(LibraryConfig)
    if field.name in ("smiles_column", "id_column", "max_atoms")
} | {"relation_column": None, "classes": ()}
"""Settings of tasks and libraries that say how raw molecules are read -> their defaults."""


def look_at_source(
    molecules: TaskConfig | EmbedConfig | PredictConfig, label_columns: tuple[str, ...] | None
) -> SourceSet | None:
    """Files and columns of raw molecules, for :func:`prepare_molecules`; None for a prepared dataset.

    Raises ColumnError if there is no column of a name that is asked for, and ConfigError for settings of raw molecules with a
    prepared dataset.
    """
    refuse_raw_settings(molecules)
    if prepared_source(molecules.sources()) is not None:
        return None
    columns = ColumnConfig(
        smiles_column=molecules.smiles_column,
        id_column=molecules.id_column,
        label_columns=label_columns,
        **_label_settings(molecules),
    )
    with _settings_named_as_in(molecules):
        return inspect_sources(find_sources(*molecules.sources()), columns)


def _label_settings(molecules: TaskConfig | EmbedConfig | PredictConfig) -> dict[str, Any]:
    """How labels are read, as `prepare` calls these settings."""
    if not isinstance(molecules, TaskConfig):
        return {}
    return {
        "censored_labels": molecules.censored,
        "relation_column": molecules.relation_column,
        "classes": molecules.classes,
    }


def refuse_raw_settings(molecules: TaskConfig | EmbedConfig | PredictConfig) -> None:
    """Raise ConfigError for settings of raw molecules with a prepared dataset, in which they would change nothing."""
    section = "task." if isinstance(molecules, TaskConfig) else ""
    given = [
        f"{section}{name}"
        for name, usual in RAW_SETTINGS.items()
        if getattr(molecules, name, usual) != usual
    ]
    if given and (prepared := prepared_source(molecules.sources())) is not None:
        raise ConfigError(
            f"{', '.join(given)}: only for raw molecules, but {prepared} is a prepared data set, which is used as it is. "
            "Leave this out, or give the files that it was made from"
        )


@contextmanager
def _settings_named_as_in(molecules: TaskConfig | EmbedConfig | PredictConfig) -> Iterator[None]:
    """Let a ColumnError name the setting as the command does."""
    try:
        yield
    except ColumnError as error:
        if not isinstance(molecules, TaskConfig):
            raise
        raise ColumnError(_TASK_SETTINGS[error.setting], error.reason) from error


def prepare_molecules(
    molecules: TaskConfig | EmbedConfig | PredictConfig,
    out: str,
    *,
    label_columns: tuple[str, ...] | None,
    conformers: int,
    form: MoleculeForm | None,
    cluster: ClusterConfig,
    sources: SourceSet | None = None,
    require_coordinates: bool = False,
) -> str:
    """URI of the prepared dataset: the source itself if it is prepared, else ``out``, which is made or completed now.

    ``form`` is that of the molecules that the model was trained on, None if it is unknown: raw molecules get it, and a
    warning is logged if prepared ones have another. All molecules are in one split, in the order of the source. ``sources``
    is what :func:`look_at_source` has found, if it was called. ``require_coordinates`` rejects raw molecules that get none.
    """
    if (prepared := prepared_source(molecules.sources())) is not None:
        if form is not None:
            _warn_of_other_form(prepared, form)
        return prepared
    rows = rows_per_chunk_of(out)
    if rows is None:
        sources = sources or look_at_source(molecules, label_columns)
        assert sources is not None  # it is not prepared
        rows = rows_per_chunk(sources)
    config = PrepareConfig(
        source=molecules.source,
        out=out,
        smiles_column=molecules.smiles_column,
        id_column=molecules.id_column,
        label_columns=label_columns,
        **_label_settings(molecules),
        featurize=FeaturizeConfig(
            **asdict(form or MoleculeForm()),
            max_atoms=molecules.max_atoms,
            require_coordinates=require_coordinates,
            conformers=ConformerConfig.of_count(conformers),
        ),
        rows_per_chunk=rows,
        valid_fraction=0.0,
        cluster=dataclasses.replace(cluster, num_data_actors=_most_actors(cluster)),
    )
    with _settings_named_as_in(molecules):
        prepare(config, wants_coordinates=bool(conformers), sources=sources)
    return out


def rows_per_chunk(sources: SourceSet) -> int:
    """Rows per chunk of raw molecules, by the bytes of the source alone: a small library has many chunks, too, so that
    many CPUs share it, and a large one has no more files than it needs.

    The number of CPUs has no part in it: the same source has the same chunks, and so the same shards and parts, on every
    machine. What was begun with other chunks goes on with those, as its plan states them (:func:`rows_per_chunk_of`).
    """
    estimated = sum(
        layout.file.size
        / (
            _BYTES_WITH_ATOMS
            if layout.holds_atoms
            else _BYTES_OF_SMILES + _BYTES_OF_CELL * len(layout.columns)
        )
        for layout in sources.layouts
    )
    # A power of two, so that a source that is a little longer has the same chunks.
    rows = 1 << int(estimated / _WANTED_CHUNKS).bit_length()
    return min(max(rows, _FEWEST_ROWS), _MOST_ROWS)


def _most_actors(cluster: ClusterConfig) -> int:
    """Actors that may prepare: the CPUs of the workers are idle until the molecules are there, and so is all of a machine
    whose cluster ends with the command."""
    most = max(cluster.num_data_actors, cluster.num_workers)
    if not is_private(cluster):
        return most
    return max(most, min(available_cpus(), logical_cpus(cluster)))


def _warn_of_other_form(source: str, form: MoleculeForm) -> None:
    differing = form.difference(MoleculeForm.of_options(load_manifest(source).options))
    if differing:
        logger.warning(
            "the model was trained on molecules of another form than those of %s, and knows less of them (%s). Prepare them "
            "like the molecules of training, or give the raw files, which get that form by themselves",
            without_credentials(source),
            differing,
        )
