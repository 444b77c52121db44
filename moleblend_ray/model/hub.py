"""Trained models as two files at any URI, and the import of official parameters.

``model.safetensors`` holds the weights, ``config.json`` the ``ModelConfig`` they belong to and the ``Origin`` they come from.

Shape legend: H heads, D width, K Gaussian kernels, P width of a pair head's vectors.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from moleblend_ray.data.files import storage
from moleblend_ray.errors import CheckpointError, ConfigError, without_credentials
from moleblend_ray.model.config import NUM_PAPER_EDGE_CLASSES, ModelConfig
from moleblend_ray.model.embeddings import NUM_DEGREES
from moleblend_ray.model.moleblend import MoleBlendModel
from moleblend_ray.model.origin import Origin
from moleblend_ray.vocabulary import (
    ATOM_VOCAB_SIZES,
    BOND_VOCAB_SIZES,
    MAX_SPD,
    NUM_HOPS,
)

logger = logging.getLogger(__name__)

WEIGHTS_NAME: Final = "model.safetensors"
CONFIG_NAME: Final = "config.json"
PROPERTY_NAME: Final = "property.json"
"""What a fine-tuned model has in place of a configuration."""

FORMAT_VERSION: Final = 1
"""Increased with every change that older code could not read."""


def save_pretrained(model: MoleBlendModel, uri: str) -> None:
    """Write the weights, the configuration and the origin of ``model`` into the directory ``uri``, also over another model.

    ConfigError if it holds a run, results or a fine-tuned model, whose files have these names.
    """
    _refuse_what_commands_made(uri)
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    # The configuration, also of a model that was there before, goes first and comes last: a directory that has one is complete.
    storage.delete(storage.join(uri, CONFIG_NAME))
    storage.write_bytes(storage.join(uri, WEIGHTS_NAME), safetensors.torch.save(tensors))
    document = {
        "format_version": FORMAT_VERSION,
        "model": dataclasses.asdict(model.config),
        **({} if model.origin is None else {"origin": model.origin.to_json()}),
    }
    storage.write_json(storage.join(uri, CONFIG_NAME), document)


def _refuse_what_commands_made(uri: str) -> None:
    """Raise ConfigError if ``uri`` has a configuration that is not of a pretrained model."""
    note = storage.join(uri, CONFIG_NAME)
    if storage.exists(storage.join(uri, PROPERTY_NAME)) or (
        storage.exists(note) and not _is_model_config(storage.read_json(note))
    ):
        raise ConfigError(
            f"{uri} holds a run, results or a fine-tuned model, which would be lost. Save the model to a folder of its own"
        )


def _is_model_config(document: Any) -> bool:
    return isinstance(document, dict) and isinstance(document.get("format_version"), int)


def from_pretrained(uri: str) -> MoleBlendModel:
    """The model of a directory that ``save_pretrained`` wrote, or of a file of official parameters (.pt, .npz).

    On the CPU, in evaluation mode.
    """
    if uri.endswith((".pt", ".npz")):
        config, state = import_official(_read_official(uri))
        origin: Origin | None = Origin(uri=without_credentials(uri))
    else:
        config, origin = _read_config(storage.join(uri, CONFIG_NAME))
        state = _read_weights(storage.join(uri, WEIGHTS_NAME))
    model = MoleBlendModel.without_weights(config)
    model.origin = origin
    expected, found = set(model.state_dict()), set(state)
    if expected != found:
        raise CheckpointError(
            f"The weights at {uri} do not belong to their configuration: missing {sorted(expected - found)[:5]}, "
            f"unexpected {sorted(found - expected)[:5]}."
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"The weights at {uri} do not belong to their configuration: {error}"
        ) from error
    return model.eval()


def import_official(
    parameters: Mapping[str, npt.NDArray[Any] | Tensor],
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and state of a MoleBlendModel that computes the same as the official parameters.

    Sizes are read from the shapes. The language-model head, which no loss uses, is dropped. Tables keep only the rows
    that occur as codes, and consecutive linear maps become one. All steps are torch operations, so gradients flow back
    to those ``parameters`` that are tensors and require them.
    """
    official = _Official(parameters)
    config = official.config()
    state = {
        **official.embeddings(config),
        **official.geometry(),
        **official.blocks(config),
        **official.heads(),
    }
    official.check_all_used()
    return config, state


