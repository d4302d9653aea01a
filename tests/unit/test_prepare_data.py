"""Published corpora become files of problems, with an account of what was left out."""

from __future__ import annotations

import ast
import base64
import gzip
import json
import os
import pickle
import runpy
import zlib
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_trd.config.schema import DataConfig
from megatron_trd.tasks.code_problems.task import CodeTask
from megatron_trd.tasks.corpora.asserts import read_asserts
from megatron_trd.tasks.corpora.golds import gold_problem, is_read_as_mathematics
from megatron_trd.tasks.corpora.overlap import StatementIndex
from megatron_trd.tasks.corpora.private_tests import read_private_tests
from megatron_trd.tasks.corpora.records import read_records
from megatron_trd.tasks.corpora.table import CORPORA
from megatron_trd.tasks.corpus import Row, read_rows
from shared_data import shared

MAIN = runpy.run_path(
    str(Path(__file__).parents[2] / "tools" / "prepare_data.py"), run_name="megatron_trd.prepare_data"
)["main"]
TRIANGLE = (
    "In triangle ABC with right angle at C the altitude from C meets AB at D and the sides of triangle ABC are "
    "integers with BD equal to 29 cubed and the cosine of B is m over n"
)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def prepare(name: str, source: Path, folder: Path, *flags: str) -> tuple[list[Row], dict[str, Any]]:
    """Run the tool; return rows and summary."""
    output = folder / f"{name}.prepared.jsonl"
    MAIN([name, "--source", str(source), "--output", str(output), *flags])
    summary = json.loads(output.with_name(output.name + ".summary.json").read_text(encoding="utf-8"))
    assert summary["output"]["sha256"] == sha256(output.read_bytes()).hexdigest()
    assert summary["sources"] == [{"path": str(source), "sha256": sha256(source.read_bytes()).hexdigest()}]
    return [row for _, row in read_rows(output)], summary


def test_what_is_left_out_of_a_math_corpus_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = r"Well, $\boxed{1}$ it is, or \boxed{\frac{2}{4}}."
    records = [
        {"id": "a", "problem": " What is 1+1? ", "answer": 2, "solution": "One more than 1.", "level": 3, "n": 1},
        {"problem": "What is 1-1?", "answer": "0", "solution": ""},
        {"problem": "What is\n1 + 1?", "answer": "2"},
        {"problem": "No answer"},
        {"problem": "A half of 1?", "answer": r"\frac{1}{2"},
        {"problem": "The root?", "answer": r"\frac{sqrt{7}}{2}"},
        {"problem": "The last box", "solution": boxes},
        {"problem": "Only the answer", "solution": r"\boxed{204}"},
        {"problem": "What angle?", "answer": r"30^\circ."},
    ]
    source = write(tmp_path / "source.jsonl", records)
    rows, summary = prepare("math", source, tmp_path)
    assert [(r.problem.id, r.problem.prompt, r.problem.answer, r.problem.reference_solution) for r in rows] == [
        ("math/a", "What is 1+1?", "2", "One more than 1."),
        ("math/2", "What is 1-1?", "0", None),
        ("math/7", "The last box", r"\frac{2}{4}", boxes),
        ("math/8", "Only the answer", "204", None),
        ("math/9", "What angle?", r"30^\circ.", None),
    ]
    assert rows[0].problem.metadata == {"source": "math", "level": 3}
    assert summary["left_out"] == {"malformed": 1, "malformed-gold": 2, "duplicate": 1}
    assert (summary["records"], summary["problems"], summary["with_reference_solution"]) == (9, 5, 2)
    assert summary["golds_compared_by_characters_only"] == [r"math/9: 30^\circ."]
    why = {finding["record"].rpartition(":")[2]: finding["why"] for finding in summary["findings"]}
    assert why["3"] == "the same statement as math/a" and "has no answer" in why["4"]
    assert "graded no_answer" in why["5"] and why["6"].endswith("sqrt has no backslash")
    assert f"{source}:4: has no answer" in capsys.readouterr().out

    rows, summary = prepare("math", source, tmp_path, "--prefix", "mine", "--keep", "malformed-gold", "duplicate")
    assert len(rows) == 8 and rows[0].problem.id == "mine/a"
    assert summary["kept_anyway"] == {"malformed-gold": 2, "duplicate": 1} and summary["left_out"] == {"malformed": 1}


