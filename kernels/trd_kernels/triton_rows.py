"""Launches the Triton row kernels: float32 logits; on a CPU through Triton's interpreter only."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from trd_kernels.divergence import DIVERGENCES, Divergence, RowNorms
from trd_kernels.row_kernels import WantedSums
from trd_kernels.softmax_sums import NUM_SUMS
from trd_kernels.triton_kernels import VECTOR, divergence_kernel, softmax_sums_kernel, spread_kernel

INTERPRETED = isinstance(divergence_kernel, InterpretedFunction)
"""Whether TRITON_INTERPRET=1 was set when triton was imported."""


class TritonRows:
    """Implements `RowKernels`."""

    name = "triton"
    scratch_mb = 0.0

    def softmax_sums(
        self,
        z_student: Tensor,
        z_teacher: Tensor,
        wanted: WantedSums,
        *,
        scale: float = 1.0,
        label: Tensor | None = None,
    ) -> Tensor:
        """See `RowKernels`."""
        num_rows, num_columns = z_student.shape
        out = z_student.new_zeros(num_rows, NUM_SUMS, 2)
        launch = _Launch.of(num_columns)
        softmax_sums_kernel[launch.grid(num_rows)](
            z_student, z_teacher, out, out if label is None else label.contiguous(),
            num_rows, num_columns, z_student.stride(0), z_teacher.stride(0), scale,
            DELTA_S=wanted.student_delta, DELTA_T=wanted.teacher_delta,
            ENTROPY_S=wanted.student_entropy, ENTROPY_T=wanted.teacher_entropy,
            ARGMAX=wanted.argmax, LABEL=label is not None, **launch.options,
        )  # fmt: skip
        return out

    def spread(self, z: Tensor, maximum: Tensor, factor: Tensor, *, out: Tensor) -> None:
        """See `RowKernels`."""
        num_rows, num_columns = z.shape
        launch = _Launch.of(num_columns)
        spread_kernel[launch.grid(num_rows)](
            z, out, maximum.contiguous(), factor.contiguous(), num_rows, num_columns, z.stride(0), out.stride(0),
            **launch.options,
        )  # fmt: skip

    def extra(self, spec: Divergence, z_student: Tensor, z_teacher: Tensor, norms: RowNorms) -> Tensor:
        """See `RowKernels`."""
        return _divergence(spec, z_student, z_teacher, norms, None, None, None, with_extra=True)

    def divergence(
        self,
        spec: Divergence,
        z_student: Tensor,
        z_teacher: Tensor,
        norms: RowNorms,
        *,
        extra: Tensor | None,
        gradient_scale: Tensor | None,
        gradient: Tensor | None,
    ) -> Tensor | None:
        """See `RowKernels`."""
        out = _divergence(spec, z_student, z_teacher, norms, extra, gradient_scale, gradient, with_extra=False)
        return None if spec.needs_extra else out[:, 0]


def _divergence(
    spec: Divergence,
    z_student: Tensor,
    z_teacher: Tensor,
    norms: RowNorms,
    extra: Tensor | None,
    scale: Tensor | None,
    gradient: Tensor | None,
    *,
    with_extra: bool,
) -> Tensor:
    """Return `[C, 2]`: values and extra row sums."""
    num_rows, num_columns = z_student.shape
    none = torch.zeros_like(norms.log_ratio)
    columns = (norms.max, norms.total, norms.log_ratio, norms.student_delta, extra, scale)
    packed = torch.cat([none if x is None else x for x in columns], dim=1)
    out = z_student.new_zeros(num_rows, 2)
    target = z_student if gradient is None else gradient
    launch = _Launch.of(num_columns)
    divergence_kernel[launch.grid(num_rows)](
        z_student, z_teacher, target, packed, out, num_rows, num_columns,
        z_student.stride(0), z_teacher.stride(0), target.stride(0), spec.beta, spec.entry_clip or 0.0,
        KIND=DIVERGENCES.index(spec.name), CLIP=spec.entry_clip is not None,
        VALUE=with_extra or not spec.needs_extra, EXTRA=with_extra, GRADIENT=gradient is not None,
        NEAR_HALF=0.25 <= spec.beta <= 0.75, **launch.options,
    )  # fmt: skip
    return out


class _Launch(NamedTuple):
    """Shape of a launch: rows of a program, and lanes of `VECTOR` columns in a block."""

    rows: int
    lanes: int
    warps: int

    @classmethod
    def of(cls, num_columns: int) -> _Launch:
        """Return the tile for rows of so many columns."""
        if INTERPRETED:  # a program is slow and a row of it is not: few programs, and several blocks even in tests
            return cls(rows=16, lanes=16, warps=1)
        lanes = triton.next_power_of_2(triton.cdiv(max(num_columns, 1), VECTOR))
        return cls(rows=1, lanes=min(max(lanes, 32), 1024), warps=8)

    def grid(self, num_rows: int) -> tuple[int]:
        """Return how many programs cover so many rows."""
        return (triton.cdiv(num_rows, self.rows),)

    @property
    def options(self) -> dict[str, int]:
        """Return the keyword arguments of the launch."""
        return {"ROWS": self.rows, "LANES": self.lanes, "num_warps": self.warps}
