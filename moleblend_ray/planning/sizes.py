"""Sizes that formulas give for a configuration: parameters, checkpoints, traffic between trainers.

Shape legend: D width, F feed-forward width, H heads, K kernels, P pair width, L blocks, E elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from moleblend_ray.model.config import ModelConfig
from moleblend_ray.training.config import Precision, Strategy
from moleblend_ray.vocabulary import (
    ATOM_VOCAB_SIZES,
    BOND_VOCAB_SIZES,
    ELEMENT_SYMBOLS,
    NUM_DESCRIPTORS,
    NUM_HOPS,
)

_NUM_DEGREES: Final = 16
_NUM_SPD_CODES: Final = 256
_TENSORS_OF_A_BLOCK: Final = 12
_TENSORS_OF_A_PAIR_HEAD: Final = 10
_TENSORS_OF_A_GRAPH_HEAD: Final = 2
_OTHER_TENSORS: Final = 27
_SHARDED_STATES: Final = 3
"""Tensors that a checkpoint holds per parameter tensor, each in as many pieces as there are shards: the weights and two
moments. The number of updates is one more tensor, in one piece."""
_PIECE_BYTES: Final = 1800
"""Bytes that a saved piece of a tensor takes besides its numbers: the archive around it, and its entry in the index."""
TRAINING_BYTES: Final = 16
"""Bytes per parameter in training: weight, gradient and two moments in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """How large a model is."""

    parameters: int
    layer_parameters: int
    """Parameters of the blocks, which FSDP gathers twice per step."""
    tensors: int
    """Number of parameter tensors."""


def model_size(config: ModelConfig) -> ModelSize:
    """The exact size of :class:`~moleblend_ray.model.moleblend.MoleBlendModel`, without building it."""
    D, F, H, K, P = (
        config.dim,
        config.ffn_dim,
        config.num_heads,
        config.num_kernels,
        config.pair_dim,
    )
    E, L = len(ELEMENT_SYMBOLS), config.num_layers
    block = 4 * (D * D + D) + 2 * D * F + F + D + 4 * D
    outputs = [config.num_spd_classes, NUM_HOPS * config.num_edge_classes]
    outputs += [3] if config.direction_head else []
    outputs += [1] if config.distance_head else []
    pair_heads = sum(2 * (D * P + P) + 4 * P + number * (P * P + 1) for number in outputs)
    atoms = (sum(ATOM_VOCAB_SIZES) + _NUM_DEGREES + 1) * D
    topology = (_NUM_SPD_CODES + sum(BOND_VOCAB_SIZES) + NUM_HOPS * H + 1) * H
    geometry = 2 * K + 4 * E + (K * K + K) + (K * H + H) + (K * D + D)
    graph_targets = config.environment_bins + NUM_DESCRIPTORS * config.descriptor_head
    heads = pair_heads + 3 * (D * D + D) + 3 * D + 3 + graph_targets * (D + 1)
    return ModelSize(
        parameters=atoms + topology + geometry + 2 * D + L * block + heads,
        layer_parameters=L * block,
        tensors=_OTHER_TENSORS
        + L * _TENSORS_OF_A_BLOCK
        + len(outputs) * _TENSORS_OF_A_PAIR_HEAD
        + (config.environment_head + config.descriptor_head) * _TENSORS_OF_A_GRAPH_HEAD,
    )


def checkpoint_bytes(config: ModelConfig, *, shards: int = 1) -> int:
    """Bytes of all files of a checkpoint that ``shards`` ranks wrote their parts of (1 under ddp).

    The bytes of the numbers are exact; those that the format adds were measured, and are right within 1 %. Tensors with
    fewer rows than ranks have fewer pieces, so with many ranks the result is an upper bound.
    """
    size = model_size(config)
    numbers = 4 * (3 * size.parameters + size.tensors + config.num_heads)
    return numbers + _PIECE_BYTES * size.tensors * (_SHARDED_STATES * shards + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """Bytes that one worker sends per optimizer step."""

    within_bytes: float
    """Bytes to the workers that share its copy of the model."""
    across_bytes: float
    """Bytes to the other copies."""
    messages: int
    """Collective operations, one after the other."""


class Gathered(NamedTuple):
    """Bytes of all parameters of a model as FSDP gathers them."""

    blocks: int
    rest: int


def gathered_bytes(config: ModelConfig, *, precision: Precision, on_gpu: bool) -> Gathered:
    """Blocks are gathered in bfloat16 under bf16 on GPUs, all else in float32."""
    size = model_size(config)
    width = 2 if precision == "bf16" and on_gpu else 4
    return Gathered(
        blocks=width * size.layer_parameters,
        rest=4 * (size.parameters - size.layer_parameters),
    )


def exchange(
    config: ModelConfig,
    workers: int,
    *,
    strategy: Strategy,
    precision: Precision,
    replicas: int = 1,
    reshard: bool = True,
    on_gpu: bool = True,
) -> Exchange:
    """Traffic per step: gathered parameters (bfloat16 under bf16 on GPUs) and reduced gradients (float32; float64 on
    CPUs).

    In an all-gather or a reduce-scatter of n bytes over W workers each worker sends n (W - 1) / W bytes; an all-reduce
    is one of each.
    """
    size = model_size(config)
    if workers == 1 or strategy == "none":
        return Exchange(within_bytes=0.0, across_bytes=0.0, messages=0)
    if strategy == "ddp":
        share = (workers - 1) / workers
        buckets = 1 + 4 * size.parameters // (25 << 20)
        return Exchange(
            within_bytes=0.0, across_bytes=2 * share * 4 * size.parameters, messages=buckets
        )
    shards = workers // replicas
    share = (shards - 1) / shards
    gathered = gathered_bytes(config, precision=precision, on_gpu=on_gpu)
    reduced = (4 if on_gpu else 8) * size.parameters
    # With `reshard`, the blocks are gathered again in the backward pass. The rest stays gathered.
    times = 2 if reshard else 1
    within = share * (times * gathered.blocks + gathered.rest + reduced)
    across = 2 * (replicas - 1) / replicas * 4 * size.parameters / shards
    groups = config.num_layers + 1
    return Exchange(
        within_bytes=within if shards > 1 else 0.0,
        across_bytes=across,
        messages=(1 + times) * groups + (groups if replicas > 1 else 0),
    )
