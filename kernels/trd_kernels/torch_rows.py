"""Row kernels in plain torch: the default on a CPU, the yardstick on a GPU. Any floating dtype.

Values are sums of terms that are each non-negative (the linear part `sum(q - p) = 0` is added to every term), so
neither a row nor a sum over ranks cancels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trd_kernels.divergence import Divergence, RowNorms
from trd_kernels.row_kernels import WantedSums
from trd_kernels.softmax_sums import ARGMAX, DELTA, ENTROPY, FLOOR, LABEL, MAX, NUM_SUMS, SUM

# Where |log(q / p)| is smaller, a series replaces a difference of close numbers.
_SERIES_RADIUS = 0.5
_SERIES_DEGREE = {torch.float32: 8, torch.float64: 16}

_TILE_ENTRIES = 2**17
"""Row math runs on so many logits at a time, so that its temporaries stay in a core's cache."""


class TorchRows:
    """Implements `RowKernels` tile by tile."""

    name = "torch"
    scratch_mb = 8.0

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
        out = z_student.new_zeros(z_student.shape[0], NUM_SUMS, 2)
        for t in _tiles(z_student):
            zs, zt = z_student[t], z_teacher[t]
            if scale != 1.0:
                zs, zt = zs * scale, zt * scale
            delta = zs - zt if wanted.student_delta or wanted.teacher_delta else None
            row_label = None if label is None else label[t]
            for side, z, with_delta, with_entropy in (
                (0, zs, wanted.student_delta, wanted.student_entropy),
                (1, zt, wanted.teacher_delta, wanted.teacher_entropy),
            ):
                _sum_up(
                    out[t, :, side],
                    z,
                    delta=delta if with_delta else None,
                    entropy=with_entropy,
                    argmax=wanted.argmax,
                    label=row_label,
                )
        return out

    def spread(self, z: Tensor, maximum: Tensor, factor: Tensor, *, out: Tensor) -> None:
        """See `RowKernels`."""
        for t in _tiles(z):
            torch.mul((z[t] - maximum[t]).exp_(), factor[t], out=out[t])

    def extra(self, spec: Divergence, z_student: Tensor, z_teacher: Tensor, norms: RowNorms) -> Tensor:
        """See `RowKernels`."""
        return torch.cat(
            [_value_and_extra(spec, _Terms.of(z_student[t], z_teacher[t], norms.rows(t))) for t in _tiles(z_student)]
        )

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
        values = []
        for t in _tiles(z_student):
            terms = _Terms.of(z_student[t], z_teacher[t], norms.rows(t))
            if not spec.needs_extra:
                values.append(_value(spec, terms))
            if gradient is not None and gradient_scale is not None:
                grad = _gradient(spec, terms, None if extra is None else extra[t])
                torch.mul(grad, gradient_scale[t], out=gradient[t])
        return torch.cat(values) if values else None


class _Terms(NamedTuple):
    """One tile `[R, V_local]` of what every divergence is made of."""

    p: Tensor
    q: Tensor
    difference: Tensor
    """q - p."""
    r: Tensor
    """log(q / p)."""
    centred: Tensor | None
    """r - sum q r, where the gradient needs it: the log-ratio of the sums cancels and is left out."""

    @classmethod
    def of(cls, z_student: Tensor, z_teacher: Tensor, norms: RowNorms) -> _Terms:
        q = (z_student - norms.max[:, :1]).exp_().div_(norms.total[:, :1])
        p = (z_teacher - norms.max[:, 1:]).exp_().div_(norms.total[:, 1:])
        delta = z_student - z_teacher
        centred = None if norms.student_delta is None else delta - norms.student_delta
        return cls(p, q, q - p, delta.sub_(norms.log_ratio), centred)


