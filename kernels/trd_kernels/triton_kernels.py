"""The Triton kernels: one program works on `ROWS` rows and walks over their columns a block at a time.

A block is a tile `[ROWS, LANES, VECTOR]` of consecutive columns; a thread loads a vector at once. Running maxima and
sums are kept per lane and merged once at the end of the row, so the order of additions depends on the shape alone:
no atomics, the same bits every run. Both sides go through the same arithmetic, so equal heads give exactly 0.
Columns beyond the row read as `FLOOR`, which no sum over a row with a real logit sees.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trd_kernels.divergence import DIVERGENCES
from trd_kernels.softmax_sums import FLOOR

VECTOR = 4
"""16 bytes of float32, the widest load of a thread."""

_FLOOR = tl.constexpr(FLOOR)
_LAST = tl.constexpr(2147483647)
_FORWARD, _REVERSE, _MIXED = (tl.constexpr(DIVERGENCES.index(name)) for name in ("forward_kl", "reverse_kl", "mixed"))
_VECTOR = tl.constexpr(VECTOR)


@triton.jit
def _phi_over_square(r):
    """Return `(exp(r) - 1 - r) / r^2` for |r| < 1, to 4e-8: Taylor's series."""
    s = 2.7557319e-07 * r + 2.7557319e-06
    s = s * r + 2.4801587e-05
    s = s * r + 1.9841270e-04
    s = s * r + 1.3888889e-03
    s = s * r + 8.3333333e-03
    s = s * r + 4.1666667e-02
    s = s * r + 1.6666667e-01
    return s * r + 0.5


@triton.jit
def _bregman(p, q, r):
    """Return `p (exp(r) - 1 - r) = q - p - p r` for `r = log(q / p)`: without cancellation where q is close to p."""
    return tl.where(tl.abs(r) < 1.0, p * (r * r * _phi_over_square(r)), q - p - p * r)


@triton.jit
def _difference(p, q, r):
    """Return `q - p` for `r = log(q / p)`, without cancellation where they are close."""
    return tl.where(tl.abs(r) < 1.0, p * (r + r * r * _phi_over_square(r)), q - p)


@triton.jit
def _mixture_log_ratios(r, beta, NEAR_HALF: tl.constexpr):
    """Return log(m / p) and log(m / q) for m = beta p + (1 - beta) q, from r alone: p or q may have underflowed.

    `NEAR_HALF` promises 0.25 <= beta <= 0.75.
    """
    x = -tl.abs(r)  # m over the larger of p and q, so that nothing overflows
    expm1 = tl.where(x > -1.0, x + x * x * _phi_over_square(x), tl.exp(x) - 1.0)
    x = tl.where(r > 0.0, beta, 1.0 - beta) * expm1
    # log(1 + x) = 2 artanh(x / (2 + x)), a series: near zero 1 + x would round x away. One doubling of 1 + x serves
    # down to a quarter; a device library's logarithm costs more than all the rest.
    far = x < -0.5
    y = tl.where(far, 2.0 * x + 1.0, x)
    s = y / (2.0 + y)
    t = s * s
    series = 1.0 + t * (
        0.33333333 + t * (0.2 + t * (0.14285714 + t * (0.11111111 + t * (0.09090909 + t * 0.07692308))))
    )
    log = 2.0 * s * series - tl.where(far, 0.69314718, 0.0)
    if not NEAR_HALF:
        log = tl.where(x < -0.75, tl.log2(1.0 + x) * 0.69314718, log)
    return log + tl.maximum(r, 0.0), log - tl.minimum(r, 0.0)


@triton.jit
def _columns(start, LANES: tl.constexpr):
    """Return the column numbers `[1, LANES, VECTOR]` of the block that begins at `start`."""
    lane = tl.arange(0, LANES)[:, None] * _VECTOR + tl.arange(0, _VECTOR)[None, :]
    return (start + lane)[None, :, :]


@triton.jit
def _offsets(rows, cols, row_stride):
    return rows[:, None, None].to(tl.int64) * row_stride + cols


