"""The teacher's top-K support, chosen exactly over a sharded vocabulary.

A support is not a list of ids but a rule each rank applies to its own columns: logits above a threshold, and of
the logits equal to it the first few. Ties therefore go to the lowest ids, whatever the number of ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trd_kernels.softmax_sums import FLOOR


class Support(NamedTuple):
    """The rule of each row on this rank, `[C]` each."""

    threshold: Tensor
    """The K-th largest teacher logit of the row."""
    quota: Tensor
    """How many columns equal to the threshold this rank contributes, lowest ids first."""

    def mask(self, teacher_logits: Tensor, tile: slice) -> Tensor:
        """Return the columns `[R, V_local]` of the rows `tile` that belong to the support."""
        threshold, quota = self.threshold[tile, None], self.quota[tile, None]
        tied = teacher_logits == threshold
        return (teacher_logits > threshold) | (tied & (tied.cumsum(1, dtype=torch.int32) <= quota))


def largest(teacher_logits: Tensor, k: int) -> Tensor:
    """Return the `k` largest logits of the local columns, `[R, k]`, filled up with `FLOOR`."""
    available = min(k, teacher_logits.shape[1])
    values = teacher_logits.topk(available, dim=1).values
    return torch.nn.functional.pad(values, (0, k - available), value=FLOOR)


def select_support(gathered: Tensor, k: int, rank: int) -> Support:
    """Turn the `largest` logits of all ranks, `[ranks, C, k]`, into the rule of rank `rank`."""
    candidates = gathered.transpose(0, 1).flatten(1)
    threshold = candidates.topk(k, dim=1).values[:, -1]
    tied = (gathered == threshold[:, None]).sum(2)
    places = k - (candidates > threshold[:, None]).sum(1)
    before = tied[:rank].sum(0)
    return Support(threshold, torch.minimum((places - before).clamp(min=0), tied[rank]))
