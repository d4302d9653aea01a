"""The matrix products of both heads: operands in the inputs' dtype, results in the compute dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HeadTensors = tuple[Tensor, Tensor, Tensor, Tensor]
"""Student input and weight, teacher input and weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Both heads without padding rows, as the matrix products want them."""

    student_input: Tensor
    student_weight: Tensor
    teacher_input: Tensor
    teacher_weight: Tensor
    num_padding: int
    compute_dtype: torch.dtype
    """Logits, sums and gradient accumulators: fp64 for fp64 inputs, else fp32."""
    operand_dtype: torch.dtype
    """Operands of matrix products: the inputs' own, but fp32 for bf16 on a CPU, which cannot widen its output."""

    @classmethod
    def of(cls, tensors: HeadTensors, *, valid: int) -> Heads:
        """Take the first `valid` rows of the weights."""
        student_input, student_weight, teacher_input, teacher_weight = tensors
        dtype = student_input.dtype
        compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        operand_dtype = dtype if student_input.is_cuda else compute_dtype
        return cls(
            student_input=student_input,
            student_weight=student_weight[:valid].to(operand_dtype),
            teacher_input=teacher_input,
            teacher_weight=teacher_weight[:valid].to(operand_dtype),
            num_padding=student_weight.shape[0] - valid,
            compute_dtype=compute_dtype,
            operand_dtype=operand_dtype,
        )

    @property
    def num_columns(self) -> int:
        """Logits of a row on this rank."""
        return self.student_weight.shape[0]

    def matmul(self, a: Tensor, b: Tensor, *, alpha: float = 1.0, out: Tensor | None = None) -> Tensor:
        """Return `alpha * a @ b` in the compute dtype; the factor meets the product before it is rounded."""
        if out is None:
            out = a.new_empty(a.shape[0], b.shape[1], dtype=self.compute_dtype)
        widens = self.operand_dtype != self.compute_dtype
        if alpha == 1.0:
            return torch.mm(a, b, self.compute_dtype, out=out) if widens else torch.mm(a, b, out=out)
        return self._add(out, a, b, alpha=alpha, beta=0.0)

    def accumulate(self, total: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0) -> None:
        """Add `alpha * a @ b` to `total`, which has the compute dtype."""
        self._add(total, a, b, alpha=alpha, beta=1.0)

    def _add(self, total: Tensor, a: Tensor, b: Tensor, *, alpha: float, beta: float) -> Tensor:
        if self.operand_dtype != self.compute_dtype:
            return torch.addmm(total, a, b, self.compute_dtype, beta=beta, alpha=alpha, out=total)
        return total.addmm_(a, b, beta=beta, alpha=alpha)
