"""Triton kernels of the attention bias.

The forward pass looks up the biases of the visible relations of each pair, adds them and writes the sum in the layout
that the blocks read. The gradient of a row of a table is a sum over all pairs that read this row. These sums are matrix
products of marks (which pair reads which row, made in registers) and the gradient of the bias. Their terms have a fixed
order, so results are reproducible, which atomic additions are not.

Shape legend: B molecules, N atoms (padded), T = N + 1 tokens, H heads, L hops, C bond codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moleblend_ray.model.blending import Relation
from moleblend_ray.model.fused import on_its_device
from moleblend_ray.vocabulary import NUM_BOND_CODES, NUM_HOPS

__all__ = ["MAX_HEADS", "pair_bias_backward", "pair_bias_forward"]

MAX_HEADS = 64
"""Most heads for which the sums of a program fit the shared memory of a multiprocessor."""

_PROGRAMS = 528
"""Programs that share the rows of all molecules in the backward pass (an H100 has 132 multiprocessors). Each sums the
gradients over its rows; PyTorch adds these sums."""

_COLUMNS, _COLUMNS_BACKWARD = 32, 16
"""Pairs of a row that a program holds in registers at once, forward and backward."""

_WARPS_BACKWARD = 16
"""Fewer leave a multiprocessor with so few threads that it waits for memory."""

_SMALLEST_TILE = 16
"""Smallest side of a tensor-core matrix product."""

_SPD: tl.constexpr = tl.constexpr(1 << Relation.SPD)
_EDGE: tl.constexpr = tl.constexpr(1 << Relation.EDGE)
_GEOMETRY: tl.constexpr = tl.constexpr(1 << Relation.GEOMETRY)


@on_its_device
def pair_bias_forward(
    spd: Tensor,
    path_codes: Tensor,
    shown: Tensor | None,
    num_atoms: Tensor,
    spd_table: Tensor,
    hop_table: Tensor,
    geometry: Tensor,
    virtual: Tensor,
) -> Tensor:
    """The attention bias (B, H, T, T) float32, -inf in padding columns; rows of padding are undefined.

    ``spd`` (B, N, N) uint8; ``path_codes`` (B, N, N, L) uint8; ``shown`` (B, N, N) uint8 with a bit for each
    :class:`Relation` (None: all); ``num_atoms`` (B,) int64; ``spd_table`` (256, H); ``hop_table`` (L * C, H);
    ``geometry`` (B, N, N, H); ``virtual`` (H,).
    """
    B, N, _, H = geometry.shape
    T = N + 1
    bias = torch.empty(B, H, T, T, dtype=torch.float32, device=geometry.device)
    _pair_bias[(B * T,)](
        spd, path_codes, spd if shown is None else shown, num_atoms,
        spd_table, hop_table, geometry, virtual, bias, T,
        **_constants(H, shown), **_path_constants(path_codes), num_warps=4,
    )  # fmt: skip
    return bias


@on_its_device
def pair_bias_backward(
    grad_output: Tensor,
    spd: Tensor,
    path_codes: Tensor,
    shown: Tensor | None,
    num_atoms: Tensor,
    *,
    num_rows: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``spd_table``, ``hop_table``, ``geometry`` and ``virtual`` from that of the bias.

    ``grad_output`` is (B, H, T, T) float32, contiguous but for what may follow each row. The gradient of ``geometry`` is in ``dtype``, the others are float32.
    ``num_rows`` are the numbers of rows of the two tables.
    """
    B, H, T, _ = grad_output.shape
    row_stride = grad_output.stride(2)
    if grad_output.stride() != (H * T * row_stride, T * row_stride, row_stride, 1):
        grad_output, row_stride = grad_output.contiguous(), T
    device, programs = grad_output.device, min(_PROGRAMS, B * T)
    grad_geometry = torch.empty(B, T - 1, T - 1, H, dtype=dtype, device=device)
    grad_spd_table_parts = torch.empty(programs, num_rows[0], H, dtype=torch.float32, device=device)
    grad_hop_table_parts = torch.empty(programs, num_rows[1], H, dtype=torch.float32, device=device)
    grad_virtual_parts = torch.empty(programs, H, dtype=torch.float32, device=device)
    constants = {
        **_constants(H, shown),
        "COLUMNS": _COLUMNS_BACKWARD,
        # By default Triton multiplies float32 numbers as tf32, with 10 bits of mantissa. The marks, 0 and 1, lose nothing
        # by that, so that three products make up for the other factor.
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "num_warps": _WARPS_BACKWARD,
    }
    relations = spd if shown is None else shown, num_atoms
    _distances_backward[(programs,)](
        grad_output, spd, *relations, grad_geometry, grad_virtual_parts, grad_spd_table_parts,
        B * T, T, row_stride, **_row_constants(num_rows[0]), **constants,
    )  # fmt: skip
    _hops_backward[(programs,)](
        grad_output, spd, path_codes, *relations, grad_hop_table_parts, B * T, T, row_stride,
        **_row_constants(num_rows[1]), **_path_constants(path_codes), **constants,
    )  # fmt: skip
    return (
        grad_spd_table_parts.sum(0),
        grad_hop_table_parts.sum(0),
        grad_geometry,
        grad_virtual_parts.sum(0),
    )


