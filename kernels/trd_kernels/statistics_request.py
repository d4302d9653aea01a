"""Side statistics of both softmaxes: which were asked for, what they need, how they read from merged sums.

All but `divergence` are taken at temperature 1 over the full vocabulary, so they mean the same for every divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from trd_kernels.checks import require
from trd_kernels.row_kernels import RowKernels, WantedSums
from trd_kernels.softmax_sums import ARGMAX, FLOOR, MAX, SIDES, MergedSums
from trd_kernels.support import largest, merge_largest
from trd_kernels.vocab_parallel import VocabShard

STATISTICS = (
    "student_logprob",
    "teacher_logprob",
    "student_entropy",
    "teacher_entropy",
    "argmax_match",
    "teacher_mass",
    "divergence",
)
# Vocabulary ids travel as floats among the row sums; fp32 holds integers exactly up to here.
_MAX_EXACT_ID = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsRequest:
    """The names asked for, with their arguments translated to this rank's columns."""

    names: tuple[str, ...]
    label_column: Tensor | None
    """`[N + 1]` column of each token's label on this rank, -1 where another holds it (entry N serves filler rows)."""
    label_known: Tensor | None
    """`[N + 1]`: whether the label is a vocabulary id at all."""
    token_set: Tensor | None
    """Columns of the token set on this rank."""
    top_k: int
    """How many of each side's likeliest ids to return with their log-probabilities."""
    first_id: int
    """Vocabulary id of column 0 on this rank."""

    @classmethod
    def of(
        cls,
        stats: Sequence[str],
        *,
        labels: Tensor | None,
        token_set: Tensor | None,
        top_k: int,
        vocab_size: int,
        shard: VocabShard,
        device: torch.device,
    ) -> StatisticsRequest:
        """Check the request. `labels` `[N]` and `token_set` `[K]` are int64 vocabulary ids."""
        require(not isinstance(stats, str), "stats", repr(stats), "give a sequence of names, not one string")
        for name in stats:
            require(name in STATISTICS, "stats", name, f"choose from {', '.join(STATISTICS)}")
        column = known = local_set = None
        if "student_logprob" in stats or "teacher_logprob" in stats:
            require(labels is not None, "labels", labels, "student_logprob and teacher_logprob in stats need them")
            assert labels is not None
            padded = pad(labels, (0, 1))
            column, owned = shard.local_ids(padded)
            column = column.masked_fill(~owned, -1)
            known = (padded >= 0) & (padded < vocab_size)
        if "teacher_mass" in stats:
            is_list = token_set is not None and token_set.ndim == 1 and token_set.dtype == torch.int64
            require(is_list, "token_set", token_set, "teacher_mass in stats needs a 1-d int64 tensor of ids")
            assert token_set is not None
            ids = token_set.to(device).unique()
            inside = bool(((ids >= 0) & (ids < vocab_size)).all())
            require(inside, "token_set", ids.tolist(), f"ids must lie in [0, {vocab_size})")
            local, mine = shard.local_ids(ids)
            local_set = local[mine]
        require(0 <= top_k <= vocab_size, "return_top_k", top_k, f"give a number from 0 to vocab_size {vocab_size}")
        exact = ("argmax_match" not in stats and top_k == 0) or vocab_size <= _MAX_EXACT_ID
        require(exact, "vocab_size", vocab_size, f"argmax_match in stats and return_top_k work up to {_MAX_EXACT_ID}")
        return cls(
            names=tuple(dict.fromkeys(stats)),
            label_column=column,
            label_known=known,
            token_set=local_set,
            top_k=top_k,
            first_id=shard.start,
        )

    @property
    def observes(self) -> bool:
        """Whether anything of the two softmaxes themselves was asked for."""
        return self.top_k > 0 or any(name != "divergence" for name in self.names)

    def wanted_sums(self, *, student_delta: bool, teacher_delta: bool) -> WantedSums:
        """Return which sums the statistics need, and those deltas."""
        return WantedSums(
            student_delta=student_delta,
            teacher_delta=teacher_delta,
            student_entropy="student_entropy" in self.names,
            teacher_entropy="teacher_entropy" in self.names,
            argmax="argmax_match" in self.names,
        )

    def columns(
        self,
        rows: RowKernels,
        z_student: Tensor,
        z_teacher: Tensor,
        wanted: WantedSums,
        *,
        scale: float,
        tokens: Tensor,
    ) -> dict[str, Tensor]:
        """Return all that one piece's logits `[C, V_local]`, times `scale`, contribute: tensors `[C, k]` to gather.

        `sums` are the softmax sums, with vocabulary ids for `ARGMAX`; `token_set` the set's sum of exp(z - max);
        `<side>_values` and `<side>_ids` the largest logits. Ids have the logits' dtype.
        """
        label = None if self.label_column is None else self.label_column[tokens]
        sums = rows.softmax_sums(z_student, z_teacher, wanted, scale=scale, label=label)
        if wanted.argmax and self.first_id > 0:
            sums[:, ARGMAX] += self.first_id
        out = {"sums": sums.flatten(1)}
        if self.token_set is not None:
            e = (z_teacher[:, self.token_set] * scale - sums[:, MAX, 1:]).exp_()
            out["token_set"] = e.sum(1, keepdim=True)
        if self.top_k > 0:
            for side, z in zip(SIDES, (z_student, z_teacher), strict=True):
                values, columns = largest(z, self.top_k)
                missing = self.top_k - values.shape[1]
                out[f"{side}_values"] = pad(values * scale, (0, missing), value=FLOOR)
                out[f"{side}_ids"] = pad((columns + self.first_id).to(z.dtype), (0, missing))
        return out

    def read(self, gathered: dict[str, Tensor], merged: MergedSums, tokens: Tensor) -> dict[str, Tensor]:
        """Return the statistics of `tokens` `[C]` from the `[ranks, C, k]` columns of all ranks."""
        out = {}
        if "argmax_match" in self.names:
            best = merged.argmax()
            out["argmax_match"] = (best[:, 0] == best[:, 1]).to(best.dtype)
        if "teacher_mass" in self.names:
            out["teacher_mass"] = (gathered["token_set"][:, :, 0] * merged.factor[:, :, 1]).sum(0) / merged.total[:, 1]
        for i, side in enumerate(SIDES):
            if f"{side}_entropy" in self.names:
                out[f"{side}_entropy"] = merged.entropy()[:, i]
            if f"{side}_logprob" in self.names and self.label_known is not None:
                out[f"{side}_logprob"] = merged.label_logprob()[:, i].masked_fill(~self.label_known[tokens], torch.nan)
        return out

    def read_top_k(self, gathered: dict[str, Tensor], merged: MergedSums) -> dict[str, Tensor]:
        """Return each side's likeliest ids and their log-probabilities, `[C, K]`."""
        out = {}
        log_sum = merged.max + merged.log_total
        for i, side in enumerate(SIDES):
            values, ids = merge_largest(gathered[f"{side}_values"], gathered[f"{side}_ids"], self.top_k)
            out[f"{side}_top_logprobs"] = values - log_sum[:, i : i + 1]
            out[f"{side}_top_ids"] = ids.to(torch.int64)
        return out

    def of_no_token(self, like: Tensor) -> dict[str, Tensor]:
        """Return every statistic of no token at all."""
        out = {name: like.new_zeros(0) for name in self.names}
        if self.top_k > 0:
            for side in SIDES:
                out[f"{side}_top_logprobs"] = like.new_zeros(0, self.top_k)
                out[f"{side}_top_ids"] = like.new_zeros(0, self.top_k, dtype=torch.int64)
        return out
