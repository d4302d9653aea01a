"""Records of programming corpora as rows."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from megatron_trd.records import Problem
from megatron_trd.tasks.code_problems.cases import CodeTests
from megatron_trd.tasks.code_problems.evalplus import make_tests
from megatron_trd.tasks.code_problems.literal import to_literal
from megatron_trd.tasks.corpora.asserts import read_asserts
from megatron_trd.tasks.corpora.private_tests import read_private_tests
from megatron_trd.tasks.corpora.records import Record, SkippedRecord, first_of, kept_metadata, row_id
from megatron_trd.tasks.corpus import Row
from megatron_trd.tasks.sandbox import shared_sandbox

SETUP = """\
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
"""
"""What starter code in the manner of LeetCode takes for granted."""
COMPLETE = "Complete this Python function."
"""What HumanEval asks for; its prompt is the start of the program."""
LIVECODEBENCH_TIMEOUT_S = 6.0
_ID = ("id", "task_id", "problem_id", "question_id")
_KEPT = ("difficulty", "url", "platform", "contest_date", "entry_point")
_SOLUTION_CLASS = re.compile(r"^\s*class\s+Solution\b", re.MULTILINE)


def code_row(
    record: Record, prefix: str, statement: str, tests: CodeTests, *, starter: str = "", solution: str | None = None
) -> Row:
    """Return a row whose prompt shows the starter code, or else names the function that will be called."""
    if not statement.strip():
        raise ValueError("has no statement; fill it in, or remove the record")
    prompt = statement.strip()
    if starter.strip():
        prompt += f"\n\nStart from this code:\n\n```python\n{starter.strip()}\n```"
    elif tests.function is not None and tests.function not in statement:
        prompt += f"\n\nThe function to write is called `{tests.function}`."
    return Row(
        task="code",
        problem=Problem(
            id=row_id(prefix, record, _ID),
            prompt=prompt,
            answer="",
            reference_solution=(solution or "").strip() or None,
            metadata=kept_metadata(prefix, record, _KEPT) | _nested_metadata(record),
        ),
        tests=tests.as_json(),
    )


def apps_row(record: Record, prefix: str) -> Row:
    """Return the row of an APPS or TACO record.

    Raises:
        SkippedRecord: it has no tests.
        ValueError: a field is malformed.
    """
    cases = _decoded(record, "input_output") or {}
    inputs, outputs = cases.get("inputs", []), cases.get("outputs", [])
    if not inputs or len(inputs) != len(outputs):
        raise SkippedRecord(f"{len(inputs)} inputs and {len(outputs)} outputs")
    solutions = _decoded(record, "solutions") or []
    starter = str(first_of(record, ("starter_code",)) or "")
    shown = "\n".join([starter, *solutions[:1]])
    function, is_method = cases.get("fn_name"), _SOLUTION_CLASS.search(shown) is not None
    if function is None:
        inputs, outputs = map(_text, inputs), map(_text, outputs)
    else:
        inputs, outputs = (to_literal(tuple(arguments)) for arguments in inputs), map(to_literal, _unwrapped(outputs))
    tests = CodeTests(
        kind="stdin" if function is None else "call",
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        function=f"Solution().{function}" if is_method and function else function,
        setup=SETUP if is_method else "",
        special_judge=bool(record.fields.get("special_judge", False)),
    )
    solution = solutions[0] if solutions else None
    return code_row(record, prefix, str(record.fields.get("question", "")), tests, starter=starter, solution=solution)


def livecodebench_row(record: Record, prefix: str) -> Row:
    """Return the row of a LiveCodeBench record: public tests, then hidden ones.

    Raises:
        ValueError: a field is malformed.
    """
    cases = [
        *(_decoded(record, "public_test_cases") or []),
        *(read_private_tests(record.fields.get("private_test_cases") or "[]")),
    ]
    kinds = {case["testtype"] for case in cases}
    if kinds not in ({"stdin"}, {"functional"}):
        raise ValueError(f"tests of type {' and '.join(sorted(kinds)) or 'none'}; give one of both")
    starter = str(record.fields.get("starter_code") or "")
    statement = str(record.fields.get("question_content", ""))
    if kinds == {"stdin"}:
        tests = CodeTests(
            kind="stdin",
            inputs=tuple(case["input"] for case in cases),
            outputs=tuple(case["output"] for case in cases),
            timeout_s=LIVECODEBENCH_TIMEOUT_S,
        )
    else:
        name = (_decoded(record, "metadata") or {}).get("func_name", "")
        tests = CodeTests(
            kind="call",
            inputs=tuple(to_literal(tuple(json.loads(line) for line in case["input"].split("\n"))) for case in cases),
            outputs=tuple(to_literal(json.loads(case["output"])) for case in cases),
            function=f"Solution().{name}" if _SOLUTION_CLASS.search(starter) else name,
            setup=SETUP,
            timeout_s=LIVECODEBENCH_TIMEOUT_S,
        )
    return code_row(record, prefix, statement, tests, starter=starter)


def evalplus_row(record: Record, prefix: str) -> Row:
    """Return the row of a HumanEval+ or MBPP+ record; what its own solution returns in the sandbox is expected.

    Raises:
        ValueError: a field is missing, or the solution fails.
    """
    fields, tests = record.fields, make_tests(record.fields, shared_sandbox())
    prompt, solution = str(fields["prompt"]), str(fields["canonical_solution"])
    if str(fields["task_id"]).startswith("Mbpp/"):  # a docstring
        return code_row(record, prefix, prompt.strip().strip('"'), tests, solution=solution)
    return code_row(record, prefix, COMPLETE, tests, starter=prompt, solution=prompt + solution)


def assert_row(record: Record, prefix: str) -> Row:
    """Return the row of a record whose tests are assertions: MBPP and LeetCode.

    Raises:
        SkippedRecord: an assertion is more than a comparison of a call with literals.
    """
    fields = record.fields
    code = "\n".join(fields["test_list"]) if "test_list" in fields else str(fields.get("test", ""))
    try:
        calls = read_asserts(code)
    except ValueError as error:
        raise SkippedRecord(str(error)) from error
    starter, solution = str(fields.get("starter") or ""), fields.get("code")
    if not calls:
        raise SkippedRecord("no assertion")
    name, is_method = calls[0].function, _SOLUTION_CLASS.search(starter) is not None
    tests = CodeTests(
        kind="call",
        inputs=tuple(call.arguments for call in calls),
        outputs=tuple(call.expected for call in calls),
        function=f"Solution().{name}" if is_method else name,
        setup=SETUP if is_method else "",
    )
    statement = str(first_of(record, ("text", "prompt")) or "")
    return code_row(record, prefix, statement, tests, starter=starter, solution=solution)


def _decoded(record: Record, name: str) -> Any:
    """Return a field that may hold JSON as a text."""
    value = record.fields.get(name)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise ValueError(f"field {name} is not valid JSON ({error}); repair it") from error


def _nested_metadata(record: Record) -> dict[str, Any]:
    nested = record.fields.get("metadata")
    return {name: nested[name] for name in _KEPT if nested.get(name)} if isinstance(nested, dict) else {}


def _text(text: Any) -> str:
    return "\n".join(map(str, text)) if isinstance(text, list) else str(text)


def _unwrapped(outputs: Sequence[Any]) -> Sequence[Any]:
    """Return expected values: APPS and TACO write each as a list of one."""
    wrapped = all(isinstance(output, list) and len(output) == 1 for output in outputs)
    return [output[0] for output in outputs] if wrapped else outputs
