"""Compiles every Triton kernel for an H100 on a machine without GPU.

    python tests/numerics/support/compile_kernels.py [--instructions]

Prints a JSON object for each kernel, by kernel and tile: the bytes of registers that each thread spills. With
``--instructions`` also the instructions of the code times its warps (of kernels without loops, what a program executes), for
which the code is disassembled.
This needs a process of its own: that of the tests runs Triton's interpreter, which accepts more than the compiler.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moleblend_ray.model import (
    attention_kernels,
    block_kernels,
    denoising_kernels,
    geometry_kernels,
    pair_bias_kernels,
    pair_loss_kernels,
    philox_kernels,
    token_embedding_kernels,
)

H100 = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"

BFLOAT16 = (
    "qkv grad_qkv output grad_output product grad_product density grad_density forms grad_forms columns "
    "geometry grad_geometry hop_table mapped grad_mapped merged grad_merged embedded grad_embedded"
)
FLOAT32 = (
    "grad_bias linear_bias grad_linear_bias_parts "
    "norm_weight grad_norm_weight_parts norm_bias grad_norm_bias_parts "
    "path_scale statistics tokens grad_tokens "
    "value grad_value mean grad_mean_parts width grad_width_parts sums grad_sums "
    "weight loss_parts grad_columns_parts grad_bias_parts "
    "spd_table grad_table_parts virtual grad_virtual_parts blended grad_blended "
    "displacement parts categories degree graph_token"
)
INT64 = "first_token num_atoms seed molecule offsets target c0 c1 c2 c3 words"
TYPES: Mapping[str, str] = {
    **dict.fromkeys(BFLOAT16.split(), "*bf16"),
    **dict.fromkeys(FLOAT32.split(), "*fp32"),
    **dict.fromkeys(INT64.split(), "*i64"),
    "bias": "*bf16",
    "known": "*i1",
    **dict.fromkeys(["spd", "path_codes", "shown", "features", "degrees"], "*u8"),
    **dict.fromkeys(
        ["T", "N", "row_stride", "first_molecule", "count", "pairs", "rows", "A"], "i32"
    ),
    **dict.fromkeys(["low", "high"], "i64"),
    **dict.fromkeys(
        ["dropout_probability", "probability", "epsilon", "norm", "merged_scale"], "fp32"
    ),
}
"""Types of the arguments of kernels, by name."""


def cases() -> Iterator[tuple[Any, dict[str, Any], int]]:
    """Kernels, constants and numbers of warps, as the preset ``base`` launches them."""
    heads: dict[str, Any] = {
        "NUM_HEADS": 32,
        "HEAD_WIDTH": 24,
        "LENGTH": 24,
        "WIDTH_TILE": 32,
        "DROPS": True,
    }
    for tile, warps in ((16, 1), (32, 2), (64, 4), (128, 16)):
        for module, extra in ((attention_kernels, 1), (denoising_kernels, 2 if tile == 64 else 1)):
            for kernel in (module._forward, module._backward):
                scales: dict[str, Any] = {"SCALES": True} if module is attention_kernels else {}
                settings = {**heads, **scales, "TILE": tile, "PRECISION": "tf32"}
                for changes in (without_draws(settings), settings):
                    yield kernel, changes, warps * extra
    row: dict[str, Any] = {"WIDTH": 768, "TILE": 1024, "SCALES": True, "DROPS": True}
    for settings in (without_draws(row), row):
        yield block_kernels._add_and_norm, settings, 4
        same = {"SAME": not settings["DROPS"]}
        yield block_kernels._add_and_norm_backward, {**settings, **same}, 4
    part: dict[str, Any] = {"ROWS": 8, "COLUMNS": 256}
    for kernel in (block_kernels._gelu, block_kernels._gelu_backward):
        settings = {"WIDTH": 768, "SCALES": True, "DROPS": True, **part}
        for changes in (without_draws(settings), settings):
            yield kernel, changes, 4
    for kernel in (geometry_kernels._gaussians, geometry_kernels._gaussians_backward):
        yield kernel, {"K": 128, "K_TILE": 128, "PAIRS": 16}, 4
    forms: dict[str, Any] = {"SHARES": 4, "WIDTH": 32, "WIDTH_TILE": 32, "PRECISION": "tf32"}
    for tile, warps in ((16, 1), (32, 2), (64, 4), (128, 8)):
        for hops, classes in ((1, 11), (5, 25)):
            sizes = {"GROUPS": hops, "TARGETS": hops, "CLASSES": classes, "TILE": tile}
            for kernel in (pair_loss_kernels._forward, pair_loss_kernels._backward):
                constants = {**forms, **sizes, "CLASS_TILE": 16 if classes == 11 else 32}
                yield kernel, constants, warps
    paths: dict[str, Any] = {"HOPS": 5, "CODES": 61}
    pair: dict[str, Any] = {"NUM_HEADS": 32, "HEADS": 32, "LONGEST": 5, "BLENDS": True}
    yield pair_bias_kernels._pair_bias, {**pair, **paths, "COLUMNS": 32}, 4
    # float32, without a blend, and the most heads.
    for changes in (
        {"PRECISION": "tf32"},
        {"PRECISION": "tf32x3", "BLENDS": False},
        {"PRECISION": "tf32", "NUM_HEADS": 64, "HEADS": 64},
    ):
        sums = {**pair, "COLUMNS": 16, **changes}
        rows = {"ROWS": 256, "ROW_TILE": 256}
        yield pair_bias_kernels._distances_backward, {**sums, **rows}, 16
        rows = {"ROWS": 305, "ROW_TILE": 512}
        yield pair_bias_kernels._hops_backward, {**sums, **rows, **paths}, 16
    token: dict[str, Any] = {"WIDTH": 768, "TILE": 1024}
    categories = {"NUM_FEATURES": 9, "NUM_DEGREES": 16}
    yield token_embedding_kernels._embed, {**token, **categories}, 4
    yield token_embedding_kernels._norm_backward, token, 4
    sums = {"NUM_CATEGORIES": 174, "ROW_TILE": 256, "WIDTH": 768, "COLUMNS": 64, "TOKENS": 32}
    for precision in ("tf32", "tf32x3"):
        constants = {**categories, **sums, "PRECISION": precision}
        yield token_embedding_kernels._tables_backward, constants, 8
    yield philox_kernels._philox, {"BLOCK": 1024}, 4


def without_draws(constants: Mapping[str, Any]) -> dict[str, Any]:
    """As in evaluation: neither dropout nor stochastic depth. The case with them follows, and its size is what is printed."""
    return {**constants, **{name: False for name in ("SCALES", "DROPS") if name in constants}}


def compiled_size(
    kernel: Any, constants: Mapping[str, Any], warps: int, *, counts: bool
) -> dict[str, int]:
    """``spilled``, bytes of local memory of each thread, as registers did not suffice, and if it ``counts`` them the
    ``instructions`` of all warps."""
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if signature[name].startswith("*")
        },
    )
    compiled = triton.compile(source, target=H100, options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        size = {"spilled": int(re.findall(r"STACK:(\d+)", dump("-res-usage", file.name))[0])}
        if counts:
            code = dump("-sass", file.name)
            size["instructions"] = warps * len(re.findall(r"/\*[0-9a-f]{4}\*/\s+\S", code))
    return size


def dump(option: str, file: str) -> str:
    command = [str(TOOLS / "cuobjdump"), option, file]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def name_of(kernel: Any, constants: Mapping[str, Any]) -> str:
    """The kernel with the constants that distinguish its cases, the tile last."""
    parts = (constants.get(name, "") for name in ("NUM_HEADS", "PRECISION", "TILE"))
    module = kernel.fn.__module__.rpartition(".")[2]
    return " ".join(map(str, (f"{module}.{kernel.__name__}", *parts))).rstrip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instructions", action="store_true")
    counts = parser.parse_args().instructions
    print(
        json.dumps(
            {
                name_of(kernel, constants): compiled_size(kernel, constants, warps, counts=counts)
                for kernel, constants, warps in cases()
            }
        )
    )
