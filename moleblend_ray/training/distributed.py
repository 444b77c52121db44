"""One model on all ranks: whole, as replicas (DDP), or sharded (FSDP2).

Gradients are *summed* over ranks, never averaged: the loss is normalised by counts of the whole step before
the backward pass, so the sum is the gradient of the global batch at any world size.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from moleblend_ray.errors import ConfigError
from moleblend_ray.training.config import Precision, Strategy
from moleblend_ray.training.ranks import Ranks


def distribute(
    objective: nn.Module,
    layers: Iterable[nn.Module],
    *,
    draw_weights: Callable[[], None],
    strategy: Strategy,
    precision: Precision,
    ranks: Ranks,
    replicas: int = 1,
    reshard: bool = True,
) -> nn.Module:
    """Spread ``objective``, which comes on the meta device, over the ranks; its forward then takes part in the collectives.

    ``draw_weights`` is called when its parameters have memory on the rank's device: those of FSDP hold only this rank's shard.
    ``fsdp`` shards each of ``layers`` by itself and the rest as one group, over all ranks or in ``replicas`` equal groups of
    neighbours, and gathers the layers twice in each micro-batch, or, without ``reshard``, once a step; ``ddp`` keeps a whole copy
    on each rank. Without a process group both train the plain module.
    """
    if strategy == "none" and ranks.world_size > 1:
        raise ConfigError(
            f"train.strategy is none but {ranks.world_size} workers train; use fsdp or ddp"
        )
    is_alone = strategy == "none" or not dist.is_initialized()
    if strategy == "fsdp" and not is_alone:
        _shard(objective, layers, precision, ranks, _mesh(replicas, ranks), reshard=reshard)
    objective.to_empty(device=ranks.device)
    draw_weights()
    return _replicate(objective, ranks) if strategy == "ddp" and not is_alone else objective


def _mesh(replicas: int, ranks: Ranks) -> DeviceMesh:
    """All ranks in a row, or a row for each replica."""
    kind, size = ranks.device.type, ranks.world_size
    if replicas == 1:
        return init_device_mesh(kind, (size,))
    if size % replicas:
        raise ConfigError(
            f"train.fsdp_replicas: {size} workers cannot form {replicas} equal groups; choose a divisor of {size}"
        )
    names = ("replicate", "shard")
    return init_device_mesh(kind, (replicas, size // replicas), mesh_dim_names=names)


def _shard(
    objective: nn.Module,
    layers: Iterable[nn.Module],
    precision: Precision,
    ranks: Ranks,
    mesh: DeviceMesh,
    *,
    reshard: bool,
) -> None:
    # Autocast (see :mod:`.mixed_precision`) decides the arithmetic, so layer inputs are not cast. The layers hold nearly all
    # parameters: gathering these in bf16 halves the traffic. Not on CPU, whose LayerNorm refuses bf16 weights for
    # float32 tokens (autocast casts them on a GPU).
    on_gpu = ranks.device.type == "cuda"
    gathers_bf16 = precision == "bf16" and on_gpu
    # A sum of float32 gradients in float64 is nearly always exact, so its order, and with it the number of ranks,
    # leaves no trace; in float32 the last digits differ and training amplifies them. On a GPU the doubled traffic
    # would cost too much for that.
    reduce_dtype = torch.float32 if on_gpu else torch.float64
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if gathers_bf16 else None,
        reduce_dtype=reduce_dtype,
        cast_forward_inputs=False,
    )
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(
        objective,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False),
    )
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            # Divide by 1 and use plain sums: gloo has no averaging and no pre-multiplied reduction.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
            if not on_gpu:
                module.set_custom_reduce_scatter(_ExchangeAndAdd())  # type: ignore[arg-type]


class _ExchangeAndAdd:
    """Reduce-scatter for gloo, whose own is an all-reduce of which each rank keeps a part: ranks exchange the parts and each
    adds up its own, for half of the traffic.

    The interface is FSDP2's ``ReduceScatter``, an abstract class of a private module.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer to communicate from or into."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """``input_tensor``, a part for each rank, to this rank's part of the sum over ranks."""
        assert op == dist.ReduceOp.SUM
        assert not async_op
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), 0, out=output_tensor)


_BUFFERS: Final = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
"""What the argument is called by which DDP sends buffers before each forward pass; PyTorch 2.13 warns of the former name."""


def _replicate(objective: nn.Module, ranks: Ranks) -> nn.Module:
    buffers: dict[str, Any] = {_BUFFERS: False}
    replica = DistributedDataParallel(
        objective,
        device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **buffers,
    )
    # A lambda, because DDP compares a hook's annotations with classes, and ours are strings.
    replica.register_comm_hook(None, lambda state, bucket: _sum_bucket(bucket))  # noqa: ARG005
    return replica


def _sum_bucket(bucket: Any) -> torch.futures.Future[Tensor]:
    """DDP communication hook that sums a gradient bucket (dist.GradBucket), where the built-in one averages."""
    reduced: torch.futures.Future[list[Tensor]] = dist.all_reduce(
        bucket.buffer(), async_op=True
    ).get_future()
    return reduced.then(lambda future: future.value()[0])


@contextlib.contextmanager
def gradient_sync(module: nn.Module, *, enabled: bool, reshard: bool = True) -> Iterator[None]:
    """Within, backward passes reduce gradients over ranks only if ``enabled``; else they add up locally.

    Those that reduce leave a sharded model only the shards of its parameters. The others do so with ``reshard``.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
        module.set_is_last_backward(enabled)
        module.set_reshard_after_backward(enabled or reshard)
        yield
    elif isinstance(module, DistributedDataParallel) and not enabled:
        with module.no_sync():
            yield
    else:
        yield


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within, ``module`` computes without dropout and gradients; afterwards it is ready to train again."""
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train()
        for part in module.modules():
            if isinstance(part, FSDPModule):
                # Without a backward pass FSDP would leave the root's parameters gathered, and the next
                # checkpoint would not find the sharded ones that the optimizer holds.
                part.reshard()
