"""A second, independent computation of the pretraining objective, slow and plain.

It takes one molecule at a time, in float64, without padding or packing, and writes out every outer product. It knows
only the names and table rows of the official parameters.

Shape legend: n atoms of the molecule, t = n + 1 tokens (graph token first), H heads, D width, K kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from molecule_zoo import ZooMolecule
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Parameters = dict[str, Tensor]
ENCODER = "encoder.molecule_encoder."
FAR = 510


@dataclass
class Choice:
    """The random choices for one molecule."""

    pair: NDArray[np.int64]
    atom: NDArray[np.int64]
    noise: NDArray[np.float64]


@dataclass
class Oracle:
    """Predictions for each molecule, and the losses of the batch."""

    states: list[Tensor] = field(default_factory=list)
    spd: list[Tensor] = field(default_factory=list)
    edge: list[Tensor] = field(default_factory=list)
    direction: list[Tensor] = field(default_factory=list)
    noise: list[Tensor] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)
    total: Tensor = field(default_factory=lambda: torch.zeros(()))


def official_parameters(
    *, layers: int, dim: int, ffn: int, heads: int, kernels: int, pair: int, seed: int
) -> Parameters:
    """Random parameters of every official name. Padding rows are not zero, so that wrong use of them shows."""
    shapes: dict[str, tuple[int, ...]] = {
        "atom_feature.atom_encoder.weight": (4609, dim),
        "atom_feature.in_degree_encoder.weight": (512, dim),
        "atom_feature.out_degree_encoder.weight": (512, dim),
        "atom_feature.graph_token.weight": (1, dim),
        "molecule_attn_bias.edge_encoder.weight": (1537, heads),
        "molecule_attn_bias.edge_dis_encoder.weight": (40 * heads * heads, 1),
        "molecule_attn_bias.spatial_pos_encoder.weight": (512, heads),
        "molecule_attn_bias.graph_token_virtual_distance.weight": (1, heads),
        "molecule_3d_bias.gbf.means.weight": (1, kernels),
        "molecule_3d_bias.gbf.stds.weight": (1, kernels),
        "molecule_3d_bias.gbf.mul.weight": (1536, 1),
        "molecule_3d_bias.gbf.bias.weight": (1536, 1),
        **_linear("molecule_3d_bias.gbf_proj.layer1", kernels, kernels),
        **_linear("molecule_3d_bias.gbf_proj.layer2", heads, kernels),
        **_linear("molecule_3d_bias.edge_proj", dim, kernels),
        **_norm("emb_layer_norm", dim),
    }
    for part in ("q_proj", "k_proj", "v_proj"):
        shapes |= _linear(f"atom_proc.{part}", dim, dim)
    for axis in (1, 2, 3):
        shapes |= _linear(f"atom_proc.force_proj{axis}", 1, dim)
        shapes |= _linear(f"blend_3d_pred_head.force_proj{axis}", 1, 20)
    for layer in range(layers):
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"layers.{layer}.self_attn.{part}", dim, dim)
        shapes |= _norm(f"layers.{layer}.self_attn_layer_norm", dim)
        shapes |= _linear(f"layers.{layer}.fc1", ffn, dim) | _linear(
            f"layers.{layer}.fc2", dim, ffn
        )
        shapes |= _norm(f"layers.{layer}.final_layer_norm", dim)
    outputs = {"spd": ("linear", 11), "edge": ("linear_map_feature", 120), "3d": ("linear", 20)}
    for head, (last, size) in outputs.items():
        for side in ("row", "column"):
            vectors = f"blend_{head}_pred_head.transform_n2_head.{side}"
            shapes |= _linear(f"{vectors}_head", pair, dim) | _norm(f"{vectors}_LayerNorm", pair)
        shapes |= _linear(f"blend_{head}_pred_head.{last}", size, pair * pair)
    generator = torch.Generator().manual_seed(seed)
    return {
        **{ENCODER + name: _draw(name, shape, generator) for name, shape in shapes.items()},
        "encoder.embed_out.weight": torch.zeros(1, dim, dtype=torch.float64, requires_grad=True),
    }


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name.endswith(("means.weight", "stds.weight")):
        value = 0.3 + value.abs()
    elif len(shape) == 2 and shape[0] < 400:
        value = value / shape[1] ** 0.5
    elif "orm.weight" in name:
        value = 1.0 + 0.1 * value
    else:
        value = 0.4 * value
    return value.requires_grad_()


def run_oracle(
    parameters: Parameters,
    molecules: Sequence[ZooMolecule],
    choices: Sequence[Choice],
    missing_positions: str,
    num_hops: int = 5,
) -> Oracle:
    """Forward pass and losses; ``missing_positions`` as in ``ModelConfig``, paths cut to ``num_hops``."""
    P = {name.removeprefix(ENCODER): value for name, value in parameters.items()}
    result = Oracle()
    spd_terms: list[Tensor] = []
    edge_terms: list[Tensor] = []
    direction_means: list[Tensor] = []
    noise_terms: list[Tensor] = []
    for molecule, choice in zip(molecules, choices, strict=True):
        predictions = _predict(P, molecule, choice, missing_positions, num_hops)
        _, spd, edge, direction, noise = predictions
        for name, value in zip(
            ("states", "spd", "edge", "direction", "noise"), predictions, strict=True
        ):
            getattr(result, name).append(value)
        distance, paths = shortest_paths(molecule)
        clean = torch.from_numpy(np.nan_to_num(molecule.positions).astype(np.float64))
        pair_terms = []
        for a in range(molecule.num_atoms):
            if molecule.position_mask[a] and choice.atom[a] == 1:
                noise_terms.append(1 - _cosine(noise[a], torch.from_numpy(choice.noise[a])))
            for b in range(molecule.num_atoms):
                if 0 < distance[a, b] < FAR:
                    target = min(int(distance[a, b]), 11) - 1
                    spd_terms.append(-torch.log_softmax(spd[a, b], -1)[target])
                for hop, bond in enumerate(paths[a][b][:num_hops]):
                    kind, stereo, conjugated = (int(code) for code in molecule.bond_features[bond])
                    if kind < 4 and stereo < 3:
                        target = 6 * kind + 2 * stereo + conjugated
                        edge_terms.append(-torch.log_softmax(edge[a, b, hop], -1)[target])
                known = molecule.position_mask[a] and molecule.position_mask[b]
                if known and (clean[a] != clean[b]).any():
                    pair_terms.append(1 - _cosine(direction[a, b], clean[b] - clean[a]))
        if pair_terms:
            direction_means.append(torch.stack(pair_terms).mean())
    terms = {
        "spd": spd_terms,
        "edge": edge_terms,
        "direction": direction_means,
        "denoise": noise_terms,
    }
    nothing = torch.stack([value.sum() for value in P.values()]).sum() * 0.0
    for name, values in terms.items():
        result.losses[name] = torch.stack(values).mean() if values else nothing
    L = result.losses
    result.total = 6 * L["denoise"] + 0.1 * L["spd"] + 0.1 * L["edge"] + 0.5 * L["direction"]
    return result


def shortest_paths(molecule: ZooMolecule) -> tuple[NDArray[np.int64], list[list[list[int]]]]:
    """Distances and, for each ordered pair, the bonds of the path; ties are broken as in the official code."""
    n = molecule.num_atoms
    distance = np.full((n, n), FAR)
    bond_of: dict[tuple[int, int], int] = {}
    for bond, (a, b) in enumerate(molecule.bonds.astype(int)):
        distance[a, b] = distance[b, a] = 1
        bond_of[a, b] = bond_of[b, a] = bond
    np.fill_diagonal(distance, 0)
    through: dict[tuple[int, int], int] = {}
    for k in range(n):
        for a in range(n):
            for b in range(n):
                if distance[a, k] + distance[k, b] < distance[a, b]:
                    distance[a, b] = distance[a, k] + distance[k, b]
                    through[a, b] = k

    def walk(a: int, b: int) -> list[int]:
        if a == b or distance[a, b] >= FAR:
            return []
        if (a, b) not in through:
            return [bond_of[a, b]]
        return walk(a, through[a, b]) + walk(through[a, b], b)

    return distance, [[walk(a, b) for b in range(n)] for a in range(n)]


def _predict(
    P: Parameters, molecule: ZooMolecule, choice: Choice, missing: str, num_hops: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = molecule.num_atoms
    distance, paths = shortest_paths(molecule)
    clean = np.where(molecule.position_mask[:, None], molecule.positions, 0.0).astype(np.float64)
    noise = np.where(molecule.position_mask[:, None], choice.noise, 0.0)
    position = torch.from_numpy(clean + noise)
    takes_part = np.ones(n, bool) if missing == "origin" else molecule.position_mask
    kernels, displacement = _kernels(P, molecule, position)
    H = P["molecule_attn_bias.spatial_pos_encoder.weight"].shape[1]
    bias = torch.zeros(n + 1, n + 1, H, dtype=torch.float64)
    virtual = P["molecule_attn_bias.graph_token_virtual_distance.weight"][0]
    rows = [[torch.zeros_like(virtual)] * (n + 1) for _ in range(n + 1)]
    shown = np.outer(takes_part, takes_part)
    for a in range(n + 1):
        rows[a][0] = virtual
        rows[0][a] = virtual
    for a in range(n):
        for b in range(n):
            if choice.pair[a, b] == 0:
                row = min(int(distance[a, b]), FAR) + 1
                rows[a + 1][b + 1] = P["molecule_attn_bias.spatial_pos_encoder.weight"][row]
            elif choice.pair[a, b] == 1:
                length = min(max(int(distance[a, b]), 1), 5)
                rows[a + 1][b + 1] = _path_bias(P, molecule, paths[a][b], num_hops) / length
            elif shown[a, b]:
                hidden = F.gelu(_apply(P, "molecule_3d_bias.gbf_proj.layer1", kernels[a, b]))
                rows[a + 1][b + 1] = _apply(P, "molecule_3d_bias.gbf_proj.layer2", hidden)
    bias = torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)
    atoms = []
    for a in range(n):
        codes = molecule.atom_features[a].astype(int) + 2 + 512 * np.arange(9)
        state = P["atom_feature.atom_encoder.weight"][codes].sum(0)
        if choice.atom[a] == 0:
            degree = int((distance[a] == 1).sum()) + 1
            state = state + P["atom_feature.in_degree_encoder.weight"][degree]
            state = state + P["atom_feature.out_degree_encoder.weight"][degree]
        elif takes_part[a]:
            total = kernels[a][torch.from_numpy(takes_part)].sum(0)
            state = state + 0.01 * _apply(P, "molecule_3d_bias.edge_proj", total)
        atoms.append(state)
    states = torch.stack([P["atom_feature.graph_token.weight"][0], *atoms])
    states = _layer_norm(P, "emb_layer_norm", states)
    for layer in range(1 + max(int(k.split(".")[1]) for k in P if k.startswith("layers."))):
        states = _block(P, f"layers.{layer}.", states, bias)
    masked = displacement * torch.from_numpy(shown)[..., None]
    return (
        states,
        _pair_head(P, "blend_spd_pred_head", states[1:], "linear"),
        _pair_head(P, "blend_edge_pred_head", states[1:], "linear_map_feature").view(n, n, 5, 24),
        _direction_head(P, states[1:]),
        _noise_head(P, states[1:], bias[:, 1:, 1:], masked),
    )


def _kernels(P: Parameters, molecule: ZooMolecule, position: Tensor) -> tuple[Tensor, Tensor]:
    n = molecule.num_atoms
    element = torch.from_numpy(molecule.atom_features[:, 0].astype(np.int64))
    delta = position[None, :] - position[:, None]
    distance = delta.norm(dim=-1)
    value = torch.zeros(n, n, dtype=torch.float64)
    mul, shift = (P[f"molecule_3d_bias.gbf.{name}.weight"][:, 0] for name in ("mul", "bias"))
    first, second = (element + 3)[:, None], (element + 3 + 512)[None, :]
    value = (mul[first] + mul[second]) * distance + shift[first] + shift[second]
    width = P["molecule_3d_bias.gbf.stds.weight"][0].abs() + 0.01
    z = (value[..., None] - P["molecule_3d_bias.gbf.means.weight"][0]) / width
    kernels = torch.exp(-z * z / 2) / (math.sqrt(2 * 3.14159) * width)
    return kernels, delta / (distance[..., None] + 1e-5)


def _path_bias(P: Parameters, molecule: ZooMolecule, path: list[int], num_hops: int) -> Tensor:
    table = P["molecule_attn_bias.edge_encoder.weight"]
    H = table.shape[1]
    matrices = P["molecule_attn_bias.edge_dis_encoder.weight"].view(-1, H, H)
    total = torch.zeros(H, dtype=torch.float64)
    for hop in range(num_hops):
        # The padding row has a value but no gradient, as in an embedding with padding_idx.
        embedding = table[0].detach()
        if hop < len(path):
            codes = molecule.bond_features[path[hop]].astype(int) + 3 + 512 * np.arange(3)
            embedding = table[codes].mean(0)
        total = total + embedding @ matrices[hop]
    return total


def _block(P: Parameters, name: str, states: Tensor, bias: Tensor) -> Tensor:
    H = bias.shape[0]
    attended = _attention_values(P, name + "self_attn.", states, bias)
    mixed = attended[1].permute(1, 0, 2).reshape(len(states), -1)
    assert mixed.shape[1] % H == 0
    mixed = _apply(P, name + "self_attn.out_proj", mixed)
    states = _layer_norm(P, name + "self_attn_layer_norm", states + mixed)
    hidden = _apply(P, name + "fc2", F.gelu(_apply(P, name + "fc1", states)))
    return _layer_norm(P, name + "final_layer_norm", states + hidden)


def _attention_values(
    P: Parameters, name: str, states: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    H = bias.shape[0]
    q, k, v = (
        _apply(P, f"{name}{part}_proj", states).view(len(states), H, -1).permute(1, 0, 2)
        for part in "qkv"
    )
    probability = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + bias, dim=-1)
    return probability, probability @ v, v


def _noise_head(P: Parameters, atoms: Tensor, bias: Tensor, displacement: Tensor) -> Tensor:
    probability, _, value = _attention_values(P, "atom_proc.", atoms, bias)
    axes = []
    for axis in range(3):
        moved = (probability * displacement[..., axis]) @ value
        flat = moved.permute(1, 0, 2).reshape(len(atoms), -1)
        axes.append(_apply(P, f"atom_proc.force_proj{axis + 1}", flat)[:, 0])
    return torch.stack(axes, -1)


def _outer(P: Parameters, head: str, atoms: Tensor) -> Tensor:
    row, column = (
        _layer_norm(
            P,
            f"{head}.transform_n2_head.{side}_LayerNorm",
            F.gelu(_apply(P, f"{head}.transform_n2_head.{side}_head", atoms)),
            eps=1e-12,
        )
        for side in ("row", "column")
    )
    return (row[:, None, :, None] * column[None, :, None, :]).flatten(2)


def _pair_head(P: Parameters, head: str, atoms: Tensor, last: str) -> Tensor:
    return _apply(P, f"{head}.{last}", _outer(P, head, atoms))


def _direction_head(P: Parameters, atoms: Tensor) -> Tensor:
    hidden = _pair_head(P, "blend_3d_pred_head", atoms, "linear")
    axes = [_apply(P, f"blend_3d_pred_head.force_proj{axis}", hidden) for axis in (1, 2, 3)]
    return torch.cat(axes, -1)


def _apply(P: Parameters, name: str, value: Tensor) -> Tensor:
    return F.linear(value, P[f"{name}.weight"], P[f"{name}.bias"])


def _layer_norm(P: Parameters, name: str, value: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(value, value.shape[-1:], P[f"{name}.weight"], P[f"{name}.bias"], eps)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    cosine: Tensor = (a @ b) / (a.norm() * b.norm()).clamp(min=1e-16)
    return cosine
