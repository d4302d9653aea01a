"""Where the gradients of the hidden states and of the head are collected while the chunks go by."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trd_kernels.heads import Heads
from trd_kernels.token_chunks import TokenChunk
from trd_kernels.vocab_parallel import RowReduction, VocabShard


@dataclass(kw_only=True)
class Gradients:
    """Adds up `dH = G W_S` and `dW = G^T H_S` for logits gradients G, chunk by chunk."""

    heads: Heads
    shard: VocabShard
    sequence_parallel: bool
    reduce_dtype: torch.dtype
    overlap: bool
    """Let the sum of a chunk's dH over ranks run while the next chunk is worked on."""
    input_grad: Tensor | None
    """`[N, Hs]` or this rank's `[N / tp, Hs]`, compute dtype; complete after `finish`."""
    weight_grad: Tensor | None
    """`[V_l, Hs]`, compute dtype, added to; the rows of padding stay as they are."""
    weight_factor: float = 1.0
    """What dW is multiplied by on its way into `weight_grad`."""
    _pending: tuple[TokenChunk, RowReduction] | None = field(default=None, init=False)

    @property
    def wanted(self) -> bool:
        """Whether there is anything to collect."""
        return self.input_grad is not None or self.weight_grad is not None

    def add(self, chunk: TokenChunk, logits_grad: Tensor, student_rows: list[Tensor], piece_rows: list[int]) -> None:
        """Add one chunk's share.

        `logits_grad` `[C, V_local]` holds the chunk's pieces one after another, of `piece_rows` rows each;
        `student_rows` are their hidden states, needed for dW alone.
        """
        heads = self.heads
        if self.weight_grad is not None:
            rows = student_rows[0] if len(student_rows) == 1 else torch.cat(student_rows)
            total = self.weight_grad[: heads.num_columns]
            heads.accumulate(total, logits_grad.t(), rows, alpha=self.weight_factor)
        if self.input_grad is None:
            return
        partial = heads.matmul(logits_grad, heads.student_weight)
        shards = chunk.by_shard.shape[0]
        if shards > 1 and len(piece_rows) > 1:  # a piece is ordered by shard; the chunk as a whole has to be
            pieces = [x.view(shards, -1, x.shape[1]) for x in partial.split(piece_rows)]
            partial = torch.cat(pieces, dim=1).flatten(0, 1)
        self.finish()
        dtype = torch.float64 if heads.compute_dtype == torch.float64 else self.reduce_dtype
        self._pending = chunk, self.shard.reduce_rows(partial, dtype=dtype, scatter=self.sequence_parallel)
        if not self.overlap:
            self.finish()

    def finish(self) -> None:
        """Wait for the reduction under way, if any, and store its rows."""
        if self._pending is None or self.input_grad is None:
            return
        chunk, reduction = self._pending
        self.input_grad[chunk.local[: chunk.num_own]] = reduction.wait()[: chunk.num_own].to(self.input_grad.dtype)
        self._pending = None
