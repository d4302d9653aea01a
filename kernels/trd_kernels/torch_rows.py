"""Row kernels in plain torch: the default on a CPU, the yardstick on a GPU. Any floating dtype.

Values are sums of terms that are each non-negative (the linear part `sum(q - p) = 0` is added to every term), so
neither a row nor a sum over ranks cancels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trd_kernels.divergence import Divergence, RowNorms
from trd_kernels.row_kernels import WantedSums
from trd_kernels.softmax_sums import ARGMAX, DELTA, ENTROPY, FLOOR, LABEL, MAX, NUM_SUMS, SUM
from trd_kernels.support import Support, largest_logits

_SERIES_RADIUS = 0.25
_SERIES_DEGREE = {torch.float32: 8, torch.float64: 13}
# Beyond it exp(r) dwarfs 1 + r and could overflow, so q = p * exp(r) is used instead.
_LARGE_RATIO = 20.0

# Row math runs on this fraction of a chunk at a time; its temporaries then add about two more blocks.
_TILES_PER_CHUNK = 8


class TorchRows:
    """Implements `RowKernels` tile by tile."""

    name = "torch"
    logit_copies = 4

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

    def largest(self, z: Tensor, k: int) -> Tensor:
        """See `RowKernels`."""
        return torch.cat([largest_logits(z[t], k) for t in _tiles(z)])

    def remove_outside(self, support: Support, z_student: Tensor, z_teacher: Tensor, *, both: bool) -> None:
        """See `RowKernels`."""
        for t in _tiles(z_student):
            outside = ~_inside(support, z_teacher, t)
            z_teacher[t].masked_fill_(outside, FLOOR)
            if both:
                z_student[t].masked_fill_(outside, FLOOR)

    def outside_sums(self, support: Support, z_student: Tensor, z_teacher: Tensor) -> Tensor:
        """See `RowKernels`."""
        out = z_student.new_zeros(z_student.shape[0], NUM_SUMS, 2)
        for t in _tiles(z_student):
            inside = _inside(support, z_teacher, t)
            _sum_up(out[t, :, 0], z_student[t].masked_fill(inside, FLOOR))
            _sum_up(out[t, :, 1], z_teacher[t].masked_fill(inside, FLOOR))
        return out

    def reshape_outside(self, support: Support, z_student: Tensor, z_teacher: Tensor, shift: Tensor) -> None:
        """See `RowKernels`."""
        for t in _tiles(z_student):
            inside = _inside(support, z_teacher, t)
            z_teacher[t] = torch.where(inside, z_teacher[t], z_student[t] - shift[t])

    def extra(self, spec: Divergence, z_student: Tensor, z_teacher: Tensor, norms: RowNorms) -> Tensor:
        """See `RowKernels`."""
        return torch.cat([_value_and_extra(spec, z_student[t], z_teacher[t], norms.rows(t)) for t in _tiles(z_student)])

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
            p, q, r = _probabilities(z_student[t], z_teacher[t], norms.rows(t))
            if not spec.needs_extra:
                values.append(_value(spec, p, q, r))
            if gradient is not None and gradient_scale is not None:
                centred = _centred(spec, z_student[t], z_teacher[t], norms.rows(t))
                grad = _gradient(spec, p, q, r, centred, None if extra is None else extra[t])
                torch.mul(grad, gradient_scale[t], out=gradient[t])
        return torch.cat(values) if values else None


def _tiles(z: Tensor) -> list[slice]:
    rows = max(1, -(-z.shape[0] // _TILES_PER_CHUNK))
    return [slice(i, i + rows) for i in range(0, z.shape[0], rows)]


def _inside(support: Support, z_teacher: Tensor, tile: slice) -> Tensor:
    """Return the columns `[R, V_local]` of the rows `tile` that belong to the support."""
    z, threshold, quota = z_teacher[tile], support.threshold[tile, None], support.quota[tile, None]
    tied = z == threshold
    return (z > threshold) | (tied & (tied.cumsum(1, dtype=torch.int32) <= quota))


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
    maximum, index = z.max(dim=1)
    shifted = z - maximum[:, None]
    e = shifted.exp()
    out[:, MAX], out[:, SUM] = maximum, e.sum(1)
    if delta is not None:
        out[:, DELTA] = torch.linalg.vecdot(e, delta)
    if entropy:
        out[:, ENTROPY] = torch.linalg.vecdot(e, shifted)
    if argmax:
        out[:, ARGMAX] = index.to(z.dtype)
    if label is not None:
        logit = z.gather(1, label.clamp(min=0)[:, None]).squeeze(1)
        out[:, LABEL] = logit.masked_fill(label < 0, 0.0)


def _value_and_extra(spec: Divergence, z_student: Tensor, z_teacher: Tensor, norms: RowNorms) -> Tensor:
    p, q, r = _probabilities(z_student, z_teacher, norms)
    if spec.name == "jsd":
        from_teacher, from_student = _mixture_log_ratios(r, spec.beta)
        m = spec.beta * p + (1.0 - spec.beta) * q
        value = spec.beta * _bregman(p, m, from_teacher).sum(1)
        value += (1.0 - spec.beta) * _bregman(q, m, from_student).sum(1)
        return torch.stack([value, (spec.beta - 1.0) * torch.linalg.vecdot(q, from_student)], dim=1)
    assert spec.entry_clip is not None
    excess, capped = _entry_excess(p, r, spec.entry_clip)
    return torch.stack([_bregman(p, q, r).sum(1) - excess.sum(1), torch.where(capped, p, 0.0).sum(1)], dim=1)


def _value(spec: Divergence, p: Tensor, q: Tensor, r: Tensor) -> Tensor:
    """Return the values `[R]` of a divergence without `extra`."""
    if spec.name == "forward_kl":
        return _bregman(p, q, r).sum(1)
    if spec.name == "reverse_kl":
        return _bregman(q, p, -r).sum(1)
    return spec.beta * _bregman(p, q, r).sum(1) + (1.0 - spec.beta) * _bregman(q, p, -r).sum(1)


def _gradient(
    spec: Divergence, p: Tensor, q: Tensor, r: Tensor, centred: Tensor | None, extra: Tensor | None
) -> Tensor:
    """Return the gradient `[R, V_local]` with respect to the student's logits; `centred` is `r - sum q r`."""
    if spec.name == "jsd":
        assert extra is not None
        return q * ((spec.beta - 1.0) * _mixture_log_ratios(r, spec.beta)[1] - extra)
    if spec.name == "forward_kl":
        gradient = q - p
        if spec.entry_clip is not None and extra is not None:
            # Capped entries leave the sum: their p no longer pulls, and q is pulled by the rest only.
            capped = _entry_excess(p, r, spec.entry_clip)[1]
            gradient += torch.where(capped, p, 0.0) - q * extra
        return gradient
    assert centred is not None
    if spec.name == "reverse_kl":
        return centred.mul_(q)
    return (q - p).mul_(spec.beta).add_(centred.mul_(q), alpha=1.0 - spec.beta)


