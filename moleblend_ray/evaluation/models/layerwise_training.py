"""Which parameters of a property model are trained, and how fast: layer-wise learning rates, frozen and fresh blocks.

Layer-wise decay: Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL 2018.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.model.initialization import init_weights
from moleblend_ray.model.moleblend import PropertyModel

_BLOCK: Final = re.compile(r"encoder\.layers\.(\d+)\.")


def depth(name: str, num_blocks: int) -> int:
    """Depth of a parameter: 0 in the embeddings, 1 to ``num_blocks`` in the blocks from the lowest on, then the
    head."""
    if name.startswith("head."):
        return num_blocks + 1
    found = _BLOCK.match(name)
    return int(found[1]) + 1 if found else 0


def lr_factors(model: PropertyModel, settings: FinetuneSettings) -> Callable[[str], float] | None:
    """Factor of ``settings.learning_rate`` for the name of each parameter; None if it is 1 for all."""
    head = (settings.head_learning_rate or settings.learning_rate) / settings.learning_rate
    if settings.layer_decay == 1.0 and head == 1.0:
        return None
    num_blocks = model.config.num_layers

    def factor(name: str) -> float:
        below = num_blocks + 1 - depth(name, num_blocks)
        return head if below == 0 else settings.layer_decay**below

    return factor


def renew_highest(model: PropertyModel, num_blocks: int) -> None:
    """Draw new weights for the highest ``num_blocks`` blocks, as for pretraining."""
    for block in model.encoder.layers[model.config.num_layers - num_blocks :]:
        init_weights(block)


def freeze_lowest(model: PropertyModel, num_blocks: int | None) -> None:
    """Do not train the embeddings and the lowest ``num_blocks`` blocks; None: train everything."""
    if num_blocks is None:
        return
    for name, parameter in model.named_parameters():
        if depth(name, model.config.num_layers) <= num_blocks:
            parameter.requires_grad_(False)
