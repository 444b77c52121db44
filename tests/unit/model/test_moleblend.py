from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import molecule_zoo as zoo
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moleblend_ray.errors import ConfigError
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.blending import BlendConfig, draw_blend
from moleblend_ray.model.config import LossConfig, ModelConfig
from moleblend_ray.model.embeddings import GaussianDistance
from moleblend_ray.model.encoder import Block
from moleblend_ray.model.fused import PathScale, add_and_norm
from moleblend_ray.model.losses import loss_counts, loss_means, pretraining_loss_sums, total_loss
from moleblend_ray.model.moleblend import MoleBlendModel, PropertyModel, ReadoutConfig
from moleblend_ray.settings import build

TINY = ModelConfig(num_layers=2, dim=32, ffn_dim=48, num_heads=4, num_kernels=8, pair_dim=8)
QUIET = dataclasses.replace(TINY, attention_dropout=0.0, activation_dropout=0.0, drop_path=0.0)
ODD = [
    zoo.single_atom(),
    zoo.chain(2).without_positions(),
    zoo.salt(),
    zoo.ring(6, tail=3).without_positions([0]),
]


def loss_of(model: MoleBlendModel, batch: MoleculeBatch) -> torch.Tensor:
    config = LossConfig()
    blend = draw_blend(batch, BlendConfig(), 0)
    sums = pretraining_loss_sums(model(batch, blend), batch, blend, config)
    return total_loss(sums, loss_counts(batch, blend, config), config)


@pytest.mark.parametrize(
    "molecules",
    [ODD, [zoo.single_atom()], [zoo.chain(3).without_positions()]],
    ids=["odd", "single", "no 3D"],
)
def test_every_parameter_gets_a_finite_gradient_whatever_the_batch_lacks(
    molecules: list[zoo.ZooMolecule],
) -> None:
    model = MoleBlendModel(TINY)
    loss_of(model, zoo.batch(molecules)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_model_built_without_memory_becomes_usable_by_init_weights() -> None:
    with torch.device("meta"):
        model = MoleBlendModel(QUIET)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(7)
    model.init_weights()
    torch.manual_seed(0)
    model.init_weights()
    torch.manual_seed(0)
    usual = MoleBlendModel(QUIET)
    torch.manual_seed(0)
    usual.init_weights()
    for (name, one), (_, other) in zip(
        (*model.named_parameters(), *model.named_buffers()),
        (*usual.named_parameters(), *usual.named_buffers()),
        strict=True,
    ):
        assert torch.equal(one, other), name
    assert loss_of(model, zoo.batch(ODD)).isfinite()


def test_gaussian_layer_starts_as_intended() -> None:
    layer = GaussianDistance(500)
    assert (layer.scale == 1).all()
    assert (layer.shift == 0).all()
    for values in (layer.means, layer.widths):
        assert 0.0 <= values.min() < 0.1
        assert 2.9 < values.max() <= 3.0


def test_gaussian_kernels_have_the_gradient_of_their_formula() -> None:
    torch.manual_seed(0)
    layer = GaussianDistance(6).double()
    distance = 3 * torch.rand(2, 4, 4, dtype=torch.float64)
    element = torch.randint(0, 100, (2, 4))
    known = torch.rand(2, 4, 4) > 0.3
    parameters = dict(layer.named_parameters())

    def kernels(distance: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(parameters, values, strict=True))
        found: torch.Tensor
        found, sums = torch.func.functional_call(layer, named, (distance, element, known))
        assert torch.equal(sums, found.sum(2))
        return found

    torch.autograd.gradcheck(kernels, (distance.requires_grad_(), *parameters.values()))
    assert torch.equal(
        kernels(distance, *parameters.values()) != 0, known[..., None].expand(-1, -1, -1, 6)
    )


def test_bfloat16_autocast_stays_close_and_finite() -> None:
    torch.manual_seed(0)
    model = MoleBlendModel(QUIET)
    batch = zoo.batch(ODD + zoo.drug_like(4))
    blend = draw_blend(batch, BlendConfig(), 0)

    def run() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        output = model(batch, blend)
        sums = pretraining_loss_sums(output, batch, blend, LossConfig())
        counts = loss_counts(batch, blend, LossConfig())
        return loss_means(sums, counts), total_loss(sums, counts, LossConfig())

    exact, _ = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, total = run()
    total.backward()
    assert total.dtype is torch.float32
    for name, value in exact.items():
        assert rounded[name].item() == pytest.approx(value.item(), rel=0.03, abs=0.03), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_weights_in_bfloat16_give_finite_losses() -> None:
    model = MoleBlendModel(QUIET).to(torch.bfloat16)
    loss = loss_of(model, zoo.batch(ODD + zoo.drug_like(4)))
    loss.backward()
    assert loss.dtype is torch.float32
    assert loss.isfinite()


def test_a_handful_of_molecules_is_learnt_by_heart() -> None:
    torch.manual_seed(0)
    started = time.monotonic()
    config = dataclasses.replace(QUIET, distance_head=True, dim=64, num_heads=8, pair_dim=16)
    model = MoleBlendModel(config)
    losses = LossConfig(
        spd_weight=1.0,
        edge_weight=1.0,
        direction_weight=1.0,
        distance_weight=1.0,
        denoise_weight=1.0,
    )
    batch = zoo.batch(zoo.drug_like(4))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    blend = draw_blend(batch, BlendConfig(), 0)
    counts = loss_counts(batch, blend, losses)
    history = []
    for _ in range(200):
        sums = pretraining_loss_sums(model(batch, blend), batch, blend, losses)
        optimizer.zero_grad()
        total_loss(sums, counts, losses).backward()
        optimizer.step()
        history.append({name: value.item() for name, value in loss_means(sums, counts).items()})
    first, last = history[0], history[-1]
    assert last["spd"] < 0.1 * first["spd"]
    assert last["edge"] < 0.1 * first["edge"]
    for name in ("direction", "distance", "denoise"):
        assert last[name] < 0.35 * first[name], (name, first[name], last[name])
    assert time.monotonic() - started < 60


def dropping(kind: str) -> ModelConfig:
    """A model without randomness but for the dropout ``kind``."""
    changes: dict[str, Any] = {kind: 0.4}
    return dataclasses.replace(QUIET, **changes)


@pytest.mark.parametrize(
    "kind", ["dropout", "attention_dropout", "activation_dropout", "drop_path"]
)
def test_each_dropout_acts_in_training_and_none_in_evaluation(kind: str) -> None:
    quiet, model = MoleBlendModel(QUIET), MoleBlendModel(dropping(kind))
    model.load_state_dict(quiet.state_dict())
    batch = zoo.batch(zoo.drug_like(4))
    blend = draw_blend(batch, BlendConfig(), 0)
    expected = quiet(batch, blend)
    assert not torch.equal(model(batch, blend).tokens, model(batch, blend).tokens)
    model.eval()
    found = model(batch, blend)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.noise, expected.noise)
    with torch.no_grad():
        assert torch.equal(model.embed(batch), model.embed(batch))