class _Official:
    """Official parameters by their names below the encoder, and which of them were used."""

    def __init__(self, parameters: Mapping[str, npt.NDArray[Any] | Tensor]) -> None:
        anchor = "atom_feature.atom_encoder.weight"
        names = [name for name in parameters if name.endswith(anchor)]
        if len(names) != 1:
            raise CheckpointError(
                f"Expected one parameter named ...{anchor} as in the official code, found {len(names)} "
                f"among {len(parameters)} names such as {sorted(parameters)[:3]}."
            )
        prefix = names[0].removesuffix(anchor)
        self._tensors = {
            name.removeprefix(prefix): _as_tensor(value)
            for name, value in parameters.items()
            if name.startswith(prefix)
        }
        self._unused = set(self._tensors)
        dropped = len(parameters) - len(self._tensors)
        logger.info("Dropped %d parameters of the unused language-model head.", dropped)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"The official parameters lack {name}; they are not a MoleBLEND.")
        self._unused.discard(name)
        return self._tensors[name]

    def check_all_used(self) -> None:
        """Raise if a parameter of the encoder has no place in our model."""
        if self._unused:
            raise CheckpointError(
                f"The official parameters {sorted(self._unused)[:5]} have no place in this model."
            )

    def config(self) -> ModelConfig:
        """The sizes, read from the shapes. Dropout rates are not stored: they are our defaults, the paper's."""
        kernels = self["molecule_3d_bias.gbf.means.weight"].shape[1]
        edge_outputs = self["blend_edge_pred_head.linear_map_feature.weight"].shape[0]
        if edge_outputs != NUM_HOPS * NUM_PAPER_EDGE_CLASSES:
            raise CheckpointError(
                f"The edge head has {edge_outputs} outputs, expected {NUM_HOPS} hops x "
                f"{NUM_PAPER_EDGE_CLASSES} classes."
            )
        try:
            return ModelConfig(
                num_layers=1 + max(self._layer_numbers(), default=-1),
                dim=self["atom_feature.atom_encoder.weight"].shape[1],
                ffn_dim=self["layers.0.fc1.weight"].shape[0],
                num_heads=self["molecule_attn_bias.spatial_pos_encoder.weight"].shape[1],
                num_kernels=kernels,
                pair_dim=self["blend_spd_pred_head.transform_n2_head.row_head.weight"].shape[0],
                num_spd_classes=self["blend_spd_pred_head.linear.weight"].shape[0],
                edge_other_class=False,
                missing_positions="origin",
            )
        except ConfigError as error:
            raise CheckpointError(f"The official parameters make no model: {error}") from error

    def _layer_numbers(self) -> set[int]:
        return {int(name.split(".")[1]) for name in self._tensors if name.startswith("layers.")}

    def embeddings(self, config: ModelConfig) -> dict[str, Tensor]:
        """The rows of each table that occur as codes, numbered as in the official collator (512 for each category)."""
        feature, bias = "atom_feature.", "molecule_attn_bias."
        degree = (
            self[feature + "in_degree_encoder.weight"] + self[feature + "out_degree_encoder.weight"]
        )
        spd, bond = self[bias + "spatial_pos_encoder.weight"], self[bias + "edge_encoder.weight"]
        H = config.num_heads
        hops = self[bias + "edge_dis_encoder.weight"].reshape(-1, H, H)
        return {
            "encoder.atoms.categories.weight": _rows_of_categories(
                self[feature + "atom_encoder.weight"], ATOM_VOCAB_SIZES, first=2
            ),
            "encoder.atoms.degree.weight": degree[1 : NUM_DEGREES + 1],
            "encoder.atoms.graph_token": self[feature + "graph_token.weight"],
            "encoder.topology.spd.weight": torch.cat([spd[1 : MAX_SPD + 2], spd[511:512]]),
            "encoder.topology.bonds.weight": _rows_of_categories(bond, BOND_VOCAB_SIZES, first=3),
            # The padding row of the official table: it has a value but is never trained.
            "encoder.topology.no_hop": bond[0].detach(),
            "encoder.topology.hop_matrices": hops[:NUM_HOPS],
            "encoder.topology.virtual_distance": self[bias + "graph_token_virtual_distance.weight"][
                0
            ],
            **self._same("emb_layer_norm", "encoder.input_norm"),
        }

    def geometry(self) -> dict[str, Tensor]:
        """Gaussian kernels, the layers that read them, and scale and shift of each element on either side of a pair."""
        prefix = "molecule_3d_bias."
        elements = ATOM_VOCAB_SIZES[0]

        def by_side(table: Tensor) -> Tensor:
            return torch.stack([table[3 + side : 3 + side + elements, 0] for side in (0, 512)])

        return {
            "encoder.geometry.gaussian.means": self[prefix + "gbf.means.weight"][0],
            "encoder.geometry.gaussian.widths": self[prefix + "gbf.stds.weight"][0],
            "encoder.geometry.gaussian.scale": by_side(self[prefix + "gbf.mul.weight"]),
            "encoder.geometry.gaussian.shift": by_side(self[prefix + "gbf.bias.weight"]),
            **self._same(prefix + "gbf_proj.layer1", "encoder.geometry.bias_in"),
            **self._same(prefix + "gbf_proj.layer2", "encoder.geometry.bias_out"),
            **self._same(prefix + "edge_proj", "encoder.geometry.merge"),
        }

    def blocks(self, config: ModelConfig) -> dict[str, Tensor]:
        """The Transformer blocks, with query, key and value in one matrix."""
        state: dict[str, Tensor] = {}
        for number in range(config.num_layers):
            theirs, ours = f"layers.{number}.", f"encoder.layers.{number}."
            for kind in ("weight", "bias"):
                parts = [self[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv"]
                state[f"{ours}attention.qkv.{kind}"] = torch.cat(parts)
            state |= self._same(theirs + "self_attn.out_proj", ours + "attention.out")
            state |= self._same(theirs + "self_attn_layer_norm", ours + "attention_norm")
            state |= self._same(theirs + "fc1", ours + "ffn_in")
            state |= self._same(theirs + "fc2", ours + "ffn_out")
            state |= self._same(theirs + "final_layer_norm", ours + "ffn_norm")
        return state

    def heads(self) -> dict[str, Tensor]:
        """Pair heads as bilinear forms; the two linear maps of the direction head become one."""
        force = "blend_3d_pred_head.force_proj"
        axes = torch.cat([self[f"{force}{axis}.weight"] for axis in (1, 2, 3)])
        axis_bias = torch.cat([self[f"{force}{axis}.bias"] for axis in (1, 2, 3)])
        hidden, hidden_bias = (
            self[f"blend_3d_pred_head.linear.{kind}"] for kind in ("weight", "bias")
        )
        denoise = "atom_proc."
        state = {
            **self._pair_head("blend_spd_pred_head", "spd_head", "linear"),
            **self._pair_head("blend_edge_pred_head", "edge_head", "linear_map_feature"),
            **self._pair_vectors("blend_3d_pred_head", "direction_head"),
            "direction_head.weight": _square(axes @ hidden),
            "direction_head.bias": axes @ hidden_bias + axis_bias,
        }
        for kind in ("weight", "bias"):
            parts = [self[f"{denoise}force_proj{axis}.{kind}"] for axis in (1, 2, 3)]
            state[f"denoising_head.axes.{kind}"] = torch.cat(parts)
        for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            state |= self._same(denoise + theirs, f"denoising_head.{ours}")
        return state

    def _pair_head(self, theirs: str, ours: str, linear: str) -> dict[str, Tensor]:
        return {
            **self._pair_vectors(theirs, ours),
            f"{ours}.weight": _square(self[f"{theirs}.{linear}.weight"]),
            f"{ours}.bias": self[f"{theirs}.{linear}.bias"],
        }

    def _pair_vectors(self, theirs: str, ours: str) -> dict[str, Tensor]:
        vectors = theirs + ".transform_n2_head."
        return {
            **self._same(vectors + "row_head", f"{ours}.row"),
            **self._same(vectors + "row_LayerNorm", f"{ours}.row_norm"),
            **self._same(vectors + "column_head", f"{ours}.column"),
            **self._same(vectors + "column_LayerNorm", f"{ours}.column_norm"),
        }

    def _same(self, theirs: str, ours: str) -> dict[str, Tensor]:
        return {f"{ours}.{kind}": self[f"{theirs}.{kind}"] for kind in ("weight", "bias")}


def _as_tensor(value: npt.NDArray[Any] | Tensor) -> Tensor:
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _rows_of_categories(table: Tensor, sizes: tuple[int, ...], first: int) -> Tensor:
    starts = (first + 512 * category for category in range(len(sizes)))
    return torch.cat(
        [table[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    )


def _square(weight: Tensor) -> Tensor:
    """(outputs, P * P) to (outputs, P rows, P columns)."""
    side = round(weight.shape[1] ** 0.5)
    return weight.reshape(-1, side, side)


def _read_config(uri: str) -> tuple[ModelConfig, Origin | None]:
    try:
        document = storage.read_json(uri)
    except storage.NotFoundError as error:
        folder = uri.removesuffix(CONFIG_NAME)
        if storage.exists(storage.join(folder, PROPERTY_NAME)):
            raise CheckpointError(
                f"{folder} is a fine-tuned model, not a pretrained one. In Python, PropertyPredictor.from_pretrained predicts with "
                "it, and MoleculeEncoder.from_pretrained gives the vectors of its encoder"
            ) from error
        raise CheckpointError(
            f"There is no pretrained model at {folder}: it has no {CONFIG_NAME}."
        ) from error
    if not _is_model_config(document):
        raise CheckpointError(
            f"{uri} is not the configuration of a model of this project. If its folder is a pretraining run, "
            "moleblend_ray.load_model takes it; the model itself is in its folder export."
        )
    version = document["format_version"]
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{uri} has format version {version}, this program reads up to {FORMAT_VERSION}: upgrade moleblend-ray."
        )
    try:
        # Models of earlier versions do not say where they come from.
        origin = Origin.from_json(document["origin"]) if "origin" in document else None
        return ModelConfig(**document["model"]), origin
    except (TypeError, KeyError, ConfigError) as error:
        raise CheckpointError(
            f"{uri} does not describe a model of this version: {error}"
        ) from error


def _read_weights(uri: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(storage.read_bytes(uri))
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{uri} is damaged ({error}); export the model again.") from error


def _reason(error: Exception) -> str:
    """The error as text; of PyTorch's on unpickling only what it found, as the rest advises to run the code in the file."""
    found = (
        str(error.__context__ or error) if isinstance(error, pickle.UnpicklingError) else str(error)
    )
    return re.split(r"\.\s|\n", found.strip())[0]


def _read_official(uri: str) -> Mapping[str, npt.NDArray[Any] | Tensor]:
    content = io.BytesIO(storage.read_bytes(uri))
    try:
        if uri.endswith(".npz"):
            with np.load(content, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        # The official files hold the command line in addition to the parameters.
        with torch.serialization.safe_globals([argparse.Namespace]):
            document = torch.load(content, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        ValueError,
        OSError,
        RuntimeError,
        EOFError,
    ) as error:
        raise CheckpointError(
            f"{uri} cannot be read as official parameters ({_reason(error)}). If it is a training checkpoint with "
            "other objects inside, save only its parameters (name -> array) as .npz and give that file."
        ) from error
    parameters = document.get("model", document) if isinstance(document, dict) else None
    if not isinstance(parameters, dict):
        raise CheckpointError(f"{uri} holds no dictionary of parameters.")
    return parameters
