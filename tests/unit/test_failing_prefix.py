"""Steps at token boundaries, the search for the last good one, and a y_r that begins with what is kept of y_o."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_trd.config.schema import MethodConfig
from megatron_trd.records import Completion, Problem, Trajectory, Verdict, VersionSpan
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.failing_prefix import find_failing_prefix, head, step_ends
from megatron_trd.rollout.refine import RolloutRunner
from scripted_rollouts import EOS, TOKENIZER, Engine, LastLine, Renderer, byte_tokenizer, ids_of, said

QWEN = Path(__file__).resolve().parents[3] / "shared/data/qwen_tokenizer"
RIGHT, WRONG = Verdict(outcome="correct"), Verdict(outcome="wrong")
METHOD = MethodConfig(refine_from="failing-prefix", prefix_continuations=3)


# ------------------------------------------------------------------ steps


@pytest.mark.parametrize(
    ("text", "lines", "paragraphs"),
    [
        ("", [], []),
        ("one", [], []),
        ("one\n", [], []),
        ("one\ntwo", ["one\n"], []),
        ("one\n\ntwo\nthree", ["one\n\n", "one\n\ntwo\n"], ["one\n\n"]),
        ("\n\none\ntwo", ["\n\none\n"], []),  # blank lines in front begin nothing
        ("one\n \ntwo", ["one\n \n"], ["one\n \n"]),
        ("if x:\n  y\nz", ["if x:\n  ", "if x:\n  y\n"], []),  # indentation is the end of the line before
        ("é\nü\n", ["é\n"], []),
    ],
)
def test_steps_end_where_lines_and_paragraphs_do(text: str, lines: list[str], paragraphs: list[str]) -> None:
    ids = ids_of(text)
    for unit, expected in (("lines", lines), ("paragraphs", paragraphs)):
        found = [TOKENIZER.decode(ids[:end]) for end in step_ends(ids, TOKENIZER, unit)]  # type: ignore[arg-type]
        assert found == expected
    assert step_ends(ids, TOKENIZER, "tokens") == list(range(1, len(ids)))


def test_a_line_break_inside_a_token_ends_nothing() -> None:
    """Cutting there would need other ids than the sampled ones."""
    tokenizer = byte_tokenizer(added=("a\nb",))
    ids = tokenizer("xa\nby\nz")["input_ids"]
    assert len(ids) == 5
    assert step_ends(ids, tokenizer, "lines") == [4]


@pytest.mark.skipif(not QWEN.is_dir(), reason="the Qwen3 tokenizer is not there (shared/data)")
def test_steps_of_real_tokens_are_lines_of_the_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    text = "First, 3 + 4 = 7.\n\n$$\nx = \\frac{7}{2}\n$$\n\n   - so é 猫\n```python\nif x:\n    y()\n```\nDone."
    ids = tokenizer(text)["input_ids"]
    prefixes = [tokenizer.decode(ids[:end]) for end in step_ends(ids, tokenizer, "lines")]
    starts = [i + 1 for i, char in enumerate(text) if char == "\n" and text[i + 1 :].lstrip(" ")[0] != "\n"]
    assert [len(prefix.rstrip(" ")) for prefix in prefixes] == starts
    assert all(text.startswith(prefix) for prefix in prefixes)


# ------------------------------------------------------------------ the search


def search(reaches: list[bool], num_right: int = 3, min_correct: int = 1) -> Any:
    """Search where prefix k (from 1) is good iff `reaches[k - 1]`."""

    async def probe(num_tokens: int) -> tuple[Verdict | None, ...]:
        num = num_right if reaches[num_tokens // 10 - 1] else min_correct - 1
        return (*[RIGHT] * num, *[WRONG] * (3 - num), None)

    ends = [10 * (k + 1) for k in range(len(reaches))]
    return asyncio.run(find_failing_prefix(ends, min_correct, probe))


@pytest.mark.parametrize("min_correct", [1, 2, 3])
def test_the_last_good_step_of_every_monotone_y_o_is_found(min_correct: int) -> None:
    for num_ends in range(34):
        for last_good in range(num_ends + 1):
            kept = search([k < last_good for k in range(num_ends)], min_correct=min_correct)
            assert (kept.num_steps, kept.num_tokens, kept.total_steps) == (last_good, 10 * last_good, num_ends + 1)
            assert len(kept.probes) <= num_ends.bit_length()  # ceil(log2 of num_ends + 1 steps)
            for probe in kept.probes:
                good = probe.num_steps <= last_good
                assert probe.num_correct == (3 if good else min_correct - 1) and len(probe.verdicts) == 4
                assert probe.num_tokens == 10 * probe.num_steps


def test_what_is_not_monotone_ends_with_a_good_step_before_a_bad_one() -> None:
    for pattern in itertools.product([True, False], repeat=9):
        kept = search(list(pattern))
        assert len(kept.probes) <= 4
        assert kept.num_steps == 0 or pattern[kept.num_steps - 1]
        assert kept.num_steps == 9 or not pattern[kept.num_steps]


def test_a_head_keeps_what_was_said_about_its_tokens() -> None:
    spans = tuple(VersionSpan(version=v, start=s, end=e) for v, s, e in (("a", 0, 2), ("b", 2, 5), ("c", 5, 6)))
    whole = Completion(
        token_ids=(1, 2, 3, 4, 5, 6), text="x", finish_reason="stop", logprobs=tuple(range(6)), weight_spans=spans
    )
    part = head(whole, 3)
    assert (part.token_ids, part.logprobs) == ((1, 2, 3), (0, 1, 2))
    assert [(span.version, span.start, span.end) for span in part.weight_spans] == [("a", 0, 2), ("b", 2, 3)]


# ------------------------------------------------------------------ through both stages

Y_O = "one\ntwo\nthree\nfour\nbad"
PROBLEM = Problem(id="p", prompt="x", answer="42")


def run(
    y_o: Completion, student: Any, refiner: Any, method: MethodConfig = METHOD
) -> tuple[Trajectory, Engine, Engine]:
    """Refine one y_o; `student` and `refiner` answer (text of the prefix they go on from, count)."""

    def rolls_out(prompt: str, count: int) -> Completion:
        return y_o if prompt == "Sp:" else student(prompt.removeprefix("Sp:"), count)

    engines = Engine(rolls_out), Engine(lambda prompt, count: refiner(prompt.removeprefix("Rp:"), count))
    parts = (Renderer(), LastLine(), SamplingParams(max_new_tokens=100, stop_token_ids=(EOS,)), 7)
    runner = RolloutRunner(*engines, *parts, method=method)  # type: ignore[arg-type]
    batch = asyncio.run(asyncio.wait_for(runner.run([PROBLEM], 0), 30))
    return batch.trajectories[0], *engines


def reaches_from(*good: str) -> Any:
    """A student that is right once in three tries from these prefixes and wrong from every other."""
    return lambda prefix, count: said("\n42" if prefix in good and count == 1 else "\nbad")


def test_y_r_is_the_kept_ids_and_then_the_refiners() -> None:
    spans = (VersionSpan(version="v1", start=0, end=len(Y_O) + 1),)
    more_spans = (VersionSpan(version="t", start=0, end=8),)
    logprobs = tuple(-0.5 - i for i in range(len(Y_O) + 1))
    y_o = Completion(
        token_ids=said(Y_O).token_ids, text=Y_O, finish_reason="stop", logprobs=logprobs, weight_spans=spans
    )
    more = said("then\n42")
    more = Completion(
        token_ids=more.token_ids, text="then\n42", finish_reason="stop", logprobs=(-9.0,) * 8, weight_spans=more_spans
    )
    done, student, refiner = run(y_o, reaches_from("one\n", "one\ntwo\n"), lambda *_: more)
    prefix = "one\ntwo\n"
    assert done.y_o_verdict == Verdict(outcome="wrong", extracted="bad")
    assert done.kept is not None and done.y_r is not None
    assert (done.kept.num_tokens, done.kept.num_steps, done.kept.total_steps) == (8, 2, 5)
    assert [(p.num_steps, p.num_tokens, p.num_correct) for p in done.kept.probes] == [(2, 8, 1), (3, 14, 0)]
    assert [v.outcome for v in done.kept.probes[0].verdicts if v] == ["wrong", "correct", "wrong"]
    assert done.y_r.token_ids == y_o.token_ids[:8] + more.token_ids
    assert done.y_r.text == prefix + "then\n42" and done.y_r.finish_reason == "stop"
    assert done.y_r.logprobs == logprobs[:8] + more.logprobs
    assert [(s.version, s.start, s.end) for s in done.y_r.weight_spans] == [("v1", 0, 8), ("t", 8, 16)]
    assert done.y_r_verdict == Verdict(outcome="correct", extracted="42")
    assert [prompt for prompt, _ in refiner.asked] == ["Rp:" + prefix]
    assert done.refine_prompt_ids == ids_of("Rp:")
    # prompt and budget together are what they would be without a prefix; each continuation has its own seed
    assert [params.max_new_tokens for _, params in student.asked] == [100, *[92] * 3, *[86] * 3]
    assert refiner.asked[0][1].max_new_tokens == 92
    assert len({params.sampling_seed for _, params in student.asked + refiner.asked}) == 8


@pytest.mark.parametrize(
    ("y_o", "method", "good", "kept"),
    [
        (said(Y_O), METHOD, (), (0, 2)),  # no step reaches it: from the start, after probes of steps 2 and 1
        (said(Y_O), METHOD, ("one\n", "one\ntwo\n", "one\ntwo\nthree\n", "one\ntwo\nthree\nfour\n"), (19, 3)),
        (said("bad"), METHOD, (), (0, 0)),  # one step: there is nothing to try
        (said("bad\n"), METHOD, (), (0, 0)),  # the token that ends the turn is no step
        (said("one\n?", "length"), METHOD, ("one\n",), (4, 1)),  # cut off before an answer: wrong
        (said("one\ntwo\n?"), METHOD, ("one\n",), (4, 2)),  # no answer: wrong
        (said("one\ntwo\n\nbad"), MethodConfig(refine_from="failing-prefix", prefix_steps="paragraphs"), (), (0, 1)),
        (said("ab"), MethodConfig(refine_from="failing-prefix", prefix_steps="tokens"), ("a",), (1, 1)),
        (
            said(Y_O),
            MethodConfig(refine_from="failing-prefix", prefix_continuations=3, prefix_min_correct=2),
            ("one\n", "one\ntwo\n"),
            (0, 2),
        ),
    ],
)
def test_how_much_is_kept(y_o: Completion, method: MethodConfig, good: tuple[str, ...], kept: tuple[int, int]) -> None:
    done, *_ = run(y_o, reaches_from(*good), lambda *_: said("\n42"), method)
    assert done.kept is not None and (done.kept.num_tokens, len(done.kept.probes)) == kept
    assert done.y_r is not None and done.y_r.token_ids == y_o.token_ids[: kept[0]] + said("\n42").token_ids


@pytest.mark.parametrize("y_o", [said("one\n42"), said("one\n&"), said("one\n!")])
def test_a_y_o_that_is_right_or_cannot_be_graded_is_rewritten_from_its_start(y_o: Completion) -> None:
    done, student, refiner = run(y_o, reaches_from("one\n"), lambda *_: said("42"))
    assert done.kept is None and len(student.asked) == 1
    assert [prompt for prompt, _ in refiner.asked] == ["Rp:"] and done.y_r == said("42")


def test_failed_continuations_are_told_from_wrong_ones() -> None:
    def flaky(prefix: str, count: int) -> Completion:
        return [said("", "abort"), said("\n&"), said("\n42")][count]

    done, *_ = run(said("one\nbad"), flaky, lambda *_: said("42"))
    assert done.kept is not None and done.kept.num_steps == 1
    (probe,) = done.kept.probes
    assert [verdict and verdict.outcome for verdict in probe.verdicts] == [None, "grader_error", "correct"]


def test_a_refiner_that_fails_behind_a_prefix_leaves_a_failed_y_r() -> None:
    failed = Completion(token_ids=(), text="", finish_reason="abort", error="all servers are down")
    done, *_ = run(said("one\nbad"), reaches_from("one\n"), lambda *_: failed)
    assert done.y_r is not None and done.y_r.finish_reason == "abort" and done.y_r.error == "all servers are down"
    assert done.y_r_verdict is None and done.kept is not None and done.kept.num_tokens == 4


def test_every_refinement_goes_on_from_the_same_prefix() -> None:
    method = MethodConfig(refine_from="failing-prefix", refine_samples=3, refine_select="verified")
    answers = ["bad", "42", "42"]
    done, _, refiner = run(said("one\nbad"), reaches_from("one\n"), lambda _, count: said(answers[count]), method)
    assert [prompt for prompt, _ in refiner.asked] == ["Rp:one\n"] * 3
    assert done.y_r is not None and done.y_r.text == "one\n42"
    assert done.selection is not None and done.selection.chosen == 1
    assert [c.completion.text for c in done.selection.rejected] == ["one\nbad", "one\n42"]
