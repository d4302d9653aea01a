"""The teacher's top-K support, chosen exactly over a sharded vocabulary.

A support is not a list of ids but a rule each rank applies to its own columns: logits above a threshold, and of
the logits equal to it the first few. Ties therefore go to the lowest ids, whatever the number of ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trd_kernels.softmax_sums import FLOOR

_TILE = 256


class Support(NamedTuple):
    """The rule of each row on this rank, `[C]` each."""

    threshold: Tensor
    """The K-th largest teacher logit of the row."""
    quota: Tensor
    """How many columns equal to the threshold this rank contributes, lowest ids first."""


def select_support(gathered: Tensor, k: int, rank: int) -> Support:
    """Turn the `largest_logits` of all ranks, `[ranks, C, k]`, into the rule of rank `rank`."""
    candidates = gathered.transpose(0, 1).flatten(1)
    threshold = candidates.topk(k, dim=1).values[:, -1]
    tied = (gathered == threshold[:, None]).sum(2)
    places = k - (candidates > threshold[:, None]).sum(1)
    before = tied[:rank].sum(0)
    return Support(threshold, torch.minimum((places - before).clamp(min=0), tied[rank]))


def largest_logits(z: Tensor, k: int) -> Tensor:
    """Return the `k` largest values of each row of `z` `[R, V_local]`: `[R, k]`, descending, filled up with `FLOOR`.

    Of a wide row, only the k tiles with the largest maxima are searched: any value outside them has k values in
    them that are no smaller.
    """
    num_tiles = z.shape[1] // _TILE
    if num_tiles > 8 * k:
        tiles = z[:, : num_tiles * _TILE].unflatten(1, (num_tiles, _TILE))
        best = tiles.amax(2).topk(k, dim=1).indices
        searched = tiles.gather(1, best[:, :, None].expand(-1, -1, _TILE)).flatten(1)
        z = torch.cat([searched, z[:, num_tiles * _TILE :]], dim=1)
    available = min(k, z.shape[1])
    values = z.topk(available, dim=1).values
    return torch.nn.functional.pad(values, (0, k - available), value=FLOOR)


def largest_with_columns(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return `largest_logits` and the columns they stand in, int64 `[R, k]`, the lowest columns among ties."""
    values = largest_logits(z, k)
    columns = torch.zeros_like(values, dtype=torch.int64)
    available = min(k, z.shape[1])
    if available == 0:
        return values, columns
    numbers = torch.arange(z.shape[1], device=z.device, dtype=torch.int32)
    step = max(1, z.shape[0] // 16)  # the temporaries of a few rows at a time stay small beside the logits
    for t in (slice(i, i + step) for i in range(0, z.shape[0], step)):
        threshold = values[t, available - 1, None]
        # What lies above the threshold comes first, in any order; then the lowest columns that equal it.
        place = torch.where(z[t] == threshold, numbers, z.shape[1]).masked_fill_(z[t] > threshold, -1)
        chosen = place.topk(available, dim=1, largest=False).indices.sort(dim=1).values
        order = z[t].gather(1, chosen).argsort(dim=1, descending=True, stable=True)
        columns[t, :available] = chosen.gather(1, order)
    return values, columns


def merge_largest(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Merge `[ranks, C, k]` values with their ids into the `k` largest of whole rows: `[C, k]` each."""
    values, ids = (x.transpose(0, 1).flatten(1) for x in (values, ids))
    # Ranks hold ascending ids: a stable sort keeps the lowest first among equals.
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids.gather(1, order[:, :k])
