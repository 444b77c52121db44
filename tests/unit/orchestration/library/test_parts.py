"""Parts are reused if they are what would be made, and what fails says so when a part is made."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.downstream import EmbedConfig, PredictConfig
from moleblend_ray.data.dataset.dataset_files import is_prepared
from moleblend_ray.data.dataset.lease import InUseError, leased
from moleblend_ray.data.dataset.manifest import Manifest, ShardInfo, load_manifest
from moleblend_ray.data.dataset.shards import read_file
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.assembly import write_manifest
from moleblend_ray.data.preparation.claim import claim_output
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.shard_writer import convert_chunk
from moleblend_ray.data.sources import ColumnConfig, find_sources, inspect_sources, read_chunks
from moleblend_ray.errors import CheckpointError, ConfigError, DataError, TrainingError
from moleblend_ray.evaluation.models.batches import without_coordinates
from moleblend_ray.evaluation.models.property_model import (
    Standardisation,
    TrainedProperty,
    save_property_model,
)
from moleblend_ray.evaluation.tasks import TaskKind
from moleblend_ray.inference import _featurize
from moleblend_ray.model.config import ModelConfig, ReadoutConfig
from moleblend_ray.model.hub import save_pretrained
from moleblend_ray.model.moleblend import MoleBlendModel, PropertyModel
from moleblend_ray.orchestration.identity import check_claim, claim
from moleblend_ray.orchestration.library import parts
from moleblend_ray.orchestration.library.embed import embed, embed_job, load_embedder
from moleblend_ray.orchestration.library.part_writer import PartsJob, PartWriter
from moleblend_ray.orchestration.library.predict import load_predictor, predict, predict_job
from moleblend_ray.orchestration.preparation.molecules import look_at_source

TINY = ModelConfig(num_layers=1, dim=16, ffn_dim=16, num_heads=2, num_kernels=4, pair_dim=2)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Of four prepared molecules in one shard."""
    source = tmp_path / "molecules.csv"
    source.write_text("smiles\nCCO\nCCN\nCCC\nCO\n")
    return prepared(str(source), str(tmp_path / "data"))


def prepared(source: str, out: str, *, canonical_order: bool = False) -> Manifest:
    """Of the data set ``out``, which is made of ``source`` without Ray."""
    options = ConvertOptions(
        columns=ColumnConfig(),
        valid_fraction=0.0,
        featurize=FeaturizeConfig(canonical_order=canonical_order),
    )
    sources = inspect_sources(find_sources(source), options.columns)
    claim_output(out, sources, options)
    receipts = [
        convert_chunk(chunk, layout, sources.labels, options, out)
        for index, layout in enumerate(sources.layouts)
        for chunk in read_chunks(layout, index, options.rows_per_chunk)
    ]
    return write_manifest(out, sources, options, receipts)


def trained_property(conformers: int = 1) -> TrainedProperty:
    """One number."""
    return TrainedProperty(
        task="esol",
        kind=TaskKind.REGRESSION,
        columns=("y",),
        unit="",
        standardisation=Standardisation(mean=np.zeros(1), std=np.ones(1)),
        conformers=conformers,
    )


def writer(folder: Path, manifest: Manifest, *, model: str = "model") -> PartWriter:
    """Of embeddings by the model in ``folder/model``; its actor will look for it under the name ``model``."""
    torch.manual_seed(0)
    save_pretrained(MoleBlendModel(TINY), str(folder / "model"))
    data = str(folder / "data")
    config = EmbedConfig(checkpoint=str(folder / "model"), source=data, out=str(folder / "out"))
    maker = embed_job(config).load(torch.device("cpu"))
    job = embed_job(dataclasses.replace(config, checkpoint=str(folder / model)))
    return PartWriter(job, data, manifest, maker.fingerprint, maker.schema)


