"""Files of samples, what they say, and how two of them are compared: no server needed."""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from chain_corpus import ChainTask, write_chains
from megatron_trd import evaluate
from megatron_trd.benchmarks.benchmark import CONVENTIONS, open_benchmark
from megatron_trd.benchmarks.comparison import compare, comparison_table
from megatron_trd.benchmarks.harness_files import write_harness_files
from megatron_trd.benchmarks.harness_tasks import EvalPlusTask, LiveCodeBenchTask
from megatron_trd.benchmarks.samples_file import Row, SamplesFile, read_samples
from megatron_trd.benchmarks.sampling import sample
from megatron_trd.benchmarks.summary import summarize
from megatron_trd.config.schema import Config, DataConfig, EvalConfig, MethodConfig, ModelConfig, RolloutConfig
from megatron_trd.estimators import bootstrap_interval
from megatron_trd.records import Completion, Outcome, Problem, VersionSpan
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.renderer import Renderer
from megatron_trd.tasks import TASKS
from megatron_trd.tasks.code_problems.evalplus import make_tests
from megatron_trd.tasks.corpora.table import CORPORA
from megatron_trd.tasks.corpus import Row as CorpusRow
from megatron_trd.weight_sync.base import ServerError
from sandboxes import sandbox_or_skip

RULER = {"name": "math", "version": "1", "profile": "default"}
R, W, C, U = "correct", "wrong", "truncated", "grader_error"


def settings(num: int = 2, **changes: Any) -> dict[str, Any]:
    bench = {"problems": 3, "corpus_sha256": "c", "max_response_tokens": 9, "verifier": RULER, "samples": num}
    common = {"schema": 1, "model": "m@1", "weights": "w", "sampling": "T 1", "thinking": False, "seed": 1}
    return {**common, "benchmarks": {"aime": bench}, **changes}


def row(problem: str, index: int, verdict: Outcome, bench: str = "aime", **changes: Any) -> Row:
    made = Row(
        bench=bench,
        problem_id=problem,
        sample_id=index,
        seed=1,
        prompt_sha256="p",
        prompt_tokens=5,
        response="r",
        finish_reason="length" if verdict == C else "stop",
        response_tokens=10 if verdict == R else 20,
        extracted=None,
        verdict=verdict,
        error=None,
        verifier=RULER,
        seconds=1.0,
        weight_version="1",
    )
    return replace(made, **changes)


def fill(directory: Path, told: dict[str, Sequence[Outcome]], bench: str = "aime", **changes: Any) -> Path:
    described = {**settings()["benchmarks"]["aime"], "problems": len(told), "samples": max(map(len, told.values()))}
    with SamplesFile(directory, settings(**{"benchmarks": {bench: described}, **changes})) as samples:
        for problem, outcomes in told.items():
            for index, outcome in enumerate(outcomes):
                samples.append(row(problem, index, outcome, bench))
    return directory


# ----------------------------------------------------------------------------- the directory


def test_what_is_there_is_found_again_and_a_torn_line_is_not(tmp_path: Path) -> None:
    rows = [row("a", 0, R, response='π "\n'), row("a", 1, W)]
    with SamplesFile(tmp_path, settings()) as samples:
        for each in rows:
            samples.append(each)
    whole = (tmp_path / "samples.jsonl").read_bytes()
    (tmp_path / "samples.jsonl").write_bytes(whole + whole[:40])
    assert list(read_samples(tmp_path)) == rows
    with SamplesFile(tmp_path, settings(num=4)) as samples:
        assert (tmp_path / "samples.jsonl").read_bytes() == whole
        assert [samples.has(("aime", "a", i), "p") for i in range(3)] == [True, True, False]
        with pytest.raises(ValueError, match="samples of problem a answer another prompt"):
            samples.has(("aime", "a", 0), "q")
        with pytest.raises(ValueError, match="another process writes there"):
            SamplesFile(tmp_path, settings())
    with SamplesFile(tmp_path, settings(num=2)):
        assert json.loads((tmp_path / "settings.json").read_text())["benchmarks"]["aime"]["samples"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "n@1"}, "model was m@1 and is n@1"),
        ({"weights": "v"}, "weights was w and is v"),
        ({"sampling": "T 0"}, "sampling was T 1 and is T 0"),
        ({"seed": 2}, "seed was 1 and is 2"),
        ({"verifier": {**RULER, "profile": "amo"}}, "verifier of aime was .* --regrade"),
        ({"max_response_tokens": 8}, "max_response_tokens of aime was 9 and is 8"),
        ({"corpus_sha256": "d"}, "corpus_sha256 of aime was c and is d"),
    ],
)
def test_a_directory_that_was_made_otherwise_is_refused(tmp_path: Path, changes: Any, message: str) -> None:
    with SamplesFile(tmp_path, settings()) as samples:
        samples.append(row("a", 0, R))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    now = settings()
    target = now if changes.keys() <= now.keys() else now["benchmarks"]["aime"]
    target.update(changes)
    with pytest.raises(ValueError, match=message):
        SamplesFile(tmp_path, now)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_further_benchmarks_join_a_directory(tmp_path: Path) -> None:
    fill(tmp_path, {"a": [R, W]})
    fill(tmp_path, {"z": [R, R]}, bench="hmmt")
    summary = summarize(tmp_path)
    assert {name: bench["avg@2"] for name, bench in summary["benchmarks"].items()} == {"aime": 0.5, "hmmt": 1.0}


