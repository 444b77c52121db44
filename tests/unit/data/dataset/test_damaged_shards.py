"""Damaged shards in training: the shard is named, nothing is skipped, and no process crashes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from synthetic import write_dataset

from moleblend_ray.data.batches.batch import StepBatch
from moleblend_ray.data.batches.builder import MicroBatchBuilder, local_step_batches
from moleblend_ray.data.config import OrderConfig, StreamConfig
from moleblend_ray.data.dataset import dataset_files, shards
from moleblend_ray.data.dataset.block import MoleculeBlock
from moleblend_ray.data.dataset.manifest import Manifest, fingerprint, load_manifest
from moleblend_ray.data.dataset.shard_reader import ShardReader
from moleblend_ray.data.dataset.shards import GRAPH_COLUMNS
from moleblend_ray.data.files import storage
from moleblend_ray.errors import DataError

NUM_MOLECULES = 90
ORDER = OrderConfig(seed=1, global_batch_size=30, num_streams=2, shuffle_window=30, chunk_rows=10)
STREAM = StreamConfig(micro_batch_size=8)
DAMAGED = "train/00001.parquet"
"""The second of three shards."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_dataset(
        str(tmp_path),
        NUM_MOLECULES,
        max_conformers=2,
        max_atoms=8,
        shard_rows=30,
        row_group_rows=10,
    )
    return tmp_path


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped_in_a_page(content: bytes) -> bytes:
    # After the strings, which training does not read: within the compressed numbers.
    return flipped(content, footer_start(content) // 2, 3)


def flipped_in_the_footer(content: bytes) -> bytes:
    return flipped(content, (footer_start(content) + len(content)) // 2, 3)


def flipped(content: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


def footer_start(content: bytes) -> int:
    return len(content) - 8 - int.from_bytes(content[-8:-4], "little")


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared cache"])
@pytest.mark.parametrize(
    "damage",
    [truncated, flipped_in_a_page, flipped_in_the_footer, None],
    ids=["truncated", "page", "footer", "missing"],
)
def test_an_epoch_over_a_damaged_shard_ends_with_its_name_and_a_remedy(
    data: Path, damage: Callable[[bytes], bytes] | None, shared: bool
) -> None:
    path = data / DAMAGED
    content = path.read_bytes()
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(content))
    builder = MicroBatchBuilder(str(data), ORDER, STREAM, shared=shared)
    expected = rf"{DAMAGED} of {data} is missing or damaged: .* Restore it, or prepare the data set"
    try:
        # The second attempt must fail too, and not find something incomplete in a cache.
        for _ in range(2):
            with pytest.raises(DataError, match=expected):
                builder.build(0, 3, 0)
        path.write_bytes(content)
        assert len(builder.build(0, 3, 0)) == 6
    finally:
        builder.close()


def test_steps_before_the_damage_are_whole_and_none_after_it_is_given(data: Path) -> None:
    # With this seed, only the last of three steps reads the damaged row group.
    order = dataclasses.replace(ORDER, seed=6)
    sound = list(local_step_batches(str(data), order, STREAM, first_step=0, num_steps=3))
    path = data / DAMAGED
    path.write_bytes(flipped_in_a_page(path.read_bytes()))
    found: list[StepBatch] = []
    steps = local_step_batches(str(data), order, STREAM, first_step=0, num_steps=3)
    with pytest.raises(DataError, match=DAMAGED):
        found.extend(steps)
    assert [batch.step for batch in found] == [0, 1]
    assert next(steps, None) is None
    for batch, undamaged in zip(found, sound, strict=False):
        for micro, other in zip(batch.micro_batches, undamaged.micro_batches, strict=True):
            assert np.array_equal(micro.payload, other.payload)


def read_all(uri: str, manifest: Manifest) -> MoleculeBlock:
    reader = ShardReader(uri, manifest, "train", columns=GRAPH_COLUMNS)
    positions = np.arange(reader.num_rows)
    return reader.read_block(positions, positions)


def equal(one: MoleculeBlock, other: MoleculeBlock) -> bool:
    names = [field.name for field in dataclasses.fields(MoleculeBlock)]
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def test_no_flipped_bit_gives_other_molecules(data: Path) -> None:
    uri, path = str(data), data / DAMAGED
    manifest = load_manifest(uri)
    sound, content = read_all(uri, manifest), path.read_bytes()
    rng = np.random.default_rng(0)
    start = footer_start(content)
    in_pages = rng.choice(start, 250, replace=False)
    in_footer = start + rng.choice(len(content) - start, 250, replace=False)
    named = {"pages": 0, "footer": 0}
    for where, positions in (("pages", in_pages), ("footer", in_footer)):
        for position in positions.tolist():
            path.write_bytes(flipped(content, position, int(rng.integers(8))))
            try:
                found = read_all(uri, manifest)
            except DataError as error:
                assert DAMAGED in str(error)  # noqa: PT017 - most flips must raise, not all
                named[where] += 1
            else:
                # The byte is not read: it belongs to a string, or to an unused field of a header.
                assert equal(found, sound), f"bit of byte {position} passed unnoticed"
    # The whole footer is checked, but only the pages of the columns that are read.
    assert named["footer"] == 250
    assert named["pages"] > 150


@pytest.mark.parametrize("damage", [truncated, flipped_in_a_page, None], ids=["cut", "bit", "gone"])
def test_a_file_read_as_a_whole_is_compared_with_the_manifest(
    data: Path, damage: Callable[[bytes], bytes] | None
) -> None:
    (shard,) = (one for one in load_manifest(str(data)).shards if one.path == DAMAGED)
    path = data / DAMAGED
    content = path.read_bytes()
    assert shards.read_file(str(data), shard) == content
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(content))
    with pytest.raises(DataError, match=DAMAGED):
        shards.read_file(str(data), shard)


def test_a_data_set_of_format_version_2_whose_footers_have_no_checksum_is_read(data: Path) -> None:
    uri = str(data)
    manifest = load_manifest(uri)
    sound = read_all(uri, manifest)
    bare = tuple(dataclasses.replace(shard, footer_crc32=None) for shard in manifest.shards)
    old = dataclasses.replace(
        manifest,
        format_version=2,
        shards=bare,
        fingerprint=fingerprint(1, {}, (), bare, format_version=2),
    ).to_json()
    for shard in old["shards"]:
        del shard["footer_crc32"]
    storage.write_json(storage.join(uri, dataset_files.MANIFEST_NAME), old)
    assert equal(read_all(uri, load_manifest(uri)), sound)
    path = data / DAMAGED
    path.write_bytes(flipped_in_a_page(path.read_bytes()))
    with pytest.raises(DataError, match=DAMAGED):
        read_all(uri, load_manifest(uri))
