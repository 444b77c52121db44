"""SMILES in, numbers out, in this process: order, what cannot be read, and agreement with a model that is asked directly."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch

import moleblend_ray as mb
from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.files import storage
from moleblend_ray.errors import CheckpointError, ConfigError, DataError
from moleblend_ray.evaluation.models.property_model import (
    Standardisation,
    TrainedProperty,
    load_property_model,
    save_property_model,
)
from moleblend_ray.evaluation.molecules.applicability import ApplicabilityDomain, save_domain
from moleblend_ray.evaluation.tasks import TaskKind
from moleblend_ray.model.config import ModelConfig, ReadoutConfig
from moleblend_ray.model.moleblend import MoleBlendModel, PropertyModel
from moleblend_ray.model.origin import Origin
from moleblend_ray.orchestration.library.embed import load_embedder

TINY = ModelConfig(num_layers=1, dim=16, ffn_dim=16, num_heads=2, num_kernels=4, pair_dim=2)
SMILES = ["CCO", "c1ccccc1O", "C", "CC(=O)Oc1ccccc1C(=O)O", "CCO"]
SOLUBILITY = TrainedProperty(
    task="esol",
    kind=TaskKind.REGRESSION,
    columns=("y",),
    unit="log(mol/L)",
    standardisation=Standardisation(mean=np.array([-3.0]), std=np.array([2.0])),
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> mb.MoleculeEncoder:
    torch.manual_seed(0)
    uri = str(tmp_path_factory.mktemp("encoder"))
    MoleBlendModel(TINY).save_pretrained(uri)
    return mb.MoleculeEncoder.from_pretrained(uri)


def fine_tuned(
    folder: Path,
    seed: int,
    *,
    relations: Literal["2d+3d", "2d", "3d"] = "2d+3d",
    conformers: int = 1,
) -> str:
    torch.manual_seed(seed)
    model = PropertyModel(MoleBlendModel(TINY), 1, ReadoutConfig(relations=relations))
    trained = dataclasses.replace(SOLUBILITY, conformers=conformers)
    save_property_model(model, trained, str(folder))
    save_domain(ApplicabilityDomain.of(["CCO", "CCN", "CCC"]), str(folder))
    return str(folder)


def test_each_molecule_has_a_vector_in_its_place(encoder: mb.MoleculeEncoder) -> None:
    vectors = encoder.encode(SMILES)
    assert vectors.shape == (5, encoder.dim)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    np.testing.assert_array_equal(vectors[0], vectors[4])
    alone = np.concatenate([encoder.encode([smiles]) for smiles in SMILES])
    np.testing.assert_allclose(vectors, alone, rtol=1e-4, atol=1e-5)
    assert encoder.encode([]).shape == (0, encoder.dim)


def test_without_conformers_other_relations_are_seen(encoder: mb.MoleculeEncoder) -> None:
    both = [encoder.encode(SMILES, conformers=made) for made in (True, False)]
    assert not np.allclose(both[0][:2], both[1][:2])
    # The same coordinates each time.
    np.testing.assert_array_equal(encoder.encode(SMILES), both[0])


def test_what_cannot_be_read_is_named_or_a_row_of_nan(encoder: mb.MoleculeEncoder) -> None:
    given = ["CCO", "C1CC", "", "CCN"]
    with pytest.raises(DataError, match=r"2 of 4 SMILES.* 1: 'C1CC' \(unparsable_smiles: .* 2: ''"):
        encoder.encode(given)
    vectors = encoder.encode(given, invalid="nan")
    assert np.isnan(vectors).all(1).tolist() == [False, True, True, False]
    np.testing.assert_allclose(
        vectors[[0, 3]], encoder.encode(["CCO", "CCN"]), rtol=1e-4, atol=1e-5
    )
    assert np.isnan(encoder.encode(["", "("], invalid="nan")).all()
    with pytest.raises(DataError, match=r"1 of 1 SMILES.*too_many_atoms"):
        encoder.encode(["CCCC"], max_atoms=3)
    for text in ("CCO", b"CCO"):
        with pytest.raises(DataError, match=r"expected a list of SMILES, found one text"):
            encoder.encode(text)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"1 of 1 SMILES.*surrogates not allowed"):
        encoder.encode(["C\ud800"])
    for several in (3, "no"):
        with pytest.raises(ConfigError, match="conformers: expected True, False or None"):
            encoder.encode(["C"], conformers=several)  # type: ignore[arg-type]
    for no_list in (None, 5, np.array("CCO")):
        with pytest.raises(DataError, match=r"expected a list of SMILES, found "):
            encoder.encode(no_list)  # type: ignore[arg-type]


@pytest.mark.parametrize("loaded", [False, True], ids=["asked", "loaded and asked"])
@pytest.mark.parametrize("default", ["meta", torch.float64, torch.bfloat16], ids=str)
def test_defaults_that_other_code_gave_pytorch_change_nothing(
    tmp_path: Path, default: torch.dtype | str, loaded: bool
) -> None:
    # The meta device stands for a GPU that this machine may not have.
    MoleBlendModel(TINY).save_pretrained(str(tmp_path / "encoder"))
    uri = fine_tuned(tmp_path / "property", 0)

    def models() -> tuple[mb.MoleculeEncoder, mb.PropertyPredictor]:
        encoder = mb.MoleculeEncoder.from_pretrained(tmp_path / "encoder")
        return encoder, mb.PropertyPredictor.from_pretrained(uri)

    def answers(encoder: mb.MoleculeEncoder, predictor: mb.PropertyPredictor) -> list[Any]:
        return [encoder.encode(SMILES[:2]), predictor.predict(SMILES[:2])["prediction:y"]]

    asked = models()
    expected = answers(*asked)
    set_default = (
        torch.set_default_dtype if isinstance(default, torch.dtype) else torch.set_default_device
    )
    set_default(default)  # type: ignore[arg-type]
    try:
        found = answers(*(models() if loaded else asked))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] == expected[1]


def test_loading_and_asking_leaves_the_random_numbers_of_the_caller(tmp_path: Path) -> None:
    MoleBlendModel(TINY).save_pretrained(tmp_path / "encoder")
    model = fine_tuned(tmp_path / "property", 0)
    before = torch.get_rng_state()
    mb.load_model(tmp_path / "encoder")
    mb.MoleculeEncoder.from_pretrained(tmp_path / "encoder").encode(["CCO"])
    mb.MoleculeEncoder.from_pretrained(model).encode(["CCO"])
    mb.PropertyPredictor.from_pretrained(model).predict(["CCO"])
    assert torch.equal(torch.get_rng_state(), before)


def test_models_of_several_tasks_predict_together_each_under_its_name(tmp_path: Path) -> None:
    uris = [fine_tuned(tmp_path / name, seed) for seed, name in enumerate("abc")]
    saved = load_property_model(uris[2])
    trained = dataclasses.replace(saved.trained, task="logp", unit="")
    save_property_model(saved.model, trained, uris[2])
    given = ["CCO", "nothing", "CCCl"]
    table = mb.PropertyPredictor.from_pretrained(uris).predict(given, atom_contributions=True)
    assert table["rejected"].to_pylist()[1].startswith("unparsable_smiles: ")
    for task, models in (("esol", uris[:2]), ("logp", uris[2:])):
        alone = mb.PropertyPredictor.from_pretrained(models).predict(given, atom_contributions=True)
        for name in ("prediction", "std", "atom_contributions"):
            assert table[f"{name}:{task}"].equals(alone[f"{name}:y"])
        assert table[f"in_domain:{task}"].equals(alone["in_domain"])
    assert table.schema.field("prediction:esol").metadata == {b"unit": b"log(mol/L)"}


def test_an_ensemble_predicts_in_the_unit_with_its_spread(tmp_path: Path) -> None:
    uris = [fine_tuned(tmp_path / name, seed) for seed, name in enumerate("ab")]
    table = mb.PropertyPredictor.from_pretrained(uris).predict(["CCO", "\ud800", "CCCl"])
    assert table["smiles"].to_pylist() == ["CCO", r"\ud800", "CCCl"]
    rejected = table["rejected"].to_pylist()
    assert rejected[0] is rejected[2] is None
    assert rejected[1].startswith("unparsable_smiles: ")
    single = [
        mb.PropertyPredictor.from_pretrained(uri)
        .predict(["CCO", "CCCl"])["prediction:y"]
        .to_numpy()
        for uri in uris
    ]
    mean, spread = (table[f"{name}:y"].to_pylist() for name in ("prediction", "std"))
    assert mean[1] is spread[1] is None
    np.testing.assert_allclose([mean[0], mean[2]], np.mean(single, axis=0), rtol=1e-5)
    np.testing.assert_allclose([spread[0], spread[2]], np.std(single, axis=0, ddof=1), rtol=1e-4)
    assert table["similarity"].to_pylist()[:2] == [1.0, None]
    assert table["in_domain"].to_pylist()[0] is True
    assert table.schema.field("prediction:y").metadata == {b"unit": b"log(mol/L)"}
    assert table.schema.field("similarity").type == pa.float64()


def test_a_vector_of_a_fine_tuned_model_is_its_encoders(tmp_path: Path) -> None:
    encoder = mb.MoleculeEncoder.from_pretrained(fine_tuned(tmp_path / "a", 0))
    torch.manual_seed(0)
    expected = PropertyModel(MoleBlendModel(TINY), 1).eval()
    for name, value in encoder.embedder.model.encoder.state_dict().items():
        torch.testing.assert_close(value, expected.encoder.state_dict()[name])


@pytest.mark.parametrize(
    ("settings", "generates"),
    [
        ({}, True),
        ({"conformers": 8}, True),
        ({"conformers": 0}, False),
        ({"relations": "2d"}, False),
    ],
    ids=str,
)
def test_vectors_of_a_fine_tuned_model_see_coordinates_if_it_was_tuned_with_them(
    tmp_path: Path, settings: dict[str, Any], generates: bool
) -> None:
    encoder = mb.MoleculeEncoder.from_pretrained(fine_tuned(tmp_path, 0, **settings))
    found = encoder.encode(SMILES[:2])
    np.testing.assert_array_equal(found, encoder.encode(SMILES[:2], conformers=generates))
    assert not np.array_equal(found, encoder.encode(SMILES[:2], conformers=not generates))


def test_vectors_of_a_model_that_was_tuned_on_distances_alone_are_of_these_alone(
    tmp_path: Path,
) -> None:
    uri = fine_tuned(tmp_path, 0, relations="3d")
    predictor = mb.PropertyPredictor.from_pretrained(uri)
    read: list[torch.Tensor] = []
    head = predictor.predictor.members[0].saved.model.head
    head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    predictor.predict(["c1ccccc1O"])
    # What its head reads is the graph token.
    found = mb.MoleculeEncoder.from_pretrained(uri).encode(["c1ccccc1O"])
    np.testing.assert_allclose(found, read[0].numpy(), rtol=1e-6, atol=1e-7)


def test_a_model_of_distances_alone_says_nothing_about_molecules_without_coordinates(
    tmp_path: Path,
) -> None:
    """Without coordinates it would give all isomers the same number."""
    uri = fine_tuned(tmp_path, 0, relations="3d")
    with pytest.raises(
        ConfigError, match=r"conformers: expected at least 1, found none: .*isomers"
    ):
        mb.PropertyPredictor.from_pretrained(uri, conformers=0)
    encoder = mb.MoleculeEncoder.from_pretrained(uri)
    with pytest.raises(ConfigError, match=r"conformers: expected true, found none: .*isomers"):
        encoder.encode(["CCO"], conformers=False)
    config = mb.EmbedConfig(checkpoint=uri, source="a.csv", out="o", conformers=False)
    with pytest.raises(ConfigError, match="conformers: expected true"):
        load_embedder(config, torch.device("cpu"))
    # No geometry satisfies a triple bond in a ring of three.
    given = ["CCO", "C1#CC1", "CCN"]
    assert np.isnan(encoder.encode(given, invalid="nan")).all(1).tolist() == [False, True, False]
    table = mb.PropertyPredictor.from_pretrained(uri).predict(given)
    reasons = table["rejected"].to_pylist()
    assert [reason and reason.partition(":")[0] for reason in reasons] == [
        None,
        "conformer_failed",
        None,
    ]
    assert table["prediction:y"].null_count == 1


def test_molecules_get_the_form_of_those_the_model_was_tuned_on(tmp_path: Path) -> None:
    salt, parent = "CC(=O)[O-].[Na+]", "CC(=O)[O-]"
    torch.manual_seed(0)
    model = PropertyModel(MoleBlendModel(TINY), 1, ReadoutConfig())
    predictions = {}
    for salts in ("keep", "largest_fragment"):
        form = MoleculeForm(salts=salts)
        trained = dataclasses.replace(SOLUBILITY, conformers=0, molecules=form)
        uri = str(tmp_path / salts)
        save_property_model(model, trained, uri)
        assert load_property_model(uri).trained.molecules == form
        found = mb.PropertyPredictor.from_pretrained(uri).predict([salt, parent])
        predictions[salts] = found["prediction:y"].to_numpy()
        vectors = mb.MoleculeEncoder.from_pretrained(uri).encode([salt, parent])
        assert np.array_equal(vectors[0], vectors[1]) == (salts == "largest_fragment")
    assert predictions["keep"][0] != predictions["keep"][1]
    assert predictions["largest_fragment"].tolist() == [predictions["keep"][1]] * 2
    with pytest.raises(ConfigError, match=r"different forms \(featurize\.salts 'keep' and"):
        mb.PropertyPredictor.from_pretrained([str(tmp_path / name) for name in predictions])


def test_a_stereoisomer_written_in_two_ways_is_one_to_a_model_of_canonical_order(
    tmp_path: Path,
) -> None:
    # The codes of chiral atoms depend on the order of their neighbours, as those of OGB do.
    ways = ["C[C@H](N)C(=O)O", "N[C@@H](C)C(O)=O"]
    torch.manual_seed(0)
    model = PropertyModel(MoleBlendModel(TINY), 1, ReadoutConfig())
    for canonical_order in (False, True):
        form = MoleculeForm(canonical_order=canonical_order)
        trained = dataclasses.replace(SOLUBILITY, conformers=0, molecules=form)
        save_property_model(model, trained, str(tmp_path / str(canonical_order)))
        encoder = mb.MoleculeEncoder.from_pretrained(tmp_path / str(canonical_order))
        one, other = encoder.encode(ways)
        assert np.array_equal(one, other) == canonical_order


def test_a_model_of_before_forms_were_stored_gets_the_default(tmp_path: Path) -> None:
    uri = fine_tuned(tmp_path, 0)
    assert "molecules" not in storage.read_json(f"{uri}/property.json")
    loaded = mb.PropertyPredictor.from_pretrained(uri)
    assert loaded.predictor.form is None
    assert loaded.predict(["CCO"])["rejected"].to_pylist() == [None]


def test_an_exported_encoder_keeps_the_form_of_its_molecules(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MoleBlendModel(TINY)
    model.origin = Origin(molecules=MoleculeForm(explicit_hydrogens=True))
    model.save_pretrained(str(tmp_path))
    encoder = mb.MoleculeEncoder.from_pretrained(str(tmp_path))
    # A molecule of 3 heavy atoms and 8 hydrogens.
    with pytest.raises(DataError, match="11"):
        encoder.encode(["CCC"], conformers=False, max_atoms=10)


def test_columns_of_tables_are_taken_by_place_with_their_gaps(
    tmp_path: Path, encoder: mb.MoleculeEncoder
) -> None:
    pd = pytest.importorskip("pandas")
    expected = encoder.encode(["CCO", "C"])
    filtered = pd.Series(["CCO", "C"], index=[1, 0])
    for given in (filtered, pa.array(["CCO", "C"]), np.array(["CCO", "C"]), iter(["CCO", "C"])):
        np.testing.assert_array_equal(encoder.encode(given), expected)
    with pytest.raises(DataError, match=r"1: 'C1CC' \(unparsable_smiles"):
        encoder.encode(pd.Series(["CCO", "C1CC"], index=[1, 0]))
    predictor = mb.PropertyPredictor.from_pretrained(Path(fine_tuned(tmp_path / "m", 0)))
    gaps: tuple[Any, ...] = (None, float("nan"), pd.NA)
    for gap in gaps:
        table = predictor.predict(["CCO", gap, "C"])
        assert table["smiles"].to_pylist() == ["CCO", None, "C"]
        (reason,) = table["rejected"].drop_null().to_pylist()
        assert reason.startswith("missing_smiles")
        assert table["prediction:y"].null_count == 1


def test_what_is_no_text_is_refused_and_not_a_missing_molecule(
    tmp_path: Path, encoder: mb.MoleculeEncoder
) -> None:
    # Otherwise a list of RDKit's molecules would get a table without a single prediction.
    chem = pytest.importorskip("rdkit.Chem")
    predictor = mb.PropertyPredictor.from_pretrained(fine_tuned(tmp_path / "m", 0))
    for wrong, told in (
        (chem.MolFromSmiles("CCO"), r"found Mol at 1: .*Chem\.MolToSmiles"),
        (b"CCO", r"found bytes at 1: b'CCO'.*decode"),
        (np.array([b"CCO"])[0], "found bytes_ at 1"),
        (["CCO"], "found list at 1"),
        (np.array(["CCO", "C"]), "found ndarray at 1"),
    ):
        given: list[Any] = ["C", wrong]
        with pytest.raises(DataError, match=told):
            encoder.encode(given, invalid="nan")
        for ask in (predictor.predict, encoder.batch):
            with pytest.raises(DataError, match=told):
                ask(given)


def test_a_batch_has_the_molecules_in_their_order_for_a_training_loop(tmp_path: Path) -> None:
    torch.manual_seed(0)
    MoleBlendModel(TINY).save_pretrained(tmp_path)
    encoder, model = mb.MoleculeEncoder.from_pretrained(tmp_path), mb.load_model(tmp_path)
    smiles = [*SMILES, "CC.[Na+]", "C" * 40]  # Not in the order of their size.
    for conformers in (True, False):
        batch = encoder.batch(iter(smiles), conformers=conformers)
        assert isinstance(batch, mb.MoleculeBatch)
        vectors = model.embed(batch)
        np.testing.assert_allclose(
            vectors.detach().numpy(),
            encoder.encode(smiles, conformers=conformers),
            rtol=1e-4,
            atol=1e-5,
        )
    vectors.square().sum().backward()
    for name, weight in model.encoder.named_parameters():
        assert weight.grad is not None, name
    with pytest.raises(DataError, match=r"1 of 2 SMILES.* 1: 'C1CC'"):
        encoder.batch(["C", "C1CC"])
    with pytest.raises(DataError, match="at least one molecule"):
        encoder.batch([])


def test_a_whole_table_is_not_taken_for_its_column_names(
    tmp_path: Path, encoder: mb.MoleculeEncoder
) -> None:
    pd = pytest.importorskip("pandas")
    columns = {"C": ["CCO", "CCN"], "label": ["1", "2"]}
    predictor = mb.PropertyPredictor.from_pretrained(fine_tuned(tmp_path / "m", 0))
    for table in (pd.DataFrame(columns), pa.table(columns), columns):
        for ask in (encoder.encode, predictor.predict):
            with pytest.raises(DataError, match=r"found a table \(.*columns \['C', 'label'\]"):
                ask(table)


def test_wrong_arguments_are_named(tmp_path: Path, encoder: mb.MoleculeEncoder) -> None:
    model = fine_tuned(tmp_path / "m", 0)
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"models": []}, "models: expected a path"),
        ({"models": None}, "models: expected a path or URI, found None"),
        ({"models": [model, 3]}, "models: expected a path or URI, found 3"),
        ({"models": ""}, "models: expected a path or URI, found ''"),
        ({"batch_size": "64"}, r"batch_size: expected int or null, found '64' \(str\)"),
        ({"conformers": 1.5}, r"conformers: expected int or null, found 1\.5 \(float\)"),
        ({"interval": "0.9"}, r"interval: expected float or null, found '0\.9' \(str\)"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"conformers": -1}, "conformers: expected 0 to 255, found -1"),
        ({"conformers": 300}, "conformers: expected 0 to 255, found 300"),
        ({"device": "gpu"}, "device: 'gpu' cannot be used"),
        ({"device": "meta:3x"}, "device: "),
    )
    for options, told in refused:
        with pytest.raises(ConfigError, match=told):
            mb.PropertyPredictor.from_pretrained(**{"models": model, **options})
    with pytest.raises(ConfigError, match="batch_size: expected at least 1"):
        mb.MoleculeEncoder.from_pretrained(model, batch_size=-1)
    for uri in (None, [model], ""):
        with pytest.raises(ConfigError, match=r"^uri: expected a path or URI, found "):
            mb.MoleculeEncoder.from_pretrained(uri)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="invalid: expected raise or nan, found 'NaN'"):
        encoder.encode(["C1CC"], invalid="NaN")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_atoms"):
        encoder.encode(["C"], max_atoms=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device: 'cuda' cannot be used here"):
        mb.MoleculeEncoder.from_pretrained(fine_tuned(tmp_path / "m", 0), device="cuda")


def test_models_are_saved_and_loaded_by_path_objects_too(tmp_path: Path) -> None:
    model = MoleBlendModel(TINY).eval()
    model.save_pretrained(tmp_path / "saved")
    for load in (mb.load_model, mb.MoleBlend.from_pretrained):
        assert load(tmp_path / "saved").config == TINY


def test_what_holds_fine_tuned_models_names_them_to_those_who_want_an_encoder(
    tmp_path: Path,
) -> None:
    model = fine_tuned(tmp_path / "models/seed-3", 0)
    seeds = {"final": {"seeds": [{"seed": 3, "model": "models/seed-3"}]}}
    storage.write_json(str(tmp_path / "results.json"), seeds)
    with pytest.raises(CheckpointError, match=rf"name one of them: {re.escape(model)}$"):
        mb.MoleculeEncoder.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"copy these two files"):
        mb.export(mb.ExportConfig(checkpoint=model, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_an_export_leaves_runs_and_fine_tuned_models_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    MoleBlendModel(TINY).save_pretrained(str(tmp_path / "encoder"))
    settings = {"config": {"order": {}}, "data_fingerprint": "d"}
    storage.write_json(str(tmp_path / "run/config.json"), settings)
    model = fine_tuned(tmp_path / "model", 0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    for out, told in ((str(tmp_path / "run"), "moleblend pretrain"), (model, "fine-tuned model")):
        with pytest.raises(ConfigError, match=rf"^out: {re.escape(out)} .*{told}.*another `out`"):
            mb.export(mb.ExportConfig(checkpoint=str(tmp_path / "encoder"), out=out))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    again = mb.ExportConfig(checkpoint=str(tmp_path / "encoder"), out=str(tmp_path / "export"))
    assert mb.export(again) == mb.export(again)


def test_a_model_that_diverged_is_refused_and_not_part_of_an_ensemble(tmp_path: Path) -> None:
    sound = fine_tuned(tmp_path / "sound", 0)
    model = PropertyModel(MoleBlendModel(TINY), 1)
    with torch.no_grad():
        model.head.out.bias.fill_(torch.nan)
    save_property_model(model, SOLUBILITY, str(tmp_path / "diverged"))
    with pytest.raises(
        CheckpointError, match=r"diverged has weights .* 1 of \d+ .*head\.out\.bias"
    ):
        mb.PropertyPredictor.from_pretrained([sound, str(tmp_path / "diverged")])
    pretrained = MoleBlendModel(TINY)
    with torch.no_grad():
        next(pretrained.encoder.parameters())[0] = torch.inf
    pretrained.save_pretrained(tmp_path / "pretrained")
    with pytest.raises(CheckpointError, match="pretrained has weights that are not finite"):
        mb.MoleculeEncoder.from_pretrained(tmp_path / "pretrained")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="names no model"):
        mb.MoleculeEncoder.from_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="neither the folder of a fine-tuned model"):
        mb.PropertyPredictor.from_pretrained(str(tmp_path))
