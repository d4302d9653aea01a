"""What a task is: problems, a verifier and prompt templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_trd.records import FinishReason, Problem, Verdict

EPISTEMIC_WORDS = (
    *("Wait", "Actually", "However", "Alternatively", "Oops", "Wrong", "Error", "Incorrect", "Correction"),
    *("Sorry", "Hmm", "Oh", "Hold", "Pause", "Uh", "Um"),
)
"""Words that open a correction in English (arXiv 2606.08432, appendix C.5)."""


class Task(Protocol):
    """A source of problems that can grade answers. Derive yours from it: two of its methods may stay as they are here.

    `grade` must be safe to call from several threads at once, and the task must survive `pickle`: with
    `--rollout-staleness` it works in a process of its own.
    """

    name: str
    template_dir: Path
    """Directory of the prompt templates (`prompts.py` lists the files); `--prompt-dir` replaces it."""
    epistemic_words: tuple[str, ...]
    """Words that open a correction ("Wait", "Actually", ...): the teacher's probability on them is a diagnostic."""

    def require_references(self) -> None:
        """Leave out training problems without a reference solution, and say how many; called before any is drawn.

        An OPSD teacher cannot do without one. Here: do nothing, because all problems have one.
        """
        return

    def check_grading(self) -> None:
        """Raise ValueError now if `grade` would not work on this machine. Here: do nothing, because it always does."""
        return

    def train_problem(self, index: int) -> Problem:
        """Return training problem `index` (0, 1, 2, ...). The same index always gives the same problem.

        A finite corpus starts over (in the next epoch's order) after `len(corpus)`, so the data cursor of
        a run is one integer.

        Raises:
            ValueError: there are no training problems.
        """
        ...

    def eval_problems(self, num: int) -> Sequence[Problem]:
        """Return the first `num` held-out problems, disjoint from every training problem; none if there are none."""
        ...

    def grade(self, problem: Problem, response: str, finish_reason: FinishReason) -> Verdict:
        """Grade `response` (decoded text, special tokens removed), which ended for `finish_reason`."""
        ...
