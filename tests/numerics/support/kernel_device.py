"""Device for tests of Triton kernels: a GPU, or the CPU with Triton's interpreter (see tests/conftest.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moleblend_ray.model.config import ModelConfig

SMALL_MODEL = ModelConfig(
    num_layers=2,
    dim=32,
    ffn_dim=32,
    num_heads=4,
    num_kernels=8,
    pair_dim=8,
    attention_dropout=0.0,
    activation_dropout=0.0,
    drop_path=0.0,
)
"""Without dropout, so that kernels and plain code can be compared."""

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _patch_language_once() -> None:
    """Let Triton's interpreter change its language where that is not done yet, and not again for each function that a kernel calls,
    which takes a quarter of the time of these tests."""
    try:
        from triton import language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang

    def patch_if_needed(function: Any) -> Any:
        seen = [lang for lang in (tl, tl.core) if lang in function.__globals__.values()]
        if seen and not any(tl.core.is_builtin(lang.load) for lang in seen):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = patch_if_needed


_patch_language_once()


def skip_if_not_interpreted(kernel: Any) -> None:
    """Skip the test on a CPU if Triton was imported before its interpreter was switched on."""
    if DEVICE.type == "cpu" and type(kernel).__name__ == "JITFunction":
        pytest.skip("Triton was imported before its interpreter was chosen")


def use_bfloat16_as_a_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter round and multiply bfloat16 as a GPU does; nothing on a GPU.

    Alone, it cuts numbers off and multiplies their bits as integers. Products are exact and added in float32, as by tensor
    cores. Other arithmetic in bfloat16 is an error: kernels have to compute in float32.
    """
    if DEVICE.type != "cpu":
        return
    from triton import language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    plain_cast, plain_dot, plain_operation = (
        builder.cast_impl,
        builder.create_dot,
        builder.binary_op,
    )

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar != tl.bfloat16:
            return plain_cast(self, widened(source), target)
        rounded = torch.from_numpy(np.array(plain_cast(self, source, tl.float32).data)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    def dot(self: Any, left: Any, right: Any, *others: Any) -> Any:
        return plain_dot(self, widened(left), widened(right), *others)

    def operation(self: Any, left: Any, right: Any, operator: Any) -> Any:
        assert left.dtype.scalar != tl.bfloat16, f"{operator.__name__} of bfloat16"
        return plain_operation(self, left, right, operator)

    monkeypatch.setattr(builder, "cast_impl", cast)
    monkeypatch.setattr(builder, "create_dot", dot)
    monkeypatch.setattr(builder, "binary_op", operation)
