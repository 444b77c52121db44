"""The optimizer and its schedule.

AdamW with decoupled weight decay; with ``weight_decay`` 0, as in the paper, it is Adam. The learning rate is a pure
function of the step, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.adamw import adamw

from moleblend_ray.model.device import on_gpu
from moleblend_ray.training.config import OptimConfig
from moleblend_ray.training.ranks import sum_over_ranks

LR_FACTOR: Final = "lr_factor"
"""Key of a parameter group: what its learning rate is multiplied with."""

_VECTOR: Final = 16
"""Elements of the widest vector register (AVX-512, float32); a multiple of those of narrower ones and wider types."""


def learning_rate(step: int, config: OptimConfig, num_steps: int) -> float:
    """Learning rate of the update that ends ``step`` (counted from 0) of a run of ``num_steps``.

    Linear warm-up whose first update already moves, then a cosine that would reach ``final_learning_rate`` at
    ``num_steps``.
    """
    warmup = min(config.warmup_steps, num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.final_learning_rate + cosine * (config.learning_rate - config.final_learning_rate)


def set_learning_rate(optimizer: CutInvariantAdamW, value: float) -> None:
    """Set the learning rate of every parameter group, times the group's own factor where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get(LR_FACTOR, 1.0)


class CutInvariantAdamW:
    """AdamW whose update of an element does not depend on how its tensor is cut into shards.

    The fused kernel for CPUs rounds the last elements of a tensor, those that fill no vector register, in another way than
    the rest. Which these are changes with the number of workers, and training amplifies it. So tensors with such a rest are
    updated as one long, padded vector.

    ``param_groups`` and ``state`` are as in ``torch.optim.Optimizer``. It is none, because that class imports PyTorch's compiler
    into each process that makes one, which takes longer than many a fine-tuning on few molecules.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float
    ) -> None:
        """``groups``: each has ``params``, ``lr`` and ``weight_decay``.

        The moments are allocated at once, see :func:`build_optimizer`.
        """
        self.param_groups = groups
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {
            parameter: {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for group in groups
            for parameter in group["params"]
        }
        self._betas, self._eps = betas, eps

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @record_function("Optimizer.step")
    @torch.no_grad()
    def step(self, *, skip: Tensor | None = None) -> None:
        """Update all parameters that have a gradient.

        Nothing changes if ``skip``, () float32 on the device of the parameters, is 1. The host need not know its value.
        """
        for group in self.param_groups:
            parts = [self._part(p) for p in group["params"] if p.grad is not None]
            if any(on_gpu(part.parameter) for part in parts):
                self._update(group, parts, skip)
                continue
            whole = [part for part in parts if part.is_whole]
            # The kernel takes a step count for each tensor, and heads without targets are behind.
            by_step: dict[float, list[_Part]] = {}
            for part in parts:
                if not part.is_whole:
                    by_step.setdefault(float(part.step), []).append(part)
            joined = [_join(together) for together in by_step.values()]
            self._update(group, [*whole, *joined], skip)
            for together, long in zip(by_step.values(), joined, strict=True):
                _put_back(long, together)

    def _part(self, parameter: nn.Parameter) -> _Part:
        state = self.state[parameter]
        assert parameter.grad is not None
        return _Part(
            parameter=_local(parameter),
            gradient=_local(parameter.grad),
            exp_avg=_local(state["exp_avg"]),
            exp_avg_sq=_local(state["exp_avg_sq"]),
            step=state["step"],
            is_whole=math.prod(parameter.shape[1:]) % _VECTOR == 0 and parameter.ndim > 1,
        )

    def _update(self, group: dict[str, Any], parts: list[_Part], skip: Tensor | None) -> None:
        beta1, beta2 = self._betas
        adamw(
            [part.parameter for part in parts],
            [part.gradient for part in parts],
            [part.exp_avg for part in parts],
            [part.exp_avg_sq for part in parts],
            [],
            [part.step for part in parts],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self._eps,
            maximize=False,
            found_inf=skip,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """What the kernel needs of one tensor, or of this rank's shard of it."""

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    is_whole: bool
    """Rows fill vector registers, so every shard does: shards are made of rows."""


def _local(tensor: Tensor) -> Tensor:
    # Only shards have it. Their class is not imported: that takes half a second, and most processes that need an optimizer
    # have no shards.
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor.detach() if to_local is None else to_local()


