"""Replays runs of the official code from golden vectors (``--golden DIR``; the README in that folder has the format).

Each run is replayed once: the data pipeline rebuilds its batch from ``mols.npz``, its parameters are imported, and its
random choices are passed as a blend. Gradients flow back through the import to the official parameters.

Shape legend: B molecules, N atoms (padded), T = N + 1 tokens, L hops in the run's batch (at most 5).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from moleblend_ray.data.batches.batch import build_micro_batches
from moleblend_ray.data.dataset.block import MoleculeBlock, undescribed
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.blending import Blend
from moleblend_ray.model.config import LOSS_NAMES, LossConfig
from moleblend_ray.model.encoder import EncoderOutput
from moleblend_ray.model.hub import import_official
from moleblend_ray.model.losses import (
    IGNORE,
    edge_targets,
    has_direction,
    loss_counts,
    loss_means,
    noised_atoms,
    pair_displacement,
    pretraining_loss_sums,
    spd_targets,
    total_loss,
)
from moleblend_ray.model.moleblend import MoleBlendModel
from moleblend_ray.model.pair_bias import attention_bias
from moleblend_ray.vocabulary import UNREACHABLE

RELATIVE_TOLERANCE = 1e-4
DEFAULT_FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "golden"
PAPER_LOSS = LossConfig(ignore_other_bonds=True, denoise_lone_atoms=True)
GOLDEN_LOSS_NAMES = {"spd": "spd", "edge": "edge", "direction": "3d", "denoise": "denoise"}
NOISE_STD = 0.2

Arrays = Mapping[str, np.ndarray[Any, Any]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folders = [Path(folder) for folder in metafunc.config.getoption("--golden")]
    if not folders and DEFAULT_FOLDER.is_dir():
        folders = [DEFAULT_FOLDER]
    runs = [run for folder in folders for run in sorted(folder.glob("run_*.npz"))]
    if folders and not runs:
        raise pytest.UsageError(f"--golden {folders}: no run_*.npz in there")
    if "run_files" in metafunc.fixturenames:
        metafunc.parametrize("run_files", [runs] if runs else [], ids=["all"] if runs else [])
    if "run_file" in metafunc.fixturenames:
        metafunc.parametrize(
            "run_file", runs, ids=[f"{run.parent.name}/{run.stem}" for run in runs]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """One run of the official code (``golden``) and what this project computes for it."""

    golden: Arrays
    batch: MoleculeBatch
    blend: Blend
    tensors: dict[str, Tensor]
    """Our values of the floating-point arrays, by their names in the run file."""
    counts: Tensor
    total: Tensor
    gradients: dict[str, Tensor | None]
    """By official parameter name."""

    @property
    def real_atoms(self) -> np.ndarray[Any, Any]:
        return self.batch.atom_mask.numpy()

    @property
    def real_pairs(self) -> np.ndarray[Any, Any]:
        return self.batch.pair_mask.numpy()


@functools.lru_cache(maxsize=1)
def replay(run_file: Path) -> Replay:
    torch.set_num_threads(1)
    golden = dict(np.load(run_file, allow_pickle=False))
    official = {
        name: torch.from_numpy(value).requires_grad_()
        if value.dtype.kind == "f"
        else torch.from_numpy(value)
        for name, value in load_parameters(run_file).items()
    }
    config, state = import_official(official)
    config = dataclasses.replace(
        config, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, drop_path=0.0
    )
    model = MoleBlendModel(config).train()
    batch = rebuild_batch(golden, run_file.parent)
    blend = given_blend(golden, batch)
    tensors: dict[str, Tensor] = {}
    remove = watch(model, batch, blend, tensors)
    output = functional_call(model, state, (batch, blend))
    remove()
    sums = pretraining_loss_sums(output, batch, blend, PAPER_LOSS)
    counts = loss_counts(batch, blend, PAPER_LOSS)
    means = loss_means(sums, counts)
    total = total_loss(sums, counts, PAPER_LOSS)
    total.backward()
    tensors |= {
        "logits_spd": output.spd_logits,
        "logits_edge": output.edge_logits,
        "logits_3d": output.direction,
        "denoise_out": output.noise,
        "pos_noised": batch.positions + blend.noise,
        "loss_total_weighted": total,
        "loss_logged_unweighted": torch.stack([means[name] for name in GOLDEN_LOSS_NAMES]).sum(),
        **{f"loss_{theirs}": means[ours] for ours, theirs in GOLDEN_LOSS_NAMES.items()},
    }
    tensors |= cosines(tensors, batch, blend)
    tensors |= language_model_logits(official, batch.pad_tokens(output.tokens))
    return Replay(
        golden=golden,
        batch=batch,
        blend=blend,
        tensors={name: value.detach() for name, value in tensors.items()},
        counts=counts,
        total=total.detach(),
        gradients={name: value.grad for name, value in official.items()},
    )


def load_parameters(run_file: Path) -> Arrays:
    """The parameters of ``run_<P>_<NAME>.npz``: ``params_<P>.npz`` with the longest matching P."""
    fitting = [
        path
        for path in run_file.parent.glob("params_*.npz")
        if run_file.stem.startswith(f"run_{path.stem.removeprefix('params_')}_")
    ]
    assert fitting, f"no params_<P>.npz belongs to {run_file.name}"
    return dict(np.load(max(fitting, key=lambda path: len(path.stem)), allow_pickle=False))


def rebuild_batch(golden: Arrays, folder: Path) -> MoleculeBatch:
    """The run's batch, built by the data pipeline, with as many hops as the run has."""
    blocks = [molecule_block(golden, folder, row) for row in range(len(golden["batch/x"]))]
    sizes = np.array([len(block["atom_features"]) for block in blocks], np.int32)
    joined = {
        name: np.concatenate([block[name] for block in blocks])
        for name in ("atom_features", "bonds", "bond_features", "positions", "position_mask")
    }
    block = MoleculeBlock(
        molecule_ids=np.arange(len(blocks), dtype=np.int64),
        num_atoms=sizes,
        num_bonds=np.array([len(block["bonds"]) for block in blocks], np.int32),
        descriptors=undescribed(len(blocks)),
        **joined,
    )
    (micro,) = build_micro_batches(block, step=0, stream=0, micro_batch_size=len(blocks))
    batch = MoleculeBatch.from_micro_batch(micro)
    batch = in_given_order(batch)
    hops = golden["batch/edge_input"].shape[3]
    return dataclasses.replace(batch, path_codes=batch.path_codes[..., :hops].contiguous())


