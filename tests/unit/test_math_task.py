"""The task that reads mathematics from local files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_trd.tasks.math_problems import MathTask


def _write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"problem": f"What is {i} + 1?", "answer": f"{i + 1}", "solution": f"{i} + 1"} for i in range(start, count)]


def _task(tmp_path: Path, **files: list[dict[str, str]]) -> MathTask:
    paths = {"train": _rows(10), "evaluation": _rows(15, start=10)} | files
    return MathTask(template_dir=tmp_path, **{name: _write(tmp_path / name, rows) for name, rows in paths.items()})


def test_every_epoch_shows_every_problem_in_its_own_order(tmp_path: Path) -> None:
    task = _task(tmp_path)
    epochs = [[task.train_problem(10 * epoch + place).prompt for place in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(row["problem"] for row in _rows(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs == [[_task(tmp_path).train_problem(10 * e + p).prompt for p in range(10)] for e in range(3)]


def test_held_out_problems_and_verdicts(tmp_path: Path) -> None:
    task = _task(tmp_path)
    problems = task.eval_problems(3)
    assert [problem.prompt for problem in problems] == [f"What is {i} + 1?" for i in (10, 11, 12)]
    assert problems[0].reference_solution == "10 + 1" and len({problem.id for problem in task.eval_problems(99)}) == 5
    assert task.grade(problems[0], r"<think>12?</think>\boxed{011}", "stop").correct
    assert task.grade(problems[0], r"\boxed{12}", "stop").outcome == "wrong"


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 problems are also in .*; remove them"):
        _task(tmp_path, evaluation=[{"problem": "What  is 3 + 1?", "answer": "4"}])
    with pytest.raises(ValueError, match="train:1: problem or answer is missing; remove the line"):
        _task(tmp_path, train=[{"problem": "What?"}])
    with pytest.raises(ValueError, match="train: is empty"):
        _task(tmp_path, train=[])
    with pytest.raises(ValueError, match="no such file; give a JSONL file"):
        MathTask(train=tmp_path / "absent", evaluation=tmp_path / "absent", template_dir=tmp_path)