def test_one_id_twice_and_nothing_left_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = [{"id": 1, "problem": text, "answer": "1"} for text in ("a", "b")]
    for records, message in ((twice, "2: id math/1 is taken by"), ([{"problem": "x"}], "no problem is left")):
        with pytest.raises(SystemExit):
            prepare("math", write(tmp_path / "source.jsonl", records), tmp_path)
        assert message in capsys.readouterr().err
        assert not (tmp_path / "math.prepared.jsonl").exists()


def test_contamination_is_found_exactly_and_by_word_sequences(tmp_path: Path) -> None:
    held_out = [{"problem": f"{TRIANGLE}. Find m + n.", "answer": "450"}, {"problem": "Short one?", "answer": "1"}]
    prepare("aime24", write(tmp_path / "eval.jsonl", held_out), tmp_path)
    index = StatementIndex([("e", f"{TRIANGLE}. Find m + n.")])
    assert index.nearest(f"{TRIANGLE}.  Find\nm + n.") == ("e", 1.0)
    assert index.nearest("Where m and n are relatively prime positive integers. " * 3) is None
    records = [
        {"problem": f"{TRIANGLE}. Find m + n.", "answer": "450"},
        {"problem": f"As everybody knows: {TRIANGLE.upper()}! What is m?", "answer": "29"},
        {
            "problem": f"{TRIANGLE[:90]} and so on, where everything behind these first words is another story",
            "answer": "1",
        },
        {"problem": "Short\none?", "answer": "1"},
        {"problem": "Short two?", "answer": "1"},
    ]
    source, against = write(tmp_path / "train.jsonl", records), str(tmp_path / "aime24.prepared.jsonl")
    rows, summary = prepare("deepscaler", source, tmp_path, "--against", against)
    assert [row.problem.id for row in rows] == ["deepscaler/3", "deepscaler/5"]
    assert summary["left_out"] == {"overlap": 3} and summary["against"][0]["path"] == against
    assert "of the shorter statement is in aime24/1" in summary["findings"][1]["why"]


def test_prompts_over_budget_are_left_out(tmp_path: Path) -> None:
    records = [{"problem": "word " * length, "answer": "1"} for length in (10, 300)]
    flags = ("--tokenizer", str(shared("qwen_tokenizer")), "--max-prompt-tokens", "200")
    rows, summary = prepare("math", write(tmp_path / "s.jsonl", records), tmp_path, *flags)
    assert [row.problem.id for row in rows] == ["math/1"] and summary["left_out"] == {"too-long": 1}
    assert "--max-prompt-tokens 200: the prompt of problem math/2 has 3" in summary["findings"][0]["why"]


def test_golds() -> None:
    for gold in ("073", r"\frac{1}{2}", r"\left( 3, \frac{\pi}{2} \right)", r"\text{even}", "1,2,3", "\\boxed{6}"):
        assert gold_problem(gold) is None
    assert gold_problem("") and gold_problem("x}") and gold_problem(r"2 sqrt{3}")
    assert is_read_as_mathematics(r"\left( 3, \frac{\pi}{2} \right)") and not is_read_as_mathematics(r"30^\circ.")


def test_amo_bench_keeps_what_its_parser_grades(tmp_path: Path) -> None:
    kinds = {1: "number", 2: "description", 5: "variable", 6: "set"}
    records = [{"question_id": i, "prompt": f"Q{i}", "answer": str(i), "answer_type": t} for i, t in kinds.items()]
    rows, summary = prepare("amo_bench", write(tmp_path / "s.jsonl", records), tmp_path)
    assert [(r.problem.id, r.problem.metadata["amo_answer_type"]) for r in rows] == [
        ("amo_bench/1", "number"),
        ("amo_bench/5", "variable"),
        ("amo_bench/6", "set"),
    ]
    assert rows[1].problem.metadata["amo_points"][19] == {"n": 20}
    assert summary["left_out"] == {"not-gradable": 1} and summary["problems_expected"] == 39