def test_malformed_lines_are_refused_by_number(tmp_path: Path) -> None:
    fill(tmp_path, {"a": [R]})
    path = tmp_path / "samples.jsonl"
    line = path.read_bytes()
    for bad, message in (
        (line, "its second"),
        (b"{}\n", "no sample"),
        (line.replace(b'"correct"', b'"ok"'), "unknown"),
    ):
        path.write_bytes(line + bad)
        with pytest.raises(ValueError, match=f"samples.jsonl:2: .*{message}"):
            list(read_samples(tmp_path))


# ----------------------------------------------------------------------------- what it says


def test_missing_and_ungraded_samples_are_counted_and_take_part_in_no_score(tmp_path: Path) -> None:
    fill(tmp_path, {"a": [R, R, W, C], "b": [R, U], "c": [W, W, W, W]})
    described = {**settings(num=4)["benchmarks"]["aime"], "problems": 4}
    with SamplesFile(tmp_path, settings(benchmarks={"aime": {**described, "problems": 3}})):
        pass
    summary = summarize(tmp_path)
    found = summary["benchmarks"]["aime"]
    assert found["avg@4"] == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert found["pass@4"] == pytest.approx((1.0 + 0.0) / 2)  # b has one known sample
    assert found["missing"] == 2
    rates = {outcome: found[f"{outcome}_rate"] for outcome in (R, W, C, U, "no_answer")}
    assert rates == {R: 0.3, W: 0.5, C: 0.1, U: 0.1, "no_answer": 0.0}
    assert found["mean_tokens_by_verdict"] == {R: 10.0, W: 20.0, C: 20.0, U: 20.0} and found["mean_tokens"] == 17.0
    assert json.loads((tmp_path / "summary.json").read_text()) == summary and summary["macro"] == {}
    table = (tmp_path / "table.md").read_text()
    assert "| Avg@4 | 50.0 [0.0, 100.0] |" in table and "| missing samples | 2 |" in table
    curve = list(csv.DictReader((tmp_path / "curves.csv").open()))
    assert [(line["k"], line["problems"]) for line in curve] == [("1", "3"), ("2", "2"), ("4", "2")]
    assert float(curve[1]["pass_at_k"]) == pytest.approx((1 - 1 / 6 + 0) / 2)


def test_the_macro_average_is_the_mean_of_benchmarks(tmp_path: Path) -> None:
    fill(tmp_path, {"a": [R, W], "b": [R, R], "c": [W, W]})
    fill(tmp_path, {"z": [R, R]}, bench="hmmt")
    macro = summarize(tmp_path)["macro"]
    assert macro["avg@2"] == pytest.approx((0.5 + 1.0) / 2) and macro["pass@2"] == pytest.approx((2 / 3 + 1) / 2)
    low, high = macro["avg@2_interval"]
    assert (2 * low - 1, 2 * high - 1) == pytest.approx(bootstrap_interval([0.5, 1.0, 0.0]))
    fill(tmp_path, {"y": [R, R, R]}, bench="amo")
    assert summarize(tmp_path)["macro"] == {}  # avg@2 and avg@3 have no mean