@triton.jit
def _push(z, delta, cols, m, s, d, h, best, DELTA: tl.constexpr, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr):
    """Take one block into the running values of each lane: maximum, sum, delta, entropy, column of the maximum."""
    block_max = tl.max(z, axis=2)
    top = tl.maximum(m, block_max)
    factor = tl.exp(m - top)
    shifted = z - top[:, :, None]
    e = tl.exp(shifted)
    if ARGMAX:
        first = tl.min(tl.where(z == block_max[:, :, None], cols, _LAST), axis=2)
        best = tl.where(block_max > m, first, best)
    if ENTROPY:
        h = (h + s * (m - top)) * factor + tl.sum(e * shifted, axis=2)
    if DELTA:
        d = d * factor + tl.sum(e * delta, axis=2)
    return top, s * factor + tl.sum(e, axis=2), d, h, best


@triton.jit
def _store_merged(
    out, z_at_label, rows, num_rows, m, s, d, h, best,
    SIDE: tl.constexpr, DELTA: tl.constexpr, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr,
):  # fmt: skip
    """Merge the lanes and store quantity k of side `SIDE` at `out[rows, k, SIDE]`."""
    mask = rows < num_rows
    out += rows * 12 + SIDE
    top = tl.max(m, axis=1)
    factor = tl.exp(m - top[:, None])
    tl.store(out, top, mask=mask)
    tl.store(out + 2, tl.sum(s * factor, axis=1), mask=mask)
    if DELTA:
        tl.store(out + 4, tl.sum(d * factor, axis=1), mask=mask)
    if ENTROPY:
        tl.store(out + 6, tl.sum((h + s * (m - top[:, None])) * factor, axis=1), mask=mask)
    if ARGMAX:
        first = tl.min(tl.where(m == top[:, None], best, _LAST), axis=1)
        tl.store(out + 8, first.to(tl.float32), mask=mask)
    tl.store(out + 10, z_at_label, mask=mask)


@triton.jit
def _at_label(z_ptr, rows, label, mask, row_stride, scale):
    return tl.load(z_ptr + rows.to(tl.int64) * row_stride + label, mask=mask & (label >= 0), other=0.0) * scale


