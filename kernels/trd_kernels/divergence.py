"""The divergences, column by column: values that stay exact near zero, and gradients with respect to logits.

Notation: p teacher, q student, r = log(q / p). Values are sums of terms that are each non-negative (the linear
part `sum(q - p) = 0` is added to every term), so neither a row nor a sum over ranks cancels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trd_kernels.checks import require

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "mixed")
TOP_K_MODES = ("renorm_both", "renorm_teacher", "tail_bucket")

_SERIES_RADIUS = 0.25
_SERIES_DEGREE = {torch.float32: 8, torch.float64: 13}
# Beyond it exp(r) dwarfs 1 + r and could overflow, so q = p * exp(r) is used instead.
_LARGE_RATIO = 20.0


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
            self.top_k == 0 or self.name in ("forward_kl", "reverse_kl"),
            "teacher_top_k",
            self.top_k,
            f"works with forward_kl and reverse_kl, not {self.name}",
        )
        require(
            self.top_k == 0 or self.name != "reverse_kl" or self.top_k_mode != "renorm_teacher",
            "top_k_mode",
            self.top_k_mode,
            "KL(student || teacher) is infinite when only the teacher is cut to its support; "
            "use renorm_both or tail_bucket with reverse_kl",
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
    """What turns logits of a row into p, q and r; `[C, 1]` each, identical on all ranks."""

    student_max: Tensor
    student_sum: Tensor
    teacher_max: Tensor
    teacher_sum: Tensor
    log_ratio: Tensor
    """lse(z_S) - lse(z_T)."""
    student_delta: Tensor | None
    """Student mean of z_S - z_T."""
    teacher_delta: Tensor | None
    """Teacher mean of z_S - z_T."""

    @classmethod
    def of(cls, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> RowNorms:
        """Combine the merged softmax sums of both sides."""
        # The difference of maxima is exact for close logits; a difference of two lse would round at their size.
        log_ratio = (student["max"] - teacher["max"]) + (student["log_sum"] - teacher["log_sum"])
        return cls(
            student_max=student["max"][:, None],
            student_sum=student["sum"][:, None],
            teacher_max=teacher["max"][:, None],
            teacher_sum=teacher["sum"][:, None],
            log_ratio=log_ratio[:, None],
            student_delta=student["delta"][:, None] if "delta" in student else None,
            teacher_delta=teacher["delta"][:, None] if "delta" in teacher else None,
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


def row_extra(spec: Divergence, z_student: Tensor, z_teacher: Tensor, norms: RowNorms) -> dict[str, Tensor]:
    """Return this rank's part of the extra row sum and of the value, `[R]` each, for `needs_extra` divergences."""
    p, q, r = _probabilities(z_student, z_teacher, norms)
    if spec.name == "jsd":
        to_student, to_teacher = _mixture_log_ratios(r, spec.beta)
        value = _jsd_value(p, q, to_student, to_teacher, spec.beta)
        return {"extra": (1.0 - spec.beta) * torch.linalg.vecdot(q, to_student), "value": value}
    assert spec.entry_clip is not None
    excess, capped = _entry_excess(p, r, spec.entry_clip)
    return {"extra": torch.where(capped, p, 0.0).sum(1), "value": _bregman(p, q, r).sum(1) - excess.sum(1)}


