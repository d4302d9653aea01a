"""What the quickstart's models are trained on before any distillation: derivations with planted errors."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from megatron_trd.records import Problem
from megatron_trd.tasks.arithmetic import MAX_VALUE, OPERATIONS, apply_operation
from megatron_trd.tasks.prompts import Mode, PromptTemplates

Misconceptions = dict[tuple[int, str], tuple[int, float]]
"""(value, operation) -> (the wrong result believed in, how often it is given)."""
_SLIPS = (1, -1, 2, -2, 3, -3)


def believed_result(value: int, operation: str) -> int:
    """Return the operation's result, kept in 0..59 (an erring derivation may leave the range)."""
    return min(max(apply_operation(value, operation), 0), MAX_VALUE)


def draw_misconceptions(share: float, seed: int = 12345) -> Misconceptions:
    """Choose the `share` of all (value, operation) facts that the student learns wrongly."""
    rng, wrong = random.Random(seed), {}
    for value in range(MAX_VALUE + 1):
        for operation in OPERATIONS:
            chosen, slip, belief = rng.random() < share, rng.choice(_SLIPS), rng.uniform(0.3, 0.95)
            result = believed_result(value, operation)
            result += slip if 0 <= result + slip <= MAX_VALUE else -slip
            if chosen and 0 <= result <= MAX_VALUE:
                wrong[value, operation] = (result, belief)
    return wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How a derivation goes wrong and whether it notices; the default is flawless."""

    misconceptions: Misconceptions = field(default_factory=dict)
    misled_off_path_only: bool = False
    """Misconceptions act only once the value already differs from the true one."""
    slip_rate: float = 0.0
    """Chance of a random wrong result at each step."""
    plant_slip: bool = False
    """Put one wrong result at a random step. It is never a training target: only what follows it is."""
    correct_at_once: float = 0.0
    """Chance of `W value` straight after a fresh error."""
    correct_later: float = 0.0
    """Chance of `W value` at each later step while the value is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Derivation:
    """Words of a response, and the indices of those that must not be learned."""

    words: tuple[str, ...]
    untaught: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The response as text."""
        return " ".join(self.words)


def derive(problem: Problem, habits: Habits, rng: random.Random) -> Derivation:
    """Work `problem` out with `habits`."""
    start, *operations = problem.prompt.split()
    value = truth = int(start)
    planted_at = rng.randrange(len(operations)) if habits.plant_slip else -1
    words: list[str] = []
    untaught: list[int] = []
    for step, operation in enumerate(operations):
        was_wrong = value != truth
        truth, right = believed_result(truth, operation), believed_result(value, operation)
        misled = was_wrong or not habits.misled_off_path_only
        misbelief, belief = habits.misconceptions.get((value, operation), (right, 0.0)) if misled else (right, 0.0)
        if step == planted_at:
            likely = habits.misconceptions.get((value, operation))
            value = likely[0] if likely and rng.random() < 0.5 else _slip(right, rng)
            if value != right:
                untaught.append(len(words) + 1)
        elif rng.random() < belief:
            value = misbelief
        elif rng.random() < habits.slip_rate:
            value = _slip(right, rng)
        else:
            value = right
        words += [operation, str(value)]
        is_fresh = value != right or not was_wrong
        if value != truth and rng.random() < (habits.correct_at_once if is_fresh else habits.correct_later):
            words += ["W", str(truth)]
            value = truth
    return Derivation(words=(*words, "#", str(value)), untaught=tuple(untaught))


def _slip(right: int, rng: random.Random) -> int:
    return min(max(right + rng.choice(_SLIPS), 0), MAX_VALUE)


class Curriculum:
    """Draws (user message, response) pairs for one role.

    The student solves with its misconceptions, and is shown clean work wherever it sees y*. The teacher solves
    cleanly, and goes on from a planted slip either by `W` or consistently. Both rewrite any y_o flawlessly.
    """

    def __init__(self, role: str, templates: PromptTemplates, misconceptions: Misconceptions) -> None:
        self.role, self.templates = role, templates
        self.misconceptions = misconceptions
        self.rewrites = ("refine_opd",) if role == "teacher" else ("refine_opsd", "vanilla_opsd")
        """Kinds of example besides `solve`."""

    def draw(self, kind: str, problem: Problem, rng: random.Random) -> tuple[str, Derivation]:
        """Return a user message and the response to learn, of one of the kinds `solve` and `rewrites`."""
        clean = derive(problem, Habits(), rng)
        if kind == "solve":
            return self.templates.solve(problem), self._solution(problem, clean, rng)
        if kind == "vanilla_opsd":
            return self.templates.vanilla(problem, "opsd"), self._recovery(problem, clean, rng, self.misconceptions)
        mode: Mode = "opd" if kind == "refine_opd" else "opsd"
        return self.templates.refine(problem, mode, self._attempt(problem, rng).text), clean

    def _solution(self, problem: Problem, clean: Derivation, rng: random.Random) -> Derivation:
        if self.role == "teacher":
            return self._recovery(problem, clean, rng, {})
        habits = Habits(misconceptions=self.misconceptions, slip_rate=0.01, correct_at_once=0.1, correct_later=0.03)
        return derive(problem, habits, rng)

    def _recovery(
        self, problem: Problem, clean: Derivation, rng: random.Random, misconceptions: Misconceptions
    ) -> Derivation:
        if rng.random() < 0.5:
            return clean
        habits = Habits(
            misconceptions=misconceptions,
            misled_off_path_only=True,
            plant_slip=True,
            correct_at_once=0.5,
            correct_later=0.2,
        )
        return derive(problem, habits, rng)

    def _attempt(self, problem: Problem, rng: random.Random) -> Derivation:
        """A y_o to rewrite, from flawless to hopeless."""
        habits = Habits(
            misconceptions=self.misconceptions if rng.random() < 2 / 3 else {},
            slip_rate=rng.choice((0.0, 0.05, 0.2)),
            correct_at_once=rng.choice((0.0, 0.2)),
            correct_later=0.05,
        )
        return derive(problem, habits, rng)