def test_an_empty_directory_has_no_scores(tmp_path: Path) -> None:
    with SamplesFile(tmp_path, settings()):
        pass
    with pytest.raises(ValueError, match="holds no sample"):
        summarize(tmp_path)


# ----------------------------------------------------------------------------- comparison


def test_differences_are_paired_by_problem(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rights = rng.binomial(4, [rng.random(20), np.ones(20)])
    sides = [{f"{i:02}": [R] * c + [W] * (4 - c) for i, c in enumerate(side)} for side in rights]
    before = fill(tmp_path / "a", sides[0])
    after = fill(tmp_path / "b", dict(reversed(sides[1].items())), model="n@1")
    fill(before, {"z": [R, W, R, W]}, bench="hmmt")
    fill(after, {"z": [R, R, R, R]}, bench="hmmt", model="n@1")
    comparison = compare(before, after)
    per_problem = ((rights[1] - rights[0]) / 4).tolist()
    found = comparison["differences"]
    assert found["aime"] == {
        "mean": pytest.approx(np.mean(per_problem)),
        "interval": list(bootstrap_interval(per_problem)),
        "problems": 20,
    }
    assert found["macro average"]["mean"] == pytest.approx((np.mean(per_problem) + 0.5) / 2)
    assert comparison["settings"] == ["model was m@1 and is n@1"]
    assert f"| aime | {100 * np.mean(per_problem):+.1f} |" in comparison_table(comparison)


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    before = fill(tmp_path / "a", {"a": [R]})
    other = {**settings()["benchmarks"]["aime"], "corpus_sha256": "d"}
    for name, changes, message in (
        ("b", {"bench": "hmmt"}, "no benchmark is in both"),
        ("c", {"benchmarks": {"aime": other}}, "made from different files"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(before, fill(tmp_path / name, {"a": [R]}, **changes))
    with pytest.raises(ValueError, match="no problem of aime was graded in both"):
        compare(before, fill(tmp_path / "d", {"a": [U]}))


# ----------------------------------------------------------------------------- benchmarks


def config(**settings: Any) -> Config:
    return Config(
        method=MethodConfig(trajectory="y_o"),
        model=ModelConfig(hf_checkpoint="m"),
        rollout=RolloutConfig(student_urls=("http://s",)),
        eval=EvalConfig(**settings),
        data=DataConfig(math_verifier_profile="strict-string"),
    )


def math_file(directory: Path, name: str, answer: str = "2") -> Path:
    problem = Problem(id=f"{name}/1", prompt="What is it?", answer=answer, metadata={"amo_answer_type": "number"})
    path = directory / f"{name}.jsonl"
    path.write_text(json.dumps(CorpusRow(task="math", problem=problem).as_json()) + "\n")
    return path


def test_a_benchmark_brings_verifier_prompt_and_budget(tmp_path: Path) -> None:
    assert CONVENTIONS.keys() <= CORPORA.keys()
    for name in ("aime24", "amo_bench"):
        math_file(tmp_path, name, r"\pi")
    aime, amo = (open_benchmark(name, tmp_path, config(), TASKS) for name in ("aime24", "amo_bench"))
    assert (aime.verifier["profile"], amo.verifier["profile"]) == ("strict-string", "amo")
    assert (aime.convention.solve_template, amo.convention.solve_template) == (None, "{problem}")
    assert aime.max_response_tokens == amo.max_response_tokens == 38_912 and len(aime.problems) == 1
    decimal = r"\boxed{3.14159}"  # AMO-Bench compares rounded numbers, the string rule does not
    verdicts = [bench.task.grade(bench.problems[0], decimal, "stop").outcome for bench in (aime, amo)]
    assert verdicts == ["wrong", "correct"]
    assert open_benchmark("aime24", tmp_path, config(eval_max_response_tokens=7), TASKS).max_response_tokens == 7
    with pytest.raises(ValueError, match=r"--benchmarks aime25: .* is missing \(there: aime24, amo_bench\)"):
        open_benchmark("aime25", tmp_path, config(), TASKS)
    write_chains(tmp_path, chains=1)
    with pytest.raises(ValueError, match="is of task chain; known are arithmetic, code, math"):
        open_benchmark("chains", tmp_path, config(), TASKS)
    own = open_benchmark("chains", tmp_path, config(), {**TASKS, "chain": ChainTask})
    assert own.max_response_tokens == 16_384 and isinstance(own.task, ChainTask)


def test_a_new_verifier_grades_stored_responses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    math_file(tmp_path, "aime24")
    strict = open_benchmark("aime24", tmp_path, config(), TASKS)
    described = {**strict.describe(), "samples": 2}
    old, new = tmp_path / "old", tmp_path / "new"
    with SamplesFile(old, settings(benchmarks={"aime24": described})) as samples:
        for index, answer in enumerate((r"\boxed{\frac{4}{2}}", r"\boxed{3}")):
            samples.append(row("aime24/1", index, W, "aime24", response=answer, verifier=strict.verifier))
    flags = ["--regrade", str(old), "--benchmark-dir", str(tmp_path), "--output"]
    evaluate.main([*flags, str(new)])
    assert [each.verdict for each in read_samples(new)] == [R, W] and "| Avg@2 | 50.0" in capsys.readouterr().out
    assert [each.verdict for each in read_samples(old)] == [W, W]
    assert {each.verifier["profile"] for each in read_samples(new)} == {"default"}
    evaluate.main(["--compare", str(old), str(new), "--output", str(tmp_path / "difference.json")])
    assert "'profile': 'strict-string'" in capsys.readouterr().out
    assert json.loads((tmp_path / "difference.json").read_text())["differences"]["aime24"]["mean"] == 0.5
    with pytest.raises(SystemExit):  # the old directory keeps its verdicts
        evaluate.main([*flags, str(old)])
    assert "verifier of aime24 was" in capsys.readouterr().err
    with SamplesFile(old, settings(benchmarks={"aime24": described})) as samples:
        samples.append(row("aime24/2", 0, W, "aime24", verifier=strict.verifier))
    with pytest.raises(SystemExit):
        evaluate.main([*flags, str(new)])
    assert "problem aime24/2 is not in --benchmark-dir" in capsys.readouterr().err


class Flaky:
    """An engine that answers every problem with its solution, except the requests that fail."""

    def __init__(self, failing: int, version: str = "1") -> None:
        self.failing, self.version = failing, version
        self.asked: list[tuple[tuple[int, ...], SamplingParams]] = []

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        self.asked.append((tuple(prompt_ids), params))
        if len(self.asked) <= self.failing:
            return Completion(token_ids=(), text="", finish_reason="abort", error="down")
        span = VersionSpan(version=self.version, start=0, end=2)
        return Completion(token_ids=(1, 2), text="# 5", finish_reason="stop", weight_spans=(span,))


def test_failed_requests_have_no_row_and_are_asked_for_again(tmp_path: Path) -> None:
    student = Path(__file__).parents[2] / "examples/quickstart_cpu/models/student"
    write_chains(tmp_path, easy=2)
    bench = open_benchmark("easy", tmp_path, config(eval_max_response_tokens=40), {"chain": ChainTask})
    renderer = Renderer.from_config(config(), bench.task, AutoTokenizer.from_pretrained(student))
    described = settings(benchmarks={"easy": {**bench.describe(), "samples": 3}})

    def asked(engine: Flaky) -> tuple[int, list[tuple[int, ...]]]:
        with SamplesFile(tmp_path / "out", described) as samples:
            made = sample(engine, renderer, bench, samples, SamplingParams(max_new_tokens=1), 3, 7, "1")
            return asyncio.run(made), [prompt for prompt, _ in engine.asked]

    first, second = Flaky(failing=4), Flaky(failing=0)
    with pytest.raises(ServerError, match="easy: 6 of 6 requests failed, the first for problem .* sample 0: down"):
        asked(Flaky(failing=6))
    num_failed, prompts = asked(first)
    assert num_failed == 4 and prompts == [renderer.solve(p) for p in bench.problems for _ in range(3)]
    assert summarize(tmp_path / "out")["benchmarks"]["easy"]["missing"] == 4
    assert asked(second) == (0, prompts[:4])
    assert summarize(tmp_path / "out")["benchmarks"]["easy"]["missing"] == 0
    told = [params for _, params in (*first.asked[4:], *second.asked)]
    assert {params.max_new_tokens for params in told} == {40}
    assert sorted(row.seed for row in read_samples(tmp_path / "out")) == sorted(p.sampling_seed or 0 for p in told)
    described["benchmarks"]["easy"]["samples"] = 4
    with SamplesFile(tmp_path / "out", described) as samples, pytest.raises(ServerError, match="from 1 to 2 during"):
        asyncio.run(sample(Flaky(0, "2"), renderer, bench, samples, SamplingParams(max_new_tokens=1), 4, 7, "1"))
    assert len(list(read_samples(tmp_path / "out"))) == 6


SUM = "def add(a, b):\n    return a + b\n"
ADD = {
    "task_id": "HumanEval/0",
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "base_input": [[1, 2], [0, 0]],
    "plus_input": [[-5, 2], [7, 7]],
    "atol": 0,
}


def fenced(program: str) -> str:
    return f"So:\n```python\n{program}```\n"


def code_file(directory: Path, name: str, tests: Any, own_id: str) -> None:
    problem = Problem(id=f"{name}/{own_id}", prompt="Add.", answer="")
    line = json.dumps(CorpusRow(task="code", problem=problem, tests=tests.as_json()).as_json())
    (directory / f"{name}.jsonl").write_text(line + "\n")


def test_code_benchmarks_are_judged_and_written_as_their_harnesses_do(tmp_path: Path) -> None:
    tests = make_tests(ADD, sandbox_or_skip())
    reads = replace(tests, kind="stdin", function=None, inputs=("1 2",), outputs=("3",), oracle="plain", num_base=0)
    code_file(tmp_path, "humaneval_plus", tests, "HumanEval/0")
    code_file(tmp_path, "livecodebench_v6", reads, "abc_1")
    plus = open_benchmark("humaneval_plus", tmp_path, config(), TASKS)
    assert isinstance(plus.task, EvalPlusTask) and plus.max_response_tokens == 16_384
    verdicts = [
        plus.task.grade(plus.problems[0], response, "stop")
        for response in (fenced(SUM), fenced(SUM.replace("a + b", "abs(a) + b")), "no program")
    ]
    assert [verdict.outcome for verdict in verdicts] == [R, W, "no_answer"]
    assert verdicts[1].evalplus is not None and verdicts[1].evalplus["plus_fail_tests"] == ["(-5, 2, )"]

    wrapped = (
        "total = 0\ndef add():\n    global total\n    total = sum(map(int, input().split()))\nadd()\nprint(total)\n"
    )
    outcomes = {}
    for mode in ("faithful", "official"):
        live = open_benchmark("livecodebench_v6", tmp_path, config(livecodebench_mode=mode), TASKS)
        assert isinstance(live.task, LiveCodeBenchTask) and live.verifier["profile"] == mode
        outcomes[mode] = live.task.grade(live.problems[0], fenced(wrapped), "stop").outcome
    assert outcomes == {"faithful": R, "official": W}  # the published harness wraps programs in a function

    directory = tmp_path / "out"
    described = {bench.name: {**bench.describe(), "samples": 3} for bench in (plus, live)}
    with SamplesFile(directory, settings(benchmarks=described)) as samples:
        for index, verdict in enumerate(verdicts):
            told = {"extracted": verdict.extracted, "evalplus": getattr(verdict, "evalplus", None)}
            samples.append(row(plus.problems[0].id, index, verdict.outcome, plus.name, **told))
        for index, outcome in enumerate((R, W, U)):
            samples.append(row(live.problems[0].id, index, outcome, live.name, extracted=wrapped))
    names = [path.name for path in write_harness_files(directory)]
    assert names == [
        "humaneval_plus_samples.jsonl",
        "humaneval_plus_eval_results.json",
        "livecodebench_v6_official_eval_all.json",
    ]
    results = json.loads((directory / names[1]).read_text())
    statuses = [(each["base_status"], each["plus_status"]) for each in results["eval"]["HumanEval/0"]]
    assert statuses == [("pass", "pass"), ("pass", "fail"), ("fail", "fail")]
    assert json.loads((directory / names[0]).read_text().splitlines()[0]) == {"task_id": "HumanEval/0", "solution": SUM}
    (problem,) = json.loads((directory / names[2]).read_text())
    assert problem["question_id"] == "abc_1" and problem["graded_list"] == [True, False] and problem["pass@1"] == 0.5
