"""Triton kernels of the cross entropy of classes of pairs, which never write the logits or their gradient.

A program computes every fourth row of pairs of one molecule: for each row atom and group of classes it multiplies the form
of the row with the vectors of all columns, and has the logits of these pairs in registers. The backward pass computes them
again.

Shape legend: B molecules, N atoms of the largest, A real atoms packed, G groups of C classes (hops of a path, or one group),
P width of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moleblend_ray.model.batch import SizeGroup
from moleblend_ray.model.fused import on_its_device

__all__ = ["MAX_ATOMS", "pair_loss_backward", "pair_loss_forward"]

MAX_ATOMS = 127
"""Atoms of the largest molecule whose tile fits in registers."""

_SHARES = 4
"""Programs of a molecule, so that there are enough of them. Each sums the gradients of the columns over its rows."""

_SMALLEST_TILE = 16
"""Smallest side of a tensor-core matrix product."""


@on_its_device
def pair_loss_forward(
    forms: Tensor,
    columns: Tensor,
    bias: Tensor,
    target: Tensor,
    weight: Tensor,
    first_token: Tensor,
    num_atoms: Tensor,
    groups: Sequence[SizeGroup],
) -> Tensor:
    """() float32, sum of the weighted cross entropies of all pairs with a target.

    The logits of group g of atoms a and b are ``forms[a, g] @ columns[b] + bias[g]``, with ``forms`` (A, G, C, P),
    ``columns`` (A, P) and ``bias`` (G, C). ``target`` (B, N, N, K) int64 has a class for the first K groups,
    negative where there is none; ``weight`` is (B, N, N) float32. All are contiguous. ``first_token``, ``num_atoms`` and
    ``groups`` are as in :func:`~moleblend_ray.model.attention_kernels.attention_forward`.
    """
    loss_parts = torch.empty(len(num_atoms), _SHARES, dtype=torch.float32, device=forms.device)
    for group in groups:
        _forward[(group.molecules * _SHARES,)](
            forms, columns, bias, target, weight, first_token, num_atoms, loss_parts,
            group.first, target.shape[1], **_constants(forms, target, group),
        )  # fmt: skip
    return loss_parts.sum()


@on_its_device
def pair_loss_backward(
    grad_output: Tensor,
    forms: Tensor,
    columns: Tensor,
    bias: Tensor,
    target: Tensor,
    weight: Tensor,
    first_token: Tensor,
    num_atoms: Tensor,
    groups: Sequence[SizeGroup],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``forms``, ``columns`` and ``bias`` in their types, from that of the sum, ()."""
    A, G, C, P = forms.shape
    # Groups without targets are not visited.
    new = torch.empty_like if target.shape[-1] == G else torch.zeros_like
    grad_forms = new(forms)
    grad_columns_parts = torch.empty(_SHARES, A, P, dtype=torch.float32, device=forms.device)
    programs = len(num_atoms) * _SHARES
    grad_bias_parts = new(torch.empty(programs, G, C, dtype=torch.float32, device=forms.device))
    for group in groups:
        _backward[(group.molecules * _SHARES,)](
            grad_output, forms, columns, bias, target, weight, first_token, num_atoms,
            grad_forms, grad_columns_parts, grad_bias_parts,
            group.first, target.shape[1], A, **_constants(forms, target, group),
        )  # fmt: skip
    grad_columns = grad_columns_parts.sum(0).to(columns.dtype)
    return grad_forms, grad_columns, grad_bias_parts.sum(0).to(bias.dtype)


