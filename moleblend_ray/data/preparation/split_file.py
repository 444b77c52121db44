"""Split files as collections publish them -> which molecule belongs to which split.

No code in a file is executed: files of PyTorch are unpickled with an allow-list of NumPy arrays and plain containers.
"""

from __future__ import annotations

import codecs
import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.splits import NamedSplits
from moleblend_ray.data.sources.damage import DamageError
from moleblend_ray.data.sources.decompression import COMPRESSIONS, decompressed
from moleblend_ray.data.sources.rows import DELIMITERS, fields, stated_delimiter
from moleblend_ray.errors import DataError

_EXPECTED: Final = (
    "a split_dict.pt, .json, .npz or .csv file, a .zip with a split_dict.pt, or a directory of "
    "train.csv, valid.csv and test.csv (each also .gz)"
)
_MAX_BYTES: Final = 2 << 30
"""Limit for a decompressed file or member of an archive; the indices of 10^8 molecules take 0.8 GB."""
_ROW_COLUMNS: Final = ("row", "idx", "index", "source_row")
_ID_COLUMNS: Final = ("id", "mol_id")
_INDEX_FILES: Final = ("train", "valid", "test")
_TORCH_MAGIC: Final = 0x1950A86A20F9469CFC6C
"""First object in files of PyTorch before 1.6."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitTable:
    """Splits by row of the source or by molecule id; exactly one of the two is given."""

    by_row: dict[str, NDArray[np.int64]] | None = None
    """Split name -> ascending indices of source records, counted from 0. No record is in two splits."""
    by_id: dict[str, str] | None = None
    """Molecule id -> split name."""


def read_split_file(uri: str) -> SplitTable:
    """The splits in the file (or directory of index files) at ``uri``.

    ======================================  ==============================================================
    ``split_dict.pt``                       dictionary of NumPy index arrays, as OGB-LSC publishes PCQM4Mv2's
    ``.zip``, ``.zip!path/split_dict.pt``   the same in an archive, which is not unpacked
    ``.json``                               ``{"train": [0, 2], "valid": [1]}``: numbers are rows, texts are ids
    ``.npz``                                one index array per split
    ``.csv``, ``.tsv``                      columns ``split`` and ``row`` (or ``idx``, ``index``) or ``id``; semicolons or tabs, too
    directory                               OGB style: ``train.csv``, ``valid.csv``, ``test.csv`` of indices
    ======================================  ==============================================================

    Text files may be compressed (.gz, .bz2, .xz, .zst). DataError if the file is damaged or of another kind, names a record
    twice or an id in two splits, has a column of rows and one of ids, or holds anything else than indices or ids.
    """
    archive, mark, member = uri.partition(".zip!")
    if mark:
        return _from_zip(archive + ".zip", member)
    name = storage.name_of(uri).lower()
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    if name.endswith(".zip"):
        return _from_zip(uri, None)
    if name.endswith(".pt"):
        return _by_row(uri, _torch_object(uri, _read(uri)))
    if name.endswith(".npz"):
        return _from_npz(uri)
    if name.endswith(".json"):
        return _from_json(uri)
    if name.endswith((".csv", ".tsv")):
        return _from_table(uri, "\t" if name.endswith(".tsv") else ",")
    return _from_directory(uri)


def splits_of_file(uri: str) -> NamedSplits:
    """The splits that a split file names (:func:`read_split_file`)."""
    table = read_split_file(uri)
    return NamedSplits(table.by_row, table.by_id, uri)


def _read(uri: str) -> bytes:
    size = storage.size(uri)
    if size > _MAX_BYTES:
        raise DataError(f"{uri}: a split file of {size} bytes; expected at most {_MAX_BYTES}.")
    return storage.read_bytes(uri)


def _read_text(uri: str) -> bytes:
    """The content of the file, decompressed if necessary."""
    content = io.BytesIO()
    try:
        for piece in decompressed(iter([_read(uri)])):
            content.write(piece)
            if content.tell() > _MAX_BYTES:
                raise DataError(
                    f"{uri}: unpacks to more than {_MAX_BYTES} bytes, too much for splits."
                )
    except DamageError as error:
        raise DataError(f"{uri}: a damaged compressed file ({error}). Fetch it again.") from error
    return content.getvalue()


# -- what PyTorch wrote ---------------------------------------------------------------------------------


def _from_zip(uri: str, member: str | None) -> SplitTable:
    with storage.translate_errors("read", uri), storage.open_read(uri) as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                names = [n for n in archive.namelist() if n.rpartition("/")[2] == "split_dict.pt"]
                wanted = [member] if member is not None else names
                if len(wanted) != 1 or wanted[0] not in archive.namelist():
                    shown = ", ".join(archive.namelist()[:5])
                    raise DataError(
                        f"{uri}: no {member or 'split_dict.pt'} in it, but {shown}; "
                        "name the member as ARCHIVE.zip!PATH."
                    )
                content = _member(archive, wanted[0], uri)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{uri} is no zip archive or is damaged: {error}") from error
    where = f"{uri}!{wanted[0]}"
    return _by_row(where, _torch_object(where, content))


def _member(archive: zipfile.ZipFile, name: str, where: str) -> bytes:
    size = archive.getinfo(name).file_size
    if size > _MAX_BYTES:
        raise DataError(f"{where}: {name} unpacks to {size} bytes, too much for splits.")
    return archive.read(name)


def _torch_object(where: str, content: bytes) -> Any:
    """The object that ``torch.save`` wrote: the pickle in a zip file or, before 1.6, the fourth of several pickles."""
    try:
        if not content.startswith(b"PK"):
            stream = io.BytesIO(content)
            magic, *_ = [_Unpickler(stream).load() for _ in range(3)]
            if magic != _TORCH_MAGIC:
                raise pickle.UnpicklingError("it is no file of torch.save")
            return _Unpickler(stream).load()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl"]
            if len(names) != 1:
                raise pickle.UnpicklingError("no data.pkl in it")
            return _Unpickler(io.BytesIO(_member(archive, names[0], where))).load()
    # A forged pickle can make the unpickler raise nearly anything.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{where}: cannot be read as a dictionary of NumPy arrays written by torch.save: {reason}. "
            "If it is trustworthy, save its arrays with numpy.savez and give the .npz."
        ) from error


class _Unpickler(pickle.Unpickler):
    """Admits only the parts of a dictionary of NumPy index arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, which is not admitted")

    def persistent_load(self, pid: Any) -> Any:  # noqa: ARG002 - whatever it refers to
        raise pickle.UnpicklingError("it holds torch tensors, not NumPy arrays")


