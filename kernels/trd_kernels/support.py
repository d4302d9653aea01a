"""The teacher's top-K support, chosen exactly over a sharded vocabulary, and the few outcomes it leaves to compare.

A rank lists its own K largest teacher logits; the K-th largest of all ranks and a quota of ties say which of them
belong to the support. Ties go to the lowest ids, whatever the number of ranks. The divergence then runs over the
listed columns, and over one more that stands for all the others where those count: a bucket with the student's mass
of the rank's other columns. Its gradient is spread over them in proportion to that mass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trd_kernels.row_kernels import RowKernels, WantedSums
from trd_kernels.softmax_sums import FLOOR, MAX, SUM, MergedSums
from trd_kernels.vocab_parallel import VocabShard

_TILE = 256
# Searched at a time: on a CPU what its cache holds; on a GPU enough that the launches do not count.
_SLICE_ENTRIES = {"cpu": 2**18, "cuda": 2**21}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """What a restricted divergence compares on this rank: L listed columns, and the bucket if there is one."""

    student: Tensor
    """`[C, L]` or `[C, L + 1]` logits, `FLOOR` where a listed column is outside the support."""
    teacher: Tensor
    columns: Tensor
    """`[C, L]` int64."""
    outside: Tensor | None
    """`[C, 6, 2]` softmax sums of the rank's other columns; None without a bucket."""

    @classmethod
    def of(
        cls,
        z_student: Tensor,
        z_teacher: Tensor,
        columns: Tensor,
        inside: Tensor,
        *,
        mode: str,
        rows: RowKernels,
        shard: VocabShard,
    ) -> Outcomes:
        """Take the `columns` that are `inside` `[C, L]` out of the two blocks, which are overwritten there.

        `mode` is a name of `TOP_K_MODES`. With a bucket: one pass over the blocks, and for `tail_bucket` one
        all-gather.
        """
        student, teacher = (z.gather(1, columns) for z in (z_student, z_teacher))
        if mode == "renorm_both":
            return cls(
                student=student.masked_fill_(~inside, FLOOR),
                teacher=teacher.masked_fill_(~inside, FLOOR),
                columns=columns,
                outside=None,
            )
        for z, listed in ((z_student, student), (z_teacher, teacher)):
            z.scatter_(1, columns, listed.masked_fill(inside, FLOOR))
        outside = rows.softmax_sums(z_student, z_teacher, WantedSums())
        bucket = outside[:, MAX, :1] + outside[:, SUM, :1].clamp(min=1e-30).log()
        if mode == "tail_bucket":
            # The teacher's tail in the student's shape: log(q / p) is then that of the two tail masses on every rank.
            merged = MergedSums.of(shard.all_gather(outside.flatten(1)))
            teacher_bucket = bucket - merged.log_ratio()
        else:
            teacher_bucket = torch.full_like(bucket, FLOOR)
        return cls(
            student=torch.cat([student.masked_fill_(~inside, FLOOR), bucket], dim=1),
            teacher=torch.cat([teacher.masked_fill_(~inside, FLOOR), teacher_bucket], dim=1),
            columns=columns,
            outside=outside,
        )

    def spread(self, gradient: Tensor, z_student: Tensor, rows: RowKernels, *, out: Tensor) -> None:
        """Turn the gradient of the outcomes into that of the logits, `out` `[C, V_local]`.

        `z_student` is the block that `of` has left behind.
        """
        num_listed = self.columns.shape[1]
        if self.outside is None:
            out.zero_()
        else:
            factor = gradient[:, num_listed:] / self.outside[:, SUM, :1].clamp(min=1e-30)
            rows.spread(z_student, self.outside[:, MAX, :1], factor, out=out)
        # Listed columns outside the support have a share of the bucket's gradient, and none of their own.
        listed = out.gather(1, self.columns) + gradient[:, :num_listed]
        out.scatter_(1, self.columns, listed.to(out.dtype))


def support_mask(values: Tensor, gathered: Tensor, k: int, rank: int) -> Tensor:
    """Return which of this rank's `values` `[C, L]`, in ascending order of their columns, belong to the support.

    `gathered` `[ranks, C, k]`: the values of all ranks, filled up with `FLOOR`.
    """
    candidates = gathered.transpose(0, 1).flatten(1)
    threshold = candidates.topk(k, dim=1).values[:, -1:]
    num_tied = (gathered == threshold).sum(2)
    places = k - (candidates > threshold).sum(1)
    quota = (places - num_tied[:rank].sum(0)).clamp(min=0)
    tied = values == threshold
    return (values > threshold) | (tied & (tied.cumsum(1) <= quota[:, None]))


def largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the `min(k, V_local)` largest values of each row of `z` `[R, V_local]` and their columns, int64.

    In ascending order of columns; among ties the lowest. Of a wide row only the k best tiles are searched: tiles
    ordered by their maximum and then by their place hold the k best columns in the same order of preference.
    """
    num_tiles = z.shape[1] // _TILE
    if num_tiles <= 8 * k:
        return _in_slices(lambda t: _largest_of(z[t], k), z, width=z.shape[1])
    tiles = z[:, : num_tiles * _TILE].unflatten(1, (num_tiles, _TILE))
    _, best = _largest_of(tiles.amax(2), k)

    def search(t: slice) -> tuple[Tensor, Tensor]:
        searched = tiles[t].gather(1, best[t, :, None].expand(-1, -1, _TILE)).flatten(1)
        values, places = _largest_of(torch.cat([searched, z[t, num_tiles * _TILE :]], dim=1), k)
        tile = best[t].gather(1, (places // _TILE).clamp(max=k - 1))
        in_rest = places - k * _TILE + num_tiles * _TILE
        return values, torch.where(places < k * _TILE, tile * _TILE + places % _TILE, in_rest)

    return _in_slices(search, z, width=(k + 1) * _TILE)


def _in_slices(find: Callable[[slice], tuple[Tensor, Tensor]], z: Tensor, *, width: int) -> tuple[Tensor, Tensor]:
    """Concatenate what `find` returns of slices of rows, each so small that its temporaries do not count."""
    step = max(1, _SLICE_ENTRIES["cuda" if z.is_cuda else "cpu"] // max(width, 1))
    values, columns = zip(*(find(slice(i, i + step)) for i in range(0, z.shape[0], step)), strict=True)
    return torch.cat(values), torch.cat(columns)


def _largest_of(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    k = min(k, z.shape[1])
    if k == 0:
        return z[:, :0], torch.zeros_like(z[:, :0], dtype=torch.int64)
    top = z.topk(k, dim=1)
    threshold = top.values[:, -1:]
    chosen = top.indices
    # topk picks any of several ties at the threshold. On a GPU looking whether there are any would be a wait.
    if z.is_cuda or bool(((z >= threshold).sum(1) > k).any()):
        numbers = torch.arange(z.shape[1], device=z.device, dtype=torch.int32)
        place = torch.where(z == threshold, numbers, z.shape[1]).masked_fill_(z > threshold, -1)
        chosen = place.topk(k, dim=1, largest=False).indices
    chosen = chosen.sort(dim=1).values
    return z.gather(1, chosen), chosen


def merge_largest(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Merge `[ranks, C, k]` values with their ids, ascending, into the `k` largest of whole rows: `[C, k]`, falling."""
    values, ids = (x.transpose(0, 1).flatten(1) for x in (values, ids))
    # Ids ascend over ranks too: a stable sort keeps the lowest first among equals.
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids.gather(1, order[:, :k])