def in_given_order(batch: MoleculeBatch) -> MoleculeBatch:
    """Undo the pipeline's sort by size, so that molecules have the order of the run."""
    order = torch.argsort(batch.molecule_ids)
    sizes = batch.num_atoms[order]
    padded = [
        *("molecule_ids", "num_atoms", "atom_mask", "atom_features", "degrees", "positions"),
        *("position_mask", "spd", "path_codes"),
    ]
    mask = batch.atom_mask[order]
    tokens = F.pad(mask, (1, 0), value=True)
    molecule = torch.arange(len(order))
    return dataclasses.replace(
        batch,
        **{name: getattr(batch, name)[order] for name in padded},
        atom_index=mask.flatten().nonzero().squeeze(1),
        token_index=tokens.flatten().nonzero().squeeze(1),
        token_molecule=molecule.repeat_interleave(sizes + 1),
        atom_token=torch.arange(int(sizes.sum())) + molecule.repeat_interleave(sizes) + 1,
        graph_token=sizes.cumsum(0) - sizes + molecule,
    )


def molecule_block(golden: Arrays, folder: Path, row: int) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of one molecule: its graph from mols.npz if the run gives its index there, else from the run's batch.

    Positions are those of the run, which may have moved or removed them. As in the official code, an atom at exactly
    (0, 0, 0) has no position.
    """
    n = int((golden["batch/x"][row, :, 0] != 0).sum())
    positions = golden["batch/pos"][row, :n].astype(np.float32)
    graph = graph_from_molecules(golden, folder, row, n)
    return {
        **(graph_from_batch(golden, row, n) if graph is None else graph),
        "positions": positions,
        "position_mask": (positions != 0).any(1),
    }


def graph_from_molecules(
    golden: Arrays, folder: Path, row: int, n: int
) -> dict[str, np.ndarray[Any, Any]] | None:
    molecules = load_molecules(folder)
    index = int(golden["mol_index"][row]) if "mol_index" in golden else -1
    if molecules is None or not 0 <= index < len(molecules["n_atoms"]):
        return None
    assert molecules["n_atoms"][index] == n, f"molecule {index} of mols.npz has another size"
    atoms = slice(*molecules["atom_ptr"][index : index + 2])
    edges = slice(*molecules["edge_ptr"][index : index + 2])
    return {
        "atom_features": molecules["x_raw"][atoms].astype(np.uint8),
        # Each bond is stored twice, as (begin, end) and (end, begin).
        "bonds": molecules["edge_index"][edges][::2].astype(np.uint16).reshape(-1, 2),
        "bond_features": molecules["edge_attr"][edges][::2].astype(np.uint8).reshape(-1, 3),
    }


@functools.lru_cache(maxsize=1)
def load_molecules(folder: Path) -> Arrays | None:
    path = folder / "mols.npz"
    return dict(np.load(path, allow_pickle=False)) if path.exists() else None


def graph_from_batch(golden: Arrays, row: int, n: int) -> dict[str, np.ndarray[Any, Any]]:
    features = golden["batch/x"][row, :n] - 2 - 512 * np.arange(9)
    codes = golden["batch/attn_edge_type"][row, :n, :n]
    begin, end = np.nonzero(np.triu(codes.any(-1)))
    return {
        "atom_features": features.astype(np.uint8),
        "bonds": np.stack([begin, end], 1).astype(np.uint16),
        "bond_features": (codes[begin, end] - 2 - 512 * np.arange(3)).astype(np.uint8),
    }


def given_blend(golden: Arrays, batch: MoleculeBatch) -> Blend:
    B, N = batch.atom_mask.shape
    pairs = torch.from_numpy(golden["choice_pair"]).to(torch.uint8)
    noise = NOISE_STD * torch.from_numpy(golden["noise_unit"]).float()
    return Blend(
        pair_choice=pairs.expand(B, N, N),
        atom_choice=torch.from_numpy(golden["choice_atom"]).to(torch.uint8),
        noise=noise.masked_fill(~batch.position_mask[..., None], 0.0),
    )


def watch(
    model: MoleBlendModel, batch: MoleculeBatch, blend: Blend, seen: dict[str, Tensor]
) -> Callable[[], None]:
    """Record the intermediates of the next forward pass in ``seen``; returns a function that stops it."""
    encoder = model.encoder

    def note_embeddings(_module: Any, _args: Any, output: tuple[Tensor, Tensor]) -> None:
        categories, degree = (batch.pad_atoms(part) for part in output)
        token = encoder.atoms.graph_token.expand(len(categories), 1, -1)
        seen["atom_feature"] = torch.cat([token, categories], 1)
        seen["degree_feature"] = degree

    def note_geometry(_module: Any, _args: Any, output: Any) -> None:
        seen["bias_3d"] = output.bias.permute(0, 3, 1, 2).masked_fill(
            ~batch.atom_mask[:, None, None, :], float("-inf")
        )
        seen["merged_3d_feature"] = batch.pad_atoms(output.merged)
        seen["delta_pos"] = output.displacement
        seen["bias_spd"] = encoder.topology.spd_bias(batch).permute(0, 3, 1, 2)
        seen["bias_edge"] = encoder.topology.edge_bias(batch).permute(0, 3, 1, 2)
        nothing = torch.zeros_like(output.bias)
        only_geometry = dataclasses.replace(
            blend, pair_choice=torch.full_like(blend.pair_choice, 2)
        )
        seen["attn_bias_base"] = attention_bias(batch, only_geometry, encoder.topology, nothing)

    def note(name: str) -> Any:
        def hook(_module: Any, _args: Any, output: Tensor) -> None:
            seen[name] = batch.pad_tokens(output)

        return hook

    def note_bias(_module: Any, _args: Any, output: EncoderOutput) -> None:
        seen["attn_bias_blended"] = output.bias

    def note_kernels(_module: Any, _args: Any, output: tuple[Tensor, Tensor]) -> None:
        seen["gaussian_feature"] = output[0]

    handles = [
        encoder.atoms.register_forward_hook(note_embeddings),
        encoder.geometry.register_forward_hook(note_geometry),
        encoder.geometry.gaussian.register_forward_hook(note_kernels),
        encoder.input_norm.register_forward_hook(note("encoder_in")),
        encoder.register_forward_hook(note_bias),
    ]
    for number, layer in enumerate(encoder.layers):
        handles += [
            layer.get_submodule("attention.out").register_forward_hook(
                note(f"layer{number}_attn_out")
            ),
            layer.register_forward_hook(note(f"layer{number}_out")),
        ]

    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop


def cosines(tensors: Mapping[str, Tensor], batch: MoleculeBatch, blend: Blend) -> dict[str, Tensor]:
    """Predictions and targets of the two cosine losses, masked as in the official code, and their cosines."""
    kept = noised_atoms(batch, blend, PAPER_LOSS)[..., None]
    predicted, noise = tensors["denoise_out"] * kept, blend.noise * kept
    direction = tensors["logits_3d"].masked_fill(~has_direction(batch)[..., None], 0.0)
    return {
        "denoise_pred_masked": predicted,
        "denoise_target_masked": noise,
        "cos_denoise": F.cosine_similarity(predicted, noise, dim=-1),
        "cos_3d": F.cosine_similarity(direction, pair_displacement(batch), dim=-1),
    }


def language_model_logits(official: Mapping[str, Tensor], states: Tensor) -> dict[str, Tensor]:
    """The unused head of the official code, which our model does not have, computed from its parameters."""
    head = {name.removeprefix("encoder."): value.detach() for name, value in official.items()}
    if "embed_out.weight" not in head:
        return {}
    hidden = F.gelu(
        F.linear(
            states, head["lm_head_transform_weight.weight"], head["lm_head_transform_weight.bias"]
        )
    )
    hidden = F.layer_norm(
        hidden, hidden.shape[-1:], head["layer_norm.weight"], head["layer_norm.bias"]
    )
    return {"graph_logits_without_bias": F.linear(hidden, head["embed_out.weight"])}


INTEGER_ARRAYS = {
    "batch/x",
    "batch/in_degree",
    "batch/out_degree",
    "batch/spatial_pos",
    "batch/edge_input",
    "batch/attn_edge_type",
    "batch/node_type_edge",
    "target_spd",
    "target_edge",
    "mask_3d_ignored",
}
EXACT_FLOATS = {"batch/attn_bias", "batch/pos", "target_3d"}
BY_TOKEN = {"atom_feature", "encoder_in", "graph_logits_without_bias"}
BY_ATOM = {"degree_feature", "merged_3d_feature", "pos_noised", "denoise_out"}
BY_ATOM |= {"denoise_pred_masked", "denoise_target_masked", "cos_denoise"}
BY_PAIR = {"gaussian_feature", "delta_pos", "logits_spd", "logits_edge", "logits_3d", "cos_3d"}
BY_HEAD_PAIR = {"bias_spd", "bias_edge"}
BY_HEAD_QUERY = {"bias_3d", "attn_bias_base", "attn_bias_blended"}
SCALARS = {f"loss_{name}" for name in GOLDEN_LOSS_NAMES.values()}
SCALARS |= {"loss_total_weighted", "loss_logged_unweighted"}
GIVEN = {"choice_pair", "choice_atom", "noise_unit", "mol_index", "batch/idx", "batch/y"}
GRADIENT_ARRAYS = {"grad_global_norm", "params_without_grad"}
KNOWN = INTEGER_ARRAYS | EXACT_FLOATS | BY_TOKEN | BY_ATOM | BY_PAIR | BY_HEAD_PAIR | BY_HEAD_QUERY
KNOWN |= SCALARS | GIVEN | GRADIENT_ARRAYS
"""Names of all arrays, except gradients of parameters and outputs of layers."""


def is_layer_output(name: str) -> bool:
    return name.startswith("layer") and name.endswith(("_out",))


def test_every_array_of_a_run_is_given_or_compared(run_file: Path) -> None:
    names = set(replay(run_file).golden)
    unknown = {n for n in names - KNOWN if not n.startswith("grad/") and not is_layer_output(n)}
    assert not unknown


def test_the_runs_together_hold_every_array_that_is_compared(run_files: list[Path]) -> None:
    found: set[str] = set()
    for run_file in run_files:
        with np.load(run_file, allow_pickle=False) as file:
            found.update(file.files)
    assert not KNOWN - found
    assert {"layer0_attn_out", "layer0_out"} <= found
    assert any(name.startswith("grad/") for name in found)


def test_integer_arrays_are_rebuilt_exactly(run_file: Path) -> None:
    run = replay(run_file)
    ours = official_batch(run.batch) | targets(run)
    names = sorted((INTEGER_ARRAYS | EXACT_FLOATS) & set(run.golden))
    assert names, "the run holds none of these arrays"
    for name in names:
        np.testing.assert_array_equal(ours[name], run.golden[name], err_msg=name)


def test_intermediates_and_outputs_agree(run_file: Path) -> None:
    differences = {
        name: relative_difference(ours, theirs)
        for name, ours, theirs in comparable(replay(run_file))
    }
    assert differences, "the run holds none of these arrays"
    wrong = {name: value for name, value in differences.items() if value > RELATIVE_TOLERANCE}
    assert not wrong, f"relative to the largest entry of each: {wrong}"


def test_losses_agree(run_file: Path) -> None:
    run = replay(run_file)
    counts = dict(zip(LOSS_NAMES, run.counts.tolist(), strict=True))
    names = sorted(SCALARS & set(run.golden))
    assert names, "the run holds no losses"
    for name in names:
        ours, theirs = float(run.tensors[name]), float(run.golden[name])
        assert np.isfinite(ours), name
        if np.isnan(theirs):
            # An official mean over nothing; ours is 0, also as a term of the sums.
            assert min(counts[loss] for loss in GOLDEN_LOSS_NAMES) == 0, name
        else:
            assert ours == pytest.approx(theirs, rel=RELATIVE_TOLERANCE, abs=1e-7), name


def test_gradients_agree(run_file: Path) -> None:
    run = replay(run_file)
    stored = {n.removeprefix("grad/"): g for n, g in run.golden.items() if n.startswith("grad/")}
    if not stored:
        pytest.skip("the run stores no gradients")
    if np.isnan(run.golden.get("loss_total_weighted", 0.0)):
        found = [gradient for gradient in run.gradients.values() if gradient is not None]
        assert found
        assert all(gradient.isfinite().all() for gradient in found)
        pytest.skip(
            "the official loss of this run is not a number, so its gradients are not either"
        )
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in stored.values()))
    wrong = {}
    for name, theirs in stored.items():
        if name.endswith("k_proj.bias"):
            continue  # Softmax cancels these biases: the stored gradients are rounding errors.
        ours = run.gradients[name]
        assert ours is not None, f"{name} has no gradient"
        difference = relative_difference(ours.numpy(), theirs, floor=1e-6 * norm)
        if difference > RELATIVE_TOLERANCE:
            wrong[name] = difference
    assert not wrong, f"relative to the largest entry of each: {wrong}"


def test_global_gradient_norm_agrees(run_file: Path) -> None:
    run = replay(run_file)
    theirs = float(run.golden.get("grad_global_norm", np.nan))
    if np.isnan(theirs):
        pytest.skip("the run stores no gradient norm")
    squares = [float(g.double().square().sum()) for g in run.gradients.values() if g is not None]
    assert np.sqrt(sum(squares)) == pytest.approx(theirs, rel=RELATIVE_TOLERANCE)


def test_only_parameters_without_official_gradient_have_none_here(run_file: Path) -> None:
    run = replay(run_file)
    if "params_without_grad" not in run.golden:
        pytest.skip("the run does not say which parameters have no gradient")
    without = {name for name, gradient in run.gradients.items() if gradient is None}
    assert without == {str(name) for name in run.golden["params_without_grad"]}


def relative_difference(
    ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any], floor: float = 1e-12
) -> float:
    """Largest difference over the largest entry; infinite if infinities or NaN do not agree."""
    assert ours.shape == theirs.shape, f"shape {ours.shape}, expected {theirs.shape}"
    finite = np.isfinite(theirs)
    if not np.array_equal(
        np.where(finite, 0.0, ours), np.where(finite, 0.0, theirs), equal_nan=True
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = max(float(np.abs(theirs[finite]).max()), floor)
    return float(np.abs(ours[finite] - theirs[finite]).max()) / scale


def comparable(run: Replay) -> Iterator[tuple[str, Any, Any]]:
    """Name, our values and theirs of each floating-point array, without entries of padding."""
    atoms, pairs = run.real_atoms, run.real_pairs
    tokens = np.pad(atoms, ((0, 0), (1, 0)), constant_values=True)
    for name, theirs in run.golden.items():
        if name in BY_TOKEN or is_layer_output(name):
            place: Any = tokens
        elif name in BY_ATOM:
            place = atoms
        elif name in BY_PAIR:
            place = pairs
        elif name in BY_HEAD_PAIR:
            place, theirs = pairs, theirs.transpose(0, 2, 3, 1)
        elif name in BY_HEAD_QUERY:
            place, theirs = (atoms if name == "bias_3d" else tokens), theirs.transpose(0, 2, 3, 1)
        else:
            continue
        ours = run.tensors[name].numpy()
        if name in BY_HEAD_PAIR | BY_HEAD_QUERY:
            ours = ours.transpose(0, 2, 3, 1)
        yield name, ours[place], theirs[place]


def official_batch(batch: MoleculeBatch) -> dict[str, np.ndarray[Any, Any]]:
    """Our batch in the integer conventions of the official collator."""
    atoms, pairs = batch.atom_mask.numpy(), batch.pair_mask.numpy()
    B, N = atoms.shape
    features = batch.atom_features.numpy().astype(np.int64)
    degree = np.where(atoms, batch.degrees.numpy().astype(np.int64) + 1, 0)
    spd = batch.spd.numpy().astype(np.int64)
    codes = batch.path_codes.numpy().astype(np.int64)
    hops = bond_attributes(codes) + 3 + 512 * np.arange(3)
    hops = np.where((codes > 0)[..., None], hops, 0)
    element = np.stack(
        [
            np.broadcast_to(features[:, :, None, 0] + 3, (B, N, N)),
            np.broadcast_to(features[:, None, :, 0] + 3 + 512, (B, N, N)),
        ],
        -1,
    )
    bias = np.zeros((B, N + 1, N + 1), np.float32)
    bias[:, :, 1:] = np.where(atoms, 0.0, -np.inf)[:, None, :]
    return {
        "batch/x": np.where(atoms[..., None], features + 2 + 512 * np.arange(9), 0),
        "batch/in_degree": degree,
        "batch/out_degree": degree,
        "batch/spatial_pos": np.where(pairs, np.where(spd == UNREACHABLE, 511, spd + 1), 0),
        "batch/edge_input": hops,
        "batch/attn_edge_type": np.where((spd == 1)[..., None], bonded_attributes(codes), 0),
        "batch/node_type_edge": np.where(pairs[..., None], element, np.array([1, 513])),
        "batch/attn_bias": bias,
        "batch/pos": batch.positions.numpy(),
    }


def bond_attributes(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(type, stereo, conjugated) of path codes ``1 + (type * 6 + stereo) * 2 + conjugated``."""
    index = np.maximum(codes - 1, 0)
    return np.stack([index // 12, index // 2 % 6, index % 2], -1)


def bonded_attributes(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if codes.shape[-1] == 0:
        return np.zeros((*codes.shape[:-1], 3), np.int64)
    return bond_attributes(codes[..., 0]) + 2 + 512 * np.arange(3)


def targets(run: Replay) -> dict[str, np.ndarray[Any, Any]]:
    classes = run.golden["logits_spd"].shape[-1] if "logits_spd" in run.golden else 11
    edge = edge_targets(run.batch, PAPER_LOSS).numpy()
    if "target_edge" in run.golden:
        # The targets of a run may have 5 hops even if its batch has fewer.
        missing = run.golden["target_edge"].shape[-1] - edge.shape[-1]
        edge = np.pad(edge, ((0, 0),) * 3 + ((0, missing),), constant_values=IGNORE)
    return {
        "target_spd": spd_targets(run.batch, classes).numpy(),
        "target_edge": edge,
        "target_3d": pair_displacement(run.batch).numpy(),
        "mask_3d_ignored": ~has_direction(run.batch).numpy(),
    }
