"""One call of the operator against its definition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu.data import STATS, Problem
from gpu.dense import Dense, Expected, device_product, exact_product
from gpu.harness import Context, Rows

# Relative Frobenius errors of gradients; bf16 is that of one rounding of the logits' gradient and one of the result.
GRADIENT_LIMIT = {torch.bfloat16: 4e-3, torch.float32: 2e-5}
VALUE_LIMIT = 1e-5
# fp32 logits of 80 nats are 8e-6 apart.
COARSE_LIMIT = 2e-4
# How much worse than torch's own products, given exact row math, the operator may be.
MARGIN = 1.5


@dataclass(frozen=True, slots=True)
class Result:
    """What one call returned."""

    loss: Tensor
    token_loss: Tensor
    input_grad: Tensor
    weight_grad: Tensor
    stats: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by name."""
        named = {"loss": self.loss, "token loss": self.token_loss, "dH": self.input_grad, "dW": self.weight_grad}
        return named | self.stats

    def cpu(self) -> Result:
        """Return a copy in main memory."""
        moved = {name: x.cpu() for name, x in self.stats.items()}
        tensors = (x.cpu() for x in (self.loss, self.token_loss, self.input_grad, self.weight_grad))
        return Result(*tensors, moved)


def call(context: Context, problem: Problem, **options: Any) -> Result:
    """Run forward and backward with a trainable head; the problem's tensors are defaults that options override."""
    hidden = problem.student_input.detach().requires_grad_()
    head = problem.student_weight.detach().requires_grad_()
    arguments = {
        "vocab_size": problem.vocab_size,
        "token_weight": problem.token_weight,
        "labels": problem.labels,
        "token_set": problem.token_set,
        "stats": STATS,
    }
    out = context.operator(hidden, head, problem.teacher_input, problem.teacher_weight, **arguments | options)
    out.loss.backward()
    return Result(
        loss=out.loss.detach(),
        token_loss=out.token_loss,
        input_grad=hidden.grad,
        weight_grad=head.grad,
        stats=out.stats,
    )


def error(got: Tensor, want: Tensor) -> float:
    """Return the relative Frobenius error (absolute where `want` is 0), NaN unless NaNs are where they belong."""
    if got.shape != want.shape or not torch.equal(got.isnan(), want.isnan()):
        return math.nan
    got, want = got.double().nan_to_num(), want.double().nan_to_num()
    norm = want.norm()
    return float((got - want).norm() / norm if norm > 0 else (got - want).norm())


def compare(rows: Rows, what: str, got: Result, want: Expected, yardstick: Expected, *, coarse: bool = False) -> None:
    """Add the errors of one call.

    Limits are fixed ones, raised where torch's own products (the yardstick) cost more; for bf16 gradients `MARGIN`
    times the yardstick is a second limit. `coarse` is for logits of a size at which fp32 itself is coarse.
    """
    dtype = got.input_grad.dtype
    fixed = COARSE_LIMIT if coarse and dtype == torch.float32 else GRADIENT_LIMIT[dtype]
    strictest = min if dtype == torch.bfloat16 else max
    for name, x, exact, by_torch in (
        ("dH", got.input_grad, want.input_grad, error(yardstick.input_grad, want.input_grad)),
        ("dW", got.weight_grad, want.weight_grad, error(yardstick.weight_grad, want.weight_grad)),
    ):
        limit = strictest(fixed, MARGIN * by_torch)
        rows.at_most(f"{what} {name}", error(x, exact), limit, note=f"torch {by_torch:.2g}")

    fixed = COARSE_LIMIT if coarse else VALUE_LIMIT
    limit = max(fixed, MARGIN * error(yardstick.token_loss, want.token_loss))
    rows.at_most(f"{what} token loss", error(got.token_loss, want.token_loss), limit)
    # Clipped values have both signs: a sum of them may be far smaller than its parts.
    rows.at_most(f"{what} loss", (got.loss - want.loss).abs() / want.size.clamp(min=1e-30), limit)
    for name, exact in want.stats.items():
        allowed = max(fixed, MARGIN * error(yardstick.stats[name], exact))
        rows.at_most(f"{what} {name}", error(got.stats[name], exact), allowed)


def references(problem: Problem) -> tuple[Dense, Dense]:
    """Return the exact definition and the yardstick of rounding errors."""
    return Dense(problem, exact_product), Dense(problem, device_product)