@triton.jit(do_not_specialize=["num_rows"])
def softmax_sums_kernel(
    zs_ptr, zt_ptr, out_ptr, label_ptr, num_rows, num_columns, stride_s, stride_t, scale,
    DELTA_S: tl.constexpr, DELTA_T: tl.constexpr, ENTROPY_S: tl.constexpr, ENTROPY_T: tl.constexpr,
    ARGMAX: tl.constexpr, LABEL: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Sums of both sides: `out[num_rows, 6, 2]`."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < num_rows
    ms = tl.full((ROWS, LANES), _FLOOR, tl.float32)
    ss = tl.zeros((ROWS, LANES), tl.float32)
    ds, hs, bs = ss, ss, tl.full((ROWS, LANES), _LAST, tl.int32)
    mt, st, dt, ht, bt = ms, ss, ss, ss, bs
    for start in range(0, num_columns, LANES * _VECTOR):
        cols = _columns(start, LANES)
        ok = mask[:, None, None] & (cols < num_columns)
        zs = tl.load(zs_ptr + _offsets(rows, cols, stride_s), mask=ok, other=_FLOOR) * scale
        zt = tl.load(zt_ptr + _offsets(rows, cols, stride_t), mask=ok, other=_FLOOR) * scale
        ms, ss, ds, hs, bs = _push(zs, zs - zt, cols, ms, ss, ds, hs, bs, DELTA_S, ENTROPY_S, ARGMAX)
        mt, st, dt, ht, bt = _push(zt, zs - zt, cols, mt, st, dt, ht, bt, DELTA_T, ENTROPY_T, ARGMAX)
    label_s, label_t = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    if LABEL:
        label = tl.load(label_ptr + rows, mask=mask, other=-1)
        label_s = _at_label(zs_ptr, rows, label, mask, stride_s, scale)
        label_t = _at_label(zt_ptr, rows, label, mask, stride_t, scale)
    _store_merged(out_ptr, label_s, rows, num_rows, ms, ss, ds, hs, bs, 0, DELTA_S, ENTROPY_S, ARGMAX)
    _store_merged(out_ptr, label_t, rows, num_rows, mt, st, dt, ht, bt, 1, DELTA_T, ENTROPY_T, ARGMAX)


@triton.jit(do_not_specialize=["num_rows"])
def spread_kernel(
    z_ptr, out_ptr, max_ptr, factor_ptr, num_rows, num_columns, stride_z, stride_out,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """`factor * exp(z - max)` of each row."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < num_rows
    top = tl.load(max_ptr + rows, mask=mask, other=0.0)[:, None, None]
    factor = tl.load(factor_ptr + rows, mask=mask, other=0.0)[:, None, None]
    for start in range(0, num_columns, LANES * _VECTOR):
        cols = _columns(start, LANES)
        ok = mask[:, None, None] & (cols < num_columns)
        z = tl.load(z_ptr + _offsets(rows, cols, stride_z), mask=ok, other=_FLOOR)
        spread = factor * tl.exp(z - top)
        tl.store(out_ptr + _offsets(rows, cols, stride_out), spread.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_rows"])
def divergence_kernel(
    zs_ptr, zt_ptr, grad_ptr, norms_ptr, out_ptr, num_rows, num_columns, stride_s, stride_t, stride_g, beta, clip,
    KIND: tl.constexpr, CLIP: tl.constexpr, VALUE: tl.constexpr, EXTRA: tl.constexpr, GRADIENT: tl.constexpr,
    NEAR_HALF: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What is asked for of each row: value and extra row sum, `out[num_rows, 2]`, and the gradient.

    `norms[num_rows, 8]`: maximum and sum of the student and of the teacher, log-ratio, mean delta, extra, weight.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < num_rows
    at = norms_ptr + rows * 8
    max_s = tl.load(at, mask=mask, other=0.0)[:, None, None]
    max_t = tl.load(at + 1, mask=mask, other=0.0)[:, None, None]
    per_s = 1.0 / tl.load(at + 2, mask=mask, other=1.0)[:, None, None]
    per_t = 1.0 / tl.load(at + 3, mask=mask, other=1.0)[:, None, None]
    log_ratio = tl.load(at + 4, mask=mask, other=0.0)[:, None, None]
    mean = tl.load(at + 5, mask=mask, other=0.0)[:, None, None]
    extra = tl.load(at + 6, mask=mask, other=0.0)[:, None, None]
    weight = tl.load(at + 7, mask=mask, other=0.0)[:, None, None]
    value = tl.zeros((ROWS, LANES), tl.float32)
    total = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, num_columns, LANES * _VECTOR):
        cols = _columns(start, LANES)
        ok = mask[:, None, None] & (cols < num_columns)
        zs = tl.load(zs_ptr + _offsets(rows, cols, stride_s), mask=ok, other=_FLOOR)
        zt = tl.load(zt_ptr + _offsets(rows, cols, stride_t), mask=ok, other=_FLOOR)
        q = tl.exp(zs - max_s) * per_s
        p = tl.exp(zt - max_t) * per_t
        delta = zs - zt
        r = delta - log_ratio
        if KIND == _FORWARD:
            terms = _bregman(p, q, r)
            g = _difference(p, q, r)
            if CLIP:
                entry = -p * r
                capped = entry >= clip
                terms -= tl.where(capped, entry - clip, 0.0)
                if EXTRA:
                    total += tl.sum(tl.where(capped, p, 0.0), axis=2)
                g += tl.where(capped, p, 0.0) - q * extra
        elif KIND == _REVERSE:
            terms = _bregman(q, p, -r)
            g = q * (delta - mean)
        elif KIND == _MIXED:
            terms = beta * _bregman(p, q, r) + (1.0 - beta) * _bregman(q, p, -r)
            g = beta * _difference(p, q, r) + (1.0 - beta) * q * (delta - mean)
        else:
            from_teacher, from_student = _mixture_log_ratios(r, beta, NEAR_HALF)
            m = beta * p + (1.0 - beta) * q
            terms = beta * _bregman(p, m, from_teacher) + (1.0 - beta) * _bregman(q, m, from_student)
            pull = (beta - 1.0) * q * from_student
            if EXTRA:
                total += tl.sum(pull, axis=2)
            g = pull - q * extra
        if VALUE:
            value += tl.sum(terms, axis=2)
        if GRADIENT:
            tl.store(grad_ptr + _offsets(rows, cols, stride_g), (g * weight).to(grad_ptr.dtype.element_ty), mask=ok)
    if VALUE:
        tl.store(out_ptr + rows * 2, tl.sum(value, axis=1), mask=mask)
    if EXTRA:
        tl.store(out_ptr + rows * 2 + 1, tl.sum(total, axis=1), mask=mask)
