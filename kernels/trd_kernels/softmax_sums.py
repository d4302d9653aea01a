"""Sums over the columns that a rank owns, and their merge into statistics of the whole row.

A row of logits z is summarised by its maximum m and by sums weighted with exp(z - m). Each sum merges over ranks
with the factor exp(m_rank - m), so one gather of a few numbers per row gives every statistic of the softmax.
"""

from __future__ import annotations

from torch import Tensor

FLOOR = -1.0e30
"""Stands for minus infinity where a finite number keeps `inf - inf` away."""


def merge_softmax_sums(side: str, gathered: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge the `[ranks, C]` sums named `<side>.<name>` into statistics of whole rows, `[C]` each.

    `max`, `sum`, `log_sum`, and of those present: `delta` (its softmax mean), `entropy` (nats), `argmax`, `label`
    (log-probability), `token_set` (probability).
    """
    prefix = f"{side}."
    sums = {name.removeprefix(prefix): x for name, x in gathered.items() if name.startswith(prefix)}
    maximum = sums["max"].amax(0)
    factor = (sums["max"] - maximum).exp()
    total = (sums["sum"] * factor).sum(0)
    out = {"max": maximum, "sum": total, "log_sum": total.log()}
    if "delta" in sums:
        out["delta"] = (sums["delta"] * factor).sum(0) / total
    if "entropy" in sums:
        moved = sums["entropy"] + sums["sum"] * (sums["max"] - maximum)
        out["entropy"] = out["log_sum"] - (moved * factor).sum(0) / total
    if "argmax" in sums:
        # Ranks hold ascending ids and argmax returns the first of equals: ties go to the lowest id.
        out["argmax"] = sums["argmax"].gather(0, sums["max"].argmax(0, keepdim=True)).squeeze(0)
    if "label" in sums:
        out["label"] = sums["label"].sum(0) - maximum - out["log_sum"]
    if "token_set" in sums:
        out["token_set"] = (sums["token_set"] * factor).sum(0) / total
    return out