def _probabilities(z_student: Tensor, z_teacher: Tensor, norms: RowNorms) -> tuple[Tensor, Tensor, Tensor]:
    q, p = (
        (z - norms.max[:, i : i + 1]).exp_().div_(norms.total[:, i : i + 1])
        for i, z in enumerate((z_student, z_teacher))
    )
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


def _centred(spec: Divergence, z_student: Tensor, z_teacher: Tensor, norms: RowNorms) -> Tensor | None:
    """Return `r - sum q r` where the gradient needs it: the log-ratio of the sums cancels and is left out."""
    return None if norms.student_delta is None else (z_student - z_teacher).sub_(norms.student_delta)


def _entry_excess(p: Tensor, r: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Return how far each entry p log(p / q) lies above the clip, and which entries do."""
    excess = (-p * r).sub_(clip)
    capped = excess >= 0
    return excess.clamp_(min=0.0), capped


def _mixture_log_ratios(r: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return log(m / p) and log(m / q) for m = beta p + (1 - beta) q, from r alone: p or q may have underflowed."""
    # m over the larger of p and q, so that nothing overflows
    x = r.abs().neg_().expm1_()
    log = torch.where(r > 0, beta * x, (1.0 - beta) * x).log1p_()
    return log + r.clamp(min=0.0), log - r.clamp(max=0.0)
