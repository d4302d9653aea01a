"""What a teacher says along a response, token by token: does it go on, or does it want to turn back?

Where a prefix has failed, the teacher is a mixture of two modes: go on as begun, or open a correction with "Wait",
"Actually", ... (arXiv 2606.08432, section 3). Two masses measure them:

* epistemic mass: the teacher's probability on the first tokens of the words that open a correction;
* best continuation: its largest probability on any other token.

The *two-mode score* is twice the smaller of both: 1 where they share the whole mass evenly, 0 where one is missing. The
teacher *turns* at the first token whose epistemic mass exceeds a threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TURN_THRESHOLD = 0.1
"""More than ten times the mean mass that the paper reports along raw rollouts, 6 to 8 per mille."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenAudit:
    """One response of R tokens in the teacher's (and the student's) eyes: R values each, at temperature 1."""

    teacher_logprob: tuple[float, ...]
    """Of the response's tokens, in nats."""
    epistemic_mass: tuple[float, ...]
    best_continuation: tuple[float, ...]
    teacher_entropy: tuple[float, ...] | None = None
    """Over the whole vocabulary, in nats; None where only a server was asked, which does not tell."""
    student_logprob: tuple[float, ...] | None = None
    student_entropy: tuple[float, ...] | None = None
    kl: tuple[float, ...] | None = None
    """KL(teacher || student) over the whole vocabulary, in nats."""

    @property
    def two_mode(self) -> tuple[float, ...]:
        """The two-mode score of each token, in [0, 1]."""
        pairs = zip(self.epistemic_mass, self.best_continuation, strict=True)
        return tuple(2.0 * min(turn, go_on) for turn, go_on in pairs)

    def turn(self, threshold: float) -> int | None:
        """Return the first token whose epistemic mass exceeds the threshold; None if none does."""
        return next((place for place, mass in enumerate(self.epistemic_mass) if mass > threshold), None)


def largest_outside(ids: Sequence[int], logprobs: Sequence[float], excluded: frozenset[int]) -> float:
    """Return the largest log-probability of an id that is not excluded, among a position's likeliest ids.

    With one id more than are excluded, it is the largest of all. Raises ValueError if there is none.
    """
    return max(logprob for token, logprob in zip(ids, logprobs, strict=True) if token not in excluded)
