"""The toy task: chains of exact whole-number operations that a model of 150 thousand weights can learn."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from megatron_trd.records import FinishReason, Problem, Verdict
from megatron_trd.tasks.base import Task

MAX_VALUE = 59
"""Every number on the way lies in 0..59."""
OPERATIONS = (
    *(f"+{operand}" for operand in range(1, 10)),
    *(f"-{operand}" for operand in range(1, 10)),
    *(f"/{operand}" for operand in range(2, 6)),
)
WORDS = (*(str(value) for value in range(MAX_VALUE + 1)), *OPERATIONS, *"QASYRW#")
"""Every word of problems, prompts and answers; the quickstart's tokenizer gives each one token."""

_FINAL_ANSWER = re.compile(r"(?<!\S)#\s+(\d+)(?!\S)")
_LARGEST_ANSWER = 14


def apply_operation(value: int, operation: str) -> int:
    """Return `value` after e.g. `+7` or `/3`; division rounds down (it is exact along every problem)."""
    operand = int(operation[1:])
    match operation[0]:
        case "+":
            return value + operand
        case "-":
            return value - operand
        case _:
            return value // operand


class ArithmeticTask(Task):
    """Problems such as `17 +3 /4 ...`, solved by `+3 20 /4 5 ... # 5`.

    `W` in a response plays the part of "Wait": the value after it replaces the one before it. Problems are
    drawn by index, so there is no corpus to ship. Which side a problem belongs to is a property of its text
    (one bit of a hash): training and held-out problems cannot meet, whatever the seeds.
    """

    name = "arithmetic"
    template_dir = Path(__file__).parent / "templates" / "arithmetic"
    epistemic_words: tuple[str, ...] = ("W",)

    def __init__(self, num_operations: int = 8, seed: int = 1) -> None:
        """Make the task with chains of `num_operations`; another `seed` gives other problems."""
        self.num_operations = num_operations
        self.seed = seed

    def train_problem(self, index: int) -> Problem:
        """Return training problem `index`; the stream never ends."""
        return self._problem("train", index)

    def eval_problems(self, num: int) -> Sequence[Problem]:
        """Return the first `num` held-out problems."""
        return [self._problem("eval", index) for index in range(num)]

    def grade(self, problem: Problem, response: str, finish_reason: FinishReason) -> Verdict:
        """Compare the answer with what follows the last `#` that is followed by a number."""
        finals = _FINAL_ANSWER.findall(response)
        if not finals:
            return Verdict(outcome="truncated" if finish_reason == "length" else "no_answer")
        return Verdict(outcome="correct" if finals[-1] == problem.answer else "wrong", extracted=finals[-1])

    def _problem(self, split: str, index: int) -> Problem:
        rng = random.Random(f"{self.name} {self.num_operations} {self.seed} {split} {index}")
        while True:
            start, operations = _draw_chain(rng, self.num_operations)
            prompt = " ".join((str(start), *operations))
            if _is_held_out(prompt) == (split == "eval"):
                break
        value, steps = start, []
        for operation in operations:
            value = apply_operation(value, operation)
            steps.append(f"{operation} {value}")
        return Problem(
            id=f"{self.name}-{split}-{index}",
            prompt=prompt,
            answer=str(value),
            reference_solution=f"{' '.join(steps)} # {value}",
        )


def _is_held_out(prompt: str) -> bool:
    return blake2b(prompt.encode(), digest_size=1).digest()[0] % 2 == 1


def _draw_chain(rng: random.Random, num_operations: int) -> tuple[int, tuple[str, ...]]:
    """Draw the answer first and walk backwards: that is how every division comes out exact."""
    value = rng.randint(0, _LARGEST_ANSWER)
    operations: list[str] = []
    while len(operations) < num_operations:
        if rng.random() < 0.45:
            operand = rng.randint(2, 5)
            before, operation = value * operand, f"/{operand}"
        else:
            operand, plus = rng.randint(1, 9), rng.random() < 0.5
            before, operation = (value - operand, f"+{operand}") if plus else (value + operand, f"-{operand}")
        if 0 <= before <= MAX_VALUE:
            operations.append(operation)
            value = before
    return value, tuple(reversed(operations))
