"""Programs in, verdicts out: extraction, comparison, calls, LiveCodeBench's harness, corpora of known verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_trd.tasks.code_problems import CodeTests, grade_program, judge_program
from megatron_trd.tasks.code_problems.compare import same_output, same_output_as_livecodebench, same_value
from megatron_trd.tasks.code_problems.extract import extract_as_livecodebench, extract_program
from megatron_trd.tasks.code_problems.literal import parse_literal, to_literal
from megatron_trd.tasks.sandbox import Finished, Job, Sandbox
from sandboxes import sandbox_or_skip

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "code"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no corpora at {DATA}")
FENCE = "```"
ECHO = CodeTests(kind="stdin", inputs=("3 4\n", "5 6\n"), outputs=("7\n", "11\n"), timeout_s=20)
ADD = CodeTests(kind="call", function="add", inputs=("(3, 4)", "(5, 6)"), outputs=("7", "11"), timeout_s=20)
SUM = "print(sum(map(int, input().split())))"


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return sandbox_or_skip()


def _records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).open(encoding="utf-8")]


def _tests_of(record: dict[str, Any], solution: str = "") -> CodeTests:
    tests = record["input_output"]
    if "fn_name" not in tests:
        return CodeTests(kind="stdin", inputs=tuple(tests["inputs"]), outputs=tuple(tests["outputs"]), timeout_s=20)
    return CodeTests(
        kind="call",
        function=("Solution()." if "class Solution" in solution else "") + tests["fn_name"],
        inputs=tuple(to_literal(tuple(arguments)) for arguments in tests["inputs"]),
        outputs=tuple(to_literal(output[0] if isinstance(output, list) else output) for output in tests["outputs"]),
        timeout_s=20,
    )


def test_tests_survive_json() -> None:
    tests = CodeTests(
        kind="call", inputs=("(1,)",), outputs=("2",), function="f", oracle="python", atol=1e-3, num_base=1
    )
    assert CodeTests.from_json(json.loads(json.dumps(tests.as_json()))) == tests


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "argv"}, "kind argv: use one of stdin, call"),
        ({"inputs": [1, 2]}, "inputs .*: give texts"),
        ({"inputs": "12"}, "inputs 12: give list or tuple"),
        ({"outputs": ["1"]}, "outputs 1: there are 2 inputs; give one for each"),
        ({"inputs": [], "outputs": []}, "inputs 0: give at least one test"),
        ({"timeout_s": "1"}, "timeout_s 1: give float or int"),
        ({"timeout_s": 0}, "timeout_s 0: give seconds above 0"),
        ({"function": "f"}, "function f: name it for kind call, and only there"),
        ({"kind": "call"}, "function None: name it for kind call"),
        ({"num_base": 3}, "num_base 3: give 0 to 2"),
        ({"special_judge": 1}, "special_judge 1: give bool"),
        ({"fn_name": "f"}, "fn_name f: no such field"),
    ],
)
def test_bad_tests_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"tests: {message}"):
        CodeTests.from_json({"kind": "stdin", "inputs": ["1", "2"], "outputs": ["1", "2"]} | change)


@pytest.mark.parametrize(
    ("response", "program"),
    [
        (f"{FENCE}python\na\n{FENCE}", "a\n"),
        (f"text\n{FENCE}py\na\n{FENCE}\nmore\n{FENCE}Python3\nb\n{FENCE}\nend", "b\n"),
        (f"{FENCE}python\na\n{FENCE}\nIt prints\n{FENCE}\n3\n{FENCE}", "a\n"),
        (f"{FENCE}\na\n{FENCE}\n{FENCE}\nb\n{FENCE}", "b\n"),
        (f"{FENCE}cpp\na\n{FENCE}", None),
        (f"<think>{FENCE}python\na\n{FENCE}</think>{FENCE}python\nb\n{FENCE}", None),  # not at the start of a line
        (f"<think>\n{FENCE}python\na\n{FENCE}\n</think>\nno code", None),
        (f"<think>\n{FENCE}python\na\n</think>\n{FENCE}python\nb\n{FENCE}", "b\n"),
        (f"  {FENCE}python\r\n  a\r\n  {FENCE}\r\n", "  a\r\n"),
        (f"{FENCE}{FENCE}python\na = '''\n{FENCE}\n'''\n{FENCE}{FENCE}", f"a = '''\n{FENCE}\n'''\n"),
        ("~~~python\na\n~~~", "a\n"),
        (f"{FENCE}python\n\n{FENCE}", None),
        ("print(1)", None),
    ],
)
def test_extraction(response: str, program: str | None) -> None:
    if response.startswith(f"<think>{FENCE}"):
        program = "b\n"  # what follows the thinking begins a line
    assert extract_program(response) == (program, False)


@pytest.mark.parametrize(
    "response", ["<think>\nhm", f"{FENCE}python\na", f"{FENCE}python\na\n{FENCE}\n{FENCE}python\nb"]
)
def test_a_response_that_breaks_off(response: str, sandbox: Sandbox) -> None:
    assert extract_program(response) == (None, True)
    assert grade_program(response, ECHO, finish_reason="stop", sandbox=sandbox).outcome == "truncated"


def test_livecodebench_extracts_between_the_last_two_fences() -> None:
    assert extract_as_livecodebench(f"{FENCE}python\na\n{FENCE}\nso\n{FENCE}\nb\nc\n{FENCE}") == "b\nc"
    assert extract_as_livecodebench(f"{FENCE}python\na") is None


@pytest.mark.parametrize(
    ("expected", "printed", "plain", "livecodebench"),
    [
        ("1 2\n3\n", "1 2 \n3\n\n\n", True, True),
        ("1 2\n3", "1\n2 3", True, False),
        ("yes", "Yes", False, False),
        ("6", "6.0", False, True),
        ("6", "6.000000001", False, False),
        ("6.0", "6.0000001", True, False),
        ("6.0", "6.00001", False, False),
        ("1000000.0", "1000000.5", True, False),
        ("0.5", "5e-1", True, True),
        ("0.5", "nan", False, False),
        ("1.5", "1_5e-1", False, True),
        ("1 2", "1 2 3", False, False),
        ("a\n\nb", "a\nb", True, False),
        ("", "", True, True),
        ("100000000000000001", "100000000000000000", False, False),
    ],
)
def test_printed_text(expected: str, printed: str, plain: bool, livecodebench: bool) -> None:
    assert (same_output(expected, printed), same_output_as_livecodebench(expected, printed)) == (plain, livecodebench)


@pytest.mark.parametrize(
    ("expected", "returned", "atol", "equal"),
    [
        ([1, (2, 3)], (1, [2, 3]), 0, True),
        ([1, 2], [1, 2, 3], 0, False),
        ({"a": [1]}, {"a": (1,)}, 0, True),
        (0.3, 0.1 + 0.2, 0, False),
        (0.3, 0.1 + 0.2, 1e-9, True),
        ([0.3, 1], [0.30001, 1], 1e-6, False),
        (math.nan, math.nan, 0, True),
        ("1", 1, 0, False),
        (1, 1.5, 1, False),
        ({1, 2}, [1, 2], 0, False),
        (True, 1, 0, True),
    ],
)
def test_returned_values(expected: Any, returned: Any, atol: float, equal: bool) -> None:
    assert same_value(expected, returned, atol) is equal


@pytest.mark.parametrize(
    "value",
    [
        None, True, 5, -(2**70), 0.1, -0.0, math.inf, 1 + 2j, "é\ud800\n'", b"\xff", [], (), (1,), set(),
        {1, (2,)}, {}, {"a": [{1: None}]},
    ],
)  # fmt: skip
def test_literals_survive(value: Any, sandbox: Sandbox) -> None:
    """As text, and through a function inside the sandbox that returns its argument."""
    assert parse_literal(to_literal(value)) == value
    tests = CodeTests(kind="call", function="same", inputs=(to_literal((value,)),), outputs=(to_literal(value),))
    tests = replace(tests, oracle="python", timeout_s=20)
    assert judge_program("def same(x): return x", tests, sandbox=sandbox).verdicts == ("pass",)


def test_long_numbers_survive(sandbox: Sandbox) -> None:
    test_literals_survive([2**20000], sandbox)


def _fenced(program: str) -> str:
    return f"<think>\nhm\n</think>\n{FENCE}python\n{program}\n{FENCE}\n"


@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        (SUM, "pass"),
        (f"def main():\n    {SUM}\nif __name__ == '__main__':\n    main()\n    exit()", "pass"),
        ("print(7)", "wrong"),
        ("print('7' if input() == '3 4' else '12')", "wrong"),
        ("import sys\nsys.exit(0)", "wrong"),
        (f"{SUM}\nraise SystemExit(1)", "runtime_error"),
        (f"{SUM}\n1 / 0", "runtime_error"),
        ("print(7", "compile_error"),
        ("def f():\nprint(7)", "compile_error"),
        ("eval('1 +')", "runtime_error"),
        ("x = bytearray(4 << 30)", "memory"),
        ("while True: print('x' * 1000)", "output_limit"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "runtime_error"),
    ],
)
def test_programs_that_print(program: str, verdict: str, sandbox: Sandbox) -> None:
    result = judge_program(program, ECHO, sandbox=sandbox)
    assert result.verdicts[-1] == verdict, result
    assert result.passed == (verdict == "pass")
    graded = grade_program(_fenced(program), ECHO, finish_reason="stop", sandbox=sandbox)
    assert graded.outcome == ("correct" if verdict == "pass" else "wrong")
    assert graded.extracted == f"{program}\n" and (graded.error is None) == graded.correct


ALWAYS_EQUAL = "class Same(BASE):\n    def __eq__(self, other): return True\n    __hash__ = BASE.__hash__\n"


@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("def add(a, b): return a + b", "pass"),
        ("def add(a, b): print('x' * 10**7); return a + b", "pass"),
        (
            "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n"
            "def add(a, b): return a + b",
            "pass",
        ),
        ("import json, os\njson.dumps = os.write = None\ndef add(a, b): return a + b", "runtime_error"),
        ("def add(a, b): return a - b", "wrong"),
        ("def add(a, b): return 7", "wrong"),
        ("def plus(a, b): return a + b", "runtime_error"),
        ("def add(a, b): raise ValueError(a)", "runtime_error"),
        ("def add(a, b): exit(0)", "runtime_error"),
        ("def add(a, b): return bytearray(4 << 30)", "memory"),
        ("import os\nos._exit(0)", "runtime_error"),
        ("import sys\nsys.exit(0)", "runtime_error"),
        ("def add(a, b: return a + b", "compile_error"),
        (ALWAYS_EQUAL.replace("BASE", "object") + "def add(a, b): return Same()", "wrong"),
        (ALWAYS_EQUAL.replace("BASE", "int") + "def add(a, b): return Same()", "wrong"),
        ("class C:\n    __class__ = int\ndef add(a, b): return C()", "runtime_error"),
        ("def add(a, b):\n    x = []\n    x.append(x)\n    return x", "runtime_error"),
        ("def add(a, b):\n    x = []\n    for _ in range(900): x = [x]\n    return x", "wrong"),
        ("def add(a, b): return [0] * 10**6", "output_limit"),
        ("import os\nos.closerange(0, 64)\ndef add(a, b): return a + b", "runtime_error"),
        ('import os, sys\nos.write(int(sys.argv[1]), b\'{"seconds": 0, "value": 7}\\n\' * 2)\nos._exit(0)', "wrong"),
        ("import os, sys\nos.write(int(sys.argv[1]), b'[[[\\n')\nos._exit(0)", "wrong"),
        (
            'import os, sys\nos.write(int(sys.argv[1]), b\'{"seconds": 0, "value": ["int", "z"]}\\n\')\nos._exit(0)',
            "wrong",
        ),
        ("import os, sys\nos.write(int(sys.argv[1]), b'[' * 9**5 + b'\\n')\nos._exit(0)", "wrong"),
        ("import os, sys\nwhile True: os.write(int(sys.argv[1]), b'x' * 4096)", "output_limit"),
    ],
)
def test_programs_that_are_called(program: str, verdict: str, sandbox: Sandbox) -> None:
    result = judge_program(program, ADD, sandbox=sandbox)
    assert result.verdicts[-1] == verdict, result


def test_methods_and_state(sandbox: Sandbox) -> None:
    tests = CodeTests(
        kind="call",
        function="Solution().twoSum",
        inputs=("([1, 2, 3], 5)", "([3, 3], 6)"),
        outputs=("[1, 2]", "[0, 1]"),
        setup="from typing import *",
        timeout_s=20,
    )
    program = """
