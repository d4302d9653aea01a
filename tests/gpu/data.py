"""Pairs of heads whose distributions are peaked and close to each other, as in distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

TOP_K = 16
STATS = (
    "student_logprob",
    "teacher_logprob",
    "student_entropy",
    "teacher_entropy",
    "argmax_match",
    "teacher_mass",
    "divergence",
)
MODES: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "beta": 0.3},
    "mixed": {"divergence": "mixed", "beta": 0.7},
    "token-clip": {"token_clip": 0.2},
    "jsd-token-clip": {"divergence": "jsd", "token_clip": 0.05},
    "entry-clip": {"entry_clip": 0.02},
    "both-clips": {"entry_clip": 0.02, "token_clip": 0.1},
    "top-k": {"teacher_top_k": TOP_K},
    "top-k-teacher": {"teacher_top_k": TOP_K, "top_k_mode": "renorm_teacher"},
    "top-k-tail": {"teacher_top_k": TOP_K, "top_k_mode": "tail_bucket"},
    "reverse-top-k": {"divergence": "reverse_kl", "teacher_top_k": TOP_K},
    "reverse-top-k-tail": {"divergence": "reverse_kl", "teacher_top_k": TOP_K, "top_k_mode": "tail_bucket"},
    "hot": {"temperature": 1.7, "scale_by_temperature_sq": True, "token_clip": 0.13},
    "hot-reverse": {"divergence": "reverse_kl", "temperature": 1.7},
    "hot-jsd": {"divergence": "jsd", "temperature": 1.7},
    "hot-top-k-tail": {"teacher_top_k": TOP_K, "top_k_mode": "tail_bucket", "temperature": 1.7},
}

_LOGIT_SPREAD = 2.5
_PEAKS = (1.0, 0.9, 0.8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Inputs of one call, with all rows of both heads: those from `vocab_size` on are padding."""

    student_input: Tensor
    student_weight: Tensor
    teacher_input: Tensor
    teacher_weight: Tensor
    vocab_size: int
    token_weight: Tensor
    labels: Tensor
    token_set: Tensor

    @property
    def heads(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors in call order."""
        return self.student_input, self.student_weight, self.teacher_input, self.teacher_weight

    def to(self, device: torch.device | str) -> Problem:
        """Return a copy on another device."""
        tensors = {k: getattr(self, k) for k in self.__slots__ if k != "vocab_size"}
        return replace(self, **{name: x.to(device) for name, x in tensors.items()})

    def without_near_ties(self, gap: float = 1e-3) -> Problem:
        """Give weight 0 to tokens whose largest ids, or whose top-K set, depend on the rounding of logits."""
        weight = self.token_weight
        for x, w in (self.heads[:2], self.heads[2:]):
            top = (x.float() @ w[: self.vocab_size].float().T).topk(TOP_K + 1).values
            close = top[:, :-1] - top[:, 1:] < gap
            weight = weight.masked_fill(close[:, 0] | close[:, -1], 0.0)
        return replace(self, token_weight=weight)


def peaked_problem(
    *,
    num_tokens: int,
    vocab_size: int,
    student_width: int,
    teacher_width: int,
    dtype: torch.dtype,
    device: torch.device | str,
    num_rows: int | None = None,
    num_kept: int | None = None,
    kl: float = 0.24,
    offset: float = 0.0,
    padding: float = 50.0,
    seed: int = 0,
) -> Problem:
    """Return two heads with `num_rows >= vocab_size` rows whose mean KL is about `kl` nats.

    Hidden states are sums of three head rows, as likely together as all other ids, and noise. The teacher is the
    student with noise of its own on every logit. Coordinate 0 gives padding rows the logit `padding`, coordinate 1
    adds `offset` nats to the student's logits and minus that to the teacher's. `num_kept` random tokens (default:
    all) have a weight, the others 0.
    """
    g = torch.Generator(device).manual_seed(seed)
    rows, inner = num_rows or vocab_size, student_width - 2

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    def head(*parts: Tensor) -> Tensor:
        """Unit rows, so that a unit of hidden-state noise is a nat; behind them rows of padding."""
        weight = torch.cat([torch.zeros(rows, 1, device=device), torch.ones(rows, 1, device=device), *parts], 1)
        weight[vocab_size:] = 0.0
        weight[vocab_size:, 0] = padding
        return weight.to(dtype)

    shared = randn(rows, inner) / inner**0.5
    own_width = teacher_width - student_width
    own = randn(rows, own_width) / own_width**0.5
    picks = torch.randint(vocab_size, (num_tokens, len(_PEAKS) + 1), generator=g, device=device)
    height = math.log(vocab_size) + _LOGIT_SPREAD**2 / 2 + 2.0 * randn(num_tokens, 1)
    peaks = (shared[picks[:, :-1]] * torch.tensor(_PEAKS, device=device)[:, None]).sum(1) * height
    hidden = peaks + _LOGIT_SPREAD * randn(num_tokens, inner)
    noise = 1.2 * (2.0 * kl) ** 0.5 * randn(num_tokens, own_width)
    one = torch.ones(num_tokens, 1, device=device)
    weight = torch.rand(num_tokens, generator=g, device=device) + 0.1
    if num_kept is not None:
        weight[torch.randperm(num_tokens, generator=g, device=device)[num_kept:]] = 0.0
    labels = torch.where(torch.arange(num_tokens, device=device) % 2 == 0, picks[:, 0], picks[:, -1])
    labels[:4] = torch.tensor([0, vocab_size - 1, -100, vocab_size], device=device)[: len(labels)]
    return Problem(
        student_input=torch.cat([one, one * offset, hidden], 1).to(dtype),
        student_weight=head(shared),
        teacher_input=torch.cat([one, -one * offset, hidden, noise], 1).to(dtype),
        teacher_weight=head(shared, own),
        vocab_size=vocab_size,
        token_weight=weight,
        labels=labels,
        token_set=torch.cat([picks[0], torch.tensor([0, vocab_size - 1, 0], device=device)]),
    )
