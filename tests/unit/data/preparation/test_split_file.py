"""Split files: every published format gives the same splits, and no code in a file is executed."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import pickle
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from moleblend_ray.data.preparation import split_file
from moleblend_ray.data.preparation.split_file import read_split_file
from moleblend_ray.errors import DataError, StorageError

SPLITS: dict[str, Any] = {
    "train": np.array([0, 3, 1]),
    "valid": np.array([4]),
    "test-dev": np.array([2, 6]),
    "test-challenge": np.array([], dtype=np.int64),
}
SORTED = {"train": [0, 1, 3], "valid": [4], "test-dev": [2, 6], "test-challenge": []}


def by_row(uri: Path | str) -> dict[str, list[int]]:
    table = read_split_file(str(uri))
    assert table.by_id is None
    assert table.by_row is not None
    assert all(rows.dtype == np.int64 for rows in table.by_row.values())
    return {name: rows.tolist() for name, rows in table.by_row.items()}


@pytest.mark.parametrize("new_format", [True, False])
def test_a_file_of_torch_save_is_read_without_torch(tmp_path: Path, new_format: bool) -> None:
    path = tmp_path / "split_dict.pt"
    torch.save(SPLITS, path, _use_new_zipfile_serialization=new_format)
    assert by_row(path) == SORTED


def test_a_torch_file_in_a_zip_is_read_in_place(tmp_path: Path) -> None:
    torch.save(SPLITS, tmp_path / "split_dict.pt")
    archive = tmp_path / "pcqm4m-v2.zip"
    with zipfile.ZipFile(archive, "w") as writer:
        writer.write(tmp_path / "split_dict.pt", "pcqm4m-v2/split_dict.pt")
    assert by_row(archive) == by_row(f"{archive}!pcqm4m-v2/split_dict.pt") == SORTED
    with pytest.raises(DataError, match=r"no other\.pt in it, but pcqm4m-v2/split_dict\.pt"):
        read_split_file(f"{archive}!other.pt")


class _Runs:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("executed",))


class _Huge:
    def __reduce__(self) -> tuple[object, ...]:
        from numpy._core.multiarray import _reconstruct

        return (_reconstruct, (np.ndarray, (1 << 50,), b"b"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_Runs(), r"holds a posix\.mkdir, which is not admitted"),
        (_Huge(), "pickled in an unknown way"),
        ({"train": torch.tensor([1])}, "not admitted|torch tensors"),
        ({"train": np.array([None, 1], dtype=object)}, "not of indices"),
    ],
    ids=["code", "memory bomb", "tensor", "objects"],
)
@pytest.mark.parametrize("new_format", [True, False])
def test_nothing_in_a_torch_file_is_executed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: object,
    message: str,
    new_format: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "s.pt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(DataError, match=message):
        read_split_file(str(tmp_path / "s.pt"))
    assert [path.name for path in tmp_path.iterdir()] == ["s.pt"]


def test_json_numbers_are_rows_and_texts_are_ids(tmp_path: Path) -> None:
    rows = {name: array.tolist() for name, array in SPLITS.items()}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert by_row(tmp_path / "rows.json") == SORTED
    (tmp_path / "ids.json.gz").write_bytes(gzip.compress(b'{"train": ["a", "b"], "test": ["c"]}'))
    table = read_split_file(str(tmp_path / "ids.json.gz"))
    assert table.by_row is None
    assert table.by_id == {"a": "train", "b": "train", "c": "test"}


def test_npz_and_tables_and_index_files_give_the_same_rows(tmp_path: Path) -> None:
    expected = {name: rows for name, rows in SORTED.items() if rows}
    np.savez(tmp_path / "s.npz", **SPLITS)
    assert by_row(tmp_path / "s.npz") == SORTED
    lines = [f"{row},{name}" for name, rows in SORTED.items() for row in rows]
    (tmp_path / "s.csv.gz").write_bytes(gzip.compress("\n".join(["idx,split", *lines]).encode()))
    assert by_row(tmp_path / "s.csv.gz") == expected
    folder = tmp_path / "split" / "scaffold"
    folder.mkdir(parents=True)
    (folder / "train.csv.gz").write_bytes(gzip.compress(b"3\n0\n1\n"))
    (folder / "valid.csv").write_text("4\n")
    assert by_row(folder) == {"train": [0, 1, 3], "valid": [4]}


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", partial(pa.compress, codec="zstd", asbytes=True)),
    ],
)
def test_texts_may_be_compressed(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.dumps({"train": [0, 1], "test": [2]}).encode()
    path = tmp_path / f"s.json{suffix}"
    path.write_bytes(pack(content))
    assert by_row(path) == {"train": [0, 1], "test": [2]}
    path.write_bytes(pack(content + b" " * 5000))
    monkeypatch.setattr(split_file, "_MAX_BYTES", 4000)
    with pytest.raises(DataError, match="unpacks to more than 4000 bytes"):
        by_row(path)


def test_spaces_around_ids_do_not_count_as_in_a_source(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("id,split\nA 1 ,train\n A2,test\n")
    (tmp_path / "s.json").write_text('{"train": ["A 1 "], "test": [" A2"]}')
    for name in ("s.csv", "s.json"):
        assert read_split_file(str(tmp_path / name)).by_id == {"A 1": "train", "A2": "test"}
    (tmp_path / "twice.csv").write_text("id,split\nA1 ,train\nA1,test\n")
    with pytest.raises(DataError, match="id 'A1' is in train and in test"):
        read_split_file(str(tmp_path / "twice.csv"))


def test_a_table_of_ids_keeps_them_as_they_are_written(tmp_path: Path) -> None:
    for name, text in {
        "s.tsv": "id\tsplit\n007\ttrain\n7\ttest\n",
        "s.csv": "id;split;note\r\n007;train;a,b\r\n7;test;c,d\r\n",
        "excel.csv": "\ufeffsep=;\r\nid;split\r\n007;train\r\n7;test\r\n",
        "commas.tsv": "id,split\n007,train\n7,test\n",
        # The name of another column has more commas than the header has tabs.
        "names.tsv": "id\tsplit\ta, b, c and d, e\n007\ttrain\tx\n7\ttest\ty\n",
        "first.csv": "\ufeffsplit;id\ntrain;007\ntest;7\n",
    }.items():
        (tmp_path / name).write_text(text)
        assert read_split_file(str(tmp_path / name)).by_id == {"007": "train", "7": "test"}, name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "s.json",
            '{"train": [0, 1], "valid": [1]}',
            "row 1 is given more than once, in train and",
        ),
        ("s.json", '{"train": [0, 0]}', "row 0 is given more than once, in train"),
        ("s.json", '{"train": [-1]}', "rows count from 0"),
        ("s.json", '{"train": [0.5]}', "float64.*expected a list of row numbers"),
        ("s.json", '{"train": ["a"], "test": ["a"]}', "id 'a' is in train and in test"),
        ("s.json", "[1]", 'expected {"train"'),
        ("s.json", "no", "not a JSON document"),
        ("s.csv", "a,b\n1,2\n", r"columns \['a', 'b'\]; expected 'split'"),
        ("s.csv", "row,split\nx,train\n", "column 'row' is string"),
        ("s.csv", "index,id,split\n0,m5,train\n1,m3,test\n", "by 'index' and by 'id'; expected"),
        ("s.csv", "id,split,split\nm5,train,test\n", "expected 'split' once"),
        ("s.npz", "no", "no .npz file"),
        ("s.pt", "no", "cannot be read as a dictionary of NumPy arrays"),
        ("s.zip", "no", "no zip archive"),
        ("s.csv.gz", "\x1f", "columns"),
        ("other.xyz", "no", "is no split file; expected a split_dict.pt"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_split_file(str(tmp_path / name))


def test_a_missing_or_damaged_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        read_split_file(str(tmp_path / "none.json"))
    packed = gzip.compress(json.dumps({"train": list(range(5000))}).encode())
    (tmp_path / "s.json.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match="damaged compressed file"):
        read_split_file(str(tmp_path / "s.json.gz"))


@pytest.mark.parametrize("dump", [pickle.dumps, lambda value: pickle.dumps(value, protocol=2)])
def test_a_bare_pickle_is_no_split_file(tmp_path: Path, dump: Callable[[object], bytes]) -> None:
    (tmp_path / "s.pt").write_bytes(dump(SPLITS))
    with pytest.raises(DataError, match="cannot be read"):
        read_split_file(str(tmp_path / "s.pt"))
