"""Memory traffic and launches of a training step on a GPU, counted on a machine without one.

    python benchmarks/traffic.py [--preset base] [--batch 4096] [--dtype bf16|fp32] [--terabytes-per-s 3.8]
                                 [--teraflops 650] [--launch-us 2.5] [--top 30]

The trainer's step runs by the code for GPUs on tensors without memory (PyTorch's FakeTensorMode), and Triton kernels are
noted instead of launched. Each operation counts what it reads and writes; ``ideal_ms`` is the largest of three times: its
bytes at the bandwidth of memory, its matrix products at their rate, and the shortest time of a kernel. A GPU needs longer:
small operations do not reach its bandwidth, and kernels that compute much, such as attention, wait for other things than
memory. So this finds operations that move too much, and compares two versions of the code; it does not replace
`train_step.py --device cuda`. Prints a table by operation, one by place, and one JSON line last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_step import new_learner, preset, step_batch

from moleblend_ray.model import device
from moleblend_ray.training import step as step_module
from moleblend_ray.training.metrics import Record
from moleblend_ray.training.optim import build_optimizer
from moleblend_ray.training.prefetch import DeviceStep

PACKAGE = Path(step_module.__file__).resolve().parents[1]
CPU = torch.device("cpu")

FREE = {
    "aten::empty.memory_format",
    "aten::empty_strided",
    "aten::empty_like",
    "aten::new_empty",
    "aten::detach",
    "aten::_unsafe_view",
    "prim::device",
}
"""Operations that launch nothing, beside views."""


class Launch(NamedTuple):
    """One operation of the step."""

    name: str
    place: str
    bytes: int
    flops: int


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation under it, and every Triton kernel."""

    def __init__(self, num_molecules: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_molecules = num_molecules
        self.launches: list[Launch] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.name()
        if not func.is_view and name not in FREE:
            inputs = tensors((args, kwargs))
            # What an operation changes in place is read and written.
            written = {id(value): value for value in tensors(output)}
            total = sum(map(bytes_of, inputs)) + sum(map(bytes_of, written.values()))
            self.launches.append(Launch(name, place(), total, flops_of(name, inputs)))
        return output

    def note_kernel(self, kernel: Any, *args: Any, grid: tuple[int, ...], **constants: Any) -> None:
        """A launch for a group of molecules touches their share of the tensors."""
        name = f"triton::{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        # The same tensor again stands for one that a kernel does not use.
        total = sum(map(bytes_of, {id(values): values for values in tensors(args)}.values()))
        if "first_molecule" in kernel.arg_names:
            programs = constants.get("NUM_HEADS") or constants["SHARES"]
            total = total * grid[0] // (self.num_molecules * programs)
        self.launches.append(Launch(name, place(), total, 0))


def main() -> None:
    arguments = parse_arguments()
    launches = count(arguments)
    report("operation", by(launches, lambda one: kind(one.name)), arguments)
    report(
        "operation, place", by(launches, lambda one: f"{kind(one.name)}  {one.place}"), arguments
    )
    total = milliseconds(launches, arguments)
    print(
        json.dumps(
            {
                "benchmark": "traffic",
                "preset": arguments.preset,
                "batch": arguments.batch,
                "dtype": arguments.dtype,
                "launches": len(launches),
                "gigabytes": round(sum(one.bytes for one in launches) / 1e9, 2),
                "matrix_product_ms": round(
                    milliseconds([one for one in launches if one.flops], arguments), 2
                ),
                "ideal_ms": round(total, 2),
                "rates": [arguments.terabytes_per_s, arguments.teraflops, arguments.launch_us],
                "torch": torch.__version__,
            }
        )
    )


def count(arguments: argparse.Namespace) -> list[Launch]:
    """The launches of the second step; the first creates the optimizer's state."""
    learner = new_learner(preset(arguments.preset), arguments.dtype, CPU)
    step = learner.prepare(step_batch(0, arguments.batch, arguments.batch))
    counter = Counter(arguments.batch)
    no_values: tuple[Record, bool, bool] = {}, False, False
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(device, "GPU_TYPES", frozenset({"cpu"})),
        mock.patch.object(triton.JITFunction, "run", note_with(counter)),
        # Fake tensors have no values that the host could read.
        mock.patch.object(step_module, "_record", return_value=no_values),
        # As on a GPU, one call for all gradients.
        mock.patch("torch.nn.utils.clip_grad._has_foreach_support", return_value=True),
    ):
        make_fake(learner.model)
        learner = dataclasses.replace(
            learner, optimizer=build_optimizer(learner.model, learner.optim)
        )
        step = fake_step(step)
        step_module.train_step(learner, step)
        counter.launches.clear()
        with counter:
            step_module.train_step(learner, step)
    return counter.launches