@pytest.mark.parametrize(
    ("kind", "behind"),
    [("attention_dropout", "attention.out"), ("activation_dropout", "ffn_out")],
)
def test_a_dropout_of_one_place_leaves_the_others_alone(kind: str, behind: str) -> None:
    model = MoleBlendModel(dropping(kind))
    with torch.no_grad():
        for layer in model.encoder.layers:
            # What was dropped before this map does not come through it; what would be dropped after it does.
            layer.get_parameter(f"{behind}.weight").zero_()
            layer.get_parameter(f"{behind}.bias").normal_()
    batch = zoo.batch(zoo.drug_like(4))
    assert torch.equal(model.encoder(batch, None).tokens, model.encoder(batch, None).tokens)


@pytest.mark.parametrize("place", ["input", "attention.out", "ffn_out"])
def test_dropout_acts_on_the_embedded_tokens_and_on_both_branches(place: str) -> None:
    model = MoleBlendModel(dataclasses.replace(QUIET, num_layers=1, dropout=0.4))
    (layer,) = model.encoder.layers
    with torch.no_grad():
        for branch in {"attention.out", "ffn_out"} - {place}:
            layer.get_parameter(f"{branch}.weight").zero_()
            layer.get_parameter(f"{branch}.bias").zero_()
        if place != "input":
            # All tokens enter as zeros, so dropout leaves them as they are.
            model.encoder.input_norm.weight.zero_()
            layer.get_parameter(f"{place}.bias").normal_()
    batch = zoo.batch(zoo.drug_like(4))
    assert not torch.equal(model.encoder(batch, None).tokens, model.encoder(batch, None).tokens)


