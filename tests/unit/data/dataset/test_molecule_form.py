"""The form of molecules: that of the settings they were prepared with."""

from __future__ import annotations

import dataclasses

from moleblend_ray.chemistry.config import FeaturizeConfig
from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.preparation.options import ConvertOptions


def test_it_has_the_names_and_defaults_of_the_settings() -> None:
    settings = FeaturizeConfig()
    for name, value in dataclasses.asdict(MoleculeForm()).items():
        assert getattr(settings, name) == value


def test_it_is_read_from_the_options_of_a_data_set_old_or_new() -> None:
    featurize = FeaturizeConfig(explicit_hydrogens=True, salts="largest_fragment", max_atoms=9)
    form = MoleculeForm.of_options(ConvertOptions(featurize=featurize).to_json())
    assert form == MoleculeForm(explicit_hydrogens=True, salts="largest_fragment")
    assert MoleculeForm.of_options({}) == MoleculeForm()
    assert MoleculeForm.from_json(dataclasses.asdict(form)) == form


def test_differences_are_named_with_both_values() -> None:
    form = MoleculeForm(explicit_hydrogens=True)
    assert form.difference(form) == ""
    assert form.difference(MoleculeForm(salts="reject")) == (
        "featurize.explicit_hydrogens True and False, featurize.salts 'keep' and 'reject'"
    )