def _tiles(z: Tensor) -> list[slice]:
    # At least eight, so that a tile's temporaries are small beside the blocks where these are small themselves.
    rows = max(1, min(_TILE_ENTRIES // max(z.shape[1], 1), -(-z.shape[0] // 8)))
    return [slice(i, i + rows) for i in range(0, z.shape[0], rows)]


def _sum_up(
    out: Tensor,
    z: Tensor,
    *,
    delta: Tensor | None = None,
    entropy: bool = False,
    argmax: bool = False,
    label: Tensor | None = None,
) -> None:
    """Write one side's sums of the logits `z` `[R, V_local]` into `out` `[R, 6]`."""
    if z.shape[1] == 0:
        out[:, MAX] = FLOOR
        return
    maximum = z.amax(1)
    shifted = z - maximum[:, None]
    e = shifted.exp()
    out[:, MAX], out[:, SUM] = maximum, e.sum(1)
    if delta is not None:
        out[:, DELTA] = torch.linalg.vecdot(e, delta)
    if entropy:
        out[:, ENTROPY] = torch.linalg.vecdot(e, shifted)
    if argmax:
        out[:, ARGMAX] = z.argmax(1).to(z.dtype)
    if label is not None:
        logit = z.gather(1, label.clamp(min=0)[:, None]).squeeze(1)
        out[:, LABEL] = logit.masked_fill(label < 0, 0.0)


def _value_and_extra(spec: Divergence, terms: _Terms) -> Tensor:
    p, q, difference, r, _ = terms
    if spec.name == "jsd":
        beta = spec.beta
        from_teacher, from_student = _mixture_log_ratios(r, beta)
        # m - p = (1 - beta) (q - p) and m - q = beta (p - q)
        value = beta * _bregman(p, (1.0 - beta) * difference, from_teacher).sum(1)
        value += (1.0 - beta) * _bregman(q, -beta * difference, from_student).sum(1)
        return torch.stack([value, (beta - 1.0) * torch.linalg.vecdot(q, from_student)], dim=1)
    assert spec.entry_clip is not None
    excess, capped = _entry_excess(p, r, spec.entry_clip)
    value = _bregman(p, difference, r).sum(1) - excess.sum(1)
    return torch.stack([value, torch.where(capped, p, 0.0).sum(1)], dim=1)


def _value(spec: Divergence, terms: _Terms) -> Tensor:
    """Return the values `[R]` of a divergence without `extra`."""
    p, q, difference, r, _ = terms
    if spec.name == "forward_kl":
        return _bregman(p, difference, r).sum(1)
    backward = _bregman(q, -difference, -r).sum(1)
    if spec.name == "reverse_kl":
        return backward
    return spec.beta * _bregman(p, difference, r).sum(1) + (1.0 - spec.beta) * backward


def _gradient(spec: Divergence, terms: _Terms, extra: Tensor | None) -> Tensor:
    """Return the gradient `[R, V_local]` with respect to the student's logits; may overwrite `terms`."""
    p, q, difference, r, centred = terms
    if spec.name == "jsd":
        assert extra is not None
        pull = _mixture_log_ratios(r, spec.beta)[1].mul_(spec.beta - 1.0)
        return pull.sub_(extra).mul_(q)
    if spec.name == "forward_kl":
        if spec.entry_clip is not None and extra is not None:
            # Capped entries leave the sum: their p no longer pulls, and q is pulled by the rest only.
            capped = _entry_excess(p, r, spec.entry_clip)[1]
            difference += torch.where(capped, p, 0.0) - q * extra
        return difference
    assert centred is not None
    backward = centred.mul_(q)
    if spec.name == "reverse_kl":
        return backward
    return difference.mul_(spec.beta).add_(backward, alpha=1.0 - spec.beta)


def _bregman(p: Tensor, difference: Tensor, r: Tensor) -> Tensor:
    """Return `p (exp(r) - 1 - r) = difference - p r` for `r = log(q / p)` and `difference = q - p`.

    Non-negative, and relatively exact for every r.
    """
    near = r.clamp(-_SERIES_RADIUS, _SERIES_RADIUS)
    degree = _SERIES_DEGREE[r.dtype]
    series = near.new_full((), 1.0 / math.factorial(degree))
    for power in range(degree - 1, 1, -1):
        series = torch.addcmul(near.new_full((), 1.0 / math.factorial(power)), series, near)
    series = series.mul_(near).mul_(near).mul_(p)
    far = torch.addcmul(difference, p, r, value=-1.0)
    # A weight of 0 or 1 selects exactly; torch.where takes ten times as long on a CPU.
    is_near = torch.eq(r, near, out=near)
    return torch.lerp(far, series, is_near)


def _entry_excess(p: Tensor, r: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Return how far each entry p log(p / q) lies above the clip, and which entries do."""
    excess = (-p * r).sub_(clip)
    capped = excess >= 0
    return excess.clamp_(min=0.0), capped


def _mixture_log_ratios(r: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return log(m / p) and log(m / q) for m = beta p + (1 - beta) q, from r alone: p or q may have underflowed."""
    # m over the larger of p and q, so that nothing overflows; beta where q is the larger, else 1 - beta
    share = r.sign().mul_(beta - 0.5).add_(0.5)
    log = r.abs().neg_().expm1_().mul_(share).log1p_()
    return log + r.clamp(min=0.0), log - r.clamp(max=0.0)
