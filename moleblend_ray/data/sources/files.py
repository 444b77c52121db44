"""URIs -> the molecule files of a source."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

from moleblend_ray.data.dataset.dataset_files import MANIFEST_NAME
from moleblend_ray.data.files import storage
from moleblend_ray.data.files.download import RECORD_NAME
from moleblend_ray.data.sources import archives
from moleblend_ray.data.sources.damage import DamageError, unreadable
from moleblend_ray.data.sources.decompression import COMPRESSIONS, compression_of
from moleblend_ray.data.sources.published import EXCLUSIONS_NAME, associate, pair_in_archive
from moleblend_ray.data.sources.records import Container, Format, SourceFile
from moleblend_ray.errors import ConfigError, DataError, without_credentials

logger = logging.getLogger(__name__)

_EXPECTED: Final = (
    ".sdf, .csv, .tsv, .smi, .cxsmiles, .mol (each also with .gz, .bz2, .xz or .zst), .tar (likewise) or .zip of these or of "
    "QM9's .xyz, or .parquet"
)
_PARQUET: Final = (".parquet", ".pq")
_WORKBOOKS: Final = (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods")
_THREADS: Final = 16
_NAMED: Final = 3
"""Files that a message names; the others it counts."""
_PROBE_BYTES: Final = 1 << 16


def find_sources(*uris: str) -> list[SourceFile]:
    """The molecule files of each file, directory (recursively) or glob: in the order given, within each sorted by URI.

    ``ARCHIVE!PATTERN`` stands for the members of an archive whose names match the glob.
    """
    files: list[SourceFile] = []
    exclusions: list[str] = []
    for uri in uris:
        found, lists = _files_of(uri)
        files += found
        exclusions += lists
    seen = Counter((file.uri, file.members) for file in files)
    repeated = [uri for (uri, _), count in seen.items() if count > 1]
    if repeated:
        raise ConfigError(
            f"source: {repeated[0]} is in two of {', '.join(uris)}; expected each file once. Leave one of them out."
        )
    return associate(files, exclusions)


def _files_of(uri: str) -> tuple[list[SourceFile], list[str]]:
    """The molecule files of one URI, and the lists of exclusions beside them."""
    base, members = _without_members(uri)
    try:
        listed = storage.list_files(base)
    except storage.NotFoundError as error:
        if "," not in base:
            raise
        raise storage.NotFoundError(
            f"{error} If these are several sources, give a list: source=[a.csv,b.csv], in Python a tuple"
        ) from error
    for info in listed:
        if storage.name_of(info.uri) == MANIFEST_NAME and _is_data_set_manifest(info.uri):
            raise ConfigError(
                f"source: {uri} holds a prepared data set already, that of {info.uri}; expected raw "
                "molecules (SDF, CSV/TSV, SMILES, Parquet). Give the source it was made of, or a glob that "
                "leaves it out. `embed` and `predict` take one prepared data set, but only alone."
            )
    lists = [info.uri for info in listed if storage.name_of(info.uri) == EXCLUSIONS_NAME]
    beside = (EXCLUSIONS_NAME, RECORD_NAME)
    others = [info for info in listed if storage.name_of(info.uri) not in beside]
    # A .txt file is read only if it is named itself: in a directory it is usually a note.
    is_named = _without_compression(storage.name_of(base)).endswith(".txt")
    with ThreadPoolExecutor(_THREADS) as pool:
        looked = list(pool.map(lambda info: _source_file(info, members, is_named=is_named), others))
    files = [file for file in looked if file is not None]
    if not files and not (lists and len(listed) == 1):
        found = ", ".join(storage.name_of(info.uri) for info in listed[:5]) or "no files"
        is_workbook = any(info.uri.lower().endswith(_WORKBOOKS) for info in listed)
        hint = " Save the sheet of a workbook as CSV in UTF-8." if is_workbook else ""
        raise DataError(f"No molecules at {uri}: found {found}; expected {_EXPECTED}.{hint}")
    if len(files) < len(others):
        left_out = [
            storage.name_of(info.uri)
            for info, file in zip(others, looked, strict=True)
            if file is None
        ]
        logger.warning(
            "%s: %d files of other kinds are left out: %s%s",
            without_credentials(uri),
            len(left_out),
            ", ".join(left_out[:_NAMED]),
            " ..." if len(left_out) > _NAMED else "",
        )
    return files, lists


def _without_members(uri: str) -> tuple[str, str]:
    """Archive and pattern of ``ARCHIVE!PATTERN``; another URI and the pattern ``*``."""
    archive, mark, pattern = uri.rpartition("!")
    if mark and archives.container_of(storage.name_of(archive)) and not storage.exists(uri):
        if not pattern:
            raise ConfigError(f"source: {uri}: expected a pattern of members after the '!'")
        return archive, pattern
    return uri, "*"


def _is_data_set_manifest(uri: str) -> bool:
    """Whether a file of this name, which other programs use too, is a manifest of ours."""
    try:
        value = storage.read_json(uri)
    except DataError:
        return False
    return isinstance(value, dict) and {"format_version", "fingerprint", "shards"} <= set(value)


def _source_file(info: storage.FileInfo, members: str, *, is_named: bool) -> SourceFile | None:
    """The file as a source; None if it holds no molecules."""
    name = storage.name_of(info.uri).lower()
    container = archives.container_of(name)
    form = _format_of(name, is_named=is_named)
    if container is None and form is None:
        return None
    _require_utf8(info.uri)
    head, probe = _probe(info)
    file = SourceFile(
        uri=info.uri,
        format=form or "sdf",
        size=info.size,
        probe=probe,
        container=container,
        members=members,
    )
    if container is None:
        _check_compression(info, head)
        return file
    return _archive(file, container) if info.size else None


def _require_utf8(uri: str) -> None:
    """DataError for a name in another encoding, as of files that come from other systems: no document could hold it."""
    shown = uri.encode(errors="backslashreplace").decode()
    if shown != uri:
        raise DataError(
            f"{shown}: its name is not in UTF-8. Rename it, or leave it out of the source."
        )


def _format_of(name: str, *, is_named: bool) -> Format | None:
    if name.endswith(_PARQUET):
        return "parquet"
    form = archives.text_format(name)
    if form is None and is_named:
        return "smi" if _without_compression(name).endswith(".txt") else None
    # Single .xyz files are not read: 100,000 files would become 100,000 shards.
    return None if form == "xyz" else form


def _without_compression(name: str) -> str:
    name = name.lower()
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return name


def _probe(info: storage.FileInfo) -> tuple[bytes, str]:
    """The beginning of the file, and a digest that tells whether the file has changed."""
    head = storage.read_range(info.uri, 0, min(info.size, _PROBE_BYTES)) if info.size else b""
    start = max(0, info.size - _PROBE_BYTES)
    tail = storage.read_range(info.uri, start, info.size - start) if start else b""
    return head, hashlib.sha256(head + tail + str(info.size).encode()).hexdigest()


def _check_compression(info: storage.FileInfo, head: bytes) -> None:
    name = storage.name_of(info.uri).lower()
    stated = next((kind for suffix, kind in COMPRESSIONS.items() if name.endswith(suffix)), None)
    # A file that is too short to tell is checked when it is read.
    if stated and len(head) >= 4 and compression_of(head) not in (stated, *_unsure(stated, head)):
        raise DataError(
            f"{info.uri} is not a {stated} file: it begins with {head[:8]!r}. Rename or repack it."
        )


def _unsure(stated: str, head: bytes) -> tuple[None, ...]:
    """Whether a head is too short for the magic number of bzip2 or xz."""
    return (None,) if stated in ("bzip2", "xz") and len(head) < 10 else ()


def _archive(file: SourceFile, container: Container) -> SourceFile | None:
    """The archive with the format of its members; None if no member holds molecules."""
    names: list[str] | None = None
    with storage.translate_errors("read", file.uri), storage.open_read(file.uri) as stream:
        if container == "zip":
            names = archives.zip_names(file.uri, stream)
    pair = pair_in_archive(file, names)
    if pair is not None:
        return pair
    with storage.translate_errors("read", file.uri), storage.open_read(file.uri) as stream:
        try:
            form = archives.first_format(file.uri, container, file.members, stream)
        except DamageError as damage:
            raise unreadable(file.uri, 0, damage) from damage
    return replace(file, format=form) if form is not None else None
