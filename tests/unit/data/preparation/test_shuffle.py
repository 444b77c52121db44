"""Shuffle and deduplication: one order per seed, every row accounted for, the same bytes after any interruption."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moleblend_ray.chemistry.config import ConformerConfig, FeaturizeConfig
from moleblend_ray.chemistry.descriptors import stored_descriptors
from moleblend_ray.data.dataset.dataset_files import listed
from moleblend_ray.data.dataset.manifest import Manifest, format_version_of, load_manifest
from moleblend_ray.data.dataset.shard_reader import ShardReader
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.assembly import count_repeats, write_manifest
from moleblend_ray.data.preparation.claim import claim_output, finished_manifest, remove_work_files
from moleblend_ray.data.preparation.exchange import (
    Exchange,
    StagedChunk,
    Unit,
    plan_exchange,
    staged_chunk,
)
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.receipts import Statistics, UnitReceipt, valid_unit_receipts
from moleblend_ray.data.preparation.shard_writer import convert_chunk
from moleblend_ray.data.preparation.shuffle import run_unit
from moleblend_ray.data.sources import find_sources, inspect_sources, read_chunks
from moleblend_ray.errors import ConfigError, DataError
from moleblend_ray.relations.hashing import keyed_hash
from moleblend_ray.vocabulary import FEATURIZER_VERSION

SMALL = 1
"""Bytes of memory with which each chunk becomes a group of its own."""
LARGE = 1 << 30


def prepare(
    source: Path, out: Path, *, memory_bytes: int = LARGE, reverse: bool = False, **changes: Any
) -> Manifest:
    """Run or continue the whole job in this process; with ``reverse``, the units of a pass in reverse order."""
    options = ConvertOptions(**{"rows_per_chunk": 20, "row_group_rows": 8, **changes})
    manifest = finished_manifest(str(out), find_sources(str(source)), options)
    if manifest is not None:
        remove_work_files(str(out))
        return manifest
    sources = inspect_sources(find_sources(str(source)), options.columns)
    done = claim_output(str(out), sources, options)
    receipts = []
    for index, layout in enumerate(sources.layouts):
        for chunk in read_chunks(layout, index, options.rows_per_chunk):
            receipt = done.get((index, chunk.chunk_index))
            if receipt is None or receipt.digest != chunk.digest(layout):
                receipt = convert_chunk(chunk, layout, sources.labels, options, str(out))
            receipts.append(receipt)
    exchange, passes = plan_exchange(
        str(out),
        [layout.file.uri for layout in sources.layouts],
        sources.labels,
        map(staged_chunk, receipts),
        options,
        memory_bytes=memory_bytes,
    )
    placed = run_passes(exchange, passes, reverse=reverse)
    return write_manifest(str(out), sources, options, receipts, placed)


def test_other_members_of_an_archive_are_another_source(tmp_path: Path) -> None:
    archive, out = tmp_path / "a.zip", tmp_path / "out"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("train/x.smi", "C\nCC\n")
        file.writestr("test/y.smi", "CCC\n")
    train = prepare(Path(f"{archive}!train/*"), out, shuffle=True)
    assert prepare(Path(f"{archive}!train/*"), out, shuffle=True) == train
    with pytest.raises(ConfigError, match=r"there .*a\.zip!train/\* .*; now .*a\.zip!test/\* "):
        prepare(Path(f"{archive}!test/*"), out, shuffle=True)
    # Data sets of earlier versions do not say which members they were made of.
    manifest = out / "manifest.json"
    value = json.loads(manifest.read_text())
    del value["sources"][0]["members"]
    manifest.write_text(json.dumps(value))
    assert prepare(Path(f"{archive}!train/*"), out, shuffle=True).counts == train.counts


def run_passes(exchange: Exchange, passes: list[list[Unit]], *, reverse: bool) -> list[UnitReceipt]:
    done = valid_unit_receipts(exchange.out, listed(exchange.out))
    for units in passes:
        for unit in reversed(units) if reverse else units:
            found = done.get(unit.name)
            if found is None or found.digest != exchange.digest(unit):
                done[unit.name] = run_unit(exchange, unit)
    return [done[unit.name] for unit in passes[-1]]


def content_of(out: Path) -> dict[str, bytes]:
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def rows_of(out: Path, split: str = "train") -> list[dict[str, Any]]:
    reader = ShardReader(str(out), load_manifest(str(out)), split, verify=True)
    rows: list[dict[str, Any]] = reader.read(np.arange(reader.num_rows)).to_pylist()
    return rows


def quarantine_of(out: Path) -> list[dict[str, Any]]:
    shards = load_manifest(str(out)).shards_of("quarantine")
    return [row for shard in shards for row in pq.read_table(out / shard.path).to_pylist()]


def alkanes(count: int) -> list[str]:
    """Distinct molecules."""
    ends = ("", "O", "N", "F", "Cl", "S")
    return ["C" * (1 + i // len(ends)) + ends[i % len(ends)] for i in range(count)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two files of 90 and 61 records, one of which is not a molecule."""
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [f"{smiles},{row}" for row, smiles in enumerate(alkanes(150))]
    (folder / "a.csv").write_text("\n".join(["smiles,y", *lines[:90]]) + "\n")
    (folder / "b.csv").write_text("\n".join(["smiles,y", "C1CC,0", *lines[90:]]) + "\n")
    return folder


