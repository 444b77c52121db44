"""Converting chunks gives the same files every time; every row is accounted for, and unfinished work is not used."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import http.server
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from many_rings import C60, cyclodextrin, cycloparaphenylene

from moleblend_ray.chemistry import conformers
from moleblend_ray.chemistry.config import ConformerConfig, FeaturizeConfig
from moleblend_ray.chemistry.descriptors import stored_descriptors
from moleblend_ray.chemistry.molecule import Molecule, molecule_from_smiles
from moleblend_ray.chemistry.records import SmilesText
from moleblend_ray.data.batches.builder import local_step_batches
from moleblend_ray.data.config import OrderConfig, StreamConfig
from moleblend_ray.data.dataset.block import block_from_table
from moleblend_ray.data.dataset.dataset_files import receipt_uri
from moleblend_ray.data.dataset.descriptors import DescriptorScaling
from moleblend_ray.data.dataset.manifest import Manifest, load_manifest
from moleblend_ray.data.dataset.manifest import fingerprint as manifest_fingerprint
from moleblend_ray.data.dataset.shard_reader import ShardReader
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation import shard_writer
from moleblend_ray.data.preparation.assembly import _sample, write_manifest
from moleblend_ray.data.preparation.claim import claim_output, finished_manifest
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.receipts import Receipt
from moleblend_ray.data.preparation.shard_writer import (
    _closest_distances,
    convert_chunk,
    featurize_chunk,
    featurize_records,
)
from moleblend_ray.data.sources import (
    ColumnConfig,
    SourceSet,
    find_sources,
    inspect_sources,
    read_chunks,
)
from moleblend_ray.data.sources.records import RawRecord
from moleblend_ray.errors import ConfigError, DataError
from moleblend_ray.vocabulary import STORED_DESCRIPTORS

BAD_TABLE = """smiles,id,y
CCO,ethanol,1.5
C1CC,open ring,2
,nothing,3
[Na+].[Cl-],salt,4
C,methane,
[U],uranium,6
CC*,dummy,7
C[N](C)(C)(C)C,valence,8
{long},long,9
c1ccccc1,ethanol,10
"""
ALKANE_500 = "C" * 500
DESCRIBED = FeaturizeConfig(descriptors=True)


def write_source(directory: Path, name: str = "bad.csv") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(BAD_TABLE.format(long=ALKANE_500))
    return directory / name


def plan(source: Path | str, **options: Any) -> tuple[SourceSet, ConvertOptions]:
    chosen = ConvertOptions(**options)
    return inspect_sources(find_sources(str(source)), chosen.columns), chosen


def convert(
    source: Path | str, out: Path | str, converted: list[int] | None = None, **options: Any
) -> Manifest:
    """Run the whole job in this process; the chunks that are converted are appended to ``converted``."""
    sources, chosen = plan(source, **options)
    done = claim_output(str(out), sources, chosen)
    receipts = []
    for index, layout in enumerate(sources.layouts):
        for chunk in read_chunks(layout, index, chosen.rows_per_chunk):
            receipt = done.get((index, chunk.chunk_index))
            if receipt is None or receipt.digest != chunk.digest(layout):
                receipt = convert_chunk(chunk, layout, sources.labels, chosen, str(out))
                if converted is not None:
                    converted.append(chunk.chunk_index)
            receipts.append(receipt)
    return write_manifest(str(out), sources, chosen, receipts)


def content_of(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def quarantine_of(out: Path, manifest: Manifest) -> list[dict[str, object]]:
    tables = [pq.read_table(out / shard.path) for shard in manifest.shards_of("quarantine")]
    return list(pa.concat_tables(tables).to_pylist())


def test_every_row_is_a_molecule_or_in_quarantine_with_its_reason(tmp_path: Path) -> None:
    source = write_source(tmp_path / "in")
    columns = ColumnConfig(id_column="id")
    manifest = convert(
        source, tmp_path / "out", columns=columns, rows_per_chunk=3, valid_fraction=0.0
    )
    rejected = quarantine_of(tmp_path / "out", manifest)
    assert [(row["source_row"], row["mol_id"], row["reason"]) for row in rejected] == [
        (1, "open ring", "unparsable_smiles"),
        (2, "nothing", "missing_smiles"),
        (6, "dummy", "unsupported_atom"),
        (7, "valence", "unparsable_smiles"),
        (8, "long", "too_many_atoms"),
    ]
    assert {row["source_uri"] for row in rejected} == {str(source)}
    assert rejected[0]["excerpt"] == "C1CC"
    assert all(row["detail"] for row in rejected)
    counts = manifest.counts
    assert (counts.rows_in, counts.rows_out, counts.rows_quarantined) == (10, 5, 5)
    assert counts.quarantined_by_reason == {
        "missing_smiles": 1,
        "too_many_atoms": 1,
        "unparsable_smiles": 2,
        "unsupported_atom": 1,
    }
    assert counts.duplicate_ids == 1
    assert counts.conformer_status == {"none": 5}
    assert [source.rows for source in manifest.sources] == [10]
    table = ShardReader(str(tmp_path / "out"), manifest, "train").read(np.arange(5))
    assert table["mol_id"].to_pylist() == ["ethanol", "salt", "methane", "uranium", "ethanol"]
    assert table["source_row"].to_pylist() == [0, 3, 4, 5, 9]
    assert table["label:y"].to_pylist() == [1.5, 4, None, 6, 10]
    assert [label.count for label in manifest.labels] == [4]
    assert load_manifest(str(tmp_path / "out")) == manifest


@pytest.mark.usefixtures("small_limit")
def test_a_record_that_is_too_large_is_a_row_in_quarantine_also_of_a_continued_run(
    tmp_path: Path,
) -> None:
    block = (
        "\n\n\n  1  0  0  0  0  0  0  0  0  0999 V2000\n" + "    0.0000" * 3 + " C   0  0\nM  END\n"
    )
    image = f">  <image>\n{'x' * (3 << 19)}\n\n"
    records = [f"m{row}{block}{image if row in (1, 6) else ''}$$$$\n" for row in range(7)]
    source, out = tmp_path / "in.sdf", tmp_path / "out"
    source.write_text("".join(records).removesuffix("$$$$\n"))
    whole = convert(source, tmp_path / "whole", rows_per_chunk=2)
    counts = whole.counts
    assert (counts.rows_in, counts.rows_out, counts.rows_quarantined) == (7, 5, 2)
    for row, rejected in zip((1, 6), quarantine_of(tmp_path / "whole", whole), strict=True):
        assert rejected == {
            "source_uri": str(source),
            "source_row": row,
            "mol_id": f"m{row}",
            "excerpt": records[row][:200],
            "reason": "invalid_record",
            "detail": "the record has 1.6 MiB, more than the 1 MiB that a record may have",
        }
    convert_first(source, out, 2, rows_per_chunk=2)
    converted: list[int] = []
    assert convert(source, out, converted, rows_per_chunk=2) == whole
    assert converted == [2, 3]
    assert content_of(out) == content_of(tmp_path / "whole")


def test_a_record_that_hangs_rdkit_costs_its_limit_and_its_neighbours_nothing(
    tmp_path: Path,
) -> None:
    source = tmp_path / "in.csv"
    source.write_text(f"smiles\nCCO\n{cycloparaphenylene(18)}\n{C60}\n{cyclodextrin(14)}\n")
    manifest = convert(
        source,
        tmp_path / "out",
        featurize=FeaturizeConfig(timeout_s=1.0, descriptors=True),
        valid_fraction=0.0,
    )
    (rejected,) = quarantine_of(tmp_path / "out", manifest)
    assert rejected["source_row"] == 1
    assert (rejected["reason"], rejected["detail"]) == (
        "too_complex",
        "timeout: not done after 1 s",
    )
    assert manifest.counts.quarantined_by_reason == {"too_complex": 1}
    table = ShardReader(str(tmp_path / "out"), manifest, "train").read(np.arange(3))
    assert table["num_atoms"].to_pylist() == [3, 60, 154]
    # The sugars are read in time, and their descriptors would take hours.
    described = np.array(table["descriptors"].to_pylist())
    assert np.isnan(described).all(axis=1).tolist() == [False, False, True]


def test_a_data_set_from_before_the_time_limit_is_that_of_its_default(tmp_path: Path) -> None:
    source = write_source(tmp_path / "in")
    out = str(tmp_path / "out")
    convert(source, out)
    sources, options = plan(source)
    document = storage.read_json(storage.join(out, "manifest.json"))
    del document["options"]["featurize"]["timeout_s"]
    manifest = Manifest.from_json(document)
    document["fingerprint"] = manifest_fingerprint(
        manifest.featurizer_version, manifest.options, manifest.labels, manifest.shards
    )
    storage.write_json(storage.join(out, "manifest.json"), document)
    files = [layout.file for layout in sources.layouts]
    assert finished_manifest(out, files, options) is not None
    hasty = dataclasses.replace(options, featurize=FeaturizeConfig(timeout_s=1.0))
    with pytest.raises(ConfigError, match=r"featurize\.timeout_s: there 30\.0, now 1\.0"):
        finished_manifest(out, files, hasty)


def test_shards_hold_what_the_featurizer_gives(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("smiles\nCCO\nC\nF/C=C/F.[Cl-]\n")
    config = FeaturizeConfig(conformers=ConformerConfig(generate=True, count=2))
    manifest = convert(source, tmp_path / "out", featurize=config, valid_fraction=0.0)
    table = ShardReader(str(tmp_path / "out"), manifest, "train").read(np.arange(3))
    for row, smiles in zip(table.to_pylist(), ["CCO", "C", "F/C=C/F.[Cl-]"], strict=True):
        molecule = molecule_from_smiles(smiles, config)
        assert isinstance(molecule, Molecule)
        assert row["smiles"] == molecule.smiles
        assert row["num_atoms"] == molecule.num_atoms
        assert row["atom_features"] == molecule.atom_features.reshape(-1).tolist()
        assert row["bonds"] == molecule.bonds.reshape(-1).tolist()
        assert row["bond_features"] == molecule.bond_features.reshape(-1).tolist()
        assert row["num_conformers"] == molecule.num_conformers
        assert row["conformer_status"] == str(molecule.conformer_status)
        assert row["conformer_detail"] == molecule.conformer_detail
        energies = np.array(row["conformer_energies"], np.float32)
        np.testing.assert_array_equal(energies, molecule.conformer_energies)
        np.testing.assert_array_equal(
            np.array(row["positions"], np.float32), molecule.positions.reshape(-1)
        )
        assert row["position_mask"] == molecule.position_mask.reshape(-1).tolist()
    assert table["mol_id"].to_pylist() == ["in_0", "in_1", "in_2"]
    block = block_from_table(table, np.arange(3))
    assert block.num_atoms.tolist() == [3, 1, 5]


def test_made_conformers_do_not_depend_on_chunks_or_the_child_that_makes_them(
    tmp_path: Path,
) -> None:
    source = tmp_path / "in.csv"
    source.write_text("smiles\nCCO\nC[Se]C\nC1#CC1\nOCC\nCC(N)C(=O)O\n")
    config = FeaturizeConfig(conformers=ConformerConfig(generate=True, count=3))
    tables = []
    for rows_per_chunk in (1, 5):
        out = tmp_path / str(rows_per_chunk)
        manifest = convert(
            source, out, featurize=config, valid_fraction=0.0, rows_per_chunk=rows_per_chunk
        )
        assert manifest.counts.conformer_status == {"failed": 1, "relaxed": 4}
        assert manifest.counts.conformer_detail == {"embedding failed": 1, "force field": 1}
        tables.append(ShardReader(str(out), manifest, "train").read(np.arange(5)))
        conformers._worker().close()
    assert tables[0].equals(tables[1])
    assert tables[0]["conformer_energies"].to_pylist()[2] == []


SDF_ATOMS = """{title}
     RDKit          {dimension}

  2  1  0  0  0  0  0  0  0  0999 V2000
{first} C   0  0
{second} O   0  0
  1  2  1  0
