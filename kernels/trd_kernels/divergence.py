"""Which divergence, and the numbers per row that turn logits into probabilities. p teacher, q student, r = log(q/p)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from trd_kernels.checks import require
from trd_kernels.softmax_sums import DELTA, MergedSums

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "mixed")
TOP_K_MODES = ("renorm_both", "renorm_teacher", "tail_bucket")


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """A divergence with its options, checked."""

    name: str
    beta: float
    temperature: float
    scale_by_temperature_sq: bool
    top_k: int
    top_k_mode: str
    token_clip: float | None
    entry_clip: float | None

    def __post_init__(self) -> None:
        require(self.name in DIVERGENCES, "divergence", self.name, f"choose one of {', '.join(DIVERGENCES)}")
        require(
            self.name not in ("jsd", "mixed") or 0.0 < self.beta < 1.0,
            "beta",
            self.beta,
            f"{self.name} needs a value strictly between 0 and 1; the ends are forward_kl and reverse_kl",
        )
        ok = math.isfinite(self.temperature) and self.temperature > 0
        require(ok, "temperature", self.temperature, "must be positive and finite")
        require(self.top_k >= 0, "teacher_top_k", self.top_k, "give 0 (the full vocabulary) or more")
        require(
            self.top_k_mode in TOP_K_MODES, "top_k_mode", self.top_k_mode, f"choose one of {', '.join(TOP_K_MODES)}"
        )
        require(
            self.top_k == 0 or self.name == "forward_kl" or self.top_k_mode != "renorm_teacher",
            "top_k_mode",
            self.top_k_mode,
            f"works with forward_kl, not {self.name}: KL(student || teacher) is infinite when only the teacher is cut "
            "to its support; use renorm_both or tail_bucket",
        )
        for argument, clip in (("token_clip", self.token_clip), ("entry_clip", self.entry_clip)):
            require(clip is None or clip > 0, argument, clip, "must be positive; None means no cap")
        require(
            self.entry_clip is None or (self.name == "forward_kl" and self.top_k == 0),
            "entry_clip",
            self.entry_clip,
            "is defined for forward_kl over the full vocabulary (teacher_top_k=0) only",
        )

    @property
    def loss_scale(self) -> float:
        """Factor on the token loss, applied after the clip."""
        return self.temperature**2 if self.scale_by_temperature_sq else 1.0

    @property
    def needs_extra(self) -> bool:
        """Whether the gradient needs a row sum that only exists once both softmaxes are known."""
        return self.name == "jsd" or self.entry_clip is not None

    @property
    def needs_student_delta(self) -> bool:
        """Whether the student's mean of `z_S - z_T` is needed: it centres the reverse gradient."""
        return self.name in ("reverse_kl", "mixed")

    @property
    def needs_teacher_delta(self) -> bool:
        """Whether the teacher's mean of `z_S - z_T` is needed: the token clip decides by it before the gradient."""
        return self.token_clip is not None and self.name in ("forward_kl", "mixed") and not self.needs_extra


class RowNorms(NamedTuple):
    """What turns logits of a row into p, q and r, identical on all ranks."""

    max: Tensor
    """`[C, 2]`, student and teacher."""
    total: Tensor
    """`[C, 2]`: sums of exp(z - max)."""
    log_ratio: Tensor
    """`[C, 1]`: lse(z_S) - lse(z_T)."""
    student_delta: Tensor | None
    """`[C, 1]`: student mean of z_S - z_T."""
    teacher_delta: Tensor | None
    """`[C, 1]`: teacher mean of z_S - z_T."""

    @classmethod
    def of(cls, merged: MergedSums, *, student_delta: bool = False, teacher_delta: bool = False) -> RowNorms:
        """Take from the merged sums of both sides what is needed."""
        log_ratio = merged.log_ratio()
        delta = merged.mean(DELTA) if student_delta or teacher_delta else log_ratio
        return cls(
            max=merged.max,
            total=merged.total,
            log_ratio=log_ratio,
            student_delta=delta[:, :1] if student_delta else None,
            teacher_delta=delta[:, 1:] if teacher_delta else None,
        )

    def rows(self, tile: slice) -> RowNorms:
        """Return the same of a slice of rows."""
        return RowNorms._make(None if x is None else x[tile] for x in self)


def first_pass_value(spec: Divergence, norms: RowNorms) -> Tensor:
    """Return the divergence `[C]` from the row sums alone: good enough for the token clip, not near zero."""
    parts = []
    if norms.teacher_delta is not None:
        weight = spec.beta if spec.name == "mixed" else 1.0
        parts.append(weight * (norms.log_ratio - norms.teacher_delta))
    if norms.student_delta is not None:
        weight = 1.0 - spec.beta if spec.name == "mixed" else 1.0
        parts.append(weight * (norms.student_delta - norms.log_ratio))
    return sum(parts[1:], parts[0]).squeeze(1)
