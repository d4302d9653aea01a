"""Sums over the columns that a rank owns, and their merge into statistics of the whole row.

A row of logits z is summarised by its maximum m and by sums weighted with exp(z - m). Each sum merges over ranks
with the factor exp(m_rank - m), so one gather of a few numbers per row gives every statistic of the softmax.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FLOOR = -1.0e30
"""Stands for minus infinity where a finite number keeps `inf - inf` away."""


def softmax_sums(
    z: Tensor,
    first_id: int,
    *,
    delta: Tensor | None = None,
    entropy: bool = False,
    argmax: bool = False,
    label: tuple[Tensor, Tensor] | None = None,
    token_set: Tensor | None = None,
) -> dict[str, Tensor]:
    """Summarise logits `z` `[R, V_local]`, whose column 0 is vocabulary id `first_id`. `V_local` may be 0.

    Always `max` and `sum` of exp(z - max); on request `delta` = sum e * delta, `entropy` = sum e * (z - max),
    `argmax` (a vocabulary id, the lowest of ties), `label` = z at (column, owned), `token_set` = sum of e over
    those columns. Each is `[R]` in the dtype of `z`.
    """
    num_rows, num_columns = z.shape
    if num_columns == 0:
        empty = z.new_zeros(num_rows)
        wanted = {"delta": delta is not None, "entropy": entropy, "argmax": argmax, "label": label is not None}
        wanted["token_set"] = token_set is not None
        return {"max": empty + FLOOR, "sum": empty} | {name: empty for name, on in wanted.items() if on}
    maximum, index = z.max(dim=1)
    shifted = z - maximum[:, None]
    e = shifted.exp()
    out = {"max": maximum, "sum": e.sum(1)}
    if delta is not None:
        out["delta"] = torch.linalg.vecdot(e, delta)
    if entropy:
        out["entropy"] = torch.linalg.vecdot(e, shifted)
    if argmax:
        out["argmax"] = (index + first_id).to(z.dtype)
    if label is not None:
        column, owned = label
        out["label"] = z.gather(1, column[:, None]).squeeze(1).masked_fill(~owned, 0.0)
    if token_set is not None:
        out["token_set"] = e[:, token_set].sum(1)
    return out


def merge_softmax_sums(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge `[ranks, C]` sums into statistics of whole rows, `[C]` each.

    `max`, `sum`, `log_sum`, and of the requested: `delta` (its softmax mean), `entropy` (nats), `argmax`, `label`
    (log-probability), `token_set` (probability).
    """
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


def over_tiles(function: Callable[[slice], dict[str, Tensor]], *, num_rows: int, tile_rows: int) -> dict[str, Tensor]:
    """Apply `function` to consecutive row slices and concatenate each entry of its results."""
    parts = [function(slice(i, min(i + tile_rows, num_rows))) for i in range(0, num_rows, tile_rows)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