def _constants(num_heads: int, shown: Tensor | None) -> dict[str, object]:
    return {
        "NUM_HEADS": num_heads,
        "HEADS": max(_SMALLEST_TILE, triton.next_power_of_2(num_heads)),
        "COLUMNS": _COLUMNS,
        "LONGEST": NUM_HOPS,
        "BLENDS": shown is not None,
    }


def _path_constants(path_codes: Tensor) -> dict[str, object]:
    return {"HOPS": path_codes.shape[-1], "CODES": NUM_BOND_CODES}


def _row_constants(rows: int) -> dict[str, object]:
    return {"ROWS": rows, "ROW_TILE": max(_SMALLEST_TILE, triton.next_power_of_2(rows))}


@triton.jit
def _relations(  # type: ignore[no-untyped-def]
    spd, shown, molecule, row, column, atoms, T, LONGEST: tl.constexpr, BLENDS: tl.constexpr
):
    """The relations of the pairs of tokens (row, column).

    Their index in (B, N, N), distance in bonds, divisor of the path bias, bits of the relations they show, and whether
    both tokens are real atoms.
    """
    real = (row > 0) & (row <= atoms) & (column > 0) & (column <= atoms)
    pair = (molecule.to(tl.int64) * (T - 1) + row - 1) * (T - 1) + column - 1
    distance = tl.load(spd + pair, mask=real, other=0).to(tl.int32)
    length = tl.minimum(tl.maximum(distance, 1), LONGEST).to(tl.float32)
    visible = real.to(tl.int32) * (_SPD + _EDGE + _GEOMETRY)
    if BLENDS:
        visible = tl.load(shown + pair, mask=real, other=0).to(tl.int32)
    return pair, distance, length, visible, real


# These tensors of a batch lie in one buffer, so their alignment changes with its sizes. They are read byte by byte:
# a kernel compiled anew for another alignment would be no faster.
@triton.jit(
    do_not_specialize=["T"],
    do_not_specialize_on_alignment=["spd", "path_codes", "shown", "num_atoms"],
)
def _pair_bias(  # type: ignore[no-untyped-def]
    spd, path_codes, shown, num_atoms, spd_table, hop_table, geometry, virtual, blended, T,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, HOPS: tl.constexpr,
    CODES: tl.constexpr, LONGEST: tl.constexpr, BLENDS: tl.constexpr,
):  # fmt: skip
    molecule, row = tl.program_id(0) // T, tl.program_id(0) % T
    atoms = tl.load(num_atoms + molecule).to(tl.int32)
    head = tl.arange(0, HEADS)[None, :]
    is_head = head < NUM_HEADS
    link = tl.load(virtual + head, mask=is_head, other=0.0).to(tl.float32)
    first = 0
    while first < T:
        column = first + tl.arange(0, COLUMNS)[:, None]
        pair, distance, length, visible, real = _relations(
            spd, shown, molecule, row, column, atoms, T, LONGEST, BLENDS
        )
        at = distance * NUM_HEADS + head
        total = tl.load(spd_table + at, mask=((visible & _SPD) != 0) & is_head, other=0.0)
        total = total.to(tl.float32)
        shows_path = (visible & _EDGE) != 0
        path = tl.zeros((COLUMNS, HEADS), tl.float32)
        for hop in tl.static_range(HOPS):
            code = tl.load(path_codes + pair * HOPS + hop, mask=shows_path, other=0).to(tl.int32)
            at = (hop * CODES + code) * NUM_HEADS + head
            path += tl.load(hop_table + at, mask=shows_path & is_head, other=0.0).to(tl.float32)
        total += path / length
        shows_distance = (visible & _GEOMETRY) != 0
        at = pair * NUM_HEADS + head
        near = tl.load(geometry + at, mask=shows_distance & is_head, other=0.0)
        total += near.to(tl.float32)
        total = tl.where(real, total, link)
        total = tl.where(column > atoms, float("-inf"), total)
        to = ((molecule.to(tl.int64) * NUM_HEADS + head) * T + row) * T + column
        tl.store(blended + to, total, mask=(column < T) & is_head)
        first += COLUMNS


@triton.jit
def _upstream(  # type: ignore[no-untyped-def]
    grad_blended, molecule, row, column, head, atoms, T, row_stride, NUM_HEADS: tl.constexpr
):
    """(COLUMNS, HEADS) gradient of the bias of one row, 0 in padding."""
    at = ((molecule.to(tl.int64) * NUM_HEADS + head) * T + row) * row_stride + column
    inside = (column <= atoms) & (row <= atoms) & (head < NUM_HEADS)
    return tl.load(grad_blended + at, mask=inside, other=0.0)


