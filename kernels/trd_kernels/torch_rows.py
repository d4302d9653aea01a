"""Row kernels in plain torch: the default on a CPU, the yardstick on a GPU. Any floating dtype.

Values are sums of terms that are each non-negative (the linear part `sum(q - p) = 0` is added to every term), so
neither a row nor a sum over ranks cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trd_kernels.divergence import Divergence, RowNorms
from trd_kernels.row_kernels import Sums, WantedSums
from trd_kernels.softmax_sums import FLOOR
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

    def softmax_sums(self, z_student: Tensor, z_teacher: Tensor, wanted: WantedSums, scale: float = 1.0) -> Sums:
        """See `RowKernels`."""

        def tile_sums(t: slice) -> Sums:
            zs, zt = z_student[t], z_teacher[t]
            if scale != 1.0:
                zs, zt = zs * scale, zt * scale
            delta = zs - zt if wanted.student_delta or wanted.teacher_delta else None
            student = _side_sums(
                zs, delta if wanted.student_delta else None, entropy=wanted.student_entropy, argmax=wanted.argmax
            )
            teacher = _side_sums(
                zt, delta if wanted.teacher_delta else None, entropy=wanted.teacher_entropy, argmax=wanted.argmax
            )
            return _named("student", student) | _named("teacher", teacher)

        return _over_tiles(tile_sums, z_student)

    def largest(self, z: Tensor, k: int) -> Tensor:
        """See `RowKernels`."""
        return _over_tiles(lambda t: {"largest": largest_logits(z[t], k)}, z)["largest"]

    def remove_outside(self, support: Support, z_student: Tensor, z_teacher: Tensor, *, both: bool) -> None:
        """See `RowKernels`."""
        for t in _tiles(z_student):
            outside = ~_inside(support, z_teacher, t)
            z_teacher[t].masked_fill_(outside, FLOOR)
            if both:
                z_student[t].masked_fill_(outside, FLOOR)

    def outside_sums(self, support: Support, z_student: Tensor, z_teacher: Tensor) -> Sums:
        """See `RowKernels`."""

        def tile_sums(t: slice) -> Sums:
            inside = _inside(support, z_teacher, t)
            student, teacher = (_side_sums(z[t].masked_fill(inside, FLOOR)) for z in (z_student, z_teacher))
            return _named("student", student) | _named("teacher", teacher)

        return _over_tiles(tile_sums, z_student)

    def reshape_outside(self, support: Support, z_student: Tensor, z_teacher: Tensor, shift: Tensor) -> None:
        """See `RowKernels`."""
        for t in _tiles(z_student):
            inside = _inside(support, z_teacher, t)
            z_teacher[t] = torch.where(inside, z_teacher[t], z_student[t] - shift[t])

    def extra(self, spec: Divergence, z_student: Tensor, z_teacher: Tensor, norms: RowNorms) -> Sums:
        """See `RowKernels`."""
        return _over_tiles(lambda t: _row_extra(spec, z_student[t], z_teacher[t], norms.rows(t)), z_student)

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


def _over_tiles(function: Callable[[slice], Sums], z: Tensor) -> Sums:
    parts = [function(t) for t in _tiles(z)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _inside(support: Support, z_teacher: Tensor, tile: slice) -> Tensor:
    """Return the columns `[R, V_local]` of the rows `tile` that belong to the support."""
    z, threshold, quota = z_teacher[tile], support.threshold[tile, None], support.quota[tile, None]
    tied = z == threshold
    return (z > threshold) | (tied & (tied.cumsum(1, dtype=torch.int32) <= quota))


def _side_sums(z: Tensor, delta: Tensor | None = None, *, entropy: bool = False, argmax: bool = False) -> Sums:
    if z.shape[1] == 0:
        empty = z.new_zeros(z.shape[0])
        wanted = {"delta": delta is not None, "entropy": entropy, "argmax": argmax}
        return {"max": empty + FLOOR, "sum": empty} | {name: empty for name, on in wanted.items() if on}
    maximum, index = z.max(dim=1)
    shifted = z - maximum[:, None]
    e = shifted.exp()
    sums = {"max": maximum, "sum": e.sum(1)}
    if delta is not None:
        sums["delta"] = torch.linalg.vecdot(e, delta)
    if entropy:
        sums["entropy"] = torch.linalg.vecdot(e, shifted)
    if argmax:
        sums["argmax"] = index.to(z.dtype)
    return sums


def _named(side: str, sums: Sums) -> Sums:
    return {f"{side}.{name}": x for name, x in sums.items()}


def _row_extra(spec: Divergence, z_student: Tensor, z_teacher: Tensor, norms: RowNorms) -> Sums:
    p, q, r = _probabilities(z_student, z_teacher, norms)
    if spec.name == "jsd":
        from_teacher, from_student = _mixture_log_ratios(r, spec.beta)
        m = spec.beta * p + (1.0 - spec.beta) * q
        value = spec.beta * _bregman(p, m, from_teacher).sum(1)
        value += (1.0 - spec.beta) * _bregman(q, m, from_student).sum(1)
        return {"extra": (spec.beta - 1.0) * torch.linalg.vecdot(q, from_student), "value": value}
    assert spec.entry_clip is not None
    excess, capped = _entry_excess(p, r, spec.entry_clip)
    return {"extra": torch.where(capped, p, 0.0).sum(1), "value": _bregman(p, q, r).sum(1) - excess.sum(1)}


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
