"""What a backend does to blocks of logits: everything in the operator that reads a whole row of them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from trd_kernels.divergence import Divergence, RowNorms
from trd_kernels.support import Support


class WantedSums(NamedTuple):
    """Which sums beside each side's maximum and sum of exponentials; see `softmax_sums`."""

    student_delta: bool = False
    teacher_delta: bool = False
    student_entropy: bool = False
    teacher_entropy: bool = False
    argmax: bool = False


class RowKernels(Protocol):
    """Blocks are `[C, V_local]` views with contiguous columns; what is per row is `[C, ...]`."""

    name: str
    logit_copies: int
    """Size of both blocks and of the temporaries besides them, in blocks of logits."""

    def softmax_sums(
        self,
        z_student: Tensor,
        z_teacher: Tensor,
        wanted: WantedSums,
        *,
        scale: float = 1.0,
        label: Tensor | None = None,
    ) -> Tensor:
        """Summarise `scale` times both blocks: `[C, 6, 2]`. 0 columns give maxima of `FLOOR` and sums of 0.

        `label` `[C]` int64 is a column, or -1 for none, whose logits become 0.
        """

    def largest(self, z: Tensor, k: int) -> Tensor:
        """Return the `k` largest logits of each row, `[C, k]` in descending order, filled up with `FLOOR`."""

    def remove_outside(self, support: Support, z_student: Tensor, z_teacher: Tensor, *, both: bool) -> None:
        """Overwrite the teacher's logits outside the support by `FLOOR`, with `both` the student's too."""

    def outside_sums(self, support: Support, z_student: Tensor, z_teacher: Tensor) -> Tensor:
        """Return the maxima and sums of `softmax_sums` over the columns outside the support."""

    def reshape_outside(self, support: Support, z_student: Tensor, z_teacher: Tensor, shift: Tensor) -> None:
        """Overwrite the teacher's logits outside the support by `z_student - shift`, `shift` `[C, 1]`."""

    def extra(self, spec: Divergence, z_student: Tensor, z_teacher: Tensor, norms: RowNorms) -> Tensor:
        """Return this rank's part of the value and of the extra row sum, `[C, 2]`, for `needs_extra` divergences."""

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
        """Return this rank's part of each row's value `[C]`, or None where `extra()` has returned it.

        With `gradient` `[C, V_local]`, which may be `z_student` itself, write the gradient with respect to
        `z_student`, times `gradient_scale` `[C, 1]`, into it. `extra` `[C, 1]` is the merged row sum of `extra()`.
        """
