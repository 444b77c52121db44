"""Columns that settings name: whether a source has them, and the error if not."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from moleblend_ray.data.sources.records import SourceFile
from moleblend_ray.errors import ConfigError, DataError


class ColumnError(ConfigError):
    """A setting of :class:`ColumnConfig` names a column that a source does not have, or that cannot be read so."""

    def __init__(self, setting: str, reason: str) -> None:
        super().__init__(setting, reason)

    @property
    def setting(self) -> str:
        """Name in :class:`ColumnConfig`; another command may have another name for it."""
        return str(self.args[0])

    @property
    def reason(self) -> str:
        """What is wrong."""
        return str(self.args[1])

    def __str__(self) -> str:
        return f"{self.setting}: {self.reason}"


def require_column(file: SourceFile, setting: str, name: str, columns: Sequence[str]) -> str:
    """``name``, which ``setting`` names; ColumnError if it is not among ``columns``."""
    if name not in columns:
        raise no_column(file.uri, setting, name, columns)
    return name


def no_column(where: str, setting: str, name: str, columns: Sequence[str]) -> ColumnError:
    """The error for a column ``name`` that is not in the file or files ``where``; it tells the nearest of ``columns``."""
    folded = {column.lower(): column for column in columns}
    nearest = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.4)
    hint = f" Did you mean {folded[nearest[0]]!r}?" if nearest else ""
    shown = ", ".join(repr(column) for column in columns[:20]) or "none"
    more = f" and {len(columns) - 20} more" if len(columns) > 20 else ""
    if any("\ufffd" in column for column in columns):
        hint = " The names are not in UTF-8, save the file as such." + hint
    return ColumnError(setting, f"{where} has no {name!r}; it has {shown}{more}.{hint}")


def require_distinct(file: SourceFile, columns: Sequence[str]) -> None:
    """DataError if two columns have one name; columns without a name do not count."""
    repeated = sorted({name for name in columns if columns.count(name) > 1 and name})
    if repeated:
        raise DataError(f"{file.uri} has columns {repeated} more than once. Rename them.")
