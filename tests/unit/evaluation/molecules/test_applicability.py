"""What a model was trained on is known by fingerprints alone, and sets how similar is similar enough."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem, DataStructs
from rdkit.Chem import rdFingerprintGenerator

from moleblend_ray.errors import CheckpointError
from moleblend_ray.evaluation.molecules import applicability
from moleblend_ray.evaluation.molecules.applicability import (
    ApplicabilityDomain,
    load_domain,
    save_domain,
    similarity_entry,
)
from moleblend_ray.evaluation.molecules.similarity import packed_ecfp

from ..conftest import all_smiles


@pytest.fixture
def domain() -> ApplicabilityDomain:
    return ApplicabilityDomain.of(all_smiles())


def test_95_percent_of_the_training_molecules_are_inside_of_the_others(
    domain: ApplicabilityDomain,
) -> None:
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    bits = [generator.GetFingerprint(Chem.MolFromSmiles(text)) for text in all_smiles()]
    nearest = [
        max(DataStructs.BulkTanimotoSimilarity(bits[row], bits[:row] + bits[row + 1 :]))
        for row in range(len(bits))
    ]
    assert domain.threshold == pytest.approx(np.percentile(nearest, 5))
    assert np.mean(np.array(nearest) >= domain.threshold) == pytest.approx(0.95, abs=0.02)


def test_the_test_molecules_of_a_split_are_compared_with_those_of_training() -> None:
    training, test = all_smiles()[:60], all_smiles()[50:]
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    known, new = (
        [generator.GetFingerprint(Chem.MolFromSmiles(text)) for text in part]
        for part in (training, test)
    )
    nearest = [max(DataStructs.BulkTanimotoSimilarity(one, known)) for one in new]
    threshold = ApplicabilityDomain.of(training).threshold
    low, median, high = np.percentile(nearest, [5, 50, 95])
    assert similarity_entry(training, test) == pytest.approx(
        {
            "percentile_5": low,
            "median": median,
            "percentile_95": high,
            "threshold": threshold,
            "in_domain": sum(one >= threshold for one in nearest),
        }
    )


def test_a_threshold_from_some_of_the_molecules_is_near_that_from_all(
    domain: ApplicabilityDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(applicability, "MAX_LEFT_OUT", 60)
    some = applicability.similarity_threshold(domain.fingerprints)
    assert some != domain.threshold
    assert some == pytest.approx(domain.threshold, abs=0.1)


@pytest.mark.parametrize("smiles", [[], ["CCO"], ["CCO", "OCC", "not a molecule"]])
def test_where_nothing_can_be_compared_only_the_known_is_inside(smiles: list[str]) -> None:
    assert ApplicabilityDomain.of(smiles).threshold == 1.0


def test_the_file_shows_neither_order_nor_number_of_the_training_molecules(
    domain: ApplicabilityDomain, tmp_path: Path
) -> None:
    save_domain(domain, str(tmp_path / "a"))
    shuffled = [*reversed(all_smiles()), *all_smiles()[:30], "not a molecule"]
    save_domain(ApplicabilityDomain.of(shuffled), str(tmp_path / "b"))
    one, two = (tmp_path / name / "training_fingerprints.npz" for name in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_a_domain_is_read_as_it_was_written(domain: ApplicabilityDomain, tmp_path: Path) -> None:
    save_domain(domain, str(tmp_path))
    read = load_domain(str(tmp_path))
    assert read is not None
    assert read.checksum == domain.checksum
    assert read.similarity(packed_ecfp(["Cc1ccccc1"])).tolist() == [1.0]
    assert 0.0 < read.similarity(packed_ecfp(["Clc1ccccc1"]))[0] < 1.0


def test_a_model_of_before_has_no_domain(tmp_path: Path) -> None:
    assert load_domain(str(tmp_path)) is None


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "training_fingerprints.npz"
    with np.load(path) as file:
        stored = {name: file[name] for name in file.files}
    np.savez_compressed(path, **{**stored, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": np.array("ecfp radius=3 bits=2048")},
        {"control": np.zeros((1, 32), np.uint64)},
    ],
)
def test_fingerprints_that_are_not_made_here_are_not_compared(
    domain: ApplicabilityDomain,
    tmp_path: Path,
    changes: dict[str, object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_domain(domain, str(tmp_path))
    rewrite(tmp_path, **changes)
    with caplog.at_level(logging.WARNING):
        assert load_domain(str(tmp_path)) is None
    assert "similarities to its molecules are not known" in caplog.text


def test_a_damaged_file_or_one_of_later_is_an_error_that_names_it(
    domain: ApplicabilityDomain, tmp_path: Path
) -> None:
    path = tmp_path / "training_fingerprints.npz"
    save_domain(domain, str(tmp_path))
    whole = path.read_bytes()
    middle = len(whole) // 2
    for content in (b"", whole[:-30], whole[:middle] + b"\0" * 40 + whole[middle + 40 :]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"training_fingerprints.npz is damaged"):
            load_domain(str(tmp_path))
    path.write_bytes(whole)
    rewrite(tmp_path, fingerprints=np.zeros((3, 32), np.int64))
    with pytest.raises(CheckpointError, match=r"damaged: expected rows of uint64 words"):
        load_domain(str(tmp_path))
    rewrite(tmp_path, format_version=np.int64(2))
    with pytest.raises(CheckpointError, match=r"version 2.*up to 1"):
        load_domain(str(tmp_path))