def test_stochastic_depth_skips_whole_molecules_and_only_in_training() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(QUIET, num_layers=3, drop_path=0.5)
    encoder = MoleBlendModel(config).encoder
    batch = zoo.batch([zoo.chain(3, seed=k) for k in range(400)])
    for path_scales, rate in zip(encoder._path_scales(batch), (0.0, 0.25, 0.5), strict=True):
        assert path_scales is not None
        for path_scale in path_scales:
            kept = torch.isclose(path_scale, torch.tensor(1 / (1 - rate)))
            assert (kept | (path_scale == 0)).all()
            assert kept.float().mean().item() == pytest.approx(1 - rate, abs=0.1)
        # Each branch by itself: both are skipped as often as chance has it.
        assert (path_scales == 0).all(0).float().mean().item() == pytest.approx(rate**2, abs=0.1)
    tokens, hidden = torch.randn(2, len(batch.token_index), 32)
    layer = encoder.layers[0]
    assert isinstance(layer, Block)
    linear, norm = layer.attention.out, layer.ffn_norm
    path = PathScale(path_scale, batch.token_molecule)
    added = add_and_norm(tokens, hidden, linear, norm, path=path, probability=0.0, seed=None)
    scaled = linear(hidden) * path_scale[batch.token_molecule, None]
    torch.testing.assert_close(added, norm(tokens + scaled))
    encoder.eval()
    assert encoder._path_scales(batch) == [None] * 3


def test_predictions_are_the_same_with_gradients_and_without() -> None:
    torch.manual_seed(0)
    model = MoleBlendModel(QUIET).eval()
    batch = zoo.batch(ODD)
    with torch.no_grad():
        without = model(batch)
    torch.testing.assert_close(model(batch).tokens, without.tokens, rtol=1e-5, atol=1e-5)


def test_property_model_shares_the_encoder_and_predicts_from_the_graph_token() -> None:
    torch.manual_seed(0)
    pretrained = MoleBlendModel(QUIET)
    before = {name: value.clone() for name, value in pretrained.state_dict().items()}
    model = PropertyModel(pretrained, num_targets=3, readout=ReadoutConfig(dropout=0.0))
    batch = zoo.batch(ODD)
    predicted = model(batch)
    assert predicted.shape == (4, 3)
    assert torch.equal(predicted, model.head(pretrained.embed(batch)))
    for name, value in pretrained.state_dict().items():
        assert torch.equal(value, before[name]), name
    predicted.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ConfigError, match="num_targets"):
        PropertyModel(pretrained, num_targets=0)


def test_missing_coordinates_may_hold_anything_without_changing_a_prediction() -> None:
    model = MoleBlendModel(QUIET).eval()
    molecule = zoo.ring(6, tail=2)
    positions = molecule.positions.copy()
    positions[3] = 1e30
    elsewhere = molecule.moved(positions)
    mask = molecule.position_mask.copy()
    mask[3] = False
    one, other = (
        zoo.batch([dataclasses.replace(m, position_mask=mask)]) for m in (molecule, elsewhere)
    )
    assert torch.equal(model.embed(one), model.embed(other))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_heads": 5}, "num_heads"),
        ({"dim": 0}, "dim"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_spd_classes": 1}, "num_spd_classes"),
        ({"missing_positions": "zero"}, "missing_positions"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(TINY, **change)


PRESETS = Path(__file__).resolve().parents[3] / "conf" / "model"
# Also stated in docs/model.md.
PARAMETERS = {
    "tiny": 528_930,
    "mini": 1_402_018,
    "small": 3_630_426,
    "base": 44_906_506,
    "large": 306_165_770,
    "xl": 914_676_218,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_documented_number_of_parameters(name: str) -> None:
    import yaml

    settings = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    with torch.device("meta"):
        model = MoleBlendModel(build(ModelConfig, settings))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert f"{PARAMETERS[name]:,}" in (PRESETS.parents[1] / "docs" / "model.md").read_text()


class ForbidQuestions(TorchDispatchMode):
    """Raises at every operation that makes the host wait for the device."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = operation.overloadpacket.__name__
        if name in {"_local_scalar_dense", "nonzero", "item", "masked_select", "_unique2", "equal"}:
            raise AssertionError(f"{name} waits for the device")
        if name == "index" and any(i is not None and i.dtype is torch.bool for i in args[1]):
            raise AssertionError("indexing by a mask waits for the device")
        return operation(*args, **(kwargs or {}))


def test_no_value_is_asked_of_the_device_during_a_forward_and_backward_pass() -> None:
    batch, model = zoo.batch(ODD), MoleBlendModel(TINY)
    with ForbidQuestions():
        loss_of(model, batch).backward()
    with pytest.raises(AssertionError, match="waits"), ForbidQuestions():
        batch.positions[batch.atom_mask]
