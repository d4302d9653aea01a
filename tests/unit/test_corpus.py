"""Files of problems and the task that reads them."""

from __future__ import annotations

import json
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_trd.config.schema import Config, DataConfig, MethodConfig, ModelConfig, RolloutConfig
from megatron_trd.tasks import TASKS, make_task
from megatron_trd.tasks.code_problems.task import CodeTask
from megatron_trd.tasks.corpus import read_rows
from megatron_trd.tasks.math_problems import MathTask

TESTS = {"kind": "stdin", "inputs": ["1\n"], "outputs": ["2\n"]}


def row(i: int, **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "task": "math",
        "id": f"sums/{i}",
        "prompt": f"What is {i} + 1?",
        "answer": str(i + 1),
        "reference_solution": f"{i} + 1 is {i + 1}.",
    } | changes


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    train, held_out = [row(i) for i in range(10)], [row(i) for i in range(10, 15)]
    train[3]["reference_solution"] = ""
    return DataConfig(
        task="math",
        train_data=(write(tmp_path / "a.jsonl", train[:4]), write(tmp_path / "b.jsonl", train[4:])),
        eval_data=(write(tmp_path / "e.jsonl", held_out),),
    )


def config(data: DataConfig, mode: str) -> Config:
    teacher = "there" if mode == "opd" else None
    rollout = RolloutConfig(student_urls=("http://s",), teacher_urls=("http://t",))
    model = ModelConfig(hf_checkpoint="here", teacher_hf_checkpoint=teacher)
    return Config(method=MethodConfig(mode=mode), model=model, data=data, rollout=rollout)  # type: ignore[arg-type]


