"""Which token rows are worked on together, once rows of zero weight are dropped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChunk:
    """Rows worked on together: k of every sequence shard, `C = shards * k`, ordered by shard and then by row.

    Without sequence parallelism there is one shard. With it, shard r holds tokens `[r*n, (r+1)*n)`, and every rank
    knows the rows of all shards.
    """

    by_shard: Tensor
    """`[shards, k]` int64 token ids in `[0, N)`; `N` marks a filler row, which has zero weight."""
    local: Tensor
    """`[k]` rows of this rank's input that it contributes; fillers point at some existing row."""
    num_own: int
    """How many leading entries of `local` are no fillers."""

    @classmethod
    def kept(
        cls, token_weight: Tensor | None, *, num_tokens: int, shards: int, shard: int, device: torch.device
    ) -> TokenChunk:
        """Return all tokens of non-zero weight; shards that keep fewer than the longest one end in fillers.

        One device synchronisation; none without weights.
        """
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
        return cls(by_shard=tokens, local=(tokens[shard] - shard * n).clamp(max=n - 1), num_own=num_own)

    @property
    def tokens(self) -> Tensor:
        """`[C]` token ids."""
        return self.by_shard.reshape(-1)

    @property
    def num_rows(self) -> int:
        """C."""
        return self.by_shard.numel()

    def rows_of_split(self, rows: int) -> int:
        """Return how many rows the largest piece of `split(rows)` has: at least one of each shard."""
        shards, k = self.by_shard.shape
        return shards * min(max(1, rows // shards), k)

    def split(self, rows: int) -> Iterator[TokenChunk]:
        """Cut into pieces of at most `rows` rows, shared out evenly among the shards."""
        k = max(1, rows // self.by_shard.shape[0])
        for start in range(0, self.local.shape[0], k):
            local = self.local[start : start + k]
            yield TokenChunk(
                by_shard=self.by_shard[:, start : start + k],
                local=local,
                num_own=min(max(self.num_own - start, 0), local.shape[0]),
            )
