"""HumanEval+ and MBPP+: tests from EvalPlus' records, its two statuses, its results file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_trd.tasks.code_problems.calls import call_job
from megatron_trd.tasks.code_problems.cases import CodeTests, Oracle
from megatron_trd.tasks.code_problems.grading import ProgramResult, judge_program
from megatron_trd.tasks.code_problems.literal import decode, to_literal
from megatron_trd.tasks.code_problems.mbpp_inputs import mbpp_arguments
from megatron_trd.tasks.code_problems.outcome import failure_of
from megatron_trd.tasks.sandbox import Sandbox

_FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "base_input", "plus_input", "atol")
_REFERENCE_S, _REFERENCE_KIB = 60.0, 1 << 18
_LEAST_S, _TIMES_REFERENCE = 1.0, 4.0
"""EvalPlus gives a call 4 times what the reference took, at least 1 s."""
_ORACLES: dict[tuple[str, str], Oracle] = {  # (data set, function) -> rule, as in EvalPlus 0.3.1
    ("HumanEval", "find_zero"): "polynomial_root",
    ("Mbpp", "are_equivalent"): "anything",
    ("Mbpp", "sum_div"): "or_zero",
    ("Mbpp", "surface_Area"): "pyramid",
    ("Mbpp", "digit_distance_nums"): "digit_distance",
    **{("Mbpp", name): "not_none" for name in ("check_str", "text_match_three", "text_starta_endb")},
    **{
        ("Mbpp", name): "same_set"
        for name in (
            *("similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly"),
            *("larg_nnum", "intersection_array", "find_dissimilar", "Diff"),
        )
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlusResult:
    """How a program did on the base tests and on the additional ones; both must pass for HumanEval+ and MBPP+."""

    base: ProgramResult
    plus: ProgramResult

    @property
    def passed(self) -> bool:
        """Whether it passed everything."""
        return self.base.passed and self.plus.passed


def make_tests(record: Mapping[str, Any], sandbox: Sandbox) -> CodeTests:
    """Make the tests of one line of HumanEvalPlus.jsonl or MbppPlus.jsonl.

    The expected values are what the record's own solution returns; it is run in the sandbox too.

    Raises:
        ValueError: a field is missing, or the solution fails.
    """
    for name in _FIELDS:
        if name not in record:
            raise ValueError(f"{record.get('task_id', 'record')}: {name} is missing; give a file of EvalPlus")
    task_id, function = str(record["task_id"]), str(record["entry_point"])
    is_mbpp = task_id.startswith("Mbpp/")
    calls = [*record["base_input"], *record["plus_input"]]
    arguments = [tuple(mbpp_arguments(task_id, call) if is_mbpp else call) for call in calls]
    tests = CodeTests(
        kind="call",
        inputs=tuple(map(to_literal, arguments)),
        outputs=("None",) * len(calls),
        function=function,
        timeout_s=_REFERENCE_S,
        atol=float(record["atol"]),
        oracle=_ORACLES.get((task_id.partition("/")[0], function), "python"),
        num_base=len(record["base_input"]),
    )
    outputs, slowest_s = _run_reference(
        str(record["prompt"]) + str(record["canonical_solution"]), task_id, tests, sandbox
    )
    return replace(tests, outputs=outputs, timeout_s=max(_LEAST_S, _TIMES_REFERENCE * slowest_s))


def _run_reference(solution: str, task_id: str, tests: CodeTests, sandbox: Sandbox) -> tuple[tuple[str, ...], float]:
    """Return the literal of what each call returns, and the seconds of the slowest."""
    job = replace(call_job(solution, tests, tests.inputs), output_kib=_REFERENCE_KIB)
    finished = sandbox.run(job)
    records = [json.loads(record) for record in finished.records]
    error = next((record["error"] for record in records if "error" in record), None)
    if error or len(records) != len(tests.inputs):
        failure = failure_of(finished)
        raise ValueError(f"{task_id}: its own solution fails ({error or failure}); remove the problem")
    values = [decode(record["value"]) for record in records]
    if tests.oracle == "not_none":
        values = [value is not None for value in values]
    try:
        literals = tuple(map(to_literal, values))
    except ValueError as wrong:
        raise ValueError(f"{task_id}: its own solution returns no plain data ({wrong}); remove the problem") from wrong
    return literals, max((record["seconds"] for record in records), default=0.0)


def judge_plus(solution: str, tests: CodeTests, *, sandbox: Sandbox, stop_at_failure: bool = True) -> PlusResult:
    """Run a program on the base tests and on the others, each in a process of their own."""
    parts = (_part(tests, slice(tests.num_base)), _part(tests, slice(tests.num_base, None)))
    base, plus = (judge_program(solution, part, sandbox=sandbox, stop_at_failure=stop_at_failure) for part in parts)
    return PlusResult(base=base, plus=plus)


def _part(tests: CodeTests, part: slice) -> CodeTests:
    return replace(tests, inputs=tests.inputs[part], outputs=tests.outputs[part], num_base=0)


def evaluation_of(record: Mapping[str, Any], solution: str, result: PlusResult) -> dict[str, Any]:
    """Return what EvalPlus writes about one sample: statuses and the inputs that failed.

    Raises:
        ValueError: the sandbox failed, so there is no status.
    """
    if result.base.ungraded or result.plus.ungraded:
        raise ValueError(f"{record['task_id']}: {result.base.describe()}; {result.plus.describe()}; run it again")
    return {
        "task_id": record["task_id"],
        "solution": solution,
        "base_status": _status(result.base),
        "plus_status": _status(result.plus),
        "base_fail_tests": _failed(result.base, record["base_input"]),
        "plus_fail_tests": _failed(result.plus, record["plus_input"]),
    }


def _status(result: ProgramResult) -> str:
    if result.passed:
        return "pass"
    return "timeout" if "timeout" in result.verdicts else "fail"


def _failed(result: ProgramResult, inputs: Sequence[Any]) -> list[Any]:
    return [inputs[index] for index, verdict in enumerate(result.verdicts) if verdict != "pass"]


def write_results(path: Path, evaluations: Sequence[Mapping[str, Any]], *, dataset_hash: str) -> None:
    """Write `*_eval_results.json` as EvalPlus does: date, hash of the data set, task id -> its samples."""
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for evaluation in evaluations:
        by_task.setdefault(evaluation["task_id"], []).append(evaluation)
    results = {"date": datetime.now().strftime("%Y-%m-%d %H:%M"), "hash": dataset_hash, "eval": by_task}
    path.write_text(json.dumps(results), encoding="utf-8")
