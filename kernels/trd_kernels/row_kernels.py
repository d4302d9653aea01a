"""What a backend does to blocks of logits: everything in the operator that reads a whole row of them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from trd_kernels.divergence import Divergence, RowNorms


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
    scratch_mb: float
    """MiB of temporaries beside the blocks of logits, and never more than half of those."""

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

    def spread(self, z: Tensor, maximum: Tensor, factor: Tensor, *, out: Tensor) -> None:
        """Write `factor * exp(z - maximum)` into `out` `[C, V_local]`; `maximum` and `factor` are `[C, 1]`."""

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
