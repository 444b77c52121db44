"""The assembled models: pretraining (encoder and relation heads) and property prediction.

Shape legend: B molecules, N atoms (padded), T = N + 1 tokens, S real tokens packed, H heads, D width.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moleblend_ray.errors import ConfigError
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.model.blending import Blend, only_geometry
from moleblend_ray.model.config import ModelConfig, ReadoutConfig
from moleblend_ray.model.denoising import DenoisingHead
from moleblend_ray.model.encoder import Encoder, EncoderOutput
from moleblend_ray.model.heads import (
    PairForm,
    PairHead,
    PropertyHead,
    map_together,
    predict_classes,
)
from moleblend_ray.model.initialization import allocate, fill_constants, init_weights
from moleblend_ray.model.origin import Origin
from moleblend_ray.model.precision import at_least_float32
from moleblend_ray.vocabulary import (
    ATOM_FEATURE_NAMES,
    ATOM_VOCAB_SIZES,
    NUM_DESCRIPTORS,
    NUM_HOPS,
)

__all__ = ["ModelConfig", "MoleBlendModel", "MoleBlendOutput", "PropertyModel", "ReadoutConfig"]

NUM_ELEMENTS: Final = ATOM_VOCAB_SIZES[0]
"""Codes of the first atom category, the element."""

HYDROGEN: Final = 0
"""Code of hydrogen."""

NUM_HYDROGENS_COLUMN: Final = ATOM_FEATURE_NAMES.index("num_hydrogens")
"""Atom category with the number of an atom's hydrogens that are not atoms of the molecule themselves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoleBlendOutput:
    """Predictions for every atom pair and atom; entries of padding are undefined."""

    tokens: Tensor
    """(S, D) packed token states of the last block."""
    spd: Tensor | PairForm
    """Predicted shortest paths, as :attr:`spd_logits` or in the form that the loss takes on a GPU."""
    edge: Tensor | PairForm
    """Predicted bonds of paths, likewise."""
    direction: Tensor | None
    """(B, N, N, 3), parallel to position b - position a; None without the head."""
    distance: Tensor | None
    """(B, N, N), angstrom; None without the head."""
    noise: Tensor
    """(B, N, 3), parallel to the noise on an atom."""
    environments: Tensor | None
    """(B, bins), log(1 + count) of each bin of atom environments; None without the head."""
    descriptors: Tensor | None
    """(B, ``vocabulary.NUM_DESCRIPTORS``), in standard deviations of the data set; None without the head."""

    @property
    def spd_logits(self) -> Tensor:
        """(B, N, N, classes): class c is a path of c + 1 bonds; the last class includes all longer ones."""
        return self.spd.logits() if isinstance(self.spd, PairForm) else self.spd

    @property
    def edge_logits(self) -> Tensor:
        """(B, N, N, 5, classes) for each hop of the path from atom a to atom b."""
        return self.edge.logits() if isinstance(self.edge, PairForm) else self.edge