M  END
$$$$
"""


def sd_record(title: str, second: tuple[float, float, float], dimension: str = "3D") -> str:
    line = "{:10.4f}{:10.4f}{:10.4f}".format
    return SDF_ATOMS.format(
        title=title, dimension=dimension, first=line(0, 0, 0), second=line(*second)
    )


def test_bad_geometry_in_an_sd_file(tmp_path: Path) -> None:
    source = tmp_path / "in.sdf"
    nan = float("nan")
    source.write_text(
        sd_record("good, one atom in the origin", (1.4, 0, 0))
        + sd_record("overlapping", (0.0, 0.1, 0))
        + sd_record("nan", (nan, 0, 0))
        + sd_record("no coordinates", (0, 0, 0))
        + sd_record("depiction", (1.4, 0, 0), dimension="2D")
        + "not a record\n$$$$\n"
    )
    manifest = convert(source, tmp_path / "out", valid_fraction=0.0)
    rejected = quarantine_of(tmp_path / "out", manifest)
    assert [(row["mol_id"], row["reason"]) for row in rejected] == [
        ("overlapping", "overlapping_atoms"),
        ("nan", "non_finite_coordinates"),
        ("not a record", "invalid_record"),
    ]
    assert "0.1 angstrom apart" in str(rejected[0]["detail"])
    table = ShardReader(str(tmp_path / "out"), manifest, "train").read(np.arange(3))
    assert table["conformer_status"].to_pylist() == ["source", "none", "none"]
    assert table["num_conformers"].to_pylist() == [1, 0, 0]
    assert manifest.counts.with_coordinates == 1
    required = FeaturizeConfig(require_coordinates=True)
    manifest = convert(source, tmp_path / "3d", featurize=required)
    assert manifest.counts.quarantined_by_reason["no_coordinates"] == 2


def test_descriptors_are_those_of_the_stored_smiles_and_scaled_by_the_training_molecules(
    tmp_path: Path,
) -> None:
    source, out = write_source(tmp_path / "in"), str(tmp_path / "out")
    settings: dict[str, Any] = {"rows_per_chunk": 3, "valid_fraction": 0.4, "split_seed": 1}
    manifest = convert(source, out, featurize=DESCRIBED, **settings)
    assert load_manifest(out) == manifest
    assert manifest.descriptors is not None
    assert manifest.descriptors.names == STORED_DESCRIPTORS
    assert manifest.num_molecules("valid") > 0
    values = {}
    for split in ("train", "valid"):
        reader = ShardReader(out, manifest, split)
        table = reader.read(np.arange(reader.num_rows))
        values[split] = np.array(table["descriptors"].to_pylist(), np.float32)
        expected = stored_descriptors(table["smiles"].to_pylist())
        np.testing.assert_array_equal(values[split], expected)
    scaling = manifest.descriptor_scaling
    assert scaling is not None
    assert scaling.to_json() == DescriptorScaling.fit(values["train"]).to_json()
    # The manifest holds them beside the molecules, so they are part of its identity.
    changed = dataclasses.replace(
        manifest.descriptors, scaling={**scaling.to_json(), "mean": [0.0]}
    )
    document = {**manifest.to_json(), "descriptors": dataclasses.asdict(changed)}
    storage.write_json(storage.join(out, "manifest.json"), document)
    with pytest.raises(
        DataError, match=r"damaged: it has 216 descriptors, with numbers .*'mean': 1"
    ):
        load_manifest(out)
    document = {**manifest.to_json(), "descriptors": "none"}
    storage.write_json(storage.join(out, "manifest.json"), document)
    with pytest.raises(DataError, match="is damaged"):
        load_manifest(out)
    changed = dataclasses.replace(
        manifest.descriptors, scaling={**scaling.to_json(), "mean": [0.0] * 216}
    )
    document = {**manifest.to_json(), "descriptors": dataclasses.asdict(changed)}
    storage.write_json(storage.join(out, "manifest.json"), document)
    with pytest.raises(DataError, match="was changed after it was written"):
        load_manifest(out)


def test_micro_batches_carry_the_scaled_descriptors_of_their_molecules(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "in"), str(tmp_path / "out")
    manifest = convert(source, out, featurize=DESCRIBED, valid_fraction=0.0)
    reader = ShardReader(out, manifest, "train")
    raw = np.array(reader.read(np.arange(5))["descriptors"].to_pylist(), np.float32)
    scaling = manifest.descriptor_scaling
    assert scaling is not None
    expected = scaling.targets(raw).astype(np.float16)
    assert np.isnan(expected).any()
    order = OrderConfig(global_batch_size=4, num_streams=2)
    stream = StreamConfig(micro_batch_size=1)
    seen = set()
    for step in local_step_batches(out, order, stream, first_step=0, num_steps=5):
        for micro in step.micro_batches:
            np.testing.assert_array_equal(micro.descriptors, expected[micro.molecule_ids])
            seen.update(micro.molecule_ids.tolist())
    assert seen == set(range(5))


def test_a_data_set_of_which_nothing_is_left_has_descriptors_too(tmp_path: Path) -> None:
    source = tmp_path / "none.csv"
    source.write_text("smiles\nC1CC\n")
    manifest = convert(source, tmp_path / "out", featurize=DESCRIBED)
    assert manifest.counts.rows_out == 0
    assert load_manifest(str(tmp_path / "out")).descriptors == manifest.descriptors


@pytest.mark.parametrize(
    ("num_rows", "group_rows", "expected"),
    [(0, 8, 0), (5, 8, 5), (1000, 8, 32 * 8), (10**6, 2048, 1 << 15), (10**9, 2048, 1 << 15)],
)
def test_scales_come_from_a_bounded_sample_from_everywhere(
    num_rows: int, group_rows: int, expected: int
) -> None:
    rows = _sample(num_rows, group_rows)
    assert expected / 2 < len(rows) + 1
    assert len(rows) <= expected
    assert len(np.unique(rows)) == len(rows)
    assert len(np.unique(rows // group_rows)) <= 32
    if len(rows):
        assert rows.min() == 0
        assert rows.max() >= num_rows - group_rows
        assert rows.max() < num_rows


def test_unreadable_labels_are_those_of_molecules_in_shards(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("smiles,y\nC,1\nCC,high\nC1CC,high\n")
    columns = ColumnConfig(label_columns=("y",))
    manifest = convert(tmp_path / "in.csv", tmp_path / "out", columns=columns)
    assert [(label.count, label.num_unreadable) for label in manifest.labels] == [(1, 1)]


def test_one_conformer_with_overlapping_atoms_is_enough() -> None:
    two = FeaturizeConfig(conformers=ConformerConfig(generate=True, count=2))
    molecule = molecule_from_smiles("CCO", two)
    assert isinstance(molecule, Molecule)
    assert molecule.num_conformers == 2
    broken = molecule.positions.copy()
    broken[0, 1] = broken[0, 0] + 0.1
    other = dataclasses.replace(molecule, positions=broken)
    whole, overlapping = _closest_distances([molecule, other])
    assert whole > 0.9
    assert overlapping == pytest.approx(0.1 * 3**0.5, rel=1e-3)


def test_a_chunk_gives_the_same_bytes_each_time_and_in_any_order(tmp_path: Path) -> None:
    source = write_source(tmp_path / "in")
    sources, options = plan(source, rows_per_chunk=3)
    convert(source, tmp_path / "a", rows_per_chunk=3)
    claim_output(str(tmp_path / "b"), sources, options)
    chunks = list(read_chunks(sources.layouts[0], 0, 3))
    receipts = [
        convert_chunk(chunk, sources.layouts[0], sources.labels, options, str(tmp_path / "b"))
        for chunk in reversed(chunks)
    ]
    write_manifest(str(tmp_path / "b"), sources, options, receipts)
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")


def test_the_split_is_a_property_of_the_molecule(tmp_path: Path) -> None:
    smiles = ["C" * length + end for length in range(1, 101) for end in ("", "O", "N", "F")]
    (tmp_path / "a.csv").write_text("smiles\n" + "\n".join(smiles) + "\n")
    (tmp_path / "b.csv").write_text("smiles\n" + "\n".join(reversed(smiles[::2])) + "\n")
    valid = {}
    for name, seed in (("a", 0), ("b", 0), ("a", 1)):
        out = tmp_path / f"{name}{seed}"
        manifest = convert(tmp_path / f"{name}.csv", out, valid_fraction=0.25, split_seed=seed)
        reader = ShardReader(str(out), manifest, "valid", columns=["smiles"])
        valid[name, seed] = set(reader.read(np.arange(reader.num_rows))["smiles"].to_pylist())
        assert (
            manifest.num_molecules("train") + manifest.num_molecules("valid")
            == manifest.counts.rows_out
        )
    assert 60 <= len(valid["a", 0]) <= 140
    assert valid["b", 0] < valid["a", 0]
    assert valid["a", 1] != valid["a", 0]


def convert_first(source: Path, out: Path, num_chunks: int, **options: Any) -> None:
    """The files of a run that was killed after ``num_chunks`` chunks."""
    sources, chosen = plan(source, **options)
    claim_output(str(out), sources, chosen)
    for chunk in list(read_chunks(sources.layouts[0], 0, chosen.rows_per_chunk))[:num_chunks]:
        convert_chunk(chunk, sources.layouts[0], sources.labels, chosen, str(out))


def test_an_interrupted_run_keeps_good_chunks_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "in"), tmp_path / "out"
    convert(source, tmp_path / "whole", rows_per_chunk=2)
    convert_first(source, out, 3, rows_per_chunk=2)
    # One receipt is cut short, and for another one its shard is: neither may count.
    Path(receipt_uri(str(out), 0, 0)).write_text('{"file_index": 0')
    shard = next(out.glob("*/00000-000002.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    converted: list[int] = []
    convert(source, out, converted, rows_per_chunk=2)
    assert converted == [0, 2, 3, 4]
    assert content_of(out) == content_of(tmp_path / "whole")


def test_a_source_changed_between_two_runs_keeps_equal_chunks_and_nothing_stale(
    tmp_path: Path,
) -> None:
    source, out = tmp_path / "in.csv.gz", tmp_path / "out"
    alkanes = ["C" * length for length in range(1, 13)]
    repaired = [*alkanes[:4], "not a molecule", *alkanes[5:8]]
    options: dict[str, Any] = {"rows_per_chunk": 2, "valid_fraction": 0.0}
    source.write_bytes(gzip.compress("\n".join(["smiles", *alkanes]).encode()))
    convert_first(source, out, 6, **options)
    source.write_bytes(gzip.compress("\n".join(["smiles", *repaired]).encode()))
    converted: list[int] = []
    manifest = convert(source, out, converted, **options)
    assert converted == [2], (
        "only the chunk with another record; a missing last line end makes no difference"
    )
    assert manifest.counts.rows_in == 8
    assert manifest == convert(source, tmp_path / "fresh", **options)
    assert content_of(out) == content_of(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # The same records under another header.
        (
            "smiles,a,b\nC,1,2\nCC,3,4\nCCC,5,6\nCCCC,7,8\n",
            "smiles,b,a\nC,1,2\nCC,3,4\nCCC,5,6\nCCCC,7,8\n",
        ),
        # A label that only later records have.
        ("smiles,a\nC,1\nCC,3\nCCC,5\nCCCC,7\n", "smiles,c\nC,1\nCC,3\nCCC,5\nCCCC,7\n"),
    ],
)
def test_chunks_that_are_read_in_another_way_are_converted_again(
    tmp_path: Path, before: str, after: str
) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out"
    options: dict[str, Any] = {"rows_per_chunk": 2, "valid_fraction": 0.0}
    source.write_text(before)
    convert_first(source, out, 1, **options)
    source.write_text(after)
    manifest = convert(source, out, **options)
    assert manifest == convert(source, tmp_path / "fresh", **options)
    assert content_of(out) == content_of(tmp_path / "fresh")


def test_a_finished_data_set_is_recognized(tmp_path: Path) -> None:
    source = write_source(tmp_path / "in")
    sources, options = plan(source)
    out = str(tmp_path / "out")
    files = [layout.file for layout in sources.layouts]
    assert finished_manifest(out, files, options) is None
    manifest = convert(source, out)
    assert finished_manifest(out, files, options) == manifest
    assert not storage.exists(out + "/receipts")


def test_a_finished_data_set_of_other_settings_or_sources_is_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "in")
    out = str(tmp_path / "out")
    convert(source, out)
    files = find_sources(str(source))
    other = ConvertOptions(featurize=FeaturizeConfig(max_atoms=100), valid_fraction=0.5)
    with pytest.raises(
        ConfigError,
        match=r"featurize\.max_atoms: there 256, now 100; valid_fraction: there 0\.05, now 0\.5",
    ):
        finished_manifest(out, files, other)
    second = write_source(tmp_path / "in", "second.csv")
    with pytest.raises(ConfigError, match=r"sources: there .*bad\.csv.*; now .*second\.csv"):
        finished_manifest(out, find_sources(str(second)), ConvertOptions())
    source.write_text(source.read_text().replace("CCO", "CCN"))
    with pytest.raises(ConfigError, match=r"sources: there .*bad\.csv .*now .*bad\.csv"):
        finished_manifest(out, find_sources(str(source)), ConvertOptions())


def test_a_finished_data_set_that_lost_or_changed_files_is_told(tmp_path: Path) -> None:
    source = write_source(tmp_path / "in")
    out = tmp_path / "out"
    manifest = convert(source, out, rows_per_chunk=4)
    files, options = find_sources(str(source)), ConvertOptions(rows_per_chunk=4)
    first, second = manifest.shards[0], manifest.shards_of("quarantine")[0]
    (out / first.path).unlink()
    (out / second.path).write_bytes(b"PAR1")
    with pytest.raises(
        DataError,
        match=rf"{first.path} is missing; {second.path} has 4 bytes instead of {second.num_bytes}\. "
        r"Restore them, or delete",
    ):
        finished_manifest(str(out), files, options)


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Nothing."""