def test_the_order_is_that_of_a_keyed_hash_of_each_record_s_place(
    source: Path, tmp_path: Path
) -> None:
    manifest = prepare(source, tmp_path / "out", shuffle=True, shuffle_seed=5, rows_per_shard=40)
    assert manifest.counts.rows_in == 151
    assert manifest.counts.quarantined_by_reason == {"unparsable_smiles": 1}
    found = rows_of(tmp_path / "out") + rows_of(tmp_path / "out", "valid")
    assert sorted(row["smiles"] for row in found) == sorted(alkanes(150))
    assert all(row["label:y"] == alkanes(150).index(row["smiles"]) for row in found)
    for split in ("train", "valid"):
        rows = rows_of(tmp_path / "out", split)
        file_index = [int(row["label:y"] >= 90) for row in rows]
        keys = keyed_hash(5, file_index, [row["source_row"] for row in rows])
        assert (np.diff(keys.astype(object)) > 0).all()
    # 150 molecules, 40 or fewer to a shard on average.
    assert len(manifest.shards_of("train")) == 4


def test_shards_of_large_molecules_have_fewer_rows(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moleblend_ray.data.preparation.exchange._MAX_BUCKET_BYTES", 2048)
    manifest = prepare(source, tmp_path / "out", shuffle=True, valid_fraction=0.0)
    assert len(manifest.shards_of("train")) > 10


@pytest.mark.parametrize(
    "settings", [{"shuffle": True}, {"deduplicate": "inchikey"}], ids=["shuffled", "in order"]
)
@pytest.mark.parametrize("memory_bytes", [SMALL, LARGE])
def test_descriptors_stay_with_their_molecules(
    source: Path, tmp_path: Path, settings: dict[str, Any], memory_bytes: int
) -> None:
    featurize = FeaturizeConfig(descriptors=True)
    out = tmp_path / "out"
    prepare(source, out, memory_bytes=memory_bytes, featurize=featurize, **settings)
    rows = rows_of(out)
    assert len(rows) > 20
    found = np.array([row["descriptors"] for row in rows], np.float32)
    np.testing.assert_array_equal(found, stored_descriptors([row["smiles"] for row in rows]))


def test_groups_fit_into_memory_with_the_copies_that_their_work_makes() -> None:
    def group_sizes(memory_bytes: int) -> list[list[int]]:
        chunks = [StagedChunk(0, i, 10 * i, 10, size, "") for i, size in enumerate((5, 5, 4, 9, 1))]
        exchange, (runs, *_) = plan_exchange(
            "out",
            ["a.csv"],
            [],
            reversed(chunks),
            ConvertOptions(row_group_rows=8, rows_per_shard=8, shuffle=True),
            memory_bytes=memory_bytes,
        )
        assert exchange.group_starts == tuple(unit.chunks[0].first_row for unit in runs)
        return [[chunk.memory_bytes for chunk in unit.chunks] for unit in runs]

    assert group_sizes(4 * 10) == [[5, 5], [4], [9, 1]]
    assert group_sizes(4 * 14) == [[5, 5, 4], [9, 1]]
    assert group_sizes(1) == [[5], [5], [4], [9], [1]]


@pytest.mark.parametrize(
    "settings", [{"shuffle": True}, {"shuffle": True, "deduplicate": "inchikey"}, {"deduplicate": "inchikey"}]
)  # fmt: skip
def test_memory_and_the_order_of_the_work_change_no_byte(
    source: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with (source / "b.csv").open("a") as file:
        file.write("CCO,1\nOCC,2\nC,3\n")
    whole = prepare(source, tmp_path / "whole", rows_per_shard=30, **settings)
    pieces = prepare(
        source, tmp_path / "pieces", memory_bytes=SMALL, reverse=True, rows_per_shard=30, **settings
    )
    assert whole == pieces
    assert content_of(tmp_path / "whole") == content_of(tmp_path / "pieces")
    assert not {name.split("/")[0] for name in content_of(tmp_path / "whole")} & {
        "staged",
        "receipts",
    }


@pytest.mark.parametrize("deduplicate", ["none", "inchikey"])
def test_another_seed_is_another_order_of_the_same_molecules(
    source: Path, tmp_path: Path, deduplicate: str
) -> None:
    for seed in (0, 1):
        out = tmp_path / str(seed)
        prepare(source, out, shuffle=True, shuffle_seed=seed, deduplicate=deduplicate)
    one, other = ([row["smiles"] for row in rows_of(tmp_path / str(seed))] for seed in (0, 1))
    assert one != other
    assert sorted(one) == sorted(other)


def write_geometry(path: Path, smiles: list[str], with_positions: list[bool]) -> None:
    """Water-like records; those without positions are SMILES."""
    heavy = [2 if text == "CO" else 1 for text in smiles]
    kind = pa.list_(pa.int32())
    columns = {
        "mol_id": [f"{path.stem}-{row}" for row in range(len(smiles))],
        "smiles": smiles,
        "atomic_numbers": pa.array([[6, 8][:n] for n in heavy], kind),
        "formal_charges": pa.array([[0] * n for n in heavy], kind),
        "positions": pa.array(
            [[0.0, 0.0, 1.0, 0.0, 0.0, 2.4][: 3 * n] if has else None
             for n, has in zip(heavy, with_positions, strict=True)],
            pa.list_(pa.float32()),
        ),
        "bond_begin": pa.array([[0][: n - 1] for n in heavy], kind),
        "bond_end": pa.array([[1][: n - 1] for n in heavy], kind),
        "bond_order": pa.array([[1][: n - 1] for n in heavy], kind),
    }  # fmt: skip
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("memory_bytes", [SMALL, LARGE])
def test_of_equal_molecules_one_with_coordinates_then_the_first_is_kept(
    tmp_path: Path, shuffle: bool, memory_bytes: int
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_geometry(folder / "a.parquet", ["CO", "C", "CO", "CO"], [False, False, True, True])
    (folder / "b.csv").write_text("smiles,n\nCO,1\nC,2\nN,3\n* ,4\n*,5\nC1CC,6\n")
    manifest = prepare(
        folder, tmp_path / "out", shuffle=shuffle, deduplicate="inchikey", valid_fraction=0.0,
        rows_per_chunk=2, rows_per_shard=2, memory_bytes=memory_bytes,
    )  # fmt: skip
    kept = [row["mol_id"] for row in rows_of(tmp_path / "out")]
    in_order = ["a-1", "a-2", "b_2"]
    assert kept == in_order if not shuffle else sorted(kept) == in_order
    duplicates = [row for row in quarantine_of(tmp_path / "out") if row["reason"] == "duplicate"]
    found = {(Path(row["source_uri"]).name, row["source_row"]): row for row in duplicates}
    assert set(found) == {("a.parquet", 0), ("a.parquet", 3), ("b.csv", 0), ("b.csv", 1)}
    methanol, methane = "OKKJLVBELUTLKV-UHFFFAOYSA-N", "VNWKTOKETHGBQD-UHFFFAOYSA-N"
    for place, mol_id, excerpt, kept_as in (
        (("a.parquet", 0), "a-0", "CO", f"InChIKey {methanol} is kept as a-2, row 2 of"),
        (("a.parquet", 3), "a-3", "CO", f"InChIKey {methanol} is kept as a-2, row 2 of"),
        (("b.csv", 0), "b_0", "CO", f"InChIKey {methanol} is kept as a-2, row 2 of"),
        (("b.csv", 1), "b_1", "C", f"InChIKey {methane} is kept as a-1, row 1 of"),
    ):
        assert (found[place]["mol_id"], found[place]["excerpt"]) == (mol_id, excerpt)
        assert found[place]["detail"] == f"{kept_as} {folder}/a.parquet"
    counts = manifest.counts
    assert counts.rows_in == 10 == counts.rows_out + counts.rows_quarantined
    assert counts.quarantined_by_reason == {
        "duplicate": 4, "unparsable_smiles": 1, "unsupported_atom": 2,
    }  # fmt: skip
    assert counts.with_coordinates == 1
    assert counts.atom_count_histogram == {"1": 2, "2": 1}
    assert counts.elements == {"C": 2, "N": 1, "O": 1}


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_of_many_duplicates_names_the_record_that_is_kept_for_it(
    tmp_path: Path, shuffle: bool
) -> None:
    source = tmp_path / "in.csv"
    source.write_text("\n".join(["smiles", *alkanes(30), *reversed(alkanes(30))]) + "\n")
    prepare(source, tmp_path / "out", shuffle=shuffle, deduplicate="inchikey")
    duplicates = quarantine_of(tmp_path / "out")
    assert sorted(row["source_row"] for row in duplicates) == list(range(30, 60))
    for row in duplicates:
        kept = 59 - row["source_row"]
        assert row["detail"].endswith(f"is kept as in_{kept}, row {kept} of {source}")


def test_coordinates_of_the_source_count_more_than_those_made_here(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.csv").write_text("smiles\nCO\nCC\nCC\n")
    write_geometry(folder / "b.parquet", ["CO"], [True])
    made = FeaturizeConfig(conformers=ConformerConfig(generate=True))
    settings: dict[str, Any] = {"deduplicate": "inchikey", "featurize": made, "valid_fraction": 0.0}
    manifest = prepare(folder, tmp_path / "out", **settings)
    assert [row["mol_id"] for row in rows_of(tmp_path / "out")] == ["a_1", "b-0"]
    assert manifest.counts.with_coordinates == 2


def test_molecules_without_an_inchikey_are_all_kept_and_counted(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("smiles\n*C\nC*\nCC\nCC\n")
    manifest = prepare(
        tmp_path / "in.csv",
        tmp_path / "out",
        deduplicate="inchikey",
        featurize=FeaturizeConfig(dummy_atoms="other"),
        valid_fraction=0.0,
    )
    assert [row["source_row"] for row in rows_of(tmp_path / "out")] == [0, 1, 2]
    assert manifest.counts.without_inchikey == 2
    assert manifest.counts.quarantined_by_reason == {"duplicate": 1}


class _KilledError(BaseException):
    """Like a kill, it cannot be caught as an Exception."""


class _Killer:
    """Allows ``left`` changes of the storage, and ends the process at the next one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        self.seen: list[str] = []
        for name in ("write_bytes", "delete", "delete_tree"):
            monkeypatch.setattr(storage, name, self._guarded(getattr(storage, name)))

    def _guarded(self, change: Callable[..., None]) -> Callable[..., None]:
        def guarded(uri: str, *arguments: Any) -> None:
            if self.left == 0:
                raise _KilledError
            if self.left is not None:
                self.left -= 1
            self.seen.append(uri)
            change(uri, *arguments)

        return guarded


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"shuffle": True, "deduplicate": "inchikey"}, ("chunks", "runs", "buckets")),
        ({"deduplicate": "inchikey"}, ("chunks", "runs", "duplicates", "groups")),
    ],
)
def test_a_run_killed_at_any_change_of_the_storage_ends_with_the_same_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    kinds: tuple[str, ...],
) -> None:
    source = tmp_path / "in.csv"
    source.write_text("\n".join(["smiles", *alkanes(24), "C1CC", *alkanes(5)]) + "\n")
    options = {"memory_bytes": SMALL, "rows_per_chunk": 12, "rows_per_shard": 15, **settings}
    killer = _Killer(monkeypatch)
    prepare(source, tmp_path / "whole", **options)
    expected = content_of(tmp_path / "whole")
    num_changes = len(killer.seen)
    assert all(any(f"/{kind}/" in uri for uri in killer.seen) for kind in kinds)
    for survived in range(num_changes):
        out = tmp_path / f"killed-{survived}"
        killer.left = survived
        with pytest.raises(_KilledError):
            prepare(source, out, **options)
        killer.left = None
        prepare(source, out, **options)
        assert content_of(out) == expected, f"killed after {survived} changes"


def test_a_changed_source_leaves_nothing_stale(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    settings: dict[str, Any] = {"shuffle": True, "rows_per_shard": 20, "memory_bytes": SMALL}
    source.write_text("\n".join(["smiles", *alkanes(100)]) + "\n")
    prepare(source, tmp_path / "out", **settings)
    (tmp_path / "out" / "manifest.json").unlink()
    options = ConvertOptions(rows_per_chunk=20, row_group_rows=8, shuffle=True, rows_per_shard=20)
    uris = [str(source)]
    plan = {
        "format_version": format_version_of(()),
        "featurizer_version": FEATURIZER_VERSION,
        "options": options.to_json(),
        "sources": uris,
    }
    storage.write_json(str(tmp_path / "out" / "receipts" / "plan.json"), plan)
    source.write_text("\n".join(["smiles", *alkanes(30)]) + "\n")
    manifest = prepare(source, tmp_path / "out", **settings)
    assert manifest == prepare(source, tmp_path / "fresh", **settings)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "fresh")


def test_a_damaged_staged_file_is_told(source: Path, tmp_path: Path) -> None:
    def damage_and_run(exchange: Exchange, unit: Unit) -> None:
        (path, *_) = sorted((tmp_path / "out" / "staged" / "chunks").iterdir())
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        run_unit(exchange, unit)

    options = ConvertOptions(shuffle=True)
    sources = inspect_sources(find_sources(str(source)), options.columns)
    layout = sources.layouts[0]
    (chunk,) = read_chunks(layout, 0, 100)
    receipt = convert_chunk(chunk, layout, sources.labels, options, str(tmp_path / "out"))
    exchange, passes = plan_exchange(
        str(tmp_path / "out"),
        [layout.file.uri],
        sources.labels,
        [staged_chunk(receipt)],
        ConvertOptions(row_group_rows=8, rows_per_shard=8, shuffle=True),
        memory_bytes=LARGE,
    )
    with pytest.raises(DataError, match=r"00000-000000\.segment is damaged\. Delete it and run"):
        damage_and_run(exchange, passes[0][0])


def test_repeats_are_counted_exactly_beyond_the_memory_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moleblend_ray.data.preparation.assembly._MAX_HASHES_IN_MEMORY", 1000)
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**64, 20_000, dtype=np.uint64)
    values = np.append(values, rng.choice(values, 500))
    expected = len(values) - len(np.unique(values))
    assert expected >= 480
    for part in (1, 700, 5000, 30_000):
        pieces = [values[i : i + part] for i in range(0, len(values), part)]
        assert count_repeats(pieces if part > 1 else pieces[:50]) == (expected if part > 1 else 0)
    assert count_repeats([]) == 0


def test_statistics_are_those_of_the_molecules(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("smiles\nCCO\nC\nCl.[Na+]\nCCl\n")
    options = ConvertOptions(valid_fraction=0.0)
    sources = inspect_sources(find_sources(str(tmp_path / "in.csv")), options.columns)
    (chunk,) = read_chunks(sources.layouts[0], 0, 100)
    receipt = convert_chunk(chunk, sources.layouts[0], sources.labels, options, str(tmp_path / "o"))
    assert receipt.statistics == Statistics(
        molecules=4,
        atoms=8,
        conformer_status={"none": 4},
        atom_count_histogram={"1": 1, "2": 2, "3": 1},
        elements={"C": 3, "O": 1, "Cl": 2, "Na": 1},
    )


def test_a_source_without_a_molecule_is_an_empty_data_set(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("smiles\nC1CC\n\n,\n")
    for settings in ({"shuffle": True}, {"deduplicate": "inchikey"}):
        out = tmp_path / f"{settings}"
        manifest = prepare(tmp_path / "in.csv", out, **settings)
        assert manifest.counts.rows_out == 0 < manifest.counts.rows_quarantined
        assert manifest.counts.atom_count_histogram == {}


def test_a_place_in_a_folder_named_like_a_split_is_taken(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("smiles\nC\n")
    out = tmp_path / "test" / "out"
    storage.write_bytes(str(out / "notes.txt"), b"mine")
    assert prepare(tmp_path / "in.csv", out, shuffle=True).counts.rows_out == 1
