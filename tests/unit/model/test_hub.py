from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import dense_oracle
import molecule_zoo as zoo
import numpy as np
import pytest
import torch

from moleblend_ray.data.files import storage
from moleblend_ray.errors import CheckpointError, ConfigError
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.model.hub import from_pretrained, import_official, save_pretrained
from moleblend_ray.model.moleblend import MoleBlendModel

TINY = ModelConfig(
    num_layers=2, dim=16, ffn_dim=24, num_heads=2, num_kernels=4, pair_dim=4, distance_head=True
)
OFFICIAL = {"layers": 2, "dim": 24, "ffn": 36, "heads": 4, "kernels": 6, "pair": 5}


def saved(folder: Path) -> MoleBlendModel:
    model = MoleBlendModel(TINY)
    save_pretrained(model, str(folder))
    return model


def test_a_saved_model_comes_back_equal(tmp_path: Path) -> None:
    model = saved(tmp_path)
    loaded = from_pretrained(str(tmp_path))
    assert loaded.config == TINY
    assert not loaded.training
    batch = zoo.batch([zoo.chain(3), zoo.salt()])
    assert torch.equal(loaded.embed(batch), model.eval().embed(batch))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_the_class_saves_and_loads_as_the_functions_do(tmp_path: Path) -> None:
    model = MoleBlendModel(TINY)
    model.save_pretrained(str(tmp_path))
    loaded = MoleBlendModel.from_pretrained(str(tmp_path))
    assert loaded.config == TINY
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"config": {"order": {}}, "data_fingerprint": "d"}),
        ("property.json", {"format_version": 3}),
    ],
    ids=["run", "fine-tuned model"],
)
def test_a_model_is_not_saved_over_what_commands_have_made(
    tmp_path: Path, name: str, content: dict[str, Any]
) -> None:
    """As after ``model = load_model(uri)``: ``model.save_pretrained(uri)`` would take the run its settings."""
    storage.write_json(str(tmp_path / name), content)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(ConfigError, match=r"would be lost\. Save the model to a folder of its own"):
        MoleBlendModel(TINY).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == before


def test_a_run_is_told_from_the_model_in_it(tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / "config.json"), {"config": {}})
    with pytest.raises(CheckpointError, match=r"not the configuration .*load_model takes it"):
        from_pretrained(str(tmp_path))


def test_an_export_killed_over_another_model_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path)
    with pytest.raises(CheckpointError, match="no pretrained model"):
        from_pretrained(str(tmp_path))


def test_a_folder_without_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no pretrained model"):
        from_pretrained(str(tmp_path))


def test_damaged_weights_are_reported_with_their_place(tmp_path: Path) -> None:
    saved(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        from_pretrained(str(tmp_path))


def test_a_newer_format_and_a_changed_configuration_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="upgrade"):
        from_pretrained(str(tmp_path))
    for change, message in (({"dim": 32}, "do not belong"), ({"width": 3}, "this version")):
        path.write_text(json.dumps(document | {"model": document["model"] | change}))
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(str(tmp_path))


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_official_parameters_load_from_a_file(tmp_path: Path, suffix: str) -> None:
    parameters = {
        name: value.detach().float()
        for name, value in dense_oracle.official_parameters(**OFFICIAL, seed=0).items()
    }
    path = tmp_path / f"official{suffix}"
    if suffix == ".npz":
        arrays: dict[str, Any] = {name: value.numpy() for name, value in parameters.items()}
        np.savez(path, **arrays)
    else:
        torch.save({"model": parameters}, path)
    model = from_pretrained(str(path))
    assert model.config.num_layers == 2
    assert model.config.num_heads == 4
    assert model.config.missing_positions == "origin"
    assert model.config.num_edge_classes == 24
    assert model.embed(zoo.batch([zoo.chain(3)])).shape == (1, 24)


@pytest.mark.parametrize(
    ("item", "named"), [(sys.exit, "sys.exit"), (torch.nn.Identity(), "linear.Identity")]
)
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, item: object, named: str) -> None:
    path = tmp_path / "model.pt"
    torch.save({"model": item}, path)
    with pytest.raises(
        CheckpointError, match=rf"cannot be read as official parameters \(.*{named}"
    ) as caught:
        from_pretrained(str(path))
    # PyTorch's advice on such a file is to run its code.
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cut.npz", "cut.pt"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive"])
def test_a_damaged_file_of_parameters_is_reported(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as official parameters"):
        from_pretrained(str(path))


def test_import_names_what_is_missing_and_what_has_no_place() -> None:
    parameters = dense_oracle.official_parameters(**OFFICIAL, seed=0)
    name = "encoder.molecule_encoder.layers.1.fc1.bias"
    with pytest.raises(CheckpointError, match=r"lack layers\.1\.fc1\.bias"):
        import_official({key: value for key, value in parameters.items() if key != name})
    with pytest.raises(CheckpointError, match="have no place"):
        import_official(parameters | {name + "_extra": parameters[name]})
    with pytest.raises(CheckpointError, match="atom_encoder"):
        import_official({"weight": parameters[name]})
