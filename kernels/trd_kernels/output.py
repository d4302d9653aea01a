"""What a linear divergence returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LinearKLDivOutput(NamedTuple):
    """Loss, its per-token parts and side statistics, identical on all ranks of the tensor-parallel group."""

    loss: Tensor
    """Scalar: `sum(token_weight * token_loss)`. The only differentiable member."""
    token_loss: Tensor
    """`[N]`, nats, after `token_clip` and before `token_weight`; 0 for rows of zero weight."""
    stats: dict[str, Tensor]
    """`[N]` each, only those asked for; 0 for rows of zero weight. With `return_top_k` also `student_top_ids`,
    `student_top_logprobs`, `teacher_top_ids` and `teacher_top_logprobs`, `[N, K]`, the likeliest first."""
