"""What a task is: problems, a verifier and prompt templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_trd.records import FinishReason, Problem, Verdict


class Task(Protocol):
    """A source of problems that can grade answers. Every method must be safe to call from a thread."""

    name: str
    template_dir: Path
    """Directory of the prompt templates (`prompts.py` lists the files); `--prompt-dir` replaces it."""
    epistemic_words: tuple[str, ...]
    """Words that open a correction ("Wait", "Actually", ...): the teacher's probability on them is a diagnostic."""

    def train_problem(self, index: int) -> Problem:
        """Return training problem `index` (0, 1, 2, ...). The same index always gives the same problem.

        A finite corpus starts over (in the next epoch's order) after `len(corpus)`, so the data cursor of
        a run is one integer.
        """
        ...

    def eval_problems(self, num: int) -> Sequence[Problem]:
        """Return the first `num` held-out problems, disjoint from every training problem."""
        ...

    def grade(self, problem: Problem, response: str, finish_reason: FinishReason) -> Verdict:
        """Grade `response` (decoded text, special tokens removed), which ended for `finish_reason`."""
        ...
