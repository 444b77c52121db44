"""The files of a data set are told apart by name, and missing or changed ones are found."""

from __future__ import annotations

from pathlib import Path

from moleblend_ray.data.dataset.dataset_files import (
    PLAN_NAME,
    is_chunk_receipt,
    is_unit_receipt,
    listed,
    listed_shards,
    receipt_uri,
    shard_path,
    staged_path,
    unit_receipt_uri,
    wrong_files,
)
from moleblend_ray.data.dataset.manifest import ShardInfo


def write(out: Path, path: str, content: bytes) -> ShardInfo:
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    (out / path).write_bytes(content)
    return ShardInfo(
        path=path, split="train", num_rows=1, num_bytes=len(content), sha256="", footer_crc32=None
    )


def test_missing_and_changed_files_are_told_with_what_is_wrong(tmp_path: Path) -> None:
    paths = [shard_path("train", stem) for stem in ("c", "a", "b", "d")]
    expected = [write(tmp_path, path, b"four") for path in paths]
    out = str(tmp_path)
    assert wrong_files(out, expected, listed_shards(out)) == {}
    (tmp_path / paths[3]).unlink()
    (tmp_path / paths[0]).write_bytes(b"longer")
    assert list(wrong_files(out, expected, listed_shards(out)).items()) == [
        ("train/c.parquet", "has 6 bytes instead of 4"),
        ("train/d.parquet", "is missing"),
    ]
    assert list(wrong_files(out, expected, {})) == paths


def test_shards_are_listed_without_files_in_progress(
    tmp_path: Path,
) -> None:
    for path in ("train/a.parquet", "quarantine/a.parquet", staged_path(0, 1), PLAN_NAME):
        write(tmp_path, path, b"x")
    out = str(tmp_path)
    assert sorted(listed_shards(out)) == [f"{out}/quarantine/a.parquet", f"{out}/train/a.parquet"]
    assert len(listed(out)) == 4
    assert listed(out, "valid", "test") == {}


def test_receipts_of_chunks_and_of_units_are_told_apart() -> None:
    out = "s3://bucket/out"
    chunk, large = receipt_uri(out, 0, 3), receipt_uri(out, 123_456, 1_234_567)
    unit = unit_receipt_uri(out, "runs/000003")
    plan, shard = f"{out}/{PLAN_NAME}", f"{out}/{shard_path('train', '00000-000003')}"
    assert chunk == "s3://bucket/out/receipts/00000-000003.json"
    uris = (chunk, large, unit, plan, shard)
    assert [uri for uri in uris if is_chunk_receipt(uri)] == [chunk, large]
    assert [uri for uri in uris if is_unit_receipt(out, uri)] == [unit]
