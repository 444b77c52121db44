"""Splits: the same for the same molecule, or exactly those of the source's split file; nothing is assigned silently."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moleblend_ray.data.dataset.dataset_files import SPLITS
from moleblend_ray.data.dataset.manifest import Manifest
from moleblend_ray.data.dataset.shard_reader import ShardReader
from moleblend_ray.data.preparation.assembly import write_manifest
from moleblend_ray.data.preparation.claim import claim_output
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.shard_writer import convert_chunk
from moleblend_ray.data.preparation.splits import UNNAMED, NamedSplits, hashed_splits
from moleblend_ray.data.sources import ColumnConfig, find_sources, inspect_sources, read_chunks
from moleblend_ray.errors import ConfigError, DataError

SMILES = ["C" * (1 + i // 4) + ("", "O", "N", "F")[i % 4] for i in range(2000)]
TRAIN, VALID, TEST = range(3)


def as_before(smiles: list[str], fraction: float, seed: int) -> list[bool]:
    """The rule for data sets with two splits, in exact arithmetic."""
    key = seed.to_bytes(8, "little", signed=True)
    digests = [hashlib.blake2b(text.encode(), digest_size=8, key=key).digest() for text in smiles]
    return [int.from_bytes(digest, "little") < fraction * 2.0**64 for digest in digests]


@pytest.mark.parametrize(("valid", "test", "seed"), [(0.05, 0.0, 0), (0.3, 0.3, -7), (0.0, 0.2, 1)])
def test_valid_is_as_ever_and_test_has_its_share_beside_it(
    valid: float, test: float, seed: int
) -> None:
    codes = hashed_splits(SMILES, valid, test, seed)
    assert ((codes == VALID) == as_before(SMILES, valid, seed)).all()
    assert np.mean(codes == TEST) == pytest.approx(test, abs=0.04)
    assert set(np.unique(codes)) <= {TRAIN, VALID, TEST}


def test_a_split_file_decides_by_row_or_by_id() -> None:
    rows = {"Train ": np.array([0, 3]), "validation": np.array([1]), "test-dev": np.array([4])}
    splits = NamedSplits(rows, None, "s.json")
    assert splits.names_rows
    # Behind the last row that is named: the next one, and one far away.
    found = splits.codes(np.array([4, 0, 2, 1, 5, 99]), [""] * 6)
    assert found.tolist() == [TEST, TRAIN, UNNAMED, VALID, UNNAMED, UNNAMED]
    by_id = NamedSplits(None, {"a": "test-challenge", "b": "dev"}, "s.csv")
    assert not by_id.names_rows
    assert by_id.codes(np.arange(3), ["b", "x", "a"]).tolist() == [VALID, UNNAMED, TEST]


def test_ids_that_are_numbers_are_not_taken_for_rows_of_a_huge_table() -> None:
    ids = {"train": np.array([1_000_000_000_001]), "test": np.array([1_000_000_000_002])}
    with pytest.raises(DataError, match=r"row 1000000000002, but only 2 rows.*as texts"):
        NamedSplits(ids, None, "s.json")
    few = NamedSplits({"test": np.array([1_000_000])}, None, "s.json")
    assert few.codes(np.array([1_000_000]), [""]).tolist() == [TEST]


def test_a_molecule_that_is_not_named_by_id_leads_to_the_column_of_ids() -> None:
    by_id = NamedSplits(None, {"a": "train"}, "s.csv").unnamed_error("row 0 of t.csv", "t_0")
    by_row = NamedSplits({"train": np.array([1])}, None, "s.csv").unnamed_error("row 0", "t_0")
    assert "set id_column to the column that holds the ids" in str(by_id)
    assert "id_column" not in str(by_row)


def test_rows_that_the_source_does_not_have_are_told(caplog: pytest.LogCaptureFixture) -> None:
    rows = {"train": np.array([0, 1, 2]), "test": np.array([4, 6])}
    splits = NamedSplits(rows, None, "s3://key:secret@bucket/s.json")
    splits.warn_of_rows_beyond(7)
    NamedSplits(None, {"a": "train"}, "ids.json").warn_of_rows_beyond(0)
    assert not caplog.text
    splits.warn_of_rows_beyond(4)
    assert "s.json names 2 rows after the last of the source, which has 4" in caplog.text
    assert "secret" not in caplog.text


def test_equal_splits_have_equal_digests() -> None:
    one = NamedSplits({"train": np.array([0, 1]), "val": np.array([2])}, None, "a")
    same = NamedSplits({"valid": np.array([2]), "train": np.array([1, 0])}, None, "b")
    other = NamedSplits({"valid": np.array([1]), "train": np.array([2, 0])}, None, "b")
    assert one.digest == same.digest != other.digest
    ids = NamedSplits(None, {"a": "train", "b": "test"}, "c")
    assert ids.digest == NamedSplits(None, {"b": "test", "a": "train"}, "d").digest
    assert ids.digest != NamedSplits(None, {"a": "train", "b": "train"}, "c").digest


def test_unknown_names_are_refused() -> None:
    for name in ("fold1", "tested"):
        with pytest.raises(ConfigError, match=rf"s\.json has a split '{name}'; expected train"):
            NamedSplits({name: np.array([0])}, None, "s.json")


def convert(tmp_path: Path, splits: NamedSplits, **options: Any) -> tuple[Manifest, Path]:
    source, out = tmp_path / "in.csv", tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    source.write_text("smiles,id\nC,a\nCC,b\nC1CC,bad\nCCC,c\nCCCC,d\n")
    chosen = ConvertOptions(
        columns=ColumnConfig(id_column="id"), split_file_digest=splits.digest, **options
    )
    sources = inspect_sources(find_sources(str(source)), chosen.columns)
    claim_output(str(out), sources, chosen)
    receipts = [
        convert_chunk(chunk, sources.layouts[0], sources.labels, chosen, str(out), splits)
        for chunk in read_chunks(sources.layouts[0], 0, 4)
    ]
    return write_manifest(str(out), sources, chosen, receipts), out


def members(manifest: Manifest, out: Path) -> dict[str, list[str]]:
    readers = {split: ShardReader(str(out), manifest, split) for split in SPLITS}
    return {
        split: reader.read(np.arange(reader.num_rows))["mol_id"].to_pylist()
        for split, reader in readers.items()
    }


def test_molecules_that_the_file_does_not_name_are_refused_taken_or_quarantined(
    tmp_path: Path,
) -> None:
    splits = NamedSplits(None, {"a": "test", "c": "valid", "d": "train"}, "s.csv")
    with pytest.raises(DataError, match=r"s\.csv names no split for row 1 of \S+in\.csv \(b\)"):
        convert(tmp_path, splits)
    manifest, out = convert(tmp_path, splits, split_file_unnamed="train")
    assert members(manifest, out) == {"train": ["b", "d"], "valid": ["c"], "test": ["a"]}
    manifest, out = convert(tmp_path, splits, split_file_unnamed="quarantine")
    assert members(manifest, out) == {"train": ["d"], "valid": ["c"], "test": ["a"]}
    counts = manifest.counts
    assert counts.rows_in == 5 == counts.rows_out + counts.rows_quarantined
    assert counts.quarantined_by_reason == {"not_in_split_file": 1, "unparsable_smiles": 1}
    parts = [pq.read_table(out / shard.path) for shard in manifest.shards_of("quarantine")]
    rejected = pa.concat_tables(parts).to_pylist()
    assert [(row["mol_id"], row["excerpt"]) for row in rejected] == [("b", "CC"), ("bad", "C1CC")]


def test_no_credentials_of_the_source_are_in_the_quarantine(tmp_path: Path) -> None:
    splits = NamedSplits(None, {"a": "train"}, "s.csv")
    source = tmp_path / "in.csv"
    source.write_text("smiles,id\nC,a\nCC,b\nC1CC,bad\n")
    chosen = ConvertOptions(
        columns=ColumnConfig(id_column="id"),
        split_file_digest=splits.digest,
        split_file_unnamed="quarantine",
    )
    sources = inspect_sources(find_sources(str(source)), chosen.columns)
    (layout,) = sources.layouts
    (chunk,) = read_chunks(layout, 0, 9)
    file = dataclasses.replace(layout.file, uri="https://me:hunter2@host/in.csv")
    layout = dataclasses.replace(layout, file=file)
    convert_chunk(chunk, layout, sources.labels, chosen, str(tmp_path / "out"), splits)
    (part,) = (tmp_path / "out" / "quarantine").iterdir()
    assert pq.read_table(part)["source_uri"].to_pylist() == ["https://***@host/in.csv"] * 2


def test_rows_are_those_of_the_source_rejected_ones_counted(tmp_path: Path) -> None:
    splits = NamedSplits({"train": np.array([0, 1, 2]), "test": np.array([3, 4])}, None, "s.npz")
    manifest, out = convert(tmp_path, splits)
    assert members(manifest, out) == {"train": ["a", "b"], "valid": [], "test": ["c", "d"]}
