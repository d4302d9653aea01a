"""What the operator must return, by definition: whole logits, explicit probabilities, autograd. Imports none of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu.data import Problem

Product = Callable[[Tensor, Tensor], Tensor]


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b` in fp64."""
    return a.double() @ b.double()


def device_product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b` with operands as they are and an fp32 result, by the device's own matrix product."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Loss, token losses `[N]`, gradients and statistics; 0 for tokens of weight 0."""

    loss: Tensor
    size: Tensor
    """Sum of the absolute values of the loss's terms."""
    token_loss: Tensor
    input_grad: Tensor
    weight_grad: Tensor
    stats: dict[str, Tensor]


class Dense:
    """The logits of a problem's kept tokens, from which every mode follows.

    With `exact_product` the reference; with `device_product` the best that torch does with operands in the inputs'
    dtype: fp32 logits, all row math in fp64, the logits' gradient and the results rounded once. The yardstick.
    """

    def __init__(self, problem: Problem, product: Product) -> None:
        self.problem, self.product = problem, product
        self.kept = problem.token_weight.nonzero().squeeze(1)
        valid = slice(problem.vocab_size)
        self.hidden, self.head = problem.student_input[self.kept], problem.student_weight[valid]
        self.z_student = product(self.hidden, self.head.T).double()
        self.z_teacher = product(problem.teacher_input[self.kept], problem.teacher_weight[valid].T).double()

    def __call__(self, **options: Any) -> Expected:
        """Evaluate one mode; options as the operator's."""
        z = self.z_student.clone().requires_grad_()
        token_loss = divergence(z, self.z_teacher, **options)
        terms = self.problem.token_weight[self.kept].double() * token_loss
        loss = terms.sum()
        (g,) = torch.autograd.grad(loss, z)
        g = self._rounded(g)
        weight_grad = torch.zeros_like(self.problem.student_weight, dtype=torch.float64)
        weight_grad[: self.problem.vocab_size] = self._rounded(self.product(g.T, self.hidden))
        unclipped = options | {"token_clip": None, "scale_by_temperature_sq": False}
        stats = self._statistics() | {"divergence": divergence(z.detach(), self.z_teacher, **unclipped)}
        return Expected(
            loss=loss.detach(),
            size=terms.detach().abs().sum(),
            token_loss=self._spread(token_loss.detach()),
            input_grad=self._spread(self._rounded(self.product(g, self.head))),
            weight_grad=weight_grad,
            stats={name: self._spread(x) for name, x in stats.items()},
        )

    def mean_kl(self) -> float:
        """Return the mean forward KL of the kept tokens, in nats."""
        return float(divergence(self.z_student, self.z_teacher).mean())

    def _rounded(self, x: Tensor) -> Tensor:
        """Round to the inputs' dtype where products do."""
        return x if self.product is exact_product else x.to(self.hidden.dtype)

    def _spread(self, x: Tensor) -> Tensor:
        """Put rows of the kept tokens at their places among all tokens."""
        out = x.new_zeros(len(self.problem.token_weight), *x.shape[1:])
        out[self.kept] = x
        return out

    def _statistics(self) -> dict[str, Tensor]:
        log_q, log_p = self.z_student.log_softmax(1), self.z_teacher.log_softmax(1)
        labels = self.problem.labels[self.kept, None]
        known = (labels >= 0) & (labels < self.problem.vocab_size)
        out = {}
        for side, logs in (("student", log_q), ("teacher", log_p)):
            picked = logs.gather(1, labels.masked_fill(~known, 0)).masked_fill(~known, math.nan)
            out[f"{side}_logprob"] = picked.squeeze(1)
            out[f"{side}_entropy"] = -(logs.exp() * logs).sum(1)
        out["argmax_match"] = (log_q.argmax(1) == log_p.argmax(1)).double()
        out["teacher_mass"] = log_p[:, self.problem.token_set.unique()].exp().sum(1)
        return out


def divergence(
    z_student: Tensor,
    z_teacher: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_temperature_sq: bool = False,
    teacher_top_k: int = 0,
    top_k_mode: str = "renorm_both",
    token_clip: float | None = None,
    entry_clip: float | None = None,
) -> Tensor:
    """Return each row's divergence between the softmaxes of two blocks of logits `[N, V]`."""
    log_q, log_p = (z_student / temperature).log_softmax(1), (z_teacher / temperature).log_softmax(1)
    if teacher_top_k:
        log_q, log_p = _on_support(log_q, log_p, z_teacher.topk(teacher_top_k).indices, top_k_mode)
    p, q = log_p.exp(), log_q.exp()
    if divergence == "jsd":
        log_m = (beta * p + (1 - beta) * q).log()
        entries = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
    else:
        forward_share = {"forward_kl": 1.0, "reverse_kl": 0.0, "mixed": beta}[divergence]
        entries = (forward_share * p - (1 - forward_share) * q) * (log_p - log_q)
    if entry_clip is not None:
        entries = entries.clamp(max=entry_clip)
    value = entries.sum(1)
    if token_clip is not None:
        value = value.clamp(max=token_clip)
    return value * temperature**2 if scale_by_temperature_sq else value


def _on_support(log_q: Tensor, log_p: Tensor, support: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    inside_q, inside_p = log_q.gather(1, support), log_p.gather(1, support)
    if mode == "tail_bucket":
        outside = torch.ones_like(log_p, dtype=torch.bool).scatter(1, support, False)
        tail_q, tail_p = (x.masked_fill(~outside, -math.inf).logsumexp(1, keepdim=True) for x in (log_q, log_p))
        return torch.cat([inside_q, tail_q], 1), torch.cat([inside_p, tail_p], 1)
    return inside_q.log_softmax(1) if mode == "renorm_both" else inside_q, inside_p.log_softmax(1)
