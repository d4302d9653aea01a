"""Side statistics of both softmaxes: which were asked for, what they need, how they read from merged sums.

All are taken at temperature 1 over the full vocabulary, so they mean the same for every divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trd_kernels.checks import require
from trd_kernels.vocab_parallel import VocabShard

STATISTICS = (
    "student_logprob",
    "teacher_logprob",
    "student_entropy",
    "teacher_entropy",
    "argmax_match",
    "teacher_mass",
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

    @classmethod
    def of(
        cls,
        stats: Sequence[str],
        *,
        labels: Tensor | None,
        token_set: Tensor | None,
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
        exact = "argmax_match" not in stats or vocab_size <= _MAX_EXACT_ID
        require(exact, "vocab_size", vocab_size, f"argmax_match in stats works up to {_MAX_EXACT_ID}")
        return cls(
            names=tuple(dict.fromkeys(stats)),
            label_column=column,
            label_owned=owned,
            label_known=known,
            token_set=local_set,
        )

    def wanted_sums(self, side: str, tokens: Tensor) -> dict[str, Any]:
        """Return the arguments of `softmax_sums` for `side` (`student` or `teacher`) and the token ids `[R]`."""
        wanted: dict[str, Any] = {
            "entropy": f"{side}_entropy" in self.names,
            "argmax": "argmax_match" in self.names,
        }
        if f"{side}_logprob" in self.names and self.label_column is not None and self.label_owned is not None:
            wanted["label"] = (self.label_column[tokens], self.label_owned[tokens])
        if side == "teacher":
            wanted["token_set"] = self.token_set
        return wanted

    def read(self, student: dict[str, Tensor], teacher: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
        """Return the statistics `[C]` of one chunk from the merged sums of both sides."""
        out = {}
        for name in self.names:
            if name == "argmax_match":
                out[name] = (student["argmax"] == teacher["argmax"]).to(student["max"].dtype)
            elif name == "teacher_mass":
                out[name] = teacher["token_set"]
            else:
                side, quantity = name.split("_")
                merged = student if side == "student" else teacher
                value = merged["entropy"] if quantity == "entropy" else merged["label"]
                if quantity == "logprob" and self.label_known is not None:
                    value = value.masked_fill(~self.label_known[tokens], torch.nan)
                out[name] = value
        return out
