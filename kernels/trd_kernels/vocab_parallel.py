"""A vocabulary cut into equal row ranges over a tensor-parallel group, and the collectives that it needs.

Everything that must come out bit-identical on all ranks is gathered and then summed locally in rank order; only
gradients of hidden states, which are large, are summed by the communication library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trd_kernels.checks import require

# The names before and after torch's renaming of the same two collectives.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabShard:
    """Rows `[start, start + num_valid)` of the vocabulary on this rank; local rows beyond them are padding."""

    rank: int
    world_size: int
    start: int
    num_valid: int
    """May be 0: a rank can own nothing but padding."""
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, *, num_rows: int, vocab_size: int, group: dist.ProcessGroup | None) -> VocabShard:
        """Return the shard of the calling rank, which holds `num_rows` weight rows (equal on all ranks)."""
        rank = 0 if group is None else dist.get_rank(group)
        world_size = 1 if group is None else dist.get_world_size(group)
        require(
            1 <= vocab_size <= world_size * num_rows,
            "vocab_size",
            vocab_size,
            f"must lie in [1, {world_size * num_rows}], the {num_rows} rows of student_weight times the "
            f"{world_size} ranks of tp_group",
        )
        start = rank * num_rows
        num_valid = min(max(vocab_size - start, 0), num_rows)
        return cls(rank=rank, world_size=world_size, start=start, num_valid=num_valid, group=group)

    def local_ids(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return column indices of `ids` clamped into this shard, and a mask of the ids that it owns."""
        local = ids - self.start
        owned = (local >= 0) & (local < self.num_valid)
        return local.clamp(0, max(self.num_valid - 1, 0)), owned

    def all_gather(self, x: Tensor) -> Tensor:
        """Return `x` of every rank, stacked in rank order: `[world_size, *x.shape]`. One all-gather."""
        if self.world_size == 1:
            return x.unsqueeze(0)
        out = x.new_empty((self.world_size * x.shape[0], *x.shape[1:]))
        _all_gather(out, x.contiguous(), group=self.group)
        return out.view(self.world_size, *x.shape)

    def all_gather_columns(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gather named `[C, k]` tensors of one dtype with one all-gather; each gains a leading rank dimension."""
        if self.world_size == 1:
            return {name: x.unsqueeze(0) for name, x in columns.items()}
        packed = self.all_gather(torch.cat(list(columns.values()), dim=1))
        return dict(zip(columns, packed.split([x.shape[1] for x in columns.values()], dim=2), strict=True))

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over ranks in rank order, bit-identical on all of them. One all-gather."""
        return x if self.world_size == 1 else self.all_gather(x).sum(0)

    def gather_rows(self, x: Tensor) -> Tensor:
        """Concatenate row shards of all ranks. One all-gather."""
        return self.all_gather(x).flatten(0, 1)

    def reduce_rows(self, x: Tensor, *, dtype: torch.dtype, scatter: bool) -> RowReduction:
        """Start to sum partial `[C, H]` rows over ranks in `dtype`; with `scatter` keep this rank's `C / world_size`.

        One all-reduce or reduce-scatter. `x` must not be used again.
        """
        if self.world_size == 1:
            return RowReduction(None, x)
        sent = x.to(dtype)
        if not scatter:
            return RowReduction(dist.all_reduce(sent, group=self.group, async_op=True), sent)
        kept = sent.new_empty((x.shape[0] // self.world_size, *x.shape[1:]))
        return RowReduction(_reduce_scatter(kept, sent, group=self.group, async_op=True), kept, sent)


class RowReduction(NamedTuple):
    """A sum over ranks that may still be under way."""

    work: dist.Work | None
    result: Tensor
    sent: Tensor | None = None
    """Held until the sum is complete."""

    def wait(self) -> Tensor:
        """Return the summed rows once the current stream may read them."""
        if self.work is not None:
            self.work.wait()
        return self.result
