"""Validation losses: deterministic, without effect on training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from synthetic import write_dataset

from moleblend_ray.data.dataset.dataset_files import MANIFEST_NAME
from moleblend_ray.data.dataset.manifest import Manifest, fingerprint, load_manifest
from moleblend_ray.data.dataset.shard_reader import ShardReader
from moleblend_ray.data.dataset.shards import GRAPH_COLUMNS
from moleblend_ray.data.files import storage
from moleblend_ray.model.config import LossConfig
from moleblend_ray.training.ranks import Ranks
from moleblend_ray.training.validation import _shares, build_validation, validation_rows


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Manifest]:
    """Two shards, of which the second (20 molecules) is the valid split."""
    uri = str(tmp_path_factory.mktemp("data"))
    write_dataset(uri, 50, shard_rows=30, row_group_rows=16)
    manifest = load_manifest(uri)
    train, valid = manifest.shards
    shards = (train, replace(valid, split="valid"))
    manifest = replace(manifest, shards=shards, fingerprint=fingerprint(1, {}, (), shards))
    storage.write_json(storage.join(uri, MANIFEST_NAME), manifest.to_json())
    return uri, load_manifest(uri)


def test_the_losses_are_the_same_each_time_and_for_any_micro_batch(
    dataset: tuple[str, Manifest],
) -> None:
    learner = toy.learner(model=toy.DROPOUT_MODEL)
    small = build_validation(*dataset, learner, micro_batch_size=3)
    large = build_validation(*dataset, learner, micro_batch_size=50)
    assert small is not None
    assert large is not None
    first = small()
    assert first == small()
    assert {"valid_loss", "valid_loss_spd", "valid_loss_denoise"} <= first.keys()
    assert large() == pytest.approx(first, rel=1e-5)


def test_the_blends_are_those_of_a_step_that_training_never_reaches(
    dataset: tuple[str, Manifest],
) -> None:
    # Losses of validation are compared between runs of different versions: another number would be another blend.
    uri, manifest = dataset
    reader = ShardReader(uri, manifest, "valid", columns=list(GRAPH_COLUMNS))
    steps = {int(share.batch.step) for share in _shares(reader, np.arange(20), 7, Ranks(), None)}
    assert steps == {2**32 - 1}


@pytest.mark.parametrize("available", [1, 31, 40, 2047, 2048, 2049, 5000, 10**6, 10**11])
@pytest.mark.parametrize("wanted", [1, 7, 33, 2048])
def test_the_molecules_are_distinct_and_from_all_over_the_split(
    wanted: int, available: int
) -> None:
    rows = validation_rows(wanted, available)
    assert len(rows) == min(wanted, available)
    assert rows[0] == 0
    assert rows[-1] < available
    assert (np.diff(rows) > 0).all()
    if wanted >= available:
        assert rows.tolist() == list(range(available))
    elif wanted > 32:
        # Runs of neighbours: a row group is read whole.
        assert (np.diff(rows) > 1).sum() <= 31
        assert rows[-1] == available - 1
        # In each quarter as much as in the others.
        counts = np.histogram(rows, bins=4, range=(0, available))[0]
        assert counts.max() - counts.min() <= wanted / 16


def test_no_molecule_is_taken_of_a_split_that_has_none() -> None:
    assert len(validation_rows(2048, 0)) == 0


def test_a_part_of_the_valid_split_is_validated_or_all_of_it(dataset: tuple[str, Manifest]) -> None:
    uri, manifest = dataset

    def losses(manifest: Manifest, molecules: int) -> dict[str, float]:
        learner = toy.learner(validation_molecules=molecules)
        validate = build_validation(uri, manifest, learner, micro_batch_size=7)
        assert validate is not None
        return validate()

    everything = losses(manifest, 2048)
    assert losses(manifest, 20) == everything
    assert losses(replace(manifest, shards=manifest.shards_of("valid")), 2048) == everything
    part = losses(manifest, 7)
    assert part["valid_loss"] != pytest.approx(everything["valid_loss"], rel=1e-4)
    assert losses(manifest, 8) != part


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_products_have_the_precision_of_training(
    dataset: tuple[str, Manifest], precision: str, dtype: torch.dtype
) -> None:
    learner = toy.learner(precision=precision)
    products = set()
    for layer in learner.model.encoder.layers:
        qkv = layer.get_submodule("attention.qkv")
        qkv.register_forward_hook(lambda *call: products.add(call[-1].dtype))
    validate = build_validation(*dataset, learner, micro_batch_size=8)
    assert validate is not None
    validate()
    assert products == {dtype}


def test_it_leaves_the_model_in_training_without_gradients(dataset: tuple[str, Manifest]) -> None:
    learner = toy.learner()
    validate = build_validation(*dataset, learner, micro_batch_size=8)
    assert validate is not None
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    validate()
    assert learner.model.training
    assert all(parameter.grad is None for parameter in learner.model.parameters())
    for name, value in learner.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_every_molecule_counts_once_and_all_ranks_have_equal_rounds(
    dataset: tuple[str, Manifest], world_size: int
) -> None:
    uri, manifest = dataset
    reader = ShardReader(uri, manifest, "valid", columns=GRAPH_COLUMNS)
    shares = [
        _shares(reader, np.arange(20), 3, Ranks(rank=rank, world_size=world_size), None)
        for rank in range(world_size)
    ]
    assert len({len(of_rank) for of_rank in shares}) == 1
    counted = [
        molecule
        for of_rank in shares
        for share in of_rank
        if share.counts
        for molecule in share.batch.molecule_ids.tolist()
    ]
    assert sorted(counted) == list(range(20))


def test_there_is_none_without_valid_molecules_or_interval(dataset: tuple[str, Manifest]) -> None:
    uri, manifest = dataset
    without = replace(manifest, shards=manifest.shards_of("train"))
    assert build_validation(uri, without, toy.learner(), micro_batch_size=8) is None
    never = toy.learner(validate_every=0)
    assert build_validation(uri, manifest, never, micro_batch_size=8) is None


def test_descriptors_are_validated_on_the_scale_of_the_data_set(tmp_path: Path) -> None:
    uri = str(tmp_path)
    molecules = write_dataset(uri, 50, described=True)
    manifest = load_manifest(uri)
    (shard,) = manifest.shards
    manifest = replace(manifest, shards=(replace(shard, split="valid"),))
    learner = toy.learner(
        model=replace(toy.MODEL, descriptor_head=True), loss=LossConfig(descriptor_weight=2.0)
    )
    head, scaling = learner.model.descriptor_head, manifest.descriptor_scaling
    assert head is not None
    assert scaling is not None
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    validate = build_validation(uri, manifest, learner, micro_batch_size=8)
    assert validate is not None
    losses = validate()
    # What a model costs that predicts the mean of each.
    targets = scaling.targets(molecules.descriptors)
    expected = np.nanmean(targets.astype(np.float64) ** 2)
    assert losses["valid_loss_descriptor"] == pytest.approx(expected, rel=1e-3)
    # More than 1, as the tenth that is unknown counts as the median in the standard deviation.
    assert expected == pytest.approx(1 / 0.9, abs=0.05)
    assert losses["valid_loss"] > 2.0 * losses["valid_loss_descriptor"]