class MoleBlendModel(nn.Module):
    """Encoder and the heads that predict every relation of every atom pair."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.origin: Origin | None = None
        """Where the weights come from; None for new ones."""
        device = torch.get_default_device()
        # Without memory first: otherwise each module would draw weights, only to have them drawn again.
        with torch.device("meta"):
            self.encoder = Encoder(config)
            self.spd_head = PairHead(config, (config.num_spd_classes,))
            self.edge_head = PairHead(config, (NUM_HOPS, config.num_edge_classes))
            self.direction_head = PairHead(config, (3,)) if config.direction_head else None
            self.distance_head = PairHead(config, ()) if config.distance_head else None
            self.denoising_head = DenoisingHead(config)
            # Linear, so that the graph token itself must hold the targets.
            self.environment_head = (
                nn.Linear(config.dim, config.environment_bins) if config.environment_head else None
            )
            self.descriptor_head = (
                nn.Linear(config.dim, NUM_DESCRIPTORS) if config.descriptor_head else None
            )
        if device.type != "meta":
            allocate(self, device)
            self.init_weights()

    @classmethod
    def without_weights(cls, config: ModelConfig) -> MoleBlendModel:
        """A float32 model on the CPU, whatever PyTorch's defaults are, whose weights are still to be loaded: its memory holds
        anything."""
        with torch.device("meta"):
            model = cls(config).float()
        allocate(model, torch.device("cpu"))
        fill_constants(model)
        return model

    @classmethod
    def from_pretrained(cls, uri: str | os.PathLike[str]) -> MoleBlendModel:
        """Load the model at ``uri``, on the CPU and in evaluation mode.

        ``uri`` is the path or URI of a directory with ``model.safetensors`` and ``config.json``, or of a file of
        official parameters.
        """
        from moleblend_ray.model import hub  # it needs this class

        return hub.from_pretrained(os.fspath(uri))

    def save_pretrained(self, uri: str | os.PathLike[str]) -> None:
        """Write the weights and the configuration into the directory ``uri``, also over another model.

        ConfigError if it holds a run, results or a fine-tuned model.
        """
        from moleblend_ray.model import hub  # it needs this class

        hub.save_pretrained(self, os.fspath(uri))

    def init_weights(self) -> None:
        """Draw new weights, with a seed from PyTorch's generator; for models of the meta device, after ``to_empty``."""
        init_weights(self)

    def forward(self, batch: MoleculeBatch, blend: Blend | None = None) -> MoleBlendOutput:
        """Predict all relations from those that ``blend`` shows; None: from all of them, without noise."""
        encoded: EncoderOutput = self.encoder(batch, blend)
        atoms = encoded.tokens.index_select(0, batch.atom_token)
        spd, edge, direction, distance = self._pair_predictions(atoms, batch)
        has_graph_head = self.environment_head is not None or self.descriptor_head is not None
        graphs = _graph_states(encoded, batch) if has_graph_head else None
        return MoleBlendOutput(
            tokens=encoded.tokens,
            spd=spd,
            edge=edge,
            direction=direction,
            distance=distance,
            noise=self.denoising_head(
                atoms, encoded.bias, encoded.displacement, batch, encoded.shared_bias
            ),
            environments=None if self.environment_head is None else self.environment_head(graphs),
            descriptors=None if self.descriptor_head is None else self.descriptor_head(graphs),
        )

    def _pair_predictions(
        self, atoms: Tensor, batch: MoleculeBatch
    ) -> tuple[Tensor | PairForm, Tensor | PairForm, Tensor | None, Tensor | None]:
        """What the heads of paths, bonds, directions and distances predict; None for those that the model does not have."""
        heads = [self.spd_head, self.edge_head, self.direction_head, self.distance_head]
        maps = [one for head in heads if head is not None for one in (head.row, head.column)]
        mapped = iter(map_together(atoms, maps))
        spd, edge = (
            predict_classes(head, next(mapped), next(mapped), batch)
            for head in (self.spd_head, self.edge_head)
        )
        direction, distance = (
            None if head is None else head(next(mapped), next(mapped), batch)
            for head in (self.direction_head, self.distance_head)
        )
        return spd, edge, direction, distance

    def embed(self, batch: MoleculeBatch, blend: Blend | None = None) -> Tensor:
        """(B, D) state of each molecule's graph token, of the relations that ``blend`` shows; None: of all of them."""
        encoded: EncoderOutput = self.encoder(batch, blend)
        return _graph_states(encoded, batch)


