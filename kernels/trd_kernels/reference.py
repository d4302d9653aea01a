"""The dense definition of every option, for tests and for reading. Materialises `[N, V]`; single process."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trd_kernels.output import LinearKLDivOutput


def linear_kl_div_reference(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    vocab_size: int,
    token_weight: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_temperature_sq: bool = False,
    teacher_top_k: int = 0,
    top_k_mode: str = "renorm_both",
    token_clip: float | None = None,
    entry_clip: float | None = None,
    labels: Tensor | None = None,
    token_set: Tensor | None = None,
    stats: Sequence[str] = (),
    dtype: torch.dtype = torch.float64,
) -> LinearKLDivOutput:
    """Return what `linear_kl_div` returns, by textbook formulas in `dtype`; autograd gives the gradients.

    Arguments as there; the weights hold all vocabulary rows.
    """
    raw_student = (student_input.to(dtype) @ student_weight.to(dtype).T)[:, :vocab_size]
    raw_teacher = (teacher_input.to(dtype) @ teacher_weight.to(dtype).T)[:, :vocab_size].detach()
    log_q = (raw_student / temperature).log_softmax(1)
    log_p = (raw_teacher / temperature).log_softmax(1)
    if teacher_top_k > 0:
        log_p, log_q = _restrict(log_p, log_q, teacher_top_k, top_k_mode)
    token_loss = _divergence(log_p, log_q, divergence, beta, entry_clip)
    if token_clip is not None:
        token_loss = torch.where(token_loss < token_clip, token_loss, token_clip)
    if scale_by_temperature_sq:
        token_loss = token_loss * temperature**2
    weight = torch.ones_like(token_loss) if token_weight is None else token_weight.to(dtype)
    kept = weight != 0
    loss = (weight * token_loss)[kept].sum()
    observed = _statistics(raw_student.detach(), raw_teacher, labels, token_set, stats)
    return LinearKLDivOutput(loss, token_loss.detach() * kept, {name: x * kept for name, x in observed.items()})


def _restrict(log_p: Tensor, log_q: Tensor, k: int, mode: str) -> tuple[Tensor, Tensor]:
    """Return log-probabilities `[N, k]` (`[N, k + 1]` with a tail bucket, `[N, V]` for `renorm_teacher`)."""
    order = log_p.argsort(dim=1, descending=True, stable=True)
    inside, outside = order[:, :k], order[:, k:]
    head_p, head_q = log_p.gather(1, inside), log_q.gather(1, inside)
    if mode == "renorm_both":
        return head_p.log_softmax(1), head_q.log_softmax(1)
    if mode == "renorm_teacher":
        return torch.full_like(log_p, -torch.inf).scatter(1, inside, head_p.log_softmax(1)), log_q
    if outside.shape[1] == 0:
        return head_p, head_q
    tails = (x.gather(1, outside).logsumexp(1, keepdim=True) for x in (log_p, log_q))
    tail_p, tail_q = tails
    return torch.cat([head_p, tail_p], 1), torch.cat([head_q, tail_q], 1)


def _divergence(log_p: Tensor, log_q: Tensor, name: str, beta: float, entry_clip: float | None) -> Tensor:
    if name == "jsd":
        mixture = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        return beta * _kl(log_p, mixture) + (1 - beta) * _kl(log_q, mixture)
    if name == "mixed":
        return beta * _kl(log_p, log_q) + (1 - beta) * _kl(log_q, log_p)
    if name == "reverse_kl":
        return _kl(log_q, log_p)
    return _kl(log_p, log_q, entry_clip)


def _kl(log_a: Tensor, log_b: Tensor, entry_clip: float | None = None) -> Tensor:
    a = log_a.exp()
    # 0 log 0 = 0; the inner `where` keeps infinities out of the gradient.
    entries = torch.where(a > 0, a * (torch.where(a > 0, log_a, 0.0) - log_b), 0.0)
    if entry_clip is not None:
        entries = torch.where(entries < entry_clip, entries, entry_clip)
    return entries.sum(1)


def _statistics(
    z_student: Tensor, z_teacher: Tensor, labels: Tensor | None, token_set: Tensor | None, names: Sequence[str]
) -> dict[str, Tensor]:
    log_q, log_p = z_student.log_softmax(1), z_teacher.log_softmax(1)
    out = {}
    for name in names:
        if name == "argmax_match":
            out[name] = (z_student.argmax(1) == z_teacher.argmax(1)).to(log_p.dtype)
        elif name == "teacher_mass":
            assert token_set is not None
            out[name] = log_p[:, token_set.unique()].exp().sum(1)
        else:
            side, quantity = name.split("_")
            logs = log_q if side == "student" else log_p
            if quantity == "entropy":
                out[name] = -(logs.exp() * logs).sum(1)
            else:
                assert labels is not None
                known = (labels >= 0) & (labels < logs.shape[1])
                picked = logs.gather(1, labels.masked_fill(~known, 0)[:, None]).squeeze(1)
                out[name] = picked.masked_fill(~known, torch.nan)
    return out