def test_no_credentials_are_written_and_a_new_signature_is_the_same_source(tmp_path: Path) -> None:
    source = write_source(tmp_path / "in")
    out = str(tmp_path / "out")
    handler = functools.partial(_QuietHandler, directory=str(source.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}/{source.name}?X-Amz-Date="
        convert(f"{base}1&X-Amz-Signature=hunter2", out)
        again = find_sources(f"{base}2&X-Amz-Signature=hunter3")
        server.shutdown()
    manifest = load_manifest(out)
    assert finished_manifest(out, again, ConvertOptions()) == manifest
    shown = f"{base}***&X-Amz-Signature=***"
    assert [info.uri for info in manifest.sources] == [shown]
    table = pq.read_table(out + "/" + manifest.shards_of("quarantine")[0].path)
    assert set(table["source_uri"].to_pylist()) == {shown}


def test_an_unfinished_data_set_of_other_settings_is_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "in")
    out = str(tmp_path / "out")
    sources, options = plan(source)
    claim_output(out, sources, options)
    other = dataclasses.replace(options, split_seed=5)
    with pytest.raises(ConfigError, match=r"begun otherwise.*options\.split_seed: there 0, now 5"):
        claim_output(out, sources, other)


def test_files_of_unknown_origin_are_not_overwritten(tmp_path: Path) -> None:
    source = write_source(tmp_path / "in")
    storage.write_bytes(str(tmp_path / "out/train/mine.parquet"), b"")
    with pytest.raises(ConfigError, match="neither a manifest nor a plan"):
        claim_output(str(tmp_path / "out"), *plan(source))