class Solution:
    def twoSum(self, nums: List[int], target: int) -> List[int]:
        return next((i, j) for j in range(len(nums)) for i in range(j) if nums[i] + nums[j] == target)
"""
    assert judge_program(program, tests, sandbox=sandbox).passed
    assert not judge_program(program, replace(tests, setup=""), sandbox=sandbox).passed


def test_every_test_is_judged_where_that_is_asked(sandbox: Sandbox) -> None:
    """A call that ends its process does not take the others with it."""
    program = (
        "import os\ndef add(a, b):\n    if a == 2: os._exit(0)\n    if a == 4: 1 / 0\n    return a + b if a != 3 else 0"
    )
    inputs = tuple(f"({number}, 1)" for number in range(6))
    tests = replace(ADD, inputs=inputs, outputs=tuple(str(number + 1) for number in range(6)))
    expected = ("pass", "pass", "runtime_error", "wrong", "runtime_error", "pass")
    assert judge_program(program, tests, sandbox=sandbox, stop_at_failure=False).verdicts == expected
    assert judge_program(program, tests, sandbox=sandbox).verdicts == expected[:3]
    stdin = replace(ECHO, inputs=("1 2", "3 4", "5 6"), outputs=("0", "7", "0"))
    assert judge_program(SUM, stdin, sandbox=sandbox, stop_at_failure=False).verdicts == ("wrong", "pass", "wrong")
    assert judge_program(SUM, stdin, sandbox=sandbox).verdicts == ("wrong",)


def test_a_call_without_end(sandbox: Sandbox) -> None:
    """Each call has its own clock."""
    limit_s = 0.5 / sandbox.slowness
    tests = replace(ADD, timeout_s=limit_s)
    program = "import time\ndef add(a, b):\n    if a == 5: time.sleep(1000)\n    return a + b"
    assert judge_program(program, tests, sandbox=sandbox).verdicts == ("pass", "timeout")


def test_expected_outputs_stay_outside(sandbox: Sandbox) -> None:
    secret = "never to be seen inside"
    search = f"""
