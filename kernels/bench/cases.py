"""What is measured: a shape, its data, one objective with a frozen or a trainable head, and the exact answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trd_kernels import linear_kl_div_reference

TOP_K = 64
OBJECTIVES: dict[str, dict[str, Any]] = {  # name -> options of `linear_kl_div`
    "forward_kl": {"divergence": "forward_kl"},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "beta": 0.5},
    "top_k": {"divergence": "forward_kl", "teacher_top_k": TOP_K, "top_k_mode": "renorm_both"},
}
HEADS = ("frozen", "trainable")

LOGIT_STD = 3.0
NOISE = 0.15
EXACT_BLOCK_ROWS = 64
MAX_EXACT_WEIGHT_BYTES = 2**30

Chunk = int | tuple[int, int]
Gradients = tuple[Tensor, ...]
"""dH `[N, Hs]` and, of a trainable head, dW `[V, Hs]`."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One command line."""

    device: str
    dtype: torch.dtype
    tokens: int
    vocab_size: int
    student_hidden: int
    teacher_hidden: int
    seed: int
    threads: int
    workspace_mb: float | None
    chunk: Chunk | None
    compile: bool
    warmup: int
    repeats: int
    error_rows: int


class Heads(NamedTuple):
    """Hidden states `[N, Hs]`, `[N, Ht]` and heads `[V, Hs]`, `[V, Ht]`, in the order of `linear_kl_div`."""

    student_input: Tensor
    student_weight: Tensor
    teacher_input: Tensor
    teacher_weight: Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """The loss of all variants is the sum of the token divergences of `heads` under `objective`."""

    settings: Settings
    objective: str
    head: str
    heads: Heads

    @property
    def is_trainable(self) -> bool:
        """Whether dW is wanted."""
        return self.head == "trainable"

    @property
    def useful_flops(self) -> int:
        """Of both head products, dH and, if wanted, dW; what a variant computes twice counts once."""
        s = self.settings
        student_products = 3 if self.is_trainable else 2
        return 2 * s.tokens * s.vocab_size * (student_products * s.student_hidden + s.teacher_hidden)


def peaked_heads(settings: Settings) -> Heads:
    """Return distributions of which some are flat and some nearly certain, the student's close to the teacher's.

    Both heads share the columns of the narrower one; the wider one's own columns meet small hidden states.
    """
    s = settings
    generator = torch.Generator(s.device).manual_seed(s.seed)
    shared = min(s.student_hidden, s.teacher_hidden)

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        x = torch.empty(rows, columns, device=s.device, dtype=s.dtype)
        return x.normal_(generator=generator).mul_(scale)

    scale = LOGIT_STD / shared**0.5
    student_weight = normal(s.vocab_size, s.student_hidden, scale)
    teacher_weight = normal(s.vocab_size, s.teacher_hidden, scale)
    teacher_weight[:, :shared] = student_weight[:, :shared]
    picks = torch.randint(s.vocab_size, (s.tokens,), generator=generator, device=s.device)
    sharpness = torch.empty(s.tokens, 1, device=s.device, dtype=s.dtype).uniform_(1.0, 3.0, generator=generator)
    base = normal(s.tokens, shared, 1.0) + sharpness * student_weight[picks, :shared]
    student_input = normal(s.tokens, s.student_hidden, NOISE)
    student_input[:, :shared] += base
    teacher_input = normal(s.tokens, s.teacher_hidden, NOISE)
    teacher_input[:, :shared] = base
    return Heads(student_input, student_weight, teacher_input, teacher_weight)


@dataclass(frozen=True, kw_only=True)
class Exact:
    """The fp64 answer on some rows; a token's dH depends on no other token."""

    rows: Tensor
    gradients: Gradients

    @classmethod
    def of(cls, case: Case) -> Exact:
        """Compute dH on `error_rows` rows; or, where an fp64 dW is affordable, all rows and dW."""
        s, weight = case.settings, case.heads.student_weight
        want_weight = case.is_trainable and weight.numel() * 8 <= MAX_EXACT_WEIGHT_BYTES
        rows = torch.arange(s.tokens, device=s.device) if want_weight else error_rows(s)
        student_weight = weight.double().requires_grad_(want_weight)
        teacher_weight = case.heads.teacher_weight.double()
        input_grads = []
        for block in rows.split(EXACT_BLOCK_ROWS):
            hidden = case.heads.student_input[block].double().requires_grad_()
            exact = Heads(hidden, student_weight, case.heads.teacher_input[block], teacher_weight)
            loss = linear_kl_div_reference(*exact, vocab_size=s.vocab_size, **OBJECTIVES[case.objective]).loss
            loss.backward()
            input_grads.append(hidden.grad)
        weight_grads = (student_weight.grad,) if want_weight else ()
        return cls(rows=rows, gradients=(torch.cat(input_grads), *weight_grads))

    def errors(self, gradients: Gradients) -> list[float]:
        """Return the relative Frobenius errors of dH and, if it was computed exactly, dW."""
        got = (gradients[0][self.rows], *gradients[1:])
        return [float((x.double() - want).norm() / want.norm()) for x, want in zip(got, self.gradients, strict=False)]


def error_rows(settings: Settings) -> Tensor:
    """Return up to `error_rows` row numbers from first to last, so that every chunk has some."""
    count = min(settings.error_rows, settings.tokens)
    return torch.linspace(0, settings.tokens - 1, count, device=settings.device).long()


def mean_kl(settings: Settings, heads: Heads) -> float:
    """Return the mean forward KL in nats over `error_rows` rows."""
    losses = []
    for block in error_rows(settings).split(EXACT_BLOCK_ROWS):
        rows = heads._replace(student_input=heads.student_input[block], teacher_input=heads.teacher_input[block])
        losses.append(linear_kl_div_reference(*rows, vocab_size=settings.vocab_size).token_loss)
    return float(torch.cat(losses).mean())