def _join(parts: list[_Part]) -> _Part:
    """Copies of the tensors, one behind the other, padded to whole registers."""
    rest = -sum(part.parameter.numel() for part in parts) % _VECTOR
    joined = {
        name: torch.cat(
            [
                *(getattr(part, name).flatten() for part in parts),
                parts[0].parameter.new_zeros(rest),
            ]
        )
        for name in ("parameter", "gradient", "exp_avg", "exp_avg_sq")
    }
    return _Part(**joined, step=parts[0].step.clone(), is_whole=True)


def _put_back(joined: _Part, parts: list[_Part]) -> None:
    sizes = [part.parameter.numel() for part in parts]
    for name in ("parameter", "exp_avg", "exp_avg_sq"):
        pieces = getattr(joined, name)[: sum(sizes)].split(sizes)
        for part, piece in zip(parts, pieces, strict=True):
            target = getattr(part, name)
            target.copy_(piece.view_as(target))
    for part in parts:
        part.step.copy_(joined.step)


def build_optimizer(
    model: nn.Module, config: OptimConfig, lr_factor: Callable[[str], float] | None = None
) -> CutInvariantAdamW:
    """AdamW over the trainable parameters of ``model``, with its moments allocated at once.

    ``lr_factor`` gives each parameter, by its name, a factor of its learning rate (:func:`set_learning_rate`). Call this
    after sharding: the moments take the parameters' placement. They exist before the first update because a
    checkpoint is restored into them, and because a head that sees no target for some steps must not change
    which tensors a checkpoint holds.
    """
    groups = _parameter_groups(model, config, lr_factor)
    for group in groups:
        group["lr"] = config.learning_rate
    return CutInvariantAdamW(groups, betas=config.betas, eps=config.eps)


def _parameter_groups(
    model: nn.Module, config: OptimConfig, lr_factor: Callable[[str], float] | None
) -> list[dict[str, Any]]:
    decayed, kept = split_by_decay(model)
    by_decay = ((decayed, config.weight_decay), (kept, 0.0))
    if lr_factor is None:
        return [{"params": params, "weight_decay": decay} for params, decay in by_decay]
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for params, decay in by_decay:
        for parameter in params:
            groups.setdefault((decay, lr_factor(names[parameter])), []).append(parameter)
    return [
        {"params": params, "weight_decay": decay, LR_FACTOR: factor}
        for (decay, factor), params in groups.items()
    ]


def split_by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters that decay (matrices), and those that do not (biases, norms, embeddings)."""
    embeddings = {
        id(parameter) for module in model.modules() for parameter in _embedding_tables(module)
    }
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decayed if decays else kept).append(parameter)
    return decayed, kept


def _embedding_tables(module: nn.Module) -> list[Tensor]:
    """The module's own parameters whose rows stand for codes; 0 is no neutral value of, say, the scale of distances."""
    if isinstance(module, nn.Embedding):
        return [module.weight]
    return [getattr(module, name) for name in getattr(module, "embedding_tables", ())]


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Global L2 norm of the gradients over all ranks, () float32, the same on each.

    The norm scales every clipped gradient, so it must not depend on how they are sharded: rows, which no shard splits, have
    norms in their own type, and the squares of these are added in float64.
    """
    whole: list[Tensor] = []
    shards: list[Tensor] = []
    replicas = 1
    for parameter in parameters:
        gradient = parameter.grad
        mesh: DeviceMesh | None = getattr(gradient, "device_mesh", None)
        if gradient is not None and mesh is not None:
            shards.append(_local(gradient))
            replicas = mesh.size(0) if mesh.ndim > 1 else 1
        elif gradient is not None:
            whole.append(gradient)
    squares = [_sum_of_squares(whole)] if whole else []
    if shards:
        # Each replica holds all of it once.
        squares.append(sum_over_ranks(_sum_of_squares(shards)) / replicas)
    return torch.stack(squares).sum().sqrt().float()


def _sum_of_squares(gradients: list[Tensor]) -> Tensor:
    """() float64."""
    if on_gpu(gradients[0]):
        # One launch for all of them: exactness at any number of ranks is promised on CPUs only.
        norms: tuple[Tensor, ...] = torch._foreach_norm(gradients)
        return torch.stack(norms).double().square().sum()
    total = gradients[0].new_zeros((), dtype=torch.float64)
    for gradient in gradients:
        rows = gradient if gradient.ndim < 2 else torch.linalg.vector_norm(gradient, dim=-1)
        total = total + torch.linalg.vector_norm(rows, dtype=torch.float64).square()
    return total


def clip_gradients(parameters: list[nn.Parameter], norm: Tensor, clip_norm: float) -> None:
    """Scale the gradients in place so that their global ``norm`` is at most ``clip_norm``."""
    nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
