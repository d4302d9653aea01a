"""Whether the reference answers of mathematics problems can be graded against."""

from __future__ import annotations

import re

from megatron_trd.tasks.math_problems.verifier import verify_answer

_LOST_BACKSLASH = re.compile(r"(?<![\\a-zA-Z])(?:d?frac|sqrt|binom|pi|left|right|cdot|circ|infty|text)(?![a-zA-Z])")


def gold_problem(gold: str) -> str | None:
    """Return what is wrong with a gold, or None: its own box must be right, and it must be LaTeX that can be read."""
    verdict = verify_answer(rf"\boxed{{{gold}}}", gold)
    if verdict.outcome != "correct":
        return f"its own box is graded {verdict.outcome}" + (f" ({verdict.error})" if verdict.error else "")
    if lost := _LOST_BACKSLASH.search(gold):
        return f"{lost[0]} has no backslash"
    return None


def is_read_as_mathematics(gold: str) -> bool:
    """Return whether Math-Verify reads the gold and calls it equal to itself; else only its characters can match."""
    return verify_answer(rf"\boxed{{{gold}}}", gold, profile="amo", amo_answer_type="set").correct
