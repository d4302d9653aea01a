"""Side statistics of both softmaxes: which were asked for, what they need, how they read from merged sums.

All but `divergence` are taken at temperature 1 over the full vocabulary, so they mean the same for every divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trd_kernels.checks import require
from trd_kernels.softmax_sums import FLOOR, merge_softmax_sums
from trd_kernels.support import largest_with_columns, merge_largest
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
    """`[N + 1]` column of each token's label on this rank (the last entry serves filler rows)."""
    label_owned: Tensor | None
    """`[N + 1]`: whether this rank holds that column."""
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
        column = owned = known = local_set = None
        if "student_logprob" in stats or "teacher_logprob" in stats:
            require(labels is not None, "labels", labels, "student_logprob and teacher_logprob in stats need them")
            assert labels is not None
            padded = torch.nn.functional.pad(labels, (0, 1))
            column, owned = shard.local_ids(padded)
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
            label_owned=owned,
            label_known=known,
            token_set=local_set,
            top_k=top_k,
            first_id=shard.start,
        )

    @property
    def observes(self) -> bool:
        """Whether anything of the two softmaxes themselves was asked for."""
        return self.top_k > 0 or any(name != "divergence" for name in self.names)

    def wanted(self) -> dict[str, bool]:
        """Return the fields of `WantedSums` that the statistics need."""
        return {
            "student_entropy": "student_entropy" in self.names,
            "teacher_entropy": "teacher_entropy" in self.names,
            "argmax": "argmax_match" in self.names,
        }

    def local_sums(
        self, z_student: Tensor, z_teacher: Tensor, scale: float, sums: dict[str, Tensor], tokens: Tensor
    ) -> dict[str, Tensor]:
        """Return `sums` of one chunk's logits `[C, V_local]`, times `scale`, with what reads few columns of a row.

        Adds `label` (the label's logit, 0 where another rank owns it), `token_set` (sum of exp(z - max)), and
        `top_values` and `top_ids` `[C, K]`; turns columns of `argmax` into ids. Ids have the logits' dtype.
        """
        out = {name: x + self.first_id if name.endswith(".argmax") else x for name, x in sums.items()}
        for side, z in (("student", z_student), ("teacher", z_teacher)):
            if f"{side}_logprob" in self.names and self.label_column is not None and self.label_owned is not None:
                out[f"{side}.label"] = z.new_zeros(z.shape[0])
                if z.shape[1] > 0:
                    logit = z.gather(1, self.label_column[tokens][:, None]).squeeze(1) * scale
                    out[f"{side}.label"] = logit.masked_fill(~self.label_owned[tokens], 0.0)
            if side == "teacher" and self.token_set is not None:
                e = (z[:, self.token_set] * scale - sums["teacher.max"][:, None]).exp()
                out["teacher.token_set"] = e.sum(1)
            if self.top_k > 0:
                values, columns = largest_with_columns(z, self.top_k)
                out[f"{side}.top_values"] = torch.where(values > FLOOR, values * scale, values)
                out[f"{side}.top_ids"] = (columns + self.first_id).to(z.dtype)
        return out

    def read(self, gathered: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
        """Return the statistics of one chunk, `[C]` or `[C, K]`, from the `[ranks, C]` sums of all ranks."""
        merged = {side: merge_softmax_sums(side, gathered) for side in ("student", "teacher")}
        out = {}
        for name in self.names:
            if name == "argmax_match":
                match = merged["student"]["argmax"] == merged["teacher"]["argmax"]
                out[name] = match.to(merged["student"]["max"].dtype)
            elif name == "teacher_mass":
                out[name] = merged["teacher"]["token_set"]
            elif name != "divergence":
                side, quantity = name.split("_")
                out[name] = merged[side]["entropy" if quantity == "entropy" else "label"]
                if quantity == "logprob" and self.label_known is not None:
                    out[name] = out[name].masked_fill(~self.label_known[tokens], torch.nan)
        if self.top_k > 0:
            for side, of_side in merged.items():
                top = gathered[f"{side}.top_values"], gathered[f"{side}.top_ids"]
                values, ids = merge_largest(*top, self.top_k)
                out[f"{side}_top_logprobs"] = values - (of_side["max"] + of_side["log_sum"])[:, None]
                out[f"{side}_top_ids"] = ids
        return out

    def empty(self, entries: int, like: Tensor) -> dict[str, Tensor]:
        """Return zeros for every statistic of so many tokens; ids are int64."""
        out = {name: like.new_zeros(entries) for name in self.names}
        if self.top_k > 0:
            for side in ("student", "teacher"):
                out[f"{side}_top_logprobs"] = like.new_zeros(entries, self.top_k)
                out[f"{side}_top_ids"] = like.new_zeros(entries, self.top_k, dtype=torch.int64)
        return out