def _reconstruct(kind: Any, shape: Any, dtype: Any) -> NDArray[Any]:
    """The empty array with which NumPy's pickles begin; a forged pickle could ask for any amount of memory."""
    if kind is not np.ndarray or tuple(shape) != (0,) or dtype not in (b"b", "b"):
        raise pickle.UnpicklingError("a NumPy array is pickled in an unknown way")
    return np.ndarray((0,), dtype=np.int8)


def _encode(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 represent bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes are spelled in {encoding}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How pickles of protocol 2 represent the bytes of an empty array."""
    return b""


def _dtype(code: str, align: bool = False, copy: bool = False) -> np.dtype[Any]:
    """An integer or bool type; an error for objects, records and subarrays."""
    dtype = np.dtype(code, align=align, copy=copy)
    if dtype.kind not in "iub":
        raise pickle.UnpicklingError(f"an array of {dtype}, not of indices")
    return dtype


_ADMITTED: Final[dict[tuple[str, str], Any]] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
}


# -- other files ----------------------------------------------------------------------------------------


def _from_npz(uri: str) -> SplitTable:
    try:
        with np.load(io.BytesIO(_read(uri)), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
        raise DataError(f"{uri} is no .npz file of index arrays: {error}") from error
    return _by_row(uri, found)


def _from_json(uri: str) -> SplitTable:
    try:
        value = json.loads(_read_text(uri))
    except ValueError as error:
        raise DataError(f"{uri} is not a JSON document ({error}).") from error
    if not isinstance(value, dict) or not all(isinstance(item, list) for item in value.values()):
        raise DataError(f'{uri}: expected {{"train": [...], "valid": [...]}}.')
    members = [member for item in value.values() for member in item]
    if members and all(isinstance(member, str) for member in members):
        return _by_id(uri, [(member, name) for name, item in value.items() for member in item])
    return _by_row(uri, value)


def _from_table(uri: str, usual: str) -> SplitTable:
    """One table with a row per molecule; the header says if another delimiter than the ``usual`` one is between cells."""
    content = _read_text(uri)
    first, end, rest = content.partition(b"\n")
    if end and stated_delimiter(first + end) is not None:
        content = rest
    options = pa.csv.ParseOptions(delimiter=_delimiter_of(content, usual))
    texts = pa.csv.ConvertOptions(
        column_types={name: pa.string() for name in ("split", *_ID_COLUMNS)},
        strings_can_be_null=False,
    )
    try:
        table = pa.csv.read_csv(io.BytesIO(content), parse_options=options, convert_options=texts)
    except pa.ArrowException as error:
        raise DataError(f"{uri} is not a table: {' '.join(str(error).split())}") from error
    keys = [n for n in table.column_names if n in (*_ROW_COLUMNS, *_ID_COLUMNS)]
    if not keys or table.column_names.count("split") != 1:
        raise DataError(
            f"{uri}: it has columns {table.column_names}; expected 'split' once and one of "
            f"{', '.join((*_ROW_COLUMNS, *_ID_COLUMNS))}. Index files without a header are given as "
            "their directory."
        )
    # An index beside ids may be that of the split file itself, and not the rows of the source.
    if len(keys) > 1:
        raise DataError(
            f"{uri}: it names molecules by {' and by '.join(map(repr, keys))}; expected one of them. Take the others out: ids stay "
            "right if rows are taken out of the source or change their order."
        )
    (key,) = keys
    splits = table["split"].to_pylist()
    if key in _ID_COLUMNS:
        return _by_id(uri, list(zip(table[key].to_pylist(), splits, strict=True)))
    if not pa.types.is_integer(table[key].type) or table[key].null_count:
        raise DataError(f"{uri}: column {key!r} is {table[key].type}; expected row numbers.")
    rows, names = table[key].to_numpy(), np.asarray(splits)
    return _by_row(uri, {str(name): rows[names == name] for name in dict.fromkeys(splits)})


def _delimiter_of(table: bytes, usual: str) -> str:
    """The delimiter by which the header has a column ``split``; the ``usual`` one if none does."""
    header = table.partition(b"\n")[0].removeprefix(codecs.BOM_UTF8).rstrip(b"\r")
    for delimiter in (usual, *DELIMITERS.values()):
        if "split" in (fields(header, delimiter) or ()):
            return delimiter
    return usual


def _from_directory(uri: str) -> SplitTable:
    files = {storage.name_of(file.uri).lower(): file.uri for file in storage.list_files(uri)}
    found = {}
    for split in _INDEX_FILES:
        name = next((n for n in (f"{split}.csv", f"{split}.csv.gz") if n in files), None)
        if name is not None:
            found[split] = _index_column(files[name])
    if not found:
        raise DataError(f"{uri} is no split file; expected {_EXPECTED}.")
    return _by_row(uri, found)


def _index_column(uri: str) -> NDArray[np.int64]:
    """One number per line, without a header."""
    try:
        return np.array(_read_text(uri).split(), dtype=np.int64)
    except ValueError as error:
        raise DataError(f"{uri}: expected one row number a line ({error}).") from error


# -- checks ---------------------------------------------------------------------------------------------


def _by_row(where: str, value: Any) -> SplitTable:
    if not isinstance(value, Mapping) or not value:
        raise DataError(
            f"{where}: holds a {type(value).__name__}; expected split names with indices."
        )
    splits: dict[str, NDArray[np.int64]] = {}
    for name, item in value.items():
        array = np.asarray(item)
        if array.size == 0:
            array = array.astype(np.int64)
        if not isinstance(name, str) or array.ndim != 1 or array.dtype.kind not in "iu":
            raise DataError(
                f"{where}: split {name!r} is an array of {array.dtype} of shape {array.shape}; "
                "expected a list of row numbers."
            )
        rows = np.sort(array.astype(np.int64))
        if rows.size and rows[0] < 0:
            raise DataError(f"{where}: split {name!r} has row {rows[0]}; rows count from 0.")
        splits[name] = rows
    every = np.sort(np.concatenate(list(splits.values())))
    twice = every[1:][every[1:] == every[:-1]]
    if twice.size:
        holders = [name for name, rows in splits.items() if twice[0] in rows]
        raise DataError(
            f"{where}: row {twice[0]} is given more than once, in {' and '.join(holders)} "
            f"({twice.size} such rows); expected each in one split."
        )
    return SplitTable(by_row=splits)


def _by_id(where: str, pairs: list[tuple[str, str]]) -> SplitTable:
    table: dict[str, str] = {}
    # Without spaces around them, as the ids of a source are read.
    for mol_id, split in ((mol_id.strip(), split) for mol_id, split in pairs):
        if table.setdefault(mol_id, split) != split:
            raise DataError(
                f"{where}: id {mol_id!r} is in {table[mol_id]} and in {split}; expected one split."
            )
    if not table:
        raise DataError(f"{where}: it names no molecules.")
    return SplitTable(by_id=table)