class PropertyModel(nn.Module):
    """The encoder of a pretrained model and a new property head; if asked for, the mean of it and a linear model of
    descriptors."""

    linear_share: Tensor
    """(num_targets,), share of the linear model of descriptors in each output, if there is one."""
    reference: Tensor
    """(119, num_targets), what an atom of each element adds to the outputs; 0 unless set."""

    def __init__(
        self,
        pretrained: MoleBlendModel,
        num_targets: int,
        readout: ReadoutConfig | None = None,
        *,
        num_descriptors: int = 0,
    ) -> None:
        super().__init__()
        if num_targets < 1:
            raise ConfigError(f"num_targets: expected at least 1, found {num_targets}")
        self.config = pretrained.config
        self.readout = readout or ReadoutConfig()
        self.num_targets = num_targets
        self.encoder = pretrained.encoder
        width = self.config.dim * (2 if self.readout.readout == "token+mean" else 1)
        self.head = PropertyHead(width, num_targets, self.readout.dropout)
        self.register_buffer("reference", torch.zeros(NUM_ELEMENTS, num_targets))
        init_weights(self.head)
        self.linear = nn.Linear(num_descriptors, num_targets) if num_descriptors else None
        if self.linear is not None:
            # Fitted beforehand, and not by the gradients of this model.
            self.linear.requires_grad_(False)
            self.register_buffer("linear_share", torch.zeros(num_targets))

    def set_linear(self, weight: Tensor, bias: Tensor, share: Tensor) -> None:
        """Set the linear model of descriptors, and its share (num_targets,) in each output, 0 to 1.

        ``weight`` is (num_targets, num_descriptors), ``bias`` (num_targets,).
        """
        assert self.linear is not None
        self.linear.weight.copy_(weight)
        self.linear.bias.copy_(bias)
        self.linear_share.copy_(share)

    def forward(self, batch: MoleculeBatch, descriptors: Tensor | None = None) -> Tensor:
        """(B, num_targets) predictions: values for regression, logits for classification.

        With ``descriptors`` (B, num_descriptors), scaled, they are weighted means of those of the encoder and of the linear
        model. In training, without them, they are those of the encoder alone. ConfigError in evaluation mode if a model
        that reads descriptors gets none.
        """
        if descriptors is None and self.linear is not None and not self.training:
            raise ConfigError(
                f"this model predicts from {self.linear.in_features} descriptors of each molecule, and got none; pass them as "
                "descriptors, or let PropertyPredictor compute them"
            )
        if self.readout.relations == "2d":
            batch = batch.without_coordinates()
        blend = only_geometry(batch) if self.readout.relations == "3d" else None
        encoded: EncoderOutput = self.encoder(batch, blend)
        output = at_least_float32(self._read(encoded, batch))
        # Never in bfloat16: these are large sums that nearly cancel.
        with torch.autocast(self.reference.device.type, enabled=False):
            known = element_counts(batch).to(self.reference.dtype) @ self.reference
            if descriptors is not None:
                assert self.linear is not None
                output = torch.lerp(output, self.linear(descriptors), self.linear_share)
            return output + known

    def _read(self, encoded: EncoderOutput, batch: MoleculeBatch) -> Tensor:
        if self.readout.readout == "token":
            output: Tensor = self.head(_graph_states(encoded, batch))
            return output
        atoms = encoded.tokens.index_select(0, batch.atom_token)
        if self.readout.readout == "sum":
            return batch.sum_atoms(self.head(atoms))
        mean = batch.sum_atoms(atoms) / batch.num_atoms[:, None]
        if self.readout.readout == "mean":
            output = self.head(mean)
        else:
            output = self.head(torch.cat([_graph_states(encoded, batch), mean], dim=1))
        return output


def element_counts(batch: MoleculeBatch) -> Tensor:
    """(B, 119) float32: number of atoms of each element code, including hydrogens that are not atoms of the graph."""
    features = batch.pack_atoms(batch.atom_features)
    atoms = F.one_hot(features[:, 0].long(), NUM_ELEMENTS).float()
    atoms[:, HYDROGEN] += features[:, NUM_HYDROGENS_COLUMN]
    return batch.sum_atoms(atoms)


def _graph_states(encoded: EncoderOutput, batch: MoleculeBatch) -> Tensor:
    return encoded.tokens.index_select(0, batch.graph_token)
