"""EvalPlus' data sets: its own solutions pass, broken ones fail, its rules for single problems, its results file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_trd.tasks.code_problems import judge_program
from megatron_trd.tasks.code_problems.compare import same_value_as_evalplus, tolerances_as_evalplus
from megatron_trd.tasks.code_problems.evalplus import evaluation_of, judge_plus, make_tests, write_results
from megatron_trd.tasks.code_problems.mbpp_inputs import mbpp_arguments
from megatron_trd.tasks.sandbox import Sandbox
from sandboxes import sandbox_or_skip

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "code"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no corpora at {DATA}")
RECORD = {
    "task_id": "Mbpp/2",
    "prompt": '"""Write a function to find the shared elements."""\n',
    "entry_point": "similar_elements",
    "canonical_solution": "def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
    "base_input": [[[3, 4, 5], [5, 4, 10]], [[1, 2], [3]]],
    "plus_input": [[[], []], [[1, 1], [1]]],
    "atol": 0,
}


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return sandbox_or_skip()


def _broken(source: str, function: str) -> str:
    """Wrap what the function returns."""
    return f"{source}\n_right = {function}\ndef {function}(*arguments): return [_right(*arguments)]\n"


@needs_data
@pytest.mark.parametrize(
    ("name", "step", "num"), [("MbppPlus-v0.2.0.jsonl", 40, 10), ("HumanEvalPlus-substitute.jsonl", 21, 8)]
)
def test_its_own_solutions_pass_and_broken_ones_fail(name: str, step: int, num: int, sandbox: Sandbox) -> None:
    records = [json.loads(line) for line in (DATA / name).open(encoding="utf-8")][::step]
    assert len(records) == num
    for record in records:
        tests = make_tests(record, sandbox)
        source = record["prompt"] + record["canonical_solution"]
        assert judge_plus(source, tests, sandbox=sandbox).passed, record["task_id"]
        broken = judge_plus(_broken(source, record["entry_point"]), tests, sandbox=sandbox)
        assert not broken.base.passed and not broken.plus.passed, record["task_id"]


def test_statuses_and_results_file(sandbox: Sandbox, tmp_path: Path) -> None:
    tests = make_tests(RECORD, sandbox)
    assert (tests.num_base, tests.oracle, len(tests.inputs)) == (2, "same_set", 4)
    right, wrong = (
        str(RECORD["canonical_solution"]),
        "def similar_elements(a, b): return [x for x in a if x > 1 and x in b]",
    )
    evaluations = [
        evaluation_of(RECORD, program, judge_plus(program, tests, sandbox=sandbox)) for program in (right, wrong)
    ]
    write_results(tmp_path / "samples_eval_results.json", evaluations, dataset_hash="abc")
    written = json.loads((tmp_path / "samples_eval_results.json").read_text())
    assert (written["hash"], [*written]) == ("abc", ["date", "hash", "eval"])
    assert written["eval"]["Mbpp/2"] == [
        {
            "task_id": "Mbpp/2",
            "solution": program,
            "base_status": "pass",
            "plus_status": plus_status,
            "base_fail_tests": [],
            "plus_fail_tests": failed,
        }
        for program, plus_status, failed in ((right, "pass", []), (wrong, "fail", [[[1, 1], [1]]]))
    ]


def test_a_solution_that_fails_is_named(sandbox: Sandbox) -> None:
    for solution in (
        "def similar_elements(a, b): 1 / 0",
        "raise SystemExit",
        "def similar_elements(a, b): return object()",
    ):
        with pytest.raises(ValueError, match="Mbpp/2: its own solution .*; remove the problem"):
            make_tests(RECORD | {"canonical_solution": solution}, sandbox)
    with pytest.raises(ValueError, match="Mbpp/2: atol is missing; give a file of EvalPlus"):
        make_tests({name: value for name, value in RECORD.items() if name != "atol"}, sandbox)


def test_objects_count_where_only_their_presence_does(sandbox: Sandbox) -> None:
    record = RECORD | {
        "task_id": "Mbpp/4",
        "entry_point": "check_str",
        "canonical_solution": "import re\ndef check_str(text): return re.search('a', text)",
        "base_input": [["a"], ["b"]],
        "plus_input": [["ab"]],
    }
    tests = make_tests(record, sandbox)
    assert tests.outputs == ("True", "False", "True")
    for program, passes in (("return 'a' in t", True), ("return [] if 'a' in t else None", True), ("return t", False)):
        assert judge_program(f"def check_str(t): {program}", tests, sandbox=sandbox).passed is passes


@pytest.mark.parametrize(
    ("oracle", "arguments", "expected", "returned", "atol", "equal"),
    [
        ("python", (), (1, 2), [1, 2], 0, False),
        ("python", (), 1, True, 0, True),
        ("python", (), 1.0, 1.0000001, 1e-6, True),
        ("python", (), 1.0, 1, 1e-6, True),
        ("python", (), 2.0, 1, 1e-6, False),
        ("python", (), [1.0, 2.0], [1.0, 2.0000001], 1e-6, True),
        ("python", (), [1.0, 2.0], [1.0], 1e-6, False),
        ("python", (), "a", "b", 1e-6, False),
        ("same_set", (), (1, 2), [2, 1, 1], 0, True),
        ("or_zero", (), 5, 0, 0, True),
        ("or_zero", (), 5, 4, 0, False),
        ("anything", (), 5, None, 0, True),
        ("pyramid", (3, 4), 33, 35, 0, True),
        ("pyramid", (3, 4), 33, 36, 0, False),
        ("digit_distance", (23, 156), 9, 7, 0, True),
        ("polynomial_root", ([1, 2],), 7, -0.5, 1e-4, True),
        ("polynomial_root", ([1, 2],), -0.5, 0.5, 1e-4, False),
    ],
)
def test_rules(oracle: Any, arguments: Any, expected: Any, returned: Any, atol: float, equal: bool) -> None:
    assert same_value_as_evalplus(oracle, arguments, expected, returned, atol) is equal


def test_tolerance_stays_once_floats_were_expected() -> None:
    assert tolerances_as_evalplus([1, [2.0], [], 3, "a"], 0) == [0, 1e-6, 1e-6, 1e-6, 1e-6]
    assert tolerances_as_evalplus([1.0], 1e-3) == [1e-3]


@pytest.mark.parametrize(
    ("task", "arguments", "expected"),
    [
        (3, [[1]], [[1]]),
        (2, [[1], [2]], [(1,), (2,)]),
        (63, [[[1, 2]]], [[(1, 2)]]),
        (75, [[[1, 2]], 3], [[(1, 2)], 3]),
        (106, [[1], [2]], [[1], (2,)]),
        (115, [[[1], [], 2]], [[{1}, {}, {}]]),
        (124, [1, "1j"], [1.0, 1j]),
        (252, ["2j"], [2j]),
        (259, [[[1, 2]]], [((1, 2),)]),
        (278, [[1, [2]]], [(1, (2,))]),
        (307, [[1], 2, 3], [(1,), 2, 3]),
        (580, [[1, [2, [3]]]], [(1, (2, (3,)))]),
        (722, [{"a": [1]}, 2], [{"a": (1,)}, 2]),
    ],
)
def test_arguments(task: int, arguments: list[Any], expected: list[Any]) -> None:
    assert mbpp_arguments(f"Mbpp/{task}", arguments) == expected
