"""How many tokens' logits live at a time, and the blocks that hold them.

Two sizes: logits in the compute dtype exist for C_l tokens; their gradient, rounded to the operands' dtype, is kept
for C_g >= C_l tokens and then enters one product for the hidden states and one for the head. A large C_g is what
these two products want; a small C_l is what memory wants.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trd_kernels.checks import require
from trd_kernels.heads import Heads
from trd_kernels.row_kernels import RowKernels

DEFAULT_WORKSPACE_MB = 1200
"""MiB, divided by the ranks that share the vocabulary: 512 and 2048 tokens at 151,936 columns in bf16."""

_GRADIENT_RATIO = 4
_ALIGNMENT = 32


class ChunkSizes(NamedTuple):
    """Tokens whose logits, and whose rounded gradient, are held at a time."""

    logits: int
    gradient: int

    @classmethod
    def given(cls, chunk: int | tuple[int, int]) -> ChunkSizes:
        """Return what the caller fixed: one number for both, or (C_l, C_g)."""
        logits, gradient = (chunk, chunk) if isinstance(chunk, int) else chunk
        ok = 1 <= logits <= gradient
        require(ok, "chunk", chunk, "give a positive number of tokens, or (C_l, C_g) with 1 <= C_l <= C_g")
        return cls(logits, gradient)

    @classmethod
    def within(cls, budget_mb: float, *, heads: Heads, rows: RowKernels, columns: int, with_grad: bool) -> ChunkSizes:
        """Return the largest sizes whose blocks and temporaries fit, for `columns` logits a row on every rank."""
        require(budget_mb > 0, "workspace_mb", budget_mb, "give a positive number of MiB")
        budget_mb -= min(rows.scratch_mb, budget_mb / 3)
        per_entry = 2 * heads.compute_dtype.itemsize
        # A gradient of the logits' own dtype is written over them instead.
        ratio = _GRADIENT_RATIO if with_grad and heads.operand_dtype != heads.compute_dtype else 0
        per_entry += ratio * heads.operand_dtype.itemsize
        logits = int(budget_mb * 2**20 // (per_entry * max(columns, 1)))
        if logits > _ALIGNMENT:
            logits -= logits % _ALIGNMENT
        logits = max(logits, 1)
        return cls(logits, logits * max(ratio, 1))


class Workspace(NamedTuple):
    """Reused by every chunk; rows start aligned, whatever the number of columns."""

    student_logits: Tensor
    """`[C_l, V_local]`, compute dtype."""
    teacher_logits: Tensor
    """`[C_l, V_local]`, compute dtype."""
    logits_grad: Tensor | None
    """`[C_g, V_local]`, operand dtype; the same memory as `student_logits` where sizes and dtypes agree."""

    @classmethod
    def allocate(cls, sizes: ChunkSizes, heads: Heads, *, with_grad: bool) -> Workspace:
        """Allocate the blocks on the device of the heads."""

        def block(rows: int, dtype: torch.dtype) -> Tensor:
            width = -(-heads.num_columns // _ALIGNMENT) * _ALIGNMENT
            return heads.student_weight.new_empty(rows, width, dtype=dtype)[:, : heads.num_columns]

        student = block(sizes.logits, heads.compute_dtype)
        teacher = block(sizes.logits, heads.compute_dtype)
        if not with_grad:
            return cls(student, teacher, None)
        in_place = sizes.logits == sizes.gradient and heads.operand_dtype == heads.compute_dtype
        return cls(student, teacher, student if in_place else block(sizes.gradient, heads.operand_dtype))