def test_lost_rows_are_never_accepted(tmp_path: Path) -> None:
    source = write_source(tmp_path / "in")
    sources, options = plan(source)
    out = str(tmp_path / "out")
    (chunk,) = read_chunks(sources.layouts[0], 0, 100)
    with pytest.raises(DataError, match="read as 11 records and parsed as 10"):
        featurize_chunk(
            dataclasses.replace(chunk, num_rows=11),
            sources.layouts[0],
            sources.labels,
            options.featurize,
        )
    receipt = convert_chunk(chunk, sources.layouts[0], sources.labels, options, out)
    with pytest.raises(DataError, match="Rows are lost: 11 read"):
        write_manifest(out, sources, options, [dataclasses.replace(receipt, rows_in=11)])
    assert not storage.exists(out + "/manifest.json")


def test_the_fingerprint_tells_content_and_settings_not_place(tmp_path: Path) -> None:
    one = convert(write_source(tmp_path / "in"), tmp_path / "a")
    two = convert(write_source(tmp_path / "elsewhere"), tmp_path / "b")
    other = convert(write_source(tmp_path / "in"), tmp_path / "c", split_seed=3)
    assert one.sources != two.sources
    assert one.fingerprint == two.fingerprint
    assert one.fingerprint != other.fingerprint


