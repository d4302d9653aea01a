"""Which of several refinements of one y_o becomes y_r."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megatron_trd.records import Candidate, Completion, Reasoning, Selection, SelectionReason

SelectRule = Literal["first", "verified", "shortest-verified"]


def is_good(y_r: Completion, reasoning: Reasoning | None) -> bool:
    """Whether a refinement ended by itself and says something behind its reasoning block, if it has one."""
    if y_r.finish_reason != "stop" or not y_r.text.strip():
        return False
    return reasoning is None or len(y_r.token_ids) - reasoning.num_tokens > 1  # the last one only ends the turn


def select(
    candidates: Sequence[Candidate], reasonings: Sequence[Reasoning | None], rule: SelectRule
) -> Selection | None:
    """Choose; None where there is one candidate.

    Only a refinement that is right and good (`is_good`) counts as verified, because a bad one would not be trained on.
    The shortest has the fewest tokens in all; of equals the first wins.
    """
    if len(candidates) == 1:
        return None
    verified = [i for i, pair in enumerate(zip(candidates, reasonings, strict=True)) if _is_verified(*pair)]
    reason: SelectionReason
    if rule == "first":
        chosen, reason = 0, "first"
    elif not verified:
        chosen, reason = 0, "none_verified"
    elif rule == "verified":
        chosen, reason = verified[0], "first_verified"
    else:
        chosen, reason = min(verified, key=lambda i: len(candidates[i].completion.token_ids)), "shortest_verified"
    return Selection(chosen=chosen, reason=reason, rejected=(*candidates[:chosen], *candidates[chosen + 1 :]))


def _is_verified(candidate: Candidate, reasoning: Reasoning | None) -> bool:
    return candidate.verdict is not None and candidate.verdict.correct and is_good(candidate.completion, reasoning)
