"""Problems on disk: one JSON object a line, the same for every task, and the task that reads them.

    {"schema": 1, "task": "math", "id": "aime24/60", "prompt": "...", "answer": "204",
     "reference_solution": "...", "metadata": {"source": "aime24", "difficulty": 4}, "tests": {...}}

`reference_solution`, `metadata` and `tests` may be left out. `tools/prepare_data.py` makes such files.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from megatron_trd.config.schema import DataConfig
from megatron_trd.log import get_logger
from megatron_trd.records import Problem
from megatron_trd.tasks.base import EPISTEMIC_WORDS, Task

logger = get_logger(__name__)

SCHEMA = 1
_TEXTS = ("task", "id", "prompt", "answer")
_FIELDS = {"schema", *_TEXTS, "reference_solution", "metadata", "tests"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a file of problems."""

    task: str
    problem: Problem
    tests: Mapping[str, Any] | None = None
    """What a program must pass, as the task writes it; it stays here and never travels with the problem."""

    def as_json(self) -> dict[str, Any]:
        """Return the line's object, without what is empty."""
        problem = self.problem
        optional = {
            "reference_solution": problem.reference_solution,
            "metadata": dict(problem.metadata),
            "tests": self.tests,
        }
        return {
            "schema": SCHEMA,
            "task": self.task,
            "id": problem.id,
            "prompt": problem.prompt,
            "answer": problem.answer,
            **{name: value for name, value in optional.items() if value},
        }

    @classmethod
    def from_json(cls, record: Any) -> Row:
        """Return the row of an object. Raises ValueError saying what is wrong with it."""
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise ValueError(f"not a problem of schema {SCHEMA}; make the file with tools/prepare_data.py")
        for name in sorted(record.keys() - _FIELDS):
            raise ValueError(f"field {name} is unknown; the fields are {', '.join(sorted(_FIELDS))}")
        for name in _TEXTS:
            if not isinstance(record.get(name), str):
                raise ValueError(f"field {name} must be a string; repair the line")
        for name in ("id", "prompt"):
            if not record[name].strip():
                raise ValueError(f"field {name} is empty; repair or remove the line")
        reference, metadata, tests = record.get("reference_solution"), record.get("metadata", {}), record.get("tests")
        if not isinstance(reference, str | None):
            raise ValueError("field reference_solution must be a string; leave it out where there is none")
        if not isinstance(metadata, dict) or not isinstance(tests, dict | None):
            raise ValueError("fields metadata and tests must be objects; repair the line")
        problem = Problem(
            id=record["id"],
            prompt=record["prompt"],
            answer=record["answer"],
            reference_solution=reference or None,
            metadata=metadata,
        )
        return cls(task=record["task"], problem=problem, tests=tests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a row lies."""

    path: str
    line: int
    """Counted from 1."""
    offset: int
    """Bytes before it."""

    def __str__(self) -> str:
        """Return `path:line`."""
        return f"{self.path}:{self.line}"

    def read(self) -> Row:
        """Return the row that lies here now. Raises ValueError if there is none."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return _parse(self, file.readline())


def read_rows(path: str | Path) -> Iterator[tuple[Place, Row]]:
    """Yield every row with its place. Raises ValueError naming file, line and what is wrong with it."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; give one that tools/prepare_data.py made")
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            place = Place(path=str(path), line=number, offset=offset)
            yield place, _parse(place, line)
            offset += len(line)


def _parse(place: Place, line: bytes) -> Row:
    try:
        return Row.from_json(json.loads(line))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def squeezed(prompt: str) -> str:
    """Return a statement without white space: two problems that agree in it are the same problem."""
    return "".join(prompt.split())


class CorpusTask(Task):
    """A task whose problems lie in files: `--train-data`, `--eval-data`. Subclasses grade.

    Files are read with the first problem that is asked for, so a process that asks for none does not read them.
    """

    name: str
    template_dir: Path
    epistemic_words: tuple[str, ...] = EPISTEMIC_WORDS

    def __init__(self, data: DataConfig) -> None:
        """Remember where the problems are."""
        self.data = data
        self._needs_references = False

    def accept(self, row: Row) -> None:
        """Look at a row when it is read; raise ValueError if this task cannot use it."""

    def require_references(self) -> None:
        """See `Task.require_references`."""
        self._needs_references = True

    def train_problem(self, index: int) -> Problem:
        """Return training problem `index`; every epoch has its own order."""
        problems = self._problems["train"]
        if not problems:
            raise ValueError(f"--train-data (unset): --task {self.name} needs files of problems to train on")
        epoch, place = divmod(index, len(problems))
        return problems[_order(len(problems), self.data.seed, epoch)[place]]

    def eval_problems(self, num: int) -> Sequence[Problem]:
        """Return the first `num` held-out problems, or all there are; none without `--eval-data`."""
        return self._problems["eval"][:num]

    def tests(self, problem: Problem) -> Mapping[str, Any]:
        """Read the tests of a problem. Raises ValueError if its file has changed since it was read."""
        place = self._places[problem.id]
        row = place.read()
        if row.problem.id != problem.id or row.tests is None:
            raise ValueError(f"{place}: no longer holds the tests of {problem.id}; keep files as they are during a run")
        return row.tests

    @cached_property
    def _problems(self) -> dict[str, list[Problem]]:
        self._places: dict[str, Place] = {}
        train, held_out = self._read("train-data"), self._read("eval-data")
        names = {squeezed(problem.prompt): problem.id for problem in held_out}
        shared = [f"{problem.id} = {names[text]}" for problem in train if (text := squeezed(problem.prompt)) in names]
        if shared:
            raise ValueError(
                f"--train-data {' '.join(self.data.train_data)}: {len(shared)} problems are also in --eval-data "
                f"({', '.join(shared[:5])}{', ...' if shared[5:] else ''}); make the training file with "
                "tools/prepare_data.py --against the evaluation files"
            )
        return {"train": self._referenced(train) if self._needs_references else train, "eval": held_out}

    def _read(self, flag: Literal["train-data", "eval-data"]) -> list[Problem]:
        problems: list[Problem] = []
        for path in self.data.train_data if flag == "train-data" else self.data.eval_data:
            before = len(problems)
            for place, row in read_rows(path):
                if row.task != self.name:
                    raise ValueError(f"--{flag} {place}: is of task {row.task}; --task {self.name} cannot grade it")
                if (first := self._places.setdefault(row.problem.id, place)) != place:
                    raise ValueError(f"--{flag} {place}: id {row.problem.id} is taken by {first}; give it another")
                try:
                    self.accept(row)
                except ValueError as error:
                    raise ValueError(f"--{flag} {place}: {error}") from error
                problems.append(row.problem)
            if len(problems) == before:
                raise ValueError(f"--{flag} {path}: is empty; give a file with at least one problem")
        return problems

    def _referenced(self, train: list[Problem]) -> list[Problem]:
        kept = [problem for problem in train if problem.reference_solution is not None]
        if train and not kept:
            raise ValueError(
                f"--train-data {' '.join(self.data.train_data)}: not one problem has a reference solution, which "
                "--mode opsd shows its teacher; use --mode opd"
            )
        if len(kept) < len(train):
            logger.warning(
                "--mode opsd: %d of %d training problems have no reference solution and are left out",
                len(train) - len(kept),
                len(train),
            )
        return kept


@lru_cache(maxsize=4)
def _order(num: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(random.Random(f"{seed} {epoch}").sample(range(num), num))


def file_sha256(path: str | Path) -> str:
    """Return the hash of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