def test_a_part_is_described_by_its_rows_bytes_and_checksum_and_reused(
    tmp_path: Path, manifest: Manifest
) -> None:
    made = writer(tmp_path, manifest).write(0, "train", 0)
    content = (tmp_path / "out" / made["path"]).read_bytes()
    assert made == {
        "path": "parts/part-00000.parquet",
        "rows": 4,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "reused": False,
    }
    assert writer(tmp_path, manifest).write(0, "train", 0) == {**made, "reused": True}


class Looked(tuple[ShardInfo, ...]):
    """Shards that count how often somebody looks at all of them."""

    looks = 0

    def __iter__(self) -> Iterator[ShardInfo]:
        Looked.looks += 1
        return super().__iter__()


def test_a_part_takes_no_longer_in_a_data_set_of_many_shards(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_many = writer(tmp_path, dataclasses.replace(manifest, shards=Looked(manifest.shards * 50)))
    monkeypatch.setattr(Looked, "looks", 0)
    made = [of_many.write(number, "train", 40 + number) for number in range(10)]
    assert [part["rows"] for part in made] == [4] * 10
    assert Looked.looks == 0


def test_names_of_parts_are_in_order_beyond_a_hundred_thousand(
    tmp_path: Path, manifest: Manifest
) -> None:
    many = dataclasses.replace(manifest, shards=manifest.shards * 100_001)
    of_many = writer(tmp_path, many)
    paths = [of_many.write(number, "train", number)["path"] for number in (2, 99_999, 100_000)]
    assert paths == sorted(paths)
    assert paths[-1] == "parts/part-100000.parquet"


def run_here(writer: PartWriter, places: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the actors do."""
    return [writer.write(place["number"], place["split"], place["shard"]) for place in places]


@pytest.mark.parametrize("shuffled", [False, True])
def test_equal_rows_of_several_files_are_told_apart_by_the_source_of_their_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffled: bool
) -> None:
    files = [tmp_path / "raw" / name / "a.csv" for name in ("x", "y")]
    for file, smiles in zip(files, ("CCO", "CCN"), strict=True):
        file.parent.mkdir(parents=True)
        file.write_text(f"smiles\n{smiles}\n")
    manifest = prepared(str(tmp_path / "raw"), str(tmp_path / "data"))
    begun = writer(tmp_path, manifest)
    if shuffled:
        manifest = dataclasses.replace(manifest, options={**manifest.options, "shuffle": True})

    monkeypatch.setattr(parts, "_run_actors", run_here)
    maker = begun.job.load(torch.device("cpu"))
    found = parts._make_parts(begun.job, maker, str(tmp_path / "data"), manifest)["parts"]
    rows = [
        pq.read_table(tmp_path / "out" / part["path"]).select(["mol_id", "source_row", "smiles"])
        for part in found
    ]
    assert [row.to_pylist() for row in rows] == [
        [{"mol_id": "a_0", "source_row": 0, "smiles": smiles}] for smiles in ("CCO", "CCN")
    ]
    told = [None, None] if shuffled else [str(file) for file in files]
    assert [part["source_uri"] for part in found] == told


@pytest.mark.parametrize("damage", ["cut", "rows", "columns"])
def test_a_part_that_does_not_fit_is_made_again(
    tmp_path: Path, manifest: Manifest, damage: str
) -> None:
    made = writer(tmp_path, manifest).write(0, "train", 0)
    path = tmp_path / "out" / made["path"]
    table = pq.read_table(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "rows":
        pq.write_table(table.slice(0, 3), path)
    else:
        vectors = pa.FixedSizeListArray.from_arrays(pa.array([0.0] * 8, pa.float32()), 2)
        pq.write_table(table.set_column(4, "embedding", vectors), path)
    again = writer(tmp_path, manifest).write(0, "train", 0)
    assert again == made
    assert pq.read_table(path).equals(table)


def test_no_flipped_bit_of_the_data_is_taken_for_a_part(tmp_path: Path, manifest: Manifest) -> None:
    made = writer(tmp_path, manifest).write(0, "train", 0)
    path = tmp_path / "out" / made["path"]
    content = path.read_bytes()
    expected = pq.read_table(path)
    again = writer(tmp_path, manifest)
    reused = 0
    for place in range(4, len(content), 7):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        found = again._made_before(str(path), 4)
        # What is accepted says the same: the flip was in a name or a statistic of the footer.
        if found is not None:
            reused += 1
            assert pq.read_table(pa.BufferReader(found)).equals(expected)
    assert reused < (len(content) - 4) // 7 // 2


def test_every_path_that_an_actor_opens_must_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(parts, "require_room", lambda need, *_: asked.append(need.resources))
    monkeypatch.setattr(parts, "require_shared_paths", lambda paths: asked.append(set(paths)))
    monkeypatch.setattr(parts, "warn_of_unused_gpus", lambda cluster: None)
    cluster = ClusterConfig(use_gpu=True)
    one = EmbedConfig(checkpoint="/m", source="/a.csv", out="/o", cluster=cluster)
    parts._check_cluster(embed_job(one))
    several = PredictConfig(models=("/m", "/n"), source=("/a.csv", "/b.csv"), out="/o")
    parts._check_cluster(predict_job(several))
    assert asked == [
        {"CPU": 1.0, "GPU": 1.0},
        {"checkpoint", "source", "out"},
        {"CPU": 1.0},
        {"models[0]", "models[1]", "source[0]", "source[1]", "out"},
    ]


def test_a_gpu_that_is_too_small_for_a_batch_is_told_from_an_error_of_the_program(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB.\nMore.")

    lacking = writer(tmp_path, manifest)
    monkeypatch.setattr(type(lacking._loaded()), "part", fill)
    with pytest.raises(
        TrainingError,
        match=r"batch_size: .* for 64 molecules .* up to 3 atoms.* batch_size=16 .*GiB",
    ):
        lacking.write(0, "train", 0)


@pytest.mark.parametrize(
    ("asked", "device", "at_once"),
    [(None, "cpu", 64), (None, "meta", 1024), (9, "cpu", 9), (9, "meta", 9)],
)
def test_gpus_compute_many_molecules_at_once_unless_asked_otherwise(
    tmp_path: Path, asked: int | None, device: str, at_once: int
) -> None:
    save_pretrained(MoleBlendModel(TINY), str(tmp_path / "encoder"))
    save_property_model(
        PropertyModel(MoleBlendModel(TINY), 1), trained_property(), str(tmp_path / "model")
    )
    place = torch.device(device)
    paths: dict[str, Any] = {"source": "/a.csv", "out": "/o", "batch_size": asked}
    embedding = EmbedConfig(checkpoint=str(tmp_path / "encoder"), **paths)
    prediction = PredictConfig(models=str(tmp_path / "model"), **paths)
    assert load_embedder(embedding, place).batch_size == at_once
    assert load_predictor(prediction, place).batch_size == at_once


def test_a_model_that_is_not_there_is_the_error_of_the_part_not_of_the_writer(
    tmp_path: Path, manifest: Manifest
) -> None:
    lacking = writer(tmp_path, manifest, model="no-such-model")
    with pytest.raises(CheckpointError, match="no-such-model"):
        lacking.write(0, "train", 0)


def test_a_model_that_was_replaced_meanwhile_is_not_used(
    tmp_path: Path, manifest: Manifest
) -> None:
    begun = writer(tmp_path, manifest)
    save_pretrained(MoleBlendModel(TINY), str(tmp_path / "model"))
    with pytest.raises(CheckpointError, match="changed while embed was at work"):
        begun.write(0, "train", 0)


@pytest.mark.parametrize(("asked", "made"), [(None, 4), (0, 0), (2, 2)])
def test_molecules_get_the_conformers_that_are_asked_for_or_else_those_of_the_models(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, made: int
) -> None:
    found = []
    monkeypatch.setattr(
        parts,
        "prepare_molecules",
        lambda *_, conformers, require_coordinates, **__: found.append(
            (conformers, require_coordinates)
        ),
    )
    config = PredictConfig(models="/m", source="/a.csv", out="/o", conformers=asked)
    for needs in (False, True):
        maker = SimpleNamespace(conformers=4, form=None, needs_coordinates=needs)
        parts._prepare(predict_job(config), maker)
    assert found == [(made, False), (made, True)]


@pytest.mark.parametrize(("asked", "told"), [(None, True), (True, True), (False, False)])
@pytest.mark.usefixtures("manifest")
def test_coordinates_that_a_prepared_source_lacks_are_missed_aloud(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asked: bool | None,
    told: bool,
) -> None:
    class BegunError(Exception):
        """Parts would be made now."""

    def make_parts(*_: object) -> None:
        raise BegunError

    monkeypatch.setattr(parts, "ray_session", lambda _: nullcontext())
    monkeypatch.setattr(parts, "_check_cluster", lambda _: None)
    monkeypatch.setattr(parts, "_make_parts", make_parts)
    save_pretrained(MoleBlendModel(TINY), str(tmp_path / "model"))
    config = EmbedConfig(
        checkpoint=str(tmp_path / "model"),
        source=str(tmp_path / "data"),
        out=str(tmp_path / "out"),
        conformers=asked,
    )
    with pytest.raises(BegunError):
        embed(config)
    assert (f"4 of 4 molecules of {tmp_path}/data have no coordinates" in caplog.text) == told


@pytest.mark.parametrize(
    ("tuned_with", "relations", "asked", "seen"),
    [
        (0, "2d+3d", None, False),
        (1, "2d", None, False),
        (1, "2d+3d", None, True),
        (0, "2d+3d", True, True),
        (0, "2d+3d", False, True),
    ],
)
def test_a_model_tuned_without_coordinates_does_not_see_those_of_the_source_unless_asked_to(
    tmp_path: Path,
    tuned_with: int,
    relations: Literal["2d+3d", "2d"],
    asked: bool | None,
    seen: bool,
) -> None:
    torch.manual_seed(0)
    model = PropertyModel(MoleBlendModel(TINY), 1, ReadoutConfig(relations=relations))
    save_property_model(model, trained_property(tuned_with), str(tmp_path))
    config = EmbedConfig(checkpoint=str(tmp_path), source="/a.sdf", out="/o", conformers=asked)
    embedder = load_embedder(config, torch.device("cpu"))
    table = _featurize(["CCCO", "OCCc1ccccc1"], 1, embedder, 256).molecules
    assert min(table["num_conformers"].to_pylist()) == 1
    vectors = [
        embedder.part(part)["embedding"].to_pylist() for part in (table, without_coordinates(table))
    ]
    assert (vectors[0] != vectors[1]) == seen


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbedConfig:
    """Raw molecules and a model, on a machine where Ray must not be started."""
    (tmp_path / "library.csv").write_text("smiles\nCCO\n")
    save_pretrained(MoleBlendModel(TINY), str(tmp_path / "model"))

    def fail(cluster: ClusterConfig) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(parts, "ray_session", fail)
    return EmbedConfig(
        checkpoint=str(tmp_path / "model"),
        source=str(tmp_path / "library.csv"),
        out=str(tmp_path / "out"),
    )


@pytest.fixture
def here(library: EmbedConfig, monkeypatch: pytest.MonkeyPatch) -> EmbedConfig:
    """A command of which this process does all without Ray."""

    def prepare_here(job: PartsJob, *_: object) -> str:
        out = f"{job.config.out}/prepared"
        if not is_prepared(out):
            prepared(job.config.sources()[0], out)
        return out

    monkeypatch.setattr(parts, "ray_session", lambda _: nullcontext())
    monkeypatch.setattr(parts, "_check_cluster", lambda _: None)
    monkeypatch.setattr(parts, "_prepare", prepare_here)
    monkeypatch.setattr(parts, "_run_actors", run_here)
    return library


def test_a_source_without_a_usable_molecule_can_be_put_right_and_the_out_used_again(
    tmp_path: Path, here: EmbedConfig
) -> None:
    (tmp_path / "library.csv").write_text("smiles\nname\nother\n")
    told = (
        r"library.csv: none of 2 rows is a usable molecule .*'unparsable_smiles': 2.*, such as row 0: not a SMILES: 'name'; "
        r"row 1: .*out/rejected.parquet lists all of them\. Correct"
    )
    with pytest.raises(DataError, match=told):
        embed(here)
    rejected = pq.read_table(tmp_path / "out/rejected.parquet")
    assert rejected["excerpt"].to_pylist() == ["name", "other"]
    # Where `moleblend data` shows more of them.
    assert load_manifest(f"{here.out}/prepared").counts.rows_in == 2
    (tmp_path / "library.csv").write_text("smiles\nCCO\nother\n")
    summary = embed(here)
    assert (summary.embeddings, summary.rejected) == (1, 1)
    assert pq.read_table(tmp_path / "out/rejected.parquet").num_rows == 1


@pytest.mark.parametrize("version", ["now", "before"])
def test_a_source_that_changed_is_told_by_a_finished_out(
    tmp_path: Path, here: EmbedConfig, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    embed(here)
    assert embed(here).already_finished
    if version == "now":
        # Which is allowed: a changed source must be seen all the same.
        shutil.rmtree(tmp_path / "out/prepared")
    else:
        summary = storage.read_json(str(tmp_path / "out/embeddings.json"))
        del summary["data"]["sources"]
        storage.write_json(str(tmp_path / "out/embeddings.json"), summary)
    assert embed(here).already_finished
    (tmp_path / "library.csv").write_text("smiles\nCCCCCO\n")
    told = rf"^out: {tmp_path}/out is finished, and its source has changed since then: there .*/library.csv \(11 bytes.*; now"
    with pytest.raises(ConfigError, match=told):
        embed(here)
    (tmp_path / "library.csv").unlink()
    assert embed(here).already_finished
    assert "cannot check whether the inputs" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [{"parts": [{"path": "a"}]}, {"parts": [{"path": 1, "bytes": 2}]}, {"parts": 3}],
    ids=str,
)
def test_a_damaged_summary_is_named(
    tmp_path: Path, here: EmbedConfig, damage: dict[str, Any]
) -> None:
    embed(here)
    uri = str(tmp_path / "out/embeddings.json")
    storage.write_json(uri, {**storage.read_json(uri), **damage})
    with pytest.raises(DataError, match=r"embeddings\.json"):
        embed(here)


def test_sources_that_a_summary_does_not_tell_are_not_compared(
    tmp_path: Path, here: EmbedConfig, caplog: pytest.LogCaptureFixture
) -> None:
    embed(here)
    uri = str(tmp_path / "out/embeddings.json")
    summary = storage.read_json(uri)
    summary["data"]["sources"] = [{"uri": 3}]
    storage.write_json(uri, summary)
    assert embed(here).already_finished
    assert "does not tell its sources" in caplog.text


def test_the_rejected_rows_of_many_chunks_are_read_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.csv").write_text("smiles\nC\nwrong\n")
    manifest = prepared(str(tmp_path / "m.csv"), str(tmp_path / "data"))
    (one,) = manifest.shards_of("quarantine")
    together = threading.Barrier(4, timeout=10.0)

    def read(uri: str, shard: ShardInfo) -> bytes:
        together.wait()
        return read_file(uri, shard)

    monkeypatch.setattr(parts, "read_file", read)
    of_four = dataclasses.replace(manifest, shards=(one,) * 4)
    assert parts._write_rejected(str(tmp_path / "out"), str(tmp_path / "data"), of_four) == 4
    assert pq.read_table(tmp_path / "out/rejected.parquet")["excerpt"].to_pylist() == ["wrong"] * 4


def test_the_rejected_rows_of_some_chunks_are_in_memory_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.csv").write_text("smiles\nC\nwrong\n")
    manifest = prepared(str(tmp_path / "m.csv"), str(tmp_path / "data"))
    (one,) = manifest.shards_of("quarantine")
    monkeypatch.setattr(parts, "_CHUNKS_A_ROW_GROUP", 2)
    of_five = dataclasses.replace(manifest, shards=(one,) * 5)
    assert parts._write_rejected(str(tmp_path / "out"), str(tmp_path / "data"), of_five) == 5
    written = pq.ParquetFile(tmp_path / "out/rejected.parquet")
    found = [written.metadata.row_group(i).num_rows for i in range(written.num_row_groups)]
    assert found == [2, 2, 1]
    assert written.read()["excerpt"].to_pylist() == ["wrong"] * 5
    # Of a source without rejected rows, the list is there as well.
    assert (
        parts._write_rejected(str(tmp_path / "none"), "", dataclasses.replace(manifest, shards=()))
        == 0
    )
    assert pq.read_table(tmp_path / "none/rejected.parquet").num_rows == 0


@pytest.mark.parametrize("lost", ["parts/part-00000.parquet", "rejected.parquet"])
@pytest.mark.parametrize("prepared_too", [False, True])
def test_what_a_finished_out_has_lost_is_made_again(
    tmp_path: Path,
    here: EmbedConfig,
    caplog: pytest.LogCaptureFixture,
    lost: str,
    prepared_too: bool,
) -> None:
    embed(here)
    file = tmp_path / "out" / lost
    content = file.read_bytes()
    file.unlink()
    if prepared_too:
        shutil.rmtree(tmp_path / "out/prepared")
    assert not embed(here).already_finished
    assert f"1 of its files are gone or have another size since then, such as {lost}" in caplog.text
    assert file.read_bytes() == content
    assert embed(here).already_finished
    # A question that `out` is not for is still told first.
    file.unlink()
    with pytest.raises(ConfigError, match="max_atoms: 256 there, 7 here"):
        embed(dataclasses.replace(here, max_atoms=7))


def test_an_out_inside_of_its_source_is_refused_before_anything_is_written(
    tmp_path: Path, library: EmbedConfig
) -> None:
    inside = dataclasses.replace(library, source=str(tmp_path / "raw"), out=f"{tmp_path}/raw/out")
    (tmp_path / "raw").mkdir()
    (tmp_path / "library.csv").rename(tmp_path / "raw/library.csv")
    with pytest.raises(ConfigError, match=r"^out: .*/raw/out lies inside source .*/raw; give"):
        embed(inside)
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["library.csv"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smiles_column": "SMILES"}, r"^smiles_column: .*has no 'SMILES'; .*mean 'smiles'"),
        ({"id_column": "name"}, r"^id_column: .*has no 'name'; it has 'smiles'"),
    ],
)
def test_a_missing_column_is_found_before_ray_is_started(
    tmp_path: Path, library: EmbedConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        embed(dataclasses.replace(library, **changes))
    assert not (tmp_path / "out").exists()


def test_parts_that_another_command_makes_are_left_to_it(
    tmp_path: Path, library: EmbedConfig
) -> None:
    with leased(library.out):
        with pytest.raises(InUseError, match=rf"^out: another command works on {library.out} at"):
            embed(library)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["leases"]
    with pytest.raises(AssertionError, match="Ray was started"):
        embed(library)


def test_no_summary_is_written_after_another_command_has_taken_over(
    tmp_path: Path, library: EmbedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(*_: object) -> dict[str, Any]:
        # Another command believes that this one is dead.
        storage.write_json(str(tmp_path / "out/leases/000002.json"), {"token": "another"})
        return {}

    monkeypatch.setattr(parts, "_make_all", make)
    with pytest.raises(InUseError, match="has taken over the work on"):
        embed(library)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["leases"]


def write_part(out: Path) -> None:
    """A first part, which belongs to the settings that ``out`` is noted for."""
    (out / "parts").mkdir()
    (out / "parts/part-00000.parquet").touch()


@pytest.mark.parametrize("changed", ["settings", "weights"])
def test_an_out_of_another_question_is_refused_before_molecules_are_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    (tmp_path / "library.csv").write_text("smiles\nCCO\n")
    save_pretrained(MoleBlendModel(TINY), str(tmp_path / "model"))
    config = EmbedConfig(
        checkpoint=str(tmp_path / "model"),
        source=str(tmp_path / "library.csv"),
        out=str(tmp_path / "out"),
    )
    fingerprint = embed_job(config).load(torch.device("cpu")).fingerprint
    # As an interrupted command leaves it.
    claim(
        config.out,
        {
            "config": embed_job(config).question(),
            "data_fingerprint": "d",
            "checkpoint_fingerprint": fingerprint,
        },
    )
    write_part(tmp_path / "out")

    class StartedError(Exception):
        """Ray was started."""

    def start(cluster: ClusterConfig) -> None:
        raise StartedError

    monkeypatch.setattr(parts, "ray_session", start)
    with pytest.raises(StartedError):
        embed(config)
    if changed == "settings":
        config = dataclasses.replace(config, max_atoms=7)
    else:
        save_pretrained(MoleBlendModel(TINY), config.checkpoint)
    told = {"settings": "max_atoms: 256 there, 7 here", "weights": "checkpoint_fingerprint: "}
    with pytest.raises(ConfigError, match=told[changed]):
        embed(config)


def test_a_job_asks_the_same_whatever_its_place_and_speed() -> None:
    config = EmbedConfig(checkpoint="model", source="a.csv", out="out")
    elsewhere = dataclasses.replace(
        config, out="b", batch_size=3, cluster=ClusterConfig(num_data_actors=4)
    )
    assert embed_job(elsewhere).question() == embed_job(config).question()
    assert "batch_size" not in embed_job(config).question()  # nor in what an earlier version noted
    flat = dataclasses.replace(config, conformers=False)
    assert embed_job(flat).question() != embed_job(config).question()


def test_a_list_of_one_source_is_this_source_and_an_order_is_a_question(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    config = EmbedConfig(checkpoint="/m", source="/a.csv", out=out)
    # As versions noted it that took one source only.
    claim(out, {"config": {**embed_job(config).question(), "source": "/a.csv"}})
    write_part(tmp_path / "out")
    listed = dataclasses.replace(config, source=("/a.csv",))
    check_claim(out, {"config": embed_job(listed).question()})
    predicted = PredictConfig(models="/m", source="/a.csv", out=str(tmp_path / "other"))
    one = dataclasses.replace(predicted, models=("/m",), source=("/a.csv",))
    claim(predicted.out, {"config": predict_job(one).question()})
    write_part(tmp_path / "other")
    check_claim(predicted.out, {"config": predict_job(predicted).question()})
    several = [
        embed_job(dataclasses.replace(config, source=sources)).question()
        for sources in (("/a.csv", "/b.csv"), ("/b.csv", "/a.csv"))
    ]
    assert several[0] != several[1]
    with pytest.raises(ConfigError, match=r"source: '/a.csv' there, \['/b.csv', '/a.csv'\] here"):
        check_claim(out, {"config": several[1]})


def test_molecules_of_several_sources_come_in_the_order_given(
    tmp_path: Path, library: EmbedConfig
) -> None:
    for name in ("b.csv", "a.csv", "folder/z.csv", "folder/y.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("smiles\nCCO\n")
    given = tuple(str(tmp_path / name) for name in ("b.csv", "folder", "a*.csv"))
    found = look_at_source(dataclasses.replace(library, source=given), ())
    assert found is not None
    uris = [layout.file.uri for layout in found.layouts]
    assert uris == [
        str(tmp_path / name) for name in ("b.csv", "folder/y.csv", "folder/z.csv", "a.csv")
    ]
    with pytest.raises(ConfigError, match=r"source: .*folder/y.csv is in two of"):
        look_at_source(dataclasses.replace(library, source=(given[1], uris[1])), ())


@pytest.mark.usefixtures("manifest")
def test_a_prepared_data_set_is_no_one_of_several_sources(
    tmp_path: Path, library: EmbedConfig
) -> None:
    data = str(tmp_path / "data")
    several = dataclasses.replace(library, source=(*library.sources(), data))
    told = (
        rf"source: {data} holds a prepared data set already.* one prepared data set, but only alone"
    )
    with pytest.raises(ConfigError, match=told):
        embed(several)
    assert not (tmp_path / "out").exists()
    assert look_at_source(dataclasses.replace(library, source=(data,)), ()) is None


@pytest.mark.usefixtures("manifest")
def test_settings_of_raw_molecules_are_refused_with_a_prepared_library(tmp_path: Path) -> None:
    library = str(tmp_path / "data")
    config = EmbedConfig(checkpoint="/m", source=library, out=str(tmp_path / "out"))
    assert look_at_source(config, ()) is None
    with pytest.raises(ConfigError, match=rf"^id_column, max_atoms: only for raw .* but {library}"):
        look_at_source(dataclasses.replace(config, id_column="name", max_atoms=50), ())


def test_contributions_are_refused_where_atoms_are_not_in_the_order_of_the_smiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest: Manifest
) -> None:
    save_property_model(
        PropertyModel(MoleBlendModel(TINY), 1), trained_property(), str(tmp_path / "model")
    )
    config = PredictConfig(
        models=str(tmp_path / "model"),
        source=str(tmp_path / "data"),
        out=str(tmp_path / "out"),
        conformers=0,
        atom_contributions=True,
    )

    class StartedError(Exception):
        """Ray was started."""

    def start(cluster: ClusterConfig) -> None:
        raise StartedError

    monkeypatch.setattr(parts, "ray_session", start)
    with pytest.raises(ConfigError, match=r"atom_contributions: .*featurize\.canonical_order=true"):
        predict(config)
    with pytest.raises(StartedError):
        predict(dataclasses.replace(config, atom_contributions=False))
    prepared(manifest.sources[0].uri, str(tmp_path / "ordered"), canonical_order=True)
    with pytest.raises(StartedError):
        predict(dataclasses.replace(config, source=str(tmp_path / "ordered")))


def test_the_results_of_another_command_are_told_by_its_name(tmp_path: Path) -> None:
    out = str(tmp_path)
    embedding = embed_job(EmbedConfig(checkpoint="/m", source="/a.csv", out=out))
    prediction = predict_job(PredictConfig(models="/m", source="/a.csv", out=out))
    claim(out, {"config": embedding.question(), "checkpoint_fingerprint": "a"})
    write_part(tmp_path)
    with pytest.raises(ConfigError, match=r"holds results of `moleblend embed`\. Give another"):
        check_claim(out, {"config": prediction.question(), "checkpoint_fingerprint": "b"})
    with pytest.raises(ConfigError, match=r"differ in checkpoint_fingerprint: 'a' there, 'b' here"):
        check_claim(out, {"config": embedding.question(), "checkpoint_fingerprint": "b"})


def test_predictions_of_before_there_were_intervals_go_on_without_them(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    config = PredictConfig(models="/m", source="/a.csv", out=out)
    before = predict_job(config).question()
    # As versions without them stored it.
    before.pop("interval")
    before.pop("atom_contributions")
    claim(out, {"config": before, "checkpoint_fingerprint": "f"})
    write_part(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"interval: None there, 0\.9 here"):
        check_claim(out, {"config": predict_job(config).question()})
    without = dataclasses.replace(config, interval=None)
    check_claim(out, {"config": predict_job(without).question()})
