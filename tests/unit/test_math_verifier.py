"""The math verifier against pairs of known verdict, every gold of the local corpora and the rules of each profile."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_trd.tasks.math_problems import verify_answer
from megatron_trd.tasks.math_problems.extract import last_box
from megatron_trd.tasks.math_problems.pool import MathWorkerPool

pytest.importorskip("math_verify", reason="math-verify is not installed")

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
PAIRS = [json.loads(line) for line in (Path(__file__).parent / "data" / "math_pairs.jsonl").open(encoding="utf-8")]
KINDS = sorted({pair["kind"] for pair in PAIRS})
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no corpora at {DATA}")

MALFORMED_GOLDS = {  # gold -> (what a right response writes, what is wrong with the gold)
    r"\frac{sqrt{7} + 1}{2}": (r"\frac{1+\sqrt{7}}{2}", "a backslash is missing"),
    "$221,$8$": ("8, 221", "one dollar sign too many"),
    "-2,-2": ("-2", "a double root named twice"),
    "$t(0,4]$": ("t(0,4]", "an `\\in` is missing; only its own text can be recognised"),
    r"\$\dfrac23 \approx \$0.67": (r"\frac{2}{3}", "an exact value and its rounding"),
    "0.56 = 56\\%": ("56\\%", "two spellings of one value"),
    "[a +b, b]": ("[a+b,b]", "a matrix row or an interval, nobody knows"),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[MathWorkerPool]:
    with MathWorkerPool(num_workers=1, deadline_s=30) as made:
        yield made


def _boxed(answer: str) -> str:
    return rf"<think>\boxed{{0}}?</think>The answer is $\boxed{{{answer}}}$."


def _golds(pattern: str) -> list[str]:
    rows = [json.loads(line) for path in sorted(DATA.glob(pattern)) for line in path.open(encoding="utf-8")]
    return list(dict.fromkeys(row["answer"] for row in rows if row["answer"] is not None))


@pytest.mark.parametrize("kind", KINDS)
def test_pairs(kind: str, pool: MathWorkerPool) -> None:
    wrong = []
    for pair in (pair for pair in PAIRS if pair["kind"] == kind):
        verdict = verify_answer(_boxed(pair["answer"]), pair["gold"], pool=pool)
        if verdict.correct != pair["equal"] or verdict.outcome == "grader_error":
            wrong.append((pair["gold"], pair["answer"], verdict))
    assert not wrong


def test_pairs_are_many_and_of_both_verdicts() -> None:
    equal = sum(pair["equal"] for pair in PAIRS)
    assert len(PAIRS) >= 120 and min(equal, len(PAIRS) - equal) >= 60


@needs_data
def test_every_gold_verifies_itself(pool: MathWorkerPool) -> None:
    golds = _golds("math/*.jsonl") + _golds("train/*.jsonl")
    assert len(golds) > 3000
    answers = {gold: gold.strip("$") if gold.count("$") == 2 else gold for gold in golds}
    assert not [gold for gold in golds if not verify_answer(_boxed(answers[gold]), gold, pool=pool).correct]
    spaced = {gold: answers[gold].replace(r"\frac", r"\dfrac ").replace("=", " = ") + "." for gold in golds}
    assert not [gold for gold in golds if not verify_answer(_boxed(spaced[gold]), gold, pool=pool).correct]


@needs_data
@pytest.mark.parametrize("gold", MALFORMED_GOLDS)
def test_malformed_golds(gold: str, pool: MathWorkerPool) -> None:
    assert gold in _golds("math/*.jsonl") + _golds("train/*.jsonl")
    assert verify_answer(_boxed(MALFORMED_GOLDS[gold][0]), gold, pool=pool).correct


def _float_of(latex: str) -> float | None:
    """Evaluate with Python alone; None for anything but fractions, roots, pi and the four operations."""
    text = latex.replace(" ", "").replace(r"\dfrac", r"\frac").replace(r"\cdot", "*").replace(r"\pi", "(pi)")
    while (
        shorter := re.sub(
            r"\\sqrt\{([^{}]*)\}", r"((\1)**.5)", re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
        )
    ) != text:
        text = shorter
    if not re.fullmatch(r"(?:\d+(?:\.\d+)?|[+\-*/()]|\.\d+|pi)+", text) or re.match(r"-?\d+\(\(\d+\)/", text):
        return None  # the last one is a mixed number
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)
    return eval(re.sub(r"(?<=[\d)])\(|\)(?=\d)", lambda m: "*(" if m[0] == "(" else ")*", text), {"pi": math.pi})


@needs_data
def test_neighbours_on_the_number_line(pool: MathWorkerPool) -> None:
    """Golds of all corpora in the order of their values: each against the next, floats as the reference."""
    values = {gold: _float_of(gold) for gold in _golds("math/*.jsonl") + _golds("train/*.jsonl")}
    ordered = sorted((value, gold) for gold, value in values.items() if value is not None and not gold.isdigit())
    assert len(ordered) > 300
    for (low, gold), (high, answer) in itertools.pairwise(ordered):
        equal = math.isclose(low, high, rel_tol=1e-12)
        if equal or low * 1.003 > high:
            assert verify_answer(_boxed(answer), gold, pool=pool).correct == equal, (gold, answer)


@pytest.mark.parametrize(
    ("response", "finish_reason", "outcome", "extracted"),
    [
        (r"so \boxed{7} and \boxed{12}", None, "wrong", "12"),
        (r"so \boxed{12} and finally \fbox{7}", None, "correct", "7"),
        (r"\boxed{\boxed{7}}", None, "correct", "7"),
        (r"\boxed{x = \boxed{7}}", None, "correct", "x = 7"),
        (r"\boxed {7}", None, "correct", "7"),
        (r"\boxed{7", None, "no_answer", None),
        (r"\boxed{7", "length", "truncated", None),
        (r"\boxed{}", "stop", "no_answer", None),
        ("The answer is 7.", "stop", "no_answer", None),
        ("The answer is", "abort", "truncated", None),
        (r"<think>\boxed{7}", "stop", "truncated", None),
        (r"<think>\boxed{7}</think>", "stop", "no_answer", None),
        (r"\boxed{8}</think>\boxed{7}", "stop", "correct", "7"),
        (r"\boxed{7}", "length", "correct", "7"),
        (r"\boxed{\text{a set } \{7\}}", None, "wrong", r"\text{a set } \{7\}"),
    ],
)
def test_extraction(response: str, finish_reason: str | None, outcome: str, extracted: str | None) -> None:
    verdict = verify_answer(response, "7", finish_reason=finish_reason)
    assert (verdict.outcome, verdict.extracted) == (outcome, extracted)
    assert verdict.correct == (outcome == "correct")


def test_boxes_by_the_thousand() -> None:
    assert last_box(r"\boxed{1} " * 5000 + r"\boxed{2}") == "2"
    assert last_box(r"\boxed{1 " * 20_000) is None
    assert last_box("{" * 100_000 + r"\boxed{3}") == "3"


@needs_data
def test_leading_zeros_of_aime_cost_the_strict_profile_seven_answers(pool: MathWorkerPool) -> None:
    golds = [json.loads(line)["answer"] for line in (DATA / "math" / "aime24.jsonl").open(encoding="utf-8")]
    responses = [_boxed(str(int(gold))) for gold in golds]
    by_profile = {
        profile: sum(
            verify_answer(response, gold, profile=profile, pool=pool).correct
            for response, gold in zip(responses, golds, strict=True)
        )
        for profile in ("default", "strict-string")
    }
    assert by_profile == {"default": 30, "strict-string": 23}


@pytest.mark.parametrize(
    ("response", "gold", "correct"),
    [
        (r"\boxed{\dfrac12}", r"\frac{1}{2}", True),
        (r"\boxed{1/2}", r"\frac{1}{2}", True),
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        (r"\boxed{0.50}", r"\frac{1}{2}", False),
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", False),
        (r"\boxed{x=5}", "5", True),
        (r"\boxed{xyz=5}", "5", False),
        (r"\boxed{90^\circ}", "90", True),
        (r"\boxed{5\text{ cm}}", "5", True),
        (r"\boxed{5\text{cm}}", "5", False),
        (r"\boxed{1,234}", "1234", False),
        (r"\boxed 5$ and", "5", True),
        (r"\fbox{5}", "5", False),
        (r"\boxed{5} or \boxed{7", "5", False),
        (r"<think>\boxed{5}", "5", True),
        (r"\boxed{\sqrt3}", r"\sqrt{3}", True),
        (r"\boxed{\frac}", r"\frac", True),
    ],
)
def test_strict_string_has_every_quirk_of_the_published_rule(response: str, gold: str, correct: bool) -> None:
    assert verify_answer(response, gold, profile="strict-string").correct == correct


@needs_data
def test_amo_golds_verify_themselves(pool: MathWorkerPool) -> None:
    rows = [json.loads(line) for line in (DATA / "math" / "amo_bench_answers_partial.jsonl").open(encoding="utf-8")]
    points = [{"n": n} for n in range(1, 21)]
    for row in rows:
        kind = row["answer_type"]
        verdict = verify_answer(
            f"### The final answer is: ${row['answer']}$",
            row["answer"],
            profile="amo",
            amo_answer_type=kind,
            amo_points=points if kind == "variable" else (),
            pool=pool,
        )
        assert verdict.outcome == "correct", row


@pytest.mark.parametrize(
    ("response", "gold", "kind", "correct"),
    [
        (r"\boxed{5} was wrong. ### The final answer is: \boxed{6}", r"\boxed{6}", "number", True),
        (r"\boxed{6} was wrong. ### The final answer is: \boxed{5}", r"\boxed{6}", "number", False),
        (r"The final answer is: $\boxed{512,578}$", r"\boxed{512578}", "number", True),
        (r"### Final answer: $\boxed{3.14159}$", r"\boxed{\pi}", "number", True),
        (r"### Final answer: $\boxed{3.14}$", r"\boxed{\pi}", "number", False),
        (r"### The final answer is $\boxed{N = 2+4 = 6}$", r"\boxed{6}", "number", True),
        (r"### The final answer is: $\boxed{\{3, 2, 1\}}$", r"\boxed{\{1, 2, 3\}}", "set", True),
        (r"### The final answer is: $\boxed{\{1, 2\}}$", r"\boxed{\{1, 2, 3\}}", "set", False),
        (r"### The final answer is: $\boxed{f(n) = 4^{n}}$", r"\boxed{2^{2n}}", "variable", True),
        (r"### The final answer is: $\boxed{4^{n} + n - 1}$", r"\boxed{2^{2n}}", "variable", False),
    ],
)
def test_amo_rule(response: str, gold: str, kind: str, correct: bool, pool: MathWorkerPool) -> None:
    points = [{"n": n} for n in range(1, 6)] if kind == "variable" else ()
    verdict = verify_answer(response, gold, profile="amo", amo_answer_type=kind, amo_points=points, pool=pool)
    assert verdict.outcome == ("correct" if correct else "wrong")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="profile lenient: unknown; use one of default, strict-string, amo"):
        verify_answer("", "7", profile="lenient")
    with pytest.raises(ValueError, match="amo_answer_type description: has no parser"):
        verify_answer("", "7", amo_answer_type="description")
