"""Which token rows each chunk holds, once rows of zero weight are dropped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChunk:
    """Rows of one chunk. `C = shards * k`, ordered by shard and then by row."""

    tokens: Tensor
    """`[C]` int64 token ids in `[0, N)`; `N` marks a filler row, which has zero weight."""
    local: Tensor
    """Rows of this rank's input that it contributes; fillers point at some existing row."""
    num_own: int
    """How many leading entries of `local` are no fillers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChunks:
    """Kept rows of every sequence shard, dealt out `k` from each shard a chunk.

    Without sequence parallelism there is one shard. With it, shard r holds tokens `[r*n, (r+1)*n)`; shards keep
    different numbers of rows, so the shorter ones end in fillers. Every rank derives the same chunks from the full
    token weights.
    """

    tokens_per_shard: Tensor
    """`[shards, M]`: kept token ids of each shard in order, then fillers."""
    num_own: int
    shard: int
    shard_size: int
    rows_per_shard: int

    @classmethod
    def plan(
        cls, token_weight: Tensor | None, *, num_tokens: int, shards: int, shard: int, chunk: int, device: torch.device
    ) -> TokenChunks:
        """Drop tokens of zero weight (one device synchronisation; none without weights) and cut the rest."""
        n = num_tokens // shards
        tokens = torch.arange(num_tokens, device=device).view(shards, n)
        num_own = n
        if token_weight is not None and num_tokens > 0:
            keep = token_weight.view(shards, n) != 0
            counts = keep.sum(1)
            per_shard: list[int] = counts.tolist()
            longest, num_own = max(per_shard), per_shard[shard]
            # A stable sort on "dropped" brings the kept tokens of each shard to the front, in order.
            order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
            is_kept = torch.arange(longest, device=device) < counts[:, None]
            tokens = torch.where(is_kept, tokens.gather(1, order), num_tokens)
        return cls(
            tokens_per_shard=tokens,
            num_own=num_own,
            shard=shard,
            shard_size=n,
            rows_per_shard=max(1, min(chunk // shards, tokens.shape[1])),
        )

    @property
    def max_rows(self) -> int:
        """Rows of the largest chunk."""
        return self.tokens_per_shard.shape[0] * self.rows_per_shard

    def __iter__(self) -> Iterator[TokenChunk]:
        k = self.rows_per_shard
        for start in range(0, self.tokens_per_shard.shape[1], k):
            tokens = self.tokens_per_shard[:, start : start + k]
            own = tokens[self.shard] - self.shard * self.shard_size
            yield TokenChunk(
                tokens=tokens.reshape(-1),
                local=own.clamp(max=self.shard_size - 1),
                num_own=min(max(self.num_own - start, 0), tokens.shape[1]),
            )
