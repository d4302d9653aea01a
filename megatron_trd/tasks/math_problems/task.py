"""Mathematics problems from local files."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from megatron_trd.records import FinishReason, Problem, Verdict
from megatron_trd.tasks.math_problems.verifier import verify_answer


class MathTask:
    """Problems from JSONL files with the fields `problem`, `answer` and, for OPSD, `solution`."""

    name = "math"
    epistemic_words: tuple[str, ...] = ("Wait", "Hmm", "Actually", "Alternatively", "But", "Maybe", "However")

    def __init__(self, *, train: Path, evaluation: Path, template_dir: Path, seed: int = 1) -> None:
        """Read both files.

        Args:
            train: training problems; every epoch has its own order.
            evaluation: held-out problems, in the file's order.
            template_dir: prompt templates.
            seed: of the orders.

        Raises:
            ValueError: a file is missing or empty, a line lacks a field, or both files share a problem.
        """
        self.template_dir = template_dir
        self.seed = seed
        self._train, self._eval = _read_problems(train), _read_problems(evaluation)
        shared = {_squeezed(problem) for problem in self._train} & {_squeezed(problem) for problem in self._eval}
        if shared:
            raise ValueError(f"{train}: {len(shared)} problems are also in {evaluation}; remove them from one")

    def train_problem(self, index: int) -> Problem:
        """Return training problem `index`; the corpus starts over in another order."""
        epoch, place = divmod(index, len(self._train))
        return self._train[_order(len(self._train), self.seed, epoch)[place]]

    def eval_problems(self, num: int) -> Sequence[Problem]:
        """Return the first `num` held-out problems, or all there are."""
        return self._eval[:num]

    def grade(self, problem: Problem, response: str, finish_reason: FinishReason) -> Verdict:
        """Compare the response's last box with the answer."""
        return verify_answer(response, problem.answer, finish_reason=finish_reason)


@lru_cache(maxsize=4)
def _order(num: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(random.Random(f"{seed} {epoch}").sample(range(num), num))


def _squeezed(problem: Problem) -> str:
    return "".join(problem.prompt.split())


def _read_problems(path: Path) -> list[Problem]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a JSONL file with the fields problem and answer")
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        if not row.get("problem") or row.get("answer") is None:
            raise ValueError(f"{path}:{number}: problem or answer is missing; remove the line")
        problems.append(
            Problem(
                id=str(row.get("id", f"{path.stem}-{number}")),
                prompt=row["problem"],
                answer=str(row["answer"]),
                reference_solution=row.get("solution") or None,
            )
        )
    if not problems:
        raise ValueError(f"{path}: is empty; give at least one problem")
    return problems
