"""Dense fp64 definitions and peaked data for the tests of `trd_kernels`; imports nothing of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

PAD_LOGIT = 50.0
STATS = (
    "student_logprob",
    "teacher_logprob",
    "student_entropy",
    "teacher_entropy",
    "argmax_match",
    "teacher_mass",
)
MODES: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "beta": 0.3},
    "mixed": {"divergence": "mixed", "beta": 0.7},
    "forward-token-clip": {"token_clip": 0.6},
    "reverse-token-clip": {"divergence": "reverse_kl", "token_clip": 0.6},
    "jsd-token-clip": {"divergence": "jsd", "token_clip": 0.08},
    "mixed-token-clip": {"divergence": "mixed", "token_clip": 0.6},
    "entry-clip": {"entry_clip": 0.1},
    "both-clips": {"entry_clip": 0.1, "token_clip": 0.05},
    "top-1-tail": {"teacher_top_k": 1, "top_k_mode": "tail_bucket"},
    "top-6-both": {"teacher_top_k": 6},
    "top-6-teacher": {"teacher_top_k": 6, "top_k_mode": "renorm_teacher"},
    "top-6-tail": {"teacher_top_k": 6, "top_k_mode": "tail_bucket"},
    "top-6-both-clip": {"teacher_top_k": 6, "token_clip": 0.6},
    "top-6-tail-clip": {"teacher_top_k": 6, "top_k_mode": "tail_bucket", "token_clip": 0.6},
    "top-all-tail": {"teacher_top_k": 157, "top_k_mode": "tail_bucket"},
    "reverse-top-6-both": {"divergence": "reverse_kl", "teacher_top_k": 6},
    "reverse-top-6-tail": {"divergence": "reverse_kl", "teacher_top_k": 6, "top_k_mode": "tail_bucket"},
    "jsd-top-6-both": {"divergence": "jsd", "beta": 0.3, "teacher_top_k": 6},
    "jsd-top-6-tail": {"divergence": "jsd", "beta": 0.3, "teacher_top_k": 6, "top_k_mode": "tail_bucket"},
    "mixed-top-6-tail": {"divergence": "mixed", "beta": 0.7, "teacher_top_k": 6, "top_k_mode": "tail_bucket"},
    "hot": {"temperature": 1.7, "scale_by_temperature_sq": True, "token_clip": 0.6},
    "cold-reverse": {"divergence": "reverse_kl", "temperature": 0.6},
    "hot-jsd": {"divergence": "jsd", "temperature": 2.5},
    "cold-top-6": {"teacher_top_k": 6, "top_k_mode": "tail_bucket", "temperature": 0.6},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Inputs of one call with all vocabulary rows, padding included."""

    student_input: Tensor
    student_weight: Tensor
    teacher_input: Tensor
    teacher_weight: Tensor
    vocab_size: int
    token_weight: Tensor
    labels: Tensor
    token_set: Tensor

    def heads(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the four tensors in call order."""
        return self.student_input, self.student_weight, self.teacher_input, self.teacher_weight


def peaked_case(
    *,
    num_tokens: int = 24,
    vocab_size: int = 157,
    num_rows: int = 176,
    dtype: torch.dtype = torch.float64,
    offset: float = 0.0,
    seed: int = 0,
) -> Case:
    """Return two heads that agree to a KL between about 1 and 1e-6, token by token, on peaked distributions.

    Hidden states are sums of head rows and noise. Coordinate 0 gives padding rows a logit of 50, coordinate 1 adds
    `offset` nats to the student's logits and minus that to the teacher's. Every fifth token has weight 0.
    """
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    width, extra = 19, 7
    head = randn(num_rows, width) * 0.9
    picks = torch.randint(vocab_size, (num_tokens, 3), generator=g)
    base = (head[picks] * torch.tensor([1.0, 0.6, 0.4], dtype=torch.float64)[:, None]).sum(1) + 0.3 * randn(
        num_tokens, width
    )
    distance = torch.logspace(0, -3.5, num_tokens, dtype=torch.float64)[:, None]
    one = torch.ones(num_tokens, 1, dtype=torch.float64)
    valid = (torch.arange(num_rows) < vocab_size)[:, None]
    head = torch.where(valid, head, 0.0)
    side = torch.cat([torch.where(valid, 0.0, PAD_LOGIT).to(head), torch.ones(num_rows, 1).to(head)], 1)
    weight = torch.rand(num_tokens, generator=g, dtype=torch.float64) + 0.1
    weight[4::5] = 0.0
    edges = [0, vocab_size - 1, num_rows // 2 - 1, num_rows // 2, num_rows // 4 - 1, num_rows // 4]
    labels = torch.tensor([edges[i % 6] if i < 12 else int(picks[i, 0]) for i in range(num_tokens)])
    return Case(
        student_input=torch.cat([one, one * offset, base + distance * randn(num_tokens, width)], 1).to(dtype),
        student_weight=torch.cat([side, head], 1).to(dtype),
        teacher_input=torch.cat([one, -one * offset, base, distance * randn(num_tokens, extra)], 1).to(dtype),
        teacher_weight=torch.cat([side, head, randn(num_rows, extra) * valid], 1).to(dtype),
        vocab_size=vocab_size,
        token_weight=weight.to(dtype),
        labels=labels % vocab_size,
        token_set=torch.tensor([3, vocab_size - 1, 0, 3, vocab_size // 2]),
    )


def tied_case() -> Case:
    """Return heads of small integers: every logit is exact, and many equal the teacher's sixth largest."""
    g = torch.Generator().manual_seed(1)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=g).double()

    return replace(
        peaked_case(),
        student_input=integers(24, 3),
        student_weight=integers(176, 3),
        teacher_input=integers(24, 3),
        teacher_weight=integers(176, 3),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """Loss, token losses, gradients and statistics by definition, fp64."""

    loss: Tensor
    token_loss: Tensor
    input_grad: Tensor
    weight_grad: Tensor
    stats: dict[str, Tensor]


def dense(case: Case, **options: Any) -> Dense:
    """Evaluate one call by definition: explicit probabilities, explicit index sets, autograd. Options as the call's."""
    hidden = case.student_input.detach().double().requires_grad_()
    head = case.student_weight.detach().double().requires_grad_()
    z_q = hidden @ head[: case.vocab_size].T
    z_p = case.teacher_input.double() @ case.teacher_weight[: case.vocab_size].double().T
    tau = options.get("temperature", 1.0)
    q, p = _normalise(z_q / tau), _normalise(z_p / tau)
    token_loss = torch.stack([_row(q[i], p[i], z_p[i], options) for i in range(q.shape[0])])
    clip = options.get("token_clip")
    if clip is not None:
        token_loss = token_loss.clamp(max=clip)
    if options.get("scale_by_temperature_sq"):
        token_loss = token_loss * tau * tau
    weight = case.token_weight.double()
    loss = (token_loss * weight).sum()
    loss.backward()
    keep = (weight != 0).double()
    q, p = _normalise(z_q.detach()), _normalise(z_p)
    every = torch.arange(q.shape[0])
    stats = {
        "student_logprob": q[every, case.labels],
        "teacher_logprob": p[every, case.labels],
        "student_entropy": -(q.exp() * q).sum(1),
        "teacher_entropy": -(p.exp() * p).sum(1),
        "argmax_match": (q.argmax(1) == p.argmax(1)).double(),
        "teacher_mass": sum(p[:, i].exp() for i in set(case.token_set.tolist())),
    }
    return Dense(
        loss=loss.detach(),
        token_loss=token_loss.detach() * keep,
        input_grad=hidden.grad,
        weight_grad=head.grad,
        stats={name: x * keep for name, x in stats.items()},
    )


def _normalise(z: Tensor) -> Tensor:
    return z - torch.logsumexp(z, dim=-1, keepdim=True)


def _row(log_q: Tensor, log_p: Tensor, teacher_logits: Tensor, options: dict[str, Any]) -> Tensor:
    k, mode = options.get("teacher_top_k", 0), options.get("top_k_mode", "renorm_both")
    if k:
        ids = sorted(range(len(log_p)), key=lambda v: (-teacher_logits[v].item(), v))
        top, rest = ids[:k], ids[k:]
        if mode == "tail_bucket":
            log_q, log_p = (
                torch.cat([x[top], torch.logsumexp(x[rest], 0, keepdim=True)]) if rest else x for x in (log_q, log_p)
            )
        else:
            log_p = _normalise(log_p[top])
            log_q = _normalise(log_q[top]) if mode == "renorm_both" else log_q[top]
    p, q = log_p.exp(), log_q.exp()
    name, beta = options.get("divergence", "forward_kl"), options.get("beta", 0.5)
    forward, backward = p * (log_p - log_q), q * (log_q - log_p)
    if name == "forward_kl":
        clip = options.get("entry_clip")
        return (forward if clip is None else forward.clamp(max=clip)).sum()
    if name == "reverse_kl":
        return backward.sum()
    if name == "mixed":
        return beta * forward.sum() + (1 - beta) * backward.sum()
    m = beta * p + (1 - beta) * q
    return beta * (p * (log_p - m.log())).sum() + (1 - beta) * (q * (log_q - m.log())).sum()


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the Frobenius norm of the error over that of `want` (absolute where `want` is 0)."""
    norm = want.double().norm()
    error = (got.detach().double() - want.double()).norm()
    return float(error / norm) if norm > 0 else float(error)
