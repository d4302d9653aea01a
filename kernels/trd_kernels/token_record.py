"""What the chunks found out about their tokens, put together once at the end."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trd_kernels.divergence import Divergence
from trd_kernels.output import LinearKLDivOutput
from trd_kernels.softmax_sums import MergedSums
from trd_kernels.statistics_request import StatisticsRequest
from trd_kernels.vocab_parallel import VocabShard


@dataclass(kw_only=True)
class TokenRecord:
    """One entry per piece in each list; C is a piece's number of rows."""

    tokens: list[Tensor] = field(default_factory=list)
    """`[C]` ids in `[0, N]`; N stands for a filler row."""
    values: list[Tensor] = field(default_factory=list)
    """`[C]`: this rank's part of the divergence."""
    is_open: list[Tensor] = field(default_factory=list)
    """`[C]` bool: False where the token clip closes. Empty without a clip."""
    observed: list[dict[str, Tensor]] = field(default_factory=list)
    """`[ranks, C, k]`: what the statistics read. Empty without statistics."""
    top_k: list[dict[str, Tensor]] = field(default_factory=list)
    """`[C, K]`: likeliest ids and their log-probabilities."""

    def outputs(
        self, *, spec: Divergence, request: StatisticsRequest, shard: VocabShard, weight: Tensor
    ) -> LinearKLDivOutput:
        """Sum the values over ranks and put everything at its token's place; `weight` `[N + 1]` ends in a 0."""
        tokens = torch.cat(self.tokens) if self.tokens else weight.new_empty(0, dtype=torch.int64)

        def placed(x: Tensor) -> Tensor:
            out = x.new_zeros(weight.shape[0], *x.shape[1:])
            out[tokens] = x
            return out[:-1]

        value = shard.sum(torch.cat([weight[:0], *self.values]))
        token_loss = value
        if spec.token_clip is not None and self.is_open:
            token_loss = value.clamp(max=spec.token_clip).where(torch.cat(self.is_open), spec.token_clip)
        token_loss = placed(token_loss * spec.loss_scale)
        stats = self._statistics(request, tokens, value) if self.tokens else request.of_no_token(weight)
        loss = (weight[:-1] * token_loss).sum()
        return LinearKLDivOutput(loss, token_loss, {name: placed(x) for name, x in stats.items()})

    def _statistics(self, request: StatisticsRequest, tokens: Tensor, value: Tensor) -> dict[str, Tensor]:
        stats = {"divergence": value} if "divergence" in request.names else {}
        if self.observed:
            columns = _joined(self.observed, dim=1)
            stats |= request.read(columns, MergedSums.of(columns["sums"]), tokens)
        return stats | (_joined(self.top_k, dim=0) if self.top_k else {})


def _joined(pieces: list[dict[str, Tensor]], dim: int) -> dict[str, Tensor]:
    return {name: torch.cat([piece[name] for piece in pieces], dim=dim) for name in pieces[0]}
