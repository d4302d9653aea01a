"""Sums over the columns that a rank owns, and their merge into statistics of the whole row.

A row of logits z is summarised by its maximum m and by sums weighted with exp(z - m). Each sum merges over ranks
with the factor exp(m_rank - m), so one gather of a few numbers per row gives every statistic of the softmax.

Sums have the layout `[..., 6, 2]`: the quantities below, of the student and of the teacher; 0 where not asked for.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

MAX, SUM, DELTA, ENTROPY, ARGMAX, LABEL = range(6)
"""With e = exp(z - max): max z; sum e; sum e (z_S - z_T); sum e (z - max); the first column of the maximum; z at the
label."""
NUM_SUMS = 6

SIDES = ("student", "teacher")

FLOOR = -1.0e30
"""Stands for minus infinity where a finite number keeps `inf - inf` away."""


class MergedSums(NamedTuple):
    """Softmax statistics of whole rows, identical on all ranks; `[C, 2]`, one column per side."""

    sums: Tensor
    """`[ranks, C, 6, 2]`, as gathered."""
    factor: Tensor
    """`[ranks, C, 2]`: exp(max of the rank - max of the row)."""
    max: Tensor
    total: Tensor
    """Sum of exp(z - max)."""
    log_total: Tensor

    @classmethod
    def of(cls, gathered: Tensor) -> MergedSums:
        """Merge the sums of all ranks, `[ranks, C, 6 * 2]`."""
        sums = gathered.unflatten(2, (NUM_SUMS, 2))
        maximum = sums[:, :, MAX].amax(0)
        factor = (sums[:, :, MAX] - maximum).exp_()
        total = (sums[:, :, SUM] * factor).sum(0)
        return cls(sums, factor, maximum, total, total.log())

    def log_ratio(self) -> Tensor:
        """Return lse(z_S) - lse(z_T), `[C, 1]`."""
        # The difference of maxima is exact for close logits; a difference of two lse would round at their size.
        return (self.max[:, :1] - self.max[:, 1:]) + (self.log_total[:, :1] - self.log_total[:, 1:])

    def mean(self, quantity: int) -> Tensor:
        """Return the mean under each side's softmax of what `quantity` sums up."""
        return (self.sums[:, :, quantity] * self.factor).sum(0) / self.total

    def entropy(self) -> Tensor:
        """Return entropies in nats."""
        moved = self.sums[:, :, ENTROPY] + self.sums[:, :, SUM] * (self.sums[:, :, MAX] - self.max)
        return self.log_total - (moved * self.factor).sum(0) / self.total

    def argmax(self) -> Tensor:
        """Return the id of the largest logit, the lowest of ties: ranks hold ascending ids and argmax is the first."""
        best = self.sums[:, :, MAX].argmax(0, keepdim=True)
        return self.sums[:, :, ARGMAX].gather(0, best).squeeze(0)

    def label_logprob(self) -> Tensor:
        """Return the log-probability of the label, which one rank at most has reported."""
        return self.sums[:, :, LABEL].sum(0) - self.max - self.log_total