def test_every_epoch_shows_every_problem_of_all_files_in_its_own_order(data: DataConfig) -> None:
    task = MathTask(data)
    epochs = [[task.train_problem(10 * epoch + place).id for place in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == [f"sums/{i}" for i in range(10)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = pickle.loads(pickle.dumps(task))
    assert epochs == [[again.train_problem(10 * e + p).id for p in range(10)] for e in range(3)]
    other_seed = MathTask(DataConfig(train_data=data.train_data, seed=data.seed + 1))
    assert [other_seed.train_problem(i).id for i in range(10)] != epochs[0]
    assert [problem.id for problem in task.eval_problems(3)] == ["sums/10", "sums/11", "sums/12"]
    assert len(task.eval_problems(99)) == 5


def test_opsd_leaves_out_problems_without_a_reference_and_counts_them(
    data: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_trd"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        opsd = make_task(config(data, "opsd"), TASKS, trains=True, evaluates=True)
        opd = make_task(config(data, "opd"), TASKS, trains=True, evaluates=True)
    assert sorted(opsd.train_problem(i).id for i in range(9)) == [f"sums/{i}" for i in range(10) if i != 3]
    assert {opd.train_problem(i).id for i in range(10)} >= {"sums/3"}
    assert {record.message for record in caplog.records} == {
        "--mode opsd: 1 of 10 training problems have no reference solution and are left out"
    }
    bare = DataConfig(task="math", train_data=(write(tmp_path / "bare", [row(3, reference_solution="")]),))
    with pytest.raises(ValueError, match="not one problem has a reference solution.*use --mode opd"):
        make_task(config(bare, "opsd"), TASKS, trains=True, evaluates=False)


def test_missing_problems_are_noticed_at_the_start(data: DataConfig) -> None:
    empty = config(DataConfig(task="math"), "opsd")
    with pytest.raises(ValueError, match=r"--train-data \(unset\): --task math needs files"):
        make_task(empty, TASKS, trains=True, evaluates=False)
    with pytest.raises(ValueError, match=r"--eval-data \(unset\): --task math has no held-out problems"):
        make_task(empty, TASKS, trains=False, evaluates=True)
    make_task(empty, TASKS, trains=False, evaluates=False)
    with pytest.raises(ValueError, match="--task maths: unknown; use one of arithmetic, code, math"):
        make_task(config(DataConfig(task="maths"), "opsd"), TASKS, trains=False, evaluates=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "bad.jsonl:2: Expecting property name"),
        ("[]", "bad.jsonl:2: not a problem of schema 1"),
        (row(1, schema=2), "bad.jsonl:2: not a problem of schema 1"),
        (row(1, solution="x"), "bad.jsonl:2: field solution is unknown"),
        (row(1, answer=2), "bad.jsonl:2: field answer must be a string"),
        (row(1, prompt=" "), "bad.jsonl:2: field prompt is empty"),
        (row(1, answer=" "), "bad.jsonl:2: answer is empty"),
        (row(1, metadata=[]), "bad.jsonl:2: fields metadata and tests must be objects"),
        (row(1, task="code"), "bad.jsonl:2: is of task code; --task math cannot grade it"),
        (row(0), "bad.jsonl:2: id sums/0 is taken by .*bad.jsonl:1"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row(0)) + "\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(ValueError, match=message):
        MathTask(DataConfig(train_data=(str(path),))).train_problem(0)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "t", [row(i) for i in range(3)])
    same = write(tmp_path / "s", [row(9, prompt="What  is 2\n+ 1?")])
    with pytest.raises(ValueError, match=r"1 problems are also in --eval-data \(sums/2 = sums/9\)"):
        MathTask(DataConfig(train_data=(train,), eval_data=(same,))).eval_problems(1)
    with pytest.raises(ValueError, match="--eval-data .*: is empty"):
        MathTask(DataConfig(eval_data=(write(tmp_path / "e", []),))).eval_problems(1)
    with pytest.raises(ValueError, match="absent: no such file"):
        MathTask(DataConfig(train_data=(str(tmp_path / "absent"),))).train_problem(0)


def test_tests_stay_in_their_file(tmp_path: Path) -> None:
    rows = [row(i, task="code", answer="", tests=TESTS | {"outputs": [f"{i}\n"]}) for i in range(3)]
    path = write(tmp_path / "ü.jsonl", [rows[0] | {"prompt": "größer"}, *rows[1:]])
    task = pickle.loads(pickle.dumps(CodeTask(DataConfig(train_data=(path,)))))
    problems = {task.train_problem(i).id: task.train_problem(i) for i in range(3)}
    assert [task.tests(problems[f"sums/{i}"])["outputs"] for i in range(3)] == [["0\n"], ["1\n"], ["2\n"]]
    assert "outputs" not in repr(problems)
    assert [str(place) for place, _ in read_rows(path)] == [f"{path}:{i}" for i in (1, 2, 3)]
    write(Path(path), [*rows[:2], rows[2] | {"id": "other"}])
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: ")):
        task.tests(problems["sums/2"])
    for tests, message in ((None, "tests are missing"), ({"kind": "stdin"}, "inputs")):
        bad = write(tmp_path / "bad", [rows[0] | {"tests": tests}])
        with pytest.raises(ValueError, match=f"bad:1: .*{message}"):
            CodeTask(DataConfig(train_data=(bad,))).train_problem(0)


def test_the_task_of_the_documentation_works(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) <= 40
    made: dict[str, Any] = {"__name__": "sort_words"}
    exec(compile(code, "docs/tasks.md", "exec"), made)
    rows = [row(0, task="sort", prompt="pear fig", answer="fig pear"), row(1, task="sort", prompt="b a", answer="b a")]
    good, bad = (write(tmp_path / name, [one]) for name, one in zip(("good", "bad"), rows, strict=True))
    data = DataConfig(task="sort", train_data=(good,))
    task = make_task(config(data, "opsd"), {**TASKS, "sort": made["SortTask"]}, trains=True, evaluates=False)
    problem = task.train_problem(0)
    outcomes = [task.grade(problem, text, "stop").outcome for text in ("Sorted: fig  pear", "Sorted: pear fig", "?")]
    assert outcomes == ["correct", "wrong", "no_answer"]
    with pytest.raises(ValueError, match="bad:1: answer is not the sorted prompt"):
        made["SortTask"](DataConfig(train_data=(bad,))).train_problem(0)
