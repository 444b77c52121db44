"""Collections of molecules as users have them: SD files, tables of text or Parquet, archives, published layouts.

There are two steps. *Reading* goes through a file once and cuts it into chunks of raw records (:func:`read_chunks`)
without looking at the molecules; it is cheap, and sequential because a compressed text file cannot be split. *Parsing*
turns a chunk into records with identifiers and labels (:func:`parse_chunk`); it needs nothing but the chunk, so any
process can do it. For a damaged file, a DataError names the record where reading stopped.

Modules: ``records`` (the types), ``files`` (finding them), ``published`` (layouts known by name), ``layouts``
(columns and labels of all files) from ``views`` (of each file), ``headers`` and ``columns``, ``reading``, ``parsing``;
below them ``text``, ``rows``, ``cells``, ``parquet``, ``archives``, ``decompression`` and ``damage``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moleblend_ray.data.sources.files import find_sources
    from moleblend_ray.data.sources.layouts import inspect_sources
    from moleblend_ray.data.sources.parquet import ParquetPart, parquet_parts
    from moleblend_ray.data.sources.parsing import parse_chunk
    from moleblend_ray.data.sources.reading import read_chunks
    from moleblend_ray.data.sources.records import (
        ColumnConfig,
        RawRecord,
        RowChunk,
        SourceFile,
        SourceLayout,
        SourceSet,
    )

__all__ = [
    "ColumnConfig",
    "ParquetPart",
    "RawRecord",
    "RowChunk",
    "SourceFile",
    "SourceLayout",
    "SourceSet",
    "find_sources",
    "inspect_sources",
    "parquet_parts",
    "parse_chunk",
    "read_chunks",
]

_HOMES = {
    "ParquetPart": "parquet",
    "find_sources": "files",
    "inspect_sources": "layouts",
    "parquet_parts": "parquet",
    "parse_chunk": "parsing",
    "read_chunks": "reading",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "records")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