def row_divergence(
    spec: Divergence,
    z_student: Tensor,
    z_teacher: Tensor,
    norms: RowNorms,
    *,
    extra: Tensor | None,
    gradient_scale: Tensor | None,
) -> Tensor:
    """Return this rank's part of the value of each row, `[R]`.

    With `gradient_scale` `[R, 1]`, overwrite `z_student` by the gradient with respect to it, times that scale.
    `extra` `[R, 1]` is the merged row sum of `row_extra`.
    """
    p, q, r = _probabilities(z_student, z_teacher, norms)
    gradient = None
    if spec.name == "forward_kl":
        value = _bregman(p, q, r).sum(1)
        if spec.entry_clip is not None:
            value -= _entry_excess(p, r, spec.entry_clip)[0].sum(1)
        if gradient_scale is not None:
            gradient = _forward_gradient(spec, p, q, r, extra)
    elif spec.name == "reverse_kl":
        value = _bregman(q, p, -r).sum(1)
        if gradient_scale is not None:
            gradient = _reverse_gradient(q, z_student, z_teacher, norms)
    elif spec.name == "mixed":
        value = spec.beta * _bregman(p, q, r).sum(1) + (1.0 - spec.beta) * _bregman(q, p, -r).sum(1)
        if gradient_scale is not None:
            gradient = spec.beta * _forward_gradient(spec, p, q, r, None)
            gradient += (1.0 - spec.beta) * _reverse_gradient(q, z_student, z_teacher, norms)
    else:
        to_student, to_teacher = _mixture_log_ratios(r, spec.beta)
        value = _jsd_value(p, q, to_student, to_teacher, spec.beta)
        if gradient_scale is not None:
            assert extra is not None
            gradient = q * ((1.0 - spec.beta) * to_student - extra)
    if gradient is not None and gradient_scale is not None:
        torch.mul(gradient, gradient_scale, out=z_student)
    return value


def _probabilities(z_student: Tensor, z_teacher: Tensor, norms: RowNorms) -> tuple[Tensor, Tensor, Tensor]:
    p = (z_teacher - norms.teacher_max).exp_().div_(norms.teacher_sum)
    q = (z_student - norms.student_max).exp_().div_(norms.student_sum)
    return p, q, (z_student - z_teacher).sub_(norms.log_ratio)


def _bregman(p: Tensor, q: Tensor, r: Tensor) -> Tensor:
    """Return `p * (exp(r) - 1 - r)` for `r = log(q / p)`: non-negative, relatively exact for every r."""
    degree = _SERIES_DEGREE[r.dtype]
    small = torch.full_like(r, 1.0 / math.factorial(degree))
    for power in range(degree - 1, 1, -1):
        small.mul_(r).add_(1.0 / math.factorial(power))
    small.mul_(r).mul_(r)
    body = torch.where(r.abs() < _SERIES_RADIUS, small, torch.expm1(r).sub_(r)).mul_(p)
    return torch.where(r > _LARGE_RATIO, q - p - p * r, body)


def _forward_gradient(spec: Divergence, p: Tensor, q: Tensor, r: Tensor, capped_mass: Tensor | None) -> Tensor:
    """Return the gradient of the forward KL.

    Under an entry clip, capped entries leave the sum: their p no longer pulls, and q is pulled by the rest only.
    """
    gradient = q - p
    if spec.entry_clip is not None and capped_mass is not None:
        capped = _entry_excess(p, r, spec.entry_clip)[1]
        gradient += torch.where(capped, p, 0.0) - q * capped_mass
    return gradient


def _reverse_gradient(q: Tensor, z_student: Tensor, z_teacher: Tensor, norms: RowNorms) -> Tensor:
    """Return the gradient of the reverse KL, `q (r - mean of r)`: the log-ratio of the sums cancels and is left out."""
    assert norms.student_delta is not None
    return (z_student - z_teacher).sub_(norms.student_delta).mul_(q)


def _entry_excess(p: Tensor, r: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Return how far each entry p log(p / q) lies above the clip, and which entries do."""
    excess = (-p * r).sub_(clip)
    capped = excess >= 0
    return excess.clamp_(min=0.0), capped


def _mixture_log_ratios(r: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return log(q / m) and log(p / m) for m = beta p + (1 - beta) q, from r alone (p or q may have underflowed)."""
    limit = math.log(torch.finfo(r.dtype).max) - 8.0
    r = r.clamp(-limit, limit)
    to_student = torch.expm1(-r).mul_(beta).log1p_().neg_()
    to_teacher = torch.expm1(r).mul_(1.0 - beta).log1p_().neg_()
    return to_student, to_teacher


def _jsd_value(p: Tensor, q: Tensor, to_student: Tensor, to_teacher: Tensor, beta: float) -> Tensor:
    m = beta * p + (1.0 - beta) * q
    return beta * _bregman(p, m, -to_teacher).sum(1) + (1.0 - beta) * _bregman(q, m, -to_student).sum(1)
