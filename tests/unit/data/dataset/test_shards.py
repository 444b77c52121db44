"""Shards and manifest: the documented schema, random access, and the detection of damage."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moleblend_ray.data.dataset import dataset_files, shards
from moleblend_ray.data.dataset.block import GraphColumns, MoleculeBlock, gather
from moleblend_ray.data.dataset.manifest import (
    FORMAT_VERSION,
    Counts,
    LabelInfo,
    Manifest,
    ShardInfo,
    fingerprint,
    format_version_of,
    load_manifest,
)
from moleblend_ray.data.dataset.shard_reader import ShardReader
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.receipts import shard_info
from moleblend_ray.errors import DataError

LABELS = (
    LabelInfo(name="homo", unit="hartree", count=0),
    LabelInfo(name="log P (o/w).x", unit=None, count=0),
)
GROUP_ROWS = 64


def make_table(num_rows: int, seed: int) -> pa.Table:
    """Rows of the shard schema with ragged lists of random content."""
    rng = np.random.default_rng(seed)
    num_atoms = rng.integers(1, 30, num_rows)
    schema = shards.shard_schema([label.column for label in LABELS])
    columns: dict[str, object] = {
        "mol_id": [f"{seed}-{row}" for row in range(num_rows)],
        "source_row": list(range(num_rows)),
        "smiles": ["C" * n for n in num_atoms],
        "conformer_status": ["source"] * num_rows,
        "conformer_detail": [""] * num_rows,
        "conformer_energies": [[float(row)] for row in range(num_rows)],
        "num_atoms": num_atoms,
        "atom_features": [rng.integers(0, 9, 9 * n).tolist() for n in num_atoms],
        "bonds": [rng.integers(0, n, 2 * n).tolist() for n in num_atoms],
        "bond_features": [rng.integers(0, 2, 3 * n).tolist() for n in num_atoms],
        "num_conformers": [1] * num_rows,
        "positions": [rng.normal(size=3 * n).astype(np.float32).tolist() for n in num_atoms],
        "position_mask": [[True] * n for n in num_atoms],
        "label:homo": rng.normal(size=num_rows),
        "label:log P (o/w).x": [None if row % 3 else float(row) for row in range(num_rows)],
    }
    return pa.table(
        {name: pa.array(columns[name], schema.field(name).type) for name in columns}, schema=schema
    )


def make_manifest(infos: list[ShardInfo]) -> Manifest:
    return Manifest(
        format_version=format_version_of([label.column for label in LABELS]),
        featurizer_version=1,
        options={"x": 1},
        sources=(),
        labels=LABELS,
        shards=tuple(infos),
        counts=Counts(
            rows_in=0,
            rows_out=0,
            rows_quarantined=0,
            quarantined_by_reason={},
            atoms_out=0,
            with_coordinates=0,
            conformer_status={},
            duplicate_ids=0,
        ),
        row_group_rows=GROUP_ROWS,
        fingerprint=fingerprint(1, {"x": 1}, LABELS, infos),
    )


def write_dataset(uri: str) -> tuple[Manifest, pa.Table]:
    """Three train shards of odd sizes and one valid shard; the manifest and the train rows."""
    infos, tables = [], []
    for index, (split, num_rows) in enumerate(
        [("train", 200), ("train", 1), ("train", 64), ("valid", 30)]
    ):
        table = make_table(num_rows, index)
        content = shards.encode_shard(table, GROUP_ROWS)
        path = f"{split}/{index:05d}-000000.parquet"
        storage.write_bytes(storage.join(uri, path), content)
        infos.append(shard_info(path, split, num_rows, content))
        tables.append(table)
    manifest = make_manifest(infos)
    storage.write_json(storage.join(uri, dataset_files.MANIFEST_NAME), manifest.to_json())
    return manifest, pa.concat_tables(tables[:3]).combine_chunks()


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_random_positions_come_back_in_the_asked_order(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = str(tmp_path) if kind == "local" else request.getfixturevalue("s3_uri")
    _, train = write_dataset(uri)
    manifest = load_manifest(uri)
    reader = ShardReader(uri, manifest, "train", verify=True)
    assert reader.num_rows == manifest.num_molecules("train") == 265
    rng = np.random.default_rng(0)
    for size in (1, 7, 500):
        positions = rng.integers(0, 265, size)
        assert reader.read(positions).equals(train.take(pa.array(positions)))
    assert reader.read(np.arange(265)).equals(train)
    assert reader.read(np.empty(0, np.int64)).num_rows == 0
    assert reader.read(np.empty(0, np.int64)).schema == train.schema
    assert pa.concat_tables(reader.iter_tables()).equals(train)


def test_a_column_subset_is_all_that_is_decoded(tmp_path: Path) -> None:
    manifest, train = write_dataset(str(tmp_path))
    columns = [*shards.GRAPH_COLUMNS, "label:log P (o/w).x"]
    reader = ShardReader(str(tmp_path), manifest, "train", columns=columns)
    positions = np.array([264, 0, 200, 63, 64])
    assert reader.read(positions).equals(train.select(columns).take(pa.array(positions)))
    with pytest.raises(DataError, match=r"no columns \['nonsense'\]"):
        ShardReader(str(tmp_path), manifest, "train", columns=["nonsense"])


def test_only_needed_row_groups_are_fetched_and_the_cache_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, _ = write_dataset(str(tmp_path))
    fetched: list[int] = []
    read_range = storage.read_range

    def counting(uri: str, offset: int, length: int) -> bytes:
        fetched.append(length)
        return read_range(uri, offset, length)

    monkeypatch.setattr(storage, "read_range", counting)
    reader = ShardReader(str(tmp_path), manifest, "train", columns=["num_atoms"])
    reader.read(np.array([0, 1, 63]))
    assert len(fetched) == 2, "a footer and one row group"
    reader.read(np.array([5, 40]))
    assert len(fetched) == 2, "the same row group comes from the cache"
    reader.read(np.array([64, 128]))
    assert len(fetched) == 4, "two more row groups, no footer"
    reader = ShardReader(str(tmp_path), manifest, "train", cache_bytes=1)
    whole = reader.read(np.arange(265))
    assert whole.num_rows == 265
    assert reader._cached_bytes <= 1


@pytest.mark.parametrize("cache_bytes", [1, 30_000, 1 << 20])
def test_a_block_of_molecules_is_the_block_of_their_rows(tmp_path: Path, cache_bytes: int) -> None:
    manifest, train = write_dataset(str(tmp_path))
    reader = ShardReader(
        str(tmp_path), manifest, "train", columns=shards.GRAPH_COLUMNS, cache_bytes=cache_bytes
    )
    columns = [GraphColumns.from_table(train)]
    rng = np.random.default_rng(0)
    for size in (0, 1, 7, 500):
        positions = rng.integers(0, 265, size)
        draw = rng.integers(0, 5, size)
        found = reader.read_block(positions, draw)
        expected = gather(columns, np.zeros_like(positions), positions, positions, draw)
        for item in dataclasses.fields(MoleculeBlock):
            value = getattr(found, item.name)
            assert value.dtype == getattr(expected, item.name).dtype
            assert np.array_equal(value, getattr(expected, item.name)), item.name
        assert reader._cached_bytes <= cache_bytes
        assert reader._cached_bytes == sum(group.nbytes for group in reader._groups.values())
    with pytest.raises(DataError, match="blocks of molecules need the columns"):
        ShardReader(str(tmp_path), manifest, "train", columns=["smiles"]).read_block(np.arange(1))


def test_lists_that_do_not_fit_are_reported_with_their_shard(tmp_path: Path) -> None:
    table = make_table(40, 0)
    lists = table.column("bond_features").to_pylist()
    lists[7] = lists[7][:-3]
    index = table.column_names.index("bond_features")
    table = table.set_column(index, "bond_features", pa.array(lists, pa.list_(pa.uint8())))
    content = shards.encode_shard(table, GROUP_ROWS)
    info = shard_info("train/0.parquet", "train", 40, content)
    storage.write_bytes(str(tmp_path / "train/0.parquet"), content)
    reader = ShardReader(str(tmp_path), make_manifest([info]), "train")
    with pytest.raises(DataError, match=r"train/0\.parquet .* 'bond_features' .* in row 7"):
        reader.read_block(np.arange(3))


@pytest.mark.parametrize("positions", [[-1], [265], [0, 10**12]])
def test_positions_outside_of_the_split_are_refused(tmp_path: Path, positions: list[int]) -> None:
    manifest, _ = write_dataset(str(tmp_path))
    with pytest.raises(DataError, match="which has 265 molecules"):
        ShardReader(str(tmp_path), manifest, "train").read(np.array(positions))


def damage_in_page(content: bytearray) -> bytes:
    content[len(content) // 3] ^= 0xFF
    return bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        damage_in_page,
        lambda content: bytes(content[:-100]),
        lambda content: bytes(content) + b"more",
        lambda content: b"",
        lambda content: bytes(len(content)),
        lambda content: bytes(content[:-8]) + b"\xff\xff\xff\x7fPAR1",
        None,
    ],
    ids=["flipped byte", "truncated", "longer", "empty", "zeros", "footer length", "missing"],
)
def test_a_damaged_shard_is_named(tmp_path: Path, damage: object) -> None:
    manifest, _ = write_dataset(str(tmp_path))
    path = tmp_path / manifest.shards[0].path
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(bytearray(path.read_bytes())))  # type: ignore[operator]
    with pytest.raises(DataError, match=r"train/00000-000000\.parquet"):
        ShardReader(str(tmp_path), manifest, "train").read(np.arange(200))
    with pytest.raises(DataError, match=r"train/00000-000000\.parquet"):
        list(ShardReader(str(tmp_path), manifest, "train").iter_tables())


def test_verify_finds_a_change_outside_of_what_is_read(tmp_path: Path) -> None:
    manifest, _ = write_dataset(str(tmp_path))
    path = tmp_path / manifest.shards[0].path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="SHA-256"):
        ShardReader(str(tmp_path), manifest, "train", verify=True).read(np.array([0]))


def test_row_groups_have_the_stated_rows_and_bytes_repeat(tmp_path: Path) -> None:
    table = make_table(150, 3)
    content = shards.encode_shard(table, GROUP_ROWS)
    assert content == shards.encode_shard(table, GROUP_ROWS)
    metadata = pq.read_metadata(pa.BufferReader(content))
    rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    assert rows == [64, 64, 22]
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    units = pq.read_schema(pa.BufferReader(content)).field("label:homo").metadata
    assert units[b"unit"] == b"hartree"


def test_a_manifest_survives_json(tmp_path: Path) -> None:
    manifest, _ = write_dataset(str(tmp_path))
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert load_manifest(str(tmp_path)) == manifest
    assert [shard.path for shard in manifest.shards_of("valid")] == ["valid/00003-000000.parquet"]
    assert manifest.label_names() == ("homo", "log P (o/w).x")


def test_a_data_set_without_manifest_is_told_to_be_unfinished(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has not finished"):
        load_manifest(str(tmp_path))


def test_a_file_of_molecules_in_place_of_a_data_set_is_told_how_to_prepare_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "molecules.csv").write_text("smiles\nCCO\n")
    with pytest.raises(
        DataError, match=r"molecules\.csv holds no manifest.*moleblend prepare source="
    ):
        load_manifest(str(tmp_path / "molecules.csv"))


def test_a_manifest_of_a_newer_version_asks_for_an_upgrade(tmp_path: Path) -> None:
    manifest, _ = write_dataset(str(tmp_path))
    newer = {**manifest.to_json(), "format_version": FORMAT_VERSION + 1, "unheard_of": True}
    storage.write_json(str(tmp_path / "manifest.json"), newer)
    with pytest.raises(
        DataError,
        match=rf"version {FORMAT_VERSION + 1}; this installation reads up to {FORMAT_VERSION}.*Upgrade",
    ):
        load_manifest(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "no format_version"),
        ('{"format_version": 1}', "damaged"),
        ("{", "not a JSON document"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_manifest(str(tmp_path))


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    manifest, _ = write_dataset(str(tmp_path))
    shard = dataclasses.replace(manifest.shards[0], num_rows=199)
    changed = dataclasses.replace(manifest, shards=(shard, *manifest.shards[1:]))
    storage.write_json(str(tmp_path / "manifest.json"), changed.to_json())
    with pytest.raises(DataError, match="changed after it was written"):
        load_manifest(str(tmp_path))


def test_a_data_set_of_format_version_1_is_read_without_the_columns_it_lacks(
    tmp_path: Path,
) -> None:
    lacking = ["conformer_detail", "conformer_energies"]
    table = make_table(100, 0).drop_columns(lacking)
    content = shards.encode_shard(table, GROUP_ROWS)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.parquet").write_bytes(content)
    shard = {
        "path": "train/0.parquet",
        "split": "train",
        "num_rows": 100,
        "num_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    labels = [{"name": label.name, "unit": label.unit, "count": 0} for label in LABELS]
    identity = {
        "format_version": 1,
        "featurizer_version": 1,
        "options": {"x": 1},
        "labels": [{**label, "num_unreadable": 0} for label in labels],
        "shards": [[shard["path"], 100, shard["sha256"]]],
    }
    old = {
        **identity,
        "sources": [],
        "labels": labels,
        "shards": [shard],
        "counts": {
            "rows_in": 100,
            "rows_out": 100,
            "rows_quarantined": 0,
            "quarantined_by_reason": {},
            "atoms_out": 0,
            "with_coordinates": 100,
            "conformer_status": {"source": 100},
            "duplicate_ids": 0,
        },
        "row_group_rows": GROUP_ROWS,
        "fingerprint": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
    }
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    manifest = load_manifest(str(tmp_path))
    assert manifest.counts.conformer_detail == {}
    reader = ShardReader(str(tmp_path), manifest, "train", verify=True)
    positions = np.array([99, 0, 64])
    assert reader.read(positions).equals(table.take(pa.array(positions)))
    assert pa.concat_tables(reader.iter_tables()).num_rows == 100
    with pytest.raises(DataError, match="has no columns"):
        ShardReader(str(tmp_path), manifest, "train", columns=lacking)