import gc, os
def find():
    needle = {secret[::-1]!r}[::-1]
    for name in os.listdir("/work"):
        if needle in open("/work/" + name, errors="replace").read(): return needle
    for thing in gc.get_objects():
        if type(thing) in (list, tuple):
            if any(type(x) is str and needle in x and x is not needle for x in thing): return needle
print(find() or "")"""
    call = CodeTests(kind="call", function="find", inputs=("()",), outputs=(repr(secret),), timeout_s=20)
    assert judge_program(search, call, sandbox=sandbox).verdicts == ("wrong",)
    stdin = CodeTests(kind="stdin", inputs=("",), outputs=(secret,), timeout_s=20)
    assert judge_program(search, stdin, sandbox=sandbox).verdicts == ("wrong",)


@pytest.mark.parametrize(
    ("response", "finish_reason", "outcome"),
    [("no code", "stop", "no_answer"), ("no code", "length", "truncated"), (_fenced(SUM), "length", "correct")],
)
def test_outcomes_without_a_run(response: str, finish_reason: Any, outcome: str, sandbox: Sandbox) -> None:
    assert grade_program(response, ECHO, finish_reason=finish_reason, sandbox=sandbox).outcome == outcome


def test_what_nobody_can_judge(sandbox: Sandbox) -> None:
    special = replace(ECHO, special_judge=True)
    verdict = grade_program(_fenced(SUM), special, finish_reason="stop", sandbox=sandbox)
    assert (verdict.outcome, verdict.error) == ("grader_error", "several outputs are right: not scored")
    verdict = grade_program(
        _fenced("def add(): ..."), replace(ADD, outputs=("7", "x+")), finish_reason="stop", sandbox=sandbox
    )
    assert verdict.outcome == "grader_error" and "is no Python literal" in str(verdict.error)


def test_a_failed_sandbox_is_no_wrong_answer(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Sandbox, job: Job) -> Finished:
        return Finished(ending="failed", error="bubblewrap was killed")

    monkeypatch.setattr(Sandbox, "run", fail)
    for tests in (ECHO, ADD):
        verdict = grade_program(_fenced(SUM), tests, finish_reason="stop", sandbox=sandbox)
        assert verdict.outcome == "grader_error" and "bubblewrap was killed" in str(verdict.error)


HARNESS = {  # program for ECHO -> verdict of LiveCodeBench's harness; all are right programs
    SUM: "pass",
    "import sys\nprint(sum(map(int, sys.stdin.readline().split())))": "pass",
    "import sys\nprint(sum(map(int, sys.stdin.read().split())))": "pass",
    "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))": "pass",
    "import sys\nprint(sum(map(int, sys.stdin.buffer.readline().split())))": "pass",
    "print(sum(map(int, open(0).read().split())))": "wrong",
    f"def main():\n    {SUM}\nif __name__ == '__main__':\n    main()": "pass",
    f"import sys\n{SUM}\nsys.exit()": "pass",
    f"import threading\nt = threading.Thread(target=lambda: {SUM})\nt.start()\nt.join()": "pass",
    "n = 0\ndef f():\n    global n\n    n += sum(map(int, input().split()))\nf()\nprint(n)": "runtime_error",
    "import sys\nfor line in sys.stdin: print(sum(map(int, line.split())))": "runtime_error",
    "import sys\nsys.stdout.buffer.write(b'%d' % sum(map(int, input().split())))": "runtime_error",
    f"{SUM}\nquit()": "runtime_error",
    "import os\nprint(sum(map(int, os.read(0, 99).split())))": "wrong",
    "import os\nprint(sum(map(int, input().split())), flush=True)\nos._exit(0)": "runtime_error",
    "class Solution: ...\n" + SUM: "runtime_error",
    "print(1": "runtime_error",
}


@pytest.mark.parametrize("program", HARNESS)
def test_livecodebench(program: str, sandbox: Sandbox) -> None:
    result = judge_program(program, ECHO, sandbox=sandbox, mode="official")
    assert (result.mode, result.verdicts[-1]) == ("official", HARNESS[program]), result
    if program != "print(1":
        faithful = judge_program(program, ECHO, sandbox=sandbox)
        assert (faithful.mode, faithful.passed) == ("faithful", True), faithful


def test_livecodebench_calls(sandbox: Sandbox) -> None:
    tests = CodeTests(kind="call", function="f", inputs=("(1,)",), outputs=("[1, [2]]",), timeout_s=20)
    for program, official, faithful in (
        ("def f(x): return (1, [2])", True, True),
        ("def f(x): return [1, (2,)]", False, True),
    ):
        assert judge_program(program, tests, sandbox=sandbox, mode="official").passed is official
        assert judge_program(program, tests, sandbox=sandbox).passed is faithful


@pytest.fixture(scope="module")
def taco() -> Iterator[list[dict[str, Any]]]:
    yield _records("taco_test_stdin_verified.jsonl")[::27]


@needs_data
def test_taco_references_pass_and_broken_ones_fail(taco: list[dict[str, Any]], sandbox: Sandbox) -> None:
    def judge(record: dict[str, Any]) -> tuple[str, bool, bool]:
        right, tests = record["solutions"][0], _tests_of(record)
        broken = right.replace("print(", "print(0, ")
        return (
            record["task_id"],
            judge_program(right, tests, sandbox=sandbox).passed,
            broken != right and judge_program(broken, tests, sandbox=sandbox).passed,
        )

    with ThreadPoolExecutor(2) as threads:
        judged = list(threads.map(judge, taco))
    assert [task for task, right, broken in judged if not right or broken] == []
    assert len(judged) == 20


@needs_data
def test_apps(sandbox: Sandbox) -> None:
    """Problems of both kinds with their solutions, one of which does not even compile."""
    verdicts = [
        (tests.kind, judge_program(solution, tests, sandbox=sandbox).verdicts[-1])
        for record in _records("apps_5.jsonl")
        for solution in record["solutions"]
        for tests in [replace(_tests_of(record, solution), setup="from typing import List")]
    ]
    assert verdicts == [("stdin", "pass")] * 6 + [("stdin", "compile_error")] + [("call", "pass")] * 6