def test_a_receipt_survives_json(tmp_path: Path) -> None:
    sources, options = plan(write_source(tmp_path / "in"))
    (chunk,) = read_chunks(sources.layouts[0], 0, 100)
    receipt = convert_chunk(
        chunk, sources.layouts[0], sources.labels, options, str(tmp_path / "out")
    )
    assert Receipt.from_json(json.loads(json.dumps(receipt.to_json()))) == receipt
    assert receipt.rows_in == receipt.rows_out + receipt.rows_quarantined


@pytest.mark.shared_data
@pytest.mark.parametrize(
    "name", ["qm9_1000.sdf.gz", "pcqm4mv2_2k.parquet", "moleculenet/bbbp.csv.gz"]
)
def test_real_files_keep_their_rows_units_and_counts(
    shared_data: Path, tmp_path: Path, name: str
) -> None:
    manifest = convert(shared_data / name, tmp_path / "out")
    counts = manifest.counts
    expected = {"qm9_1000.sdf.gz": (1000, 0), "pcqm4mv2_2k.parquet": (1792, 0)}
    assert (counts.rows_in, counts.rows_quarantined) == expected.get(name, (2050, 11))
    if name == "pcqm4mv2_2k.parquet":
        assert [(label.name, label.unit) for label in manifest.labels] == [("homo_lumo_gap", "eV")]
        assert manifest.labels[0].count == counts.with_coordinates == 1792
    if name == "qm9_1000.sdf.gz":
        assert len(manifest.labels) == 19
        assert counts.conformer_status == {"source": 1000}


def test_records_are_told_while_they_are_featurized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "_TELL_S", 0.0)
    records = [
        RawRecord(
            row=row,
            mol_id=None,
            content=SmilesText("CCO" if row % 2 else "not a molecule"),
            labels=np.empty(0),
            unreadable=(),
            excerpt="",
        )
        for row in range(100)
    ]
    told: list[int] = []
    found = featurize_records(records, "a.csv", (), FeaturizeConfig(), told.append)
    assert len(found.molecules) == len(found.quarantine) == 50
    assert sum(told) == 100
    assert len(told) > 10
