"""The meaning of the columns of a source: what the views of its files have in common."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from moleblend_ray.chemistry.rejection import Rejection
from moleblend_ray.data.dataset.manifest import LabelColumn
from moleblend_ray.data.sources.cells import class_labels
from moleblend_ray.data.sources.columns import ColumnError, no_column
from moleblend_ray.data.sources.parsing import parse_items
from moleblend_ray.data.sources.reading import SAMPLE_RECORDS, first_items, open_items
from moleblend_ray.data.sources.records import (
    ColumnConfig,
    SourceFile,
    SourceLayout,
    SourceSet,
)
from moleblend_ray.data.sources.views import FileView, look_at
from moleblend_ray.errors import ConfigError, DataError, without_credentials

logger = logging.getLogger(__name__)

_THREADS: Final = 16


def inspect_sources(files: Sequence[SourceFile], config: ColumnConfig) -> SourceSet:
    """Columns and labels of all files, from headers, schemas and a sample at the beginning of each.

    ColumnError for columns that they lack; DataError if all are empty, one cannot be read, or a geometry is not that of
    its table.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        views = list(pool.map(lambda file: look_at(file, config), files))
    if all(view.is_empty for view in views):
        raise DataError(f"{_names(files)}: empty, no records to read.")
    for view in views:
        if view.is_empty:
            logger.warning("%s is empty: no records to read", without_credentials(view.file.uri))
    labels = _merge_labels(views)
    if config.label_columns is not None:
        labels = _chosen_labels(config.label_columns, views, labels)
    of_classes = (
        class_labels((label.name for label in labels), config.classes) if config.classes else ()
    )
    if of_classes:
        labels = tuple(LabelColumn(label.name) for label in of_classes)
    if config.censored_labels:
        labels = tuple(label._replace(censored=True) for label in labels)
    names = tuple(label.name for label in labels)
    if config.relation_column is not None:
        _check_relations(config.relation_column, names, views)
    columns = tuple(label.column for label in of_classes) or names
    layouts = tuple(
        SourceLayout(
            file=view.file,
            columns=view.columns,
            smiles_column=view.smiles_column,
            id_column=view.id_column,
            labels=names,
            own_labels=_own_labels(view, names, columns),
            has_geometry=view.has_geometry,
            censored=config.censored_labels,
            relation_column=config.relation_column,
            class_labels=of_classes,
        )
        for view in views
    )
    for layout in layouts:
        if layout.file.geometry is not None:
            _check_geometry(layout)
    without = {column for column in columns if _is_without_values(column, views)}
    words = (
        word for view in views for column in columns for word in view.without_values.get(column, ())
    )
    return SourceSet(
        layouts=layouts,
        labels=labels,
        labels_without_values=tuple(
            name for name, column in zip(names, columns, strict=True) if column in without
        ),
        words=tuple(dict.fromkeys(words)) if without else (),
        classes=config.classes,
    )


def _is_without_values(column: str, views: Sequence[FileView]) -> bool:
    return all(
        column in view.without_values or (view.is_whole and column not in view.columns)
        for view in views
    )


def _own_labels(view: FileView, labels: Sequence[str], columns: Sequence[str]) -> tuple[str, ...]:
    """The labels that the file has, each of the column at the same index."""
    # A property that is not in the sample of an SD file may come later in the file.
    is_open = view.file.format == "sdf"
    return tuple(
        label
        for label, column in zip(labels, columns, strict=True)
        if is_open or column in view.columns
    )


def _check_geometry(layout: SourceLayout) -> None:
    """DataError if most of the first records of a geometry are of other molecules than the rows of its table."""
    file = layout.file
    assert file.geometry is not None
    with open_items(file) as items:
        sample = first_items(file, items, SAMPLE_RECORDS)
    with_geometry = [item for item in sample if item.geometry is not None]
    mismatches = [
        record
        for record in parse_items(with_geometry, layout, 0)
        if isinstance(record.content, Rejection) and record.content.code == "geometry_mismatch"
    ]
    if 2 * len(mismatches) > len(with_geometry):
        first = mismatches[0]
        assert isinstance(first.content, Rejection)
        raise DataError(
            f"{file.geometry.uri} is no geometry of {file.uri}: of the first {len(with_geometry)} records "
            f"{len(mismatches)} do not fit. Row {first.row}: {first.content.detail}. Give one of them only."
        )


def _merge_labels(views: Sequence[FileView]) -> tuple[LabelColumn, ...]:
    """Numeric columns of all files in order of appearance; ConfigError if two files state different units for one."""
    merged: dict[str, tuple[LabelColumn, SourceFile]] = {}
    for view in views:
        for label in view.numeric:
            known, file = merged.setdefault(label.name, (label, view.file))
            if label.unit and known.unit and label.unit != known.unit:
                raise ConfigError(
                    f"label_columns: {label.name!r} is in {known.unit} in {file.uri} and in {label.unit} "
                    f"in {view.file.uri}. Prepare them apart, or give label_columns without it."
                )
            if label.unit and not known.unit:
                merged[label.name] = (label, view.file)
    return tuple(label for label, _ in merged.values())


def _chosen_labels(
    names: Sequence[str], views: Sequence[FileView], numeric: Sequence[LabelColumn]
) -> tuple[LabelColumn, ...]:
    """The labels that were asked for; ConfigError for a name that no file has."""
    units = {label.name: label.unit for label in numeric}
    for name in names:
        _require_anywhere("label_columns", name, views)
    for view in views:
        for name, unit in view.units.items():
            units[name] = units.get(name) or unit
    return tuple(LabelColumn(name, units.get(name)) for name in names)


def _require_anywhere(setting: str, name: str, views: Sequence[FileView]) -> None:
    """ColumnError if no file has the column ``name`` of ``setting``; a warning if one may have it after its sample."""
    available = tuple(dict.fromkeys(column for view in views for column in view.columns))
    if name in available:
        return
    if all(view.is_whole for view in views):
        raise no_column(_names([view.file for view in views]), setting, name, available)
    logger.warning(
        "%s: no record has %r among the first %d of each file", setting, name, SAMPLE_RECORDS
    )


def _check_relations(name: str, labels: Sequence[str], views: Sequence[FileView]) -> None:
    """ColumnError if no file has the column ``name`` of relations, or if it is a label; a warning if some files lack it."""
    setting = "relation_column"
    if name in labels:
        raise ColumnError(
            setting,
            f"{name!r} is a label column, too; expected one that holds relations (>, <, =).",
        )
    _require_anywhere(setting, name, views)
    lacking = [
        view.file
        for view in views
        if view.is_whole and not view.is_empty and name not in view.columns
    ]
    if lacking:
        logger.warning(
            "%s: no %r in %s: numbers there count as measured, unless their own cells begin with a relation",
            setting,
            name,
            without_credentials(_names(lacking)),
        )


def _names(files: Sequence[SourceFile]) -> str:
    shown = ", ".join(file.uri for file in files[:3])
    return shown + (f" and {len(files) - 3} more" if len(files) > 3 else "")