def note_with(counter: Counter) -> Callable[..., None]:
    return lambda kernel, *args, **kwargs: counter.note_kernel(kernel, *args, **kwargs)


def make_fake(model: nn.Module) -> None:
    """Replace parameters and buffers by tensors without memory."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(fake(parameter.detach())))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, fake(buffer))


def fake_step(step: DeviceStep) -> DeviceStep:
    return dataclasses.replace(
        step,
        molecules=tuple(map(with_fakes, step.molecules)),
        blends=tuple(map(with_fakes, step.blends)),
        counts=fake(step.counts),
    )


def with_fakes(record: Any) -> Any:
    """A dataclass with its tensors replaced."""
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    fakes = {name: fake(value) for name, value in values.items() if isinstance(value, Tensor)}
    return dataclasses.replace(record, **fakes)


def fake(values: Tensor) -> Tensor:
    return torch.empty_strided(values.shape, values.stride(), dtype=values.dtype)


def tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def bytes_of(values: Tensor) -> int:
    """Repeated elements of expanded tensors are read once."""
    sizes = (size for size, stride in zip(values.shape, values.stride(), strict=True) if stride)
    total = values.element_size()
    for size in sizes:
        total *= size
    return total if values.numel() else 0


def flops_of(name: str, inputs: list[Tensor]) -> int:
    """Two operations for each multiply-add of a matrix product; 0 of everything else."""
    operator = name.partition(".")[0]
    if operator in {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"}:
        left, right = inputs[-2:] if "add" not in operator else inputs[1:3]
        return 2 * left.numel() * right.shape[-1]
    return 0


def place() -> str:
    """File and function of the innermost frame of the package; of a backward pass that of the caller."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(str(PACKAGE)):
            if frame.name == "_backward" and frame.filename == step_module.__file__:
                return "autograd"
            return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
    return "?"


def kind(name: str) -> str:
    operator = name.partition(".")[0] if name.startswith("aten") else name
    products = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"}
    return "matrix products" if operator in products else operator


def by(launches: Iterable[Launch], key: Callable[[Launch], str]) -> dict[str, list[Launch]]:
    groups: dict[str, list[Launch]] = defaultdict(list)
    for one in launches:
        groups[key(one)].append(one)
    return groups


def milliseconds(launches: Iterable[Launch], arguments: argparse.Namespace) -> float:
    return sum(times(launches, arguments)) * 1e3


def times(launches: Iterable[Launch], arguments: argparse.Namespace) -> Iterator[float]:
    for one in launches:
        moved = one.bytes / (arguments.terabytes_per_s * 1e12)
        computed = one.flops / (arguments.teraflops * 1e12)
        yield max(moved, computed, arguments.launch_us * 1e-6)


def report(title: str, groups: dict[str, list[Launch]], arguments: argparse.Namespace) -> None:
    """The groups that take longest."""
    durations = {name: milliseconds(group, arguments) for name, group in groups.items()}
    print(f"\n{'ideal ms':>9} {'launches':>8} {'GB':>7}  {title}")
    for name in sorted(durations, key=durations.__getitem__, reverse=True)[: arguments.top]:
        group = groups[name]
        moved = sum(one.bytes for one in group) / 1e9
        print(f"{durations[name]:9.3f} {len(group):8d} {moved:7.2f}  {name}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="base")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--terabytes-per-s", type=float, default=3.8)
    parser.add_argument("--teraflops", type=float, default=650.0)
    parser.add_argument("--launch-us", type=float, default=2.5)
    parser.add_argument("--top", type=int, default=30)
    return parser.parse_args()


if __name__ == "__main__":
    main()