@pytest.mark.parametrize("kind", ["json", "jsonl", "jsonl.gz", "parquet"])
def test_kinds_of_files(tmp_path: Path, kind: str) -> None:
    records = [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": "2"}]
    path = tmp_path / f"f.{kind}"
    if kind == "parquet":
        if not find_spec("pyarrow"):
            path.write_bytes(b"PAR1")
            with pytest.raises(ValueError, match="reading parquet needs package pyarrow; pip install"):
                list(read_records([path]))
            return
        pytest.importorskip("pyarrow.parquet").write_table(
            pytest.importorskip("pyarrow").Table.from_pylist(records), path
        )
    elif kind == "json":
        path.write_text(json.dumps(records))
    else:
        (gzip.open if kind.endswith("gz") else open)(path, "wb").write(
            "".join(json.dumps(record) + "\n" for record in records).encode()
        )
    read = list(read_records([path, path]))
    assert [record.fields for record in read] == records * 2
    assert [(record.number, record.index) for record in read] == [(1, 1), (2, 2), (1, 3), (2, 4)]


def test_bad_sources_are_named(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.csv", "x", "unknown kind of file"),
        ("a.jsonl", '{"a": 1}\n[\n', r"a\.jsonl:2: not valid JSON"),
        ("a.json", "[1]", r"a\.json:1: a int, not an object"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            list(read_records([tmp_path / name]))


def test_without_a_network_the_hub_asks_for_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, source, message in (
        ("aime24", "hub", "--source math-ai/aime24: cannot be fetched"),
        ("aime24", "own/er", "--source own/er: cannot be fetched"),
        ("aime24", "absent.jsonl", "--source absent.jsonl: no such file, and no id of a data set"),
        ("mbpp_plus", "hub", "mbpp_plus is not on the hub in this form, give a file"),
    ):
        with pytest.raises(SystemExit):
            prepare(name, Path(source), tmp_path)
        assert message in capsys.readouterr().err


class _RunsCode:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


def packed(content: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(content))).decode()


def test_hidden_tests_are_text_or_refused(tmp_path: Path) -> None:
    cases = [{"input": "1\n", "output": "2\n", "testtype": "stdin"}]
    assert read_private_tests(json.dumps(cases)) == read_private_tests(packed(json.dumps(cases))) == cases
    with pytest.raises(ValueError, match=r"asks for (posix|nt)\.system"):
        read_private_tests(packed(_RunsCode(tmp_path / "trace")))
    assert not (tmp_path / "trace").exists()
    for content in ([json.dumps(cases)], b"[]", 1, {"a": str}):
        with pytest.raises(ValueError, match="hidden tests"):
            read_private_tests(packed(content))
    whole = packed(json.dumps(cases))
    for text in ("", "?", whole[:-8], base64.b64encode(b"x").decode(), packed("no json")):
        with pytest.raises(ValueError):
            read_private_tests(text)


def test_livecodebench_joins_public_and_hidden_tests(tmp_path: Path) -> None:
    def case(given: str, wanted: str, kind: str) -> dict[str, str]:
        return {"input": given, "output": wanted, "testtype": kind}

    stdin = [case("1\n", "2\n", "stdin"), case("3\n", "4\n", "stdin")]
    calls = [case('[1, 2]\n"a"', "true", "functional")]
    records = [
        {
            "question_id": "abc_a",
            "question_content": "Add one.",
            "starter_code": "",
            "difficulty": "easy",
            "contest_date": "2025-01-04",
            "public_test_cases": json.dumps(stdin[:1]),
            "private_test_cases": packed(json.dumps(stdin[1:])),
            "metadata": "{}",
        },
        {
            "question_id": "3001",
            "question_content": "Is it?",
            "starter_code": "class Solution:\n    def isIt(self, x: List[int], y: str) -> bool:\n        ",
            "public_test_cases": json.dumps(calls),
            "private_test_cases": "[]",
            "metadata": '{"func_name": "isIt"}',
        },
        {"question_id": "none", "question_content": "?", "public_test_cases": "[]", "private_test_cases": "[]"},
    ]
    rows, summary = prepare("livecodebench_v6", write(tmp_path / "test6.jsonl", records), tmp_path)
    assert [row.problem.id for row in rows] == ["livecodebench_v6/abc_a", "livecodebench_v6/3001"]
    first, second = (row.tests or {} for row in rows)
    assert (first["kind"], first["inputs"], first["outputs"]) == ("stdin", ["1\n", "3\n"], ["2\n", "4\n"])
    assert (second["kind"], second["function"], second["outputs"]) == ("call", "Solution().isIt", ["True"])
    assert first["timeout_s"] == 6 and ast.literal_eval(second["inputs"][0]) == ([1, 2], "a")
    assert rows[1].problem.prompt.startswith("Is it?\n\nStart from this code:\n\n```python\nclass Solution:")
    assert summary["problems_expected"] == 175 and summary["left_out"] == {"malformed": 1}


def test_assertions_are_read_as_data() -> None:
    code = "x = {'n': 4, 's': 'a'}\nassert s.f(**x) == -1\nassert f((1,), k=[2.5]) == {'a': None}\nassert not f()\n"
    read = [(call.function, *map(ast.literal_eval, (call.arguments, call.expected))) for call in read_asserts(code)]
    assert read == [("f", (4, "a"), -1), ("f", ((1,), [2.5]), {"a": None}), ("f", (), False)]
    for bad in (
        "assert f(os.getcwd()) == 1",
        "assert f(1) < 2",
        "for i in range(3):\n    assert f(i) == i",
        "assert (",
    ):
        with pytest.raises(ValueError):
            read_asserts(bad)


def test_programs_pass_their_tests_after_the_way_through_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each kind of corpus: reference solutions, and wrong programs, through `prepare` and `CodeTask.grade`."""
    plus = write(
        tmp_path / "plus.jsonl",
        [json.loads(line) for line in shared("code/HumanEvalPlus-substitute.jsonl").open(encoding="utf-8")][:3],
    )
    sources = {"apps": shared("code/apps_5.jsonl"), "humaneval_plus": plus}
    files = []
    for name, source in sources.items():
        rows, summary = prepare(name, source, tmp_path, "--check-solutions")
        assert len(rows) == summary["records"] and summary["left_out"] == {}
        files.append(str(tmp_path / f"{name}.prepared.jsonl"))
    task = CodeTask(DataConfig(train_data=tuple(files)))
    problems = {problem.id: problem for problem in (task.train_problem(i) for i in range(8))}
    assert len(problems) == 8
    for problem in problems.values():
        right = task.grade(problem, f"```python\n{problem.reference_solution}\n```", "stop")
        assert right.outcome == "correct", right
        assert task.grade(problem, "```python\nprint('no')\n```", "stop").outcome == "wrong"
    wrong = json.loads(sources["apps"].open(encoding="utf-8").readline()) | {"solutions": ["print('no')"]}
    with pytest.raises(SystemExit):
        prepare("apps", write(tmp_path / "wrong.jsonl", [wrong]), tmp_path, "--check-solutions")
    assert "{'failing-solution': 1}" in capsys.readouterr().err


def test_every_provided_gold_verifies_against_itself(tmp_path: Path) -> None:
    names = {"aime24": 30, "aime25": 30, "hmmt25_feb": 30, "hmmt25_nov": 30}
    for name, size in names.items():
        rows, summary = prepare(name, shared(f"math/{name}.jsonl"), tmp_path, "--keep", "malformed-gold")
        assert len(rows) == size == summary["problems_expected"] and not summary["golds_compared_by_characters_only"]
    assert summary["kept_anyway"] == {"malformed-gold": 1}, "HMMT November, problem 20: a lost backslash"
    against = ("--against", *(str(tmp_path / f"{name}.prepared.jsonl") for name in names))
    train, summary = prepare("deepscaler", shared("train/deepscaler_aime_1983_2023.jsonl"), tmp_path, *against)
    assert len(train) == 975 and summary["left_out"] == {}, "AIME 1983 to 2023 and the benchmarks have none in common"


def test_the_table_is_complete() -> None:
    assert {"deepscaler", "taco", "apps", "aime24", "aime25", "hmmt25_feb", "hmmt25_nov"} <= CORPORA.keys()
    assert {"beyondaime", "amo_bench", "math500", "humaneval_plus", "mbpp_plus"} <= CORPORA.keys()
    assert CORPORA["livecodebench_release_v6"].files != CORPORA["livecodebench_v6"].files