@triton.jit(
    do_not_specialize=["T", "row_stride", "rows"],
    do_not_specialize_on_alignment=["spd", "shown", "num_atoms"],
)
def _distances_backward(  # type: ignore[no-untyped-def]
    grad_blended, spd, shown, num_atoms, grad_geometry, grad_virtual_parts, grad_table_parts,
    rows, T, row_stride,
    ROWS: tl.constexpr, ROW_TILE: tl.constexpr, NUM_HEADS: tl.constexpr, HEADS: tl.constexpr,
    COLUMNS: tl.constexpr, LONGEST: tl.constexpr, BLENDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the table of shortest paths, the 3D bias and the links of the graph token."""
    head = tl.arange(0, HEADS)[None, :]
    code = tl.arange(0, ROW_TILE)
    grad_table = tl.zeros((ROW_TILE, HEADS), tl.float32)
    grad_virtual = tl.zeros((COLUMNS, HEADS), tl.float32)
    number = tl.program_id(0)
    while number < rows:
        molecule, row = number // T, number % T
        atoms = tl.load(num_atoms + molecule).to(tl.int32)
        first = 0
        while first < T:
            place = first + tl.arange(0, COLUMNS)
            column = place[:, None]
            upstream = _upstream(
                grad_blended, molecule, row, column, head, atoms, T, row_stride, NUM_HEADS
            )
            pair, _, _, visible, _ = _relations(
                spd, shown, molecule, row, column, atoms, T, LONGEST, BLENDS
            )
            grad_virtual += tl.where((row == 0) | (column == 0), upstream, 0.0)
            grad_pair = tl.where((visible & _GEOMETRY) != 0, upstream, 0.0)
            tl.store(
                grad_geometry + pair * NUM_HEADS + head,
                grad_pair.to(grad_geometry.dtype.element_ty),
                mask=(row > 0) & (column > 0) & (column < T) & (head < NUM_HEADS),
            )
            _, distance, _, visible, _ = _relations(
                spd, shown, molecule, row, place[None, :], atoms, T, LONGEST, BLENDS
            )
            marks = (code[:, None] == distance) & ((visible & _SPD) != 0)
            grad_table = tl.dot(
                marks.to(tl.float32), upstream, acc=grad_table, input_precision=PRECISION
            )
            first += COLUMNS
        number += tl.num_programs(0)
    program = tl.program_id(0).to(tl.int64)
    to = grad_table_parts + (program * ROWS + code[:, None]) * NUM_HEADS + head
    tl.store(to, grad_table, mask=(code < ROWS)[:, None] & (head < NUM_HEADS))
    to = grad_virtual_parts + program * NUM_HEADS + head
    tl.store(to, tl.sum(grad_virtual, 0)[None, :], mask=head < NUM_HEADS)


@triton.jit(
    do_not_specialize=["T", "row_stride", "rows"],
    do_not_specialize_on_alignment=["spd", "path_codes", "shown", "num_atoms"],
)
def _hops_backward(  # type: ignore[no-untyped-def]
    grad_blended, spd, path_codes, shown, num_atoms, grad_table_parts,
    rows, T, row_stride,
    ROWS: tl.constexpr, ROW_TILE: tl.constexpr, NUM_HEADS: tl.constexpr, HEADS: tl.constexpr,
    COLUMNS: tl.constexpr, HOPS: tl.constexpr, CODES: tl.constexpr, LONGEST: tl.constexpr,
    BLENDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the table of hops."""
    head = tl.arange(0, HEADS)[None, :]
    code = tl.arange(0, ROW_TILE)
    grad_table = tl.zeros((ROW_TILE, HEADS), tl.float32)
    number = tl.program_id(0)
    while number < rows:
        molecule, row = number // T, number % T
        atoms = tl.load(num_atoms + molecule).to(tl.int32)
        # Links and padding have no path.
        end = tl.where((row > 0) & (row <= atoms), atoms + 1, 0)
        first = 0
        while first < end:
            place = first + tl.arange(0, COLUMNS)
            column = place[:, None]
            upstream = _upstream(
                grad_blended, molecule, row, column, head, atoms, T, row_stride, NUM_HEADS
            )
            _, _, length, _, _ = _relations(
                spd, shown, molecule, row, column, atoms, T, LONGEST, BLENDS
            )
            pair, _, _, visible, _ = _relations(
                spd, shown, molecule, row, place[None, :], atoms, T, LONGEST, BLENDS
            )
            shows_path = (visible & _EDGE) != 0
            marks = tl.zeros((ROW_TILE, COLUMNS), tl.float32)
            for hop in tl.static_range(HOPS):
                at = pair * HOPS + hop
                read = hop * CODES + tl.load(path_codes + at, mask=shows_path, other=0).to(tl.int32)
                marks += ((code[:, None] == read) & shows_path).to(tl.float32)
            grad_table = tl.dot(marks, upstream / length, acc=grad_table, input_precision=PRECISION)
            first += COLUMNS
        number += tl.num_programs(0)
    to = (tl.program_id(0).to(tl.int64) * ROWS + code[:, None]) * NUM_HEADS + head
    tl.store(grad_table_parts + to, grad_table, mask=(code < ROWS)[:, None] & (head < NUM_HEADS))