def _constants(forms: Tensor, target: Tensor, group: SizeGroup) -> dict[str, object]:
    _, G, C, P = forms.shape
    return {
        "SHARES": _SHARES,
        "GROUPS": G,
        "TARGETS": target.shape[-1],
        "CLASSES": C,
        "CLASS_TILE": max(_SMALLEST_TILE, triton.next_power_of_2(C)),
        "WIDTH": P,
        "WIDTH_TILE": max(_SMALLEST_TILE, triton.next_power_of_2(P)),
        "TILE": group.tile,
        "PRECISION": "ieee" if forms.dtype == torch.float32 else "tf32",
        "num_warps": max(1, group.tile // 16),
    }


@triton.jit
def _columns_of(  # type: ignore[no-untyped-def]
    columns, first_token, num_atoms, first_molecule,
    SHARES: tl.constexpr, WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The molecule and share of this program, its number of atoms and first one, and the vectors (TILE, WIDTH_TILE) of its
    atoms with their places, 0 where none is ``held``."""
    molecule = first_molecule + tl.program_id(0) // SHARES
    atoms = tl.load(num_atoms + molecule).to(tl.int32)
    # Tokens are atoms and one graph token for each molecule. int64: a batch can have more than 2**31 numbers.
    first = tl.load(first_token + molecule).to(tl.int64) - molecule
    column = tl.arange(0, TILE)[:, None]
    feature = tl.arange(0, WIDTH_TILE)[None, :]
    held = (column < atoms) & (feature < WIDTH)
    places = (first + column) * WIDTH + feature
    vectors = tl.load(columns + places, mask=held, other=0.0)
    return molecule, tl.program_id(0) % SHARES, atoms, first, vectors, places, held


@triton.jit
def _row_of_pairs(  # type: ignore[no-untyped-def]
    forms, group_bias, target, weight, vectors, molecule, row, first, group, atoms, N,
    GROUPS: tl.constexpr, TARGETS: tl.constexpr, CLASSES: tl.constexpr, CLASS_TILE: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The form (CLASS_TILE, WIDTH_TILE) of one row atom and group with its places, and of its pairs with all columns the
    logits (TILE, CLASS_TILE), their log-sum-exp, the weights, and which classes are the targets."""
    kind = tl.arange(0, CLASS_TILE)
    feature = tl.arange(0, WIDTH_TILE)[None, :]
    places = (((first + row) * GROUPS + group) * CLASSES + kind[:, None]) * WIDTH + feature
    written = (kind < CLASSES)[:, None] & (feature < WIDTH)
    form = tl.load(forms + places, mask=written, other=0.0)
    logits = tl.dot(vectors, tl.trans(form), input_precision=PRECISION) + group_bias[None, :]
    logits = tl.where((kind < CLASSES)[None, :], logits, float("-inf"))
    largest = tl.max(logits, 1)
    total = tl.log(tl.sum(tl.exp(logits - largest[:, None]), 1)) + largest
    column = tl.arange(0, TILE)
    pair = (molecule.to(tl.int64) * N + row) * N + column
    wanted = tl.load(target + pair * TARGETS + group, mask=column < atoms, other=-1)
    pair_weight = tl.load(weight + pair, mask=column < atoms, other=0.0)
    # Selected, not multiplied by 0: what has no target may be infinite.
    pair_weight = tl.where(wanted >= 0, pair_weight, 0.0)
    return form, places, written, logits, total, pair_weight, kind[None, :] == wanted[:, None]


@triton.jit(do_not_specialize=["first_molecule", "N"])
def _forward(  # type: ignore[no-untyped-def]
    forms, columns, bias, target, weight, first_token, num_atoms, loss_parts, first_molecule, N,
    SHARES: tl.constexpr, GROUPS: tl.constexpr, TARGETS: tl.constexpr, CLASSES: tl.constexpr,
    CLASS_TILE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    molecule, share, atoms, first, vectors, _at, _held = _columns_of(
        columns, first_token, num_atoms, first_molecule, SHARES, WIDTH, WIDTH_TILE, TILE
    )
    kind = tl.arange(0, CLASS_TILE)
    loss = tl.zeros((TILE,), tl.float32)
    for group in range(TARGETS):
        group_bias = tl.load(bias + group * CLASSES + kind, mask=kind < CLASSES, other=0.0)
        row = share
        while row < atoms:
            _form, _places, _written, logits, total, pair_weight, hit = _row_of_pairs(
                forms, group_bias, target, weight, vectors, molecule, row, first, group, atoms, N,
                GROUPS, TARGETS, CLASSES, CLASS_TILE, WIDTH, WIDTH_TILE, TILE, PRECISION,
            )  # fmt: skip
            entropy = total - tl.sum(tl.where(hit, logits, 0.0), 1)
            loss += tl.where(pair_weight != 0.0, entropy * pair_weight, 0.0)
            row += SHARES
    tl.store(loss_parts + molecule * SHARES + share, tl.sum(loss, 0))


@triton.jit(do_not_specialize=["first_molecule", "N", "A"])
def _backward(  # type: ignore[no-untyped-def]
    grad_output, forms, columns, bias, target, weight, first_token, num_atoms,
    grad_forms, grad_columns_parts, grad_bias_parts, first_molecule, N, A,
    SHARES: tl.constexpr, GROUPS: tl.constexpr, TARGETS: tl.constexpr, CLASSES: tl.constexpr,
    CLASS_TILE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    molecule, share, atoms, first, vectors, places, held = _columns_of(
        columns, first_token, num_atoms, first_molecule, SHARES, WIDTH, WIDTH_TILE, TILE
    )
    kind = tl.arange(0, CLASS_TILE)
    upstream = tl.load(grad_output)
    grad_vectors = tl.zeros((TILE, WIDTH_TILE), tl.float32)
    for group in range(TARGETS):
        group_bias = tl.load(bias + group * CLASSES + kind, mask=kind < CLASSES, other=0.0)
        grad_bias = tl.zeros((TILE, CLASS_TILE), tl.float32)
        row = share
        while row < atoms:
            form, form_places, written, logits, total, pair_weight, hit = _row_of_pairs(
                forms, group_bias, target, weight, vectors, molecule, row, first, group, atoms, N,
                GROUPS, TARGETS, CLASSES, CLASS_TILE, WIDTH, WIDTH_TILE, TILE, PRECISION,
            )  # fmt: skip
            grad_logits = tl.exp(logits - total[:, None]) - tl.where(hit, 1.0, 0.0)
            counts = (pair_weight != 0.0)[:, None]
            grad_logits = tl.where(counts, grad_logits * (pair_weight * upstream)[:, None], 0.0)
            grad_bias += grad_logits
            rounded = grad_logits.to(form.dtype)
            grad_vectors = tl.dot(rounded, form, acc=grad_vectors, input_precision=PRECISION)
            grad_form = tl.dot(tl.trans(rounded), vectors, input_precision=PRECISION)
            to = grad_forms + form_places
            tl.store(to, grad_form.to(grad_forms.dtype.element_ty), mask=written)
            row += SHARES
        to = ((molecule.to(tl.int64) * SHARES + share) * GROUPS + group) * CLASSES + kind
        tl.store(grad_bias_parts + to, tl.sum(grad_bias, 0), mask=kind < CLASSES)
    to = share.to(tl.int64) * A * WIDTH + places
    tl.store(grad_columns_parts + to, grad_vectors, mask=held)
