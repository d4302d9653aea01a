"""Reasoning blocks by token ids: found in every chat template's way of writing them, and never re-tokenised."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_trd.config.schema import MethodConfig
from megatron_trd.records import Problem, Reasoning
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.reasoning import ReasoningTokens, require_reasoning_tokens
from megatron_trd.rollout.refine import RolloutRunner
from megatron_trd.rollout.to_sample import to_sample
from scripted_rollouts import TOKENIZER, Engine, LastLine, Renderer, byte_tokenizer, ids_of, said

QWEN = Path(__file__).resolve().parents[3] / "shared/data/qwen_tokenizer"
EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("refine_prompt", "y_r", "block"),
    [
        ("R>", "42", None),
        ("R>" + EMPTY, "42", None),
        ("R>", "<think>\n\nhm\n\n</think>\n\n42", "<think>\n\nhm\n\n</think>\n\n"),
        ("R>", "<think>hm</think>42", "<think>hm</think>"),  # no white space behind it
        ("R>", "<think>hm</think> \n\n 42", "<think>hm</think> \n\n "),
        ("R><think>\n", "hm</think>\n\n42", "hm</think>\n\n"),  # opened by the template
        ("R><think>\n", "hm", "hm"),  # and never closed
        ("R>", "<think>hm", "<think>hm"),
        ("R>", "a <think>hm", "a <think>hm"),
        ("R>", "<think>a</think>b<think>c</think>d", "<think>a</think>b<think>c</think>"),
        ("R>", "<think>a</think>b<think>c", "<think>a</think>b<think>c"),
        ("R>", "<think>hm</think>", "<think>hm</think>"),
        ("y_o: <think>was open\n>", "42", None),  # what the prompt quotes opens nothing
        ("R>", "", None),
    ],
)
def test_the_block_of_a_response(refine_prompt: str, y_r: str, block: str | None) -> None:
    tokens = ReasoningTokens.of(TOKENIZER)
    assert tokens is not None
    found = tokens.find(ids_of("S>"), ids_of(refine_prompt), ids_of(y_r))
    assert (found and TOKENIZER.decode(ids_of(y_r)[: found.num_tokens])) == block


@pytest.mark.parametrize(
    ("template", "prompt", "suffix"),
    [
        (None, "S>", EMPTY),  # the switch is on: what it would write when off
        (None, "S>" + EMPTY, ""),
        ("{{ messages[0]['content'] }}>", "S>", ""),  # a template that never writes blocks
        ("{{ messages[0]['content'] }}><think>\n", "S><think>\n", "\n</think>\n\n"),  # one that always opens one
    ],
)
def test_what_stands_in_the_place_of_a_block(template: str | None, prompt: str, suffix: str) -> None:
    tokenizer = TOKENIZER if template is None else byte_tokenizer(template)
    tokens = ReasoningTokens.of(tokenizer)
    assert tokens is not None
    found = tokens.find(ids_of(prompt), ids_of(prompt), ids_of("<think>hm</think>42"))
    assert found is not None
    assert found.student_suffix_ids == found.teacher_suffix_ids == ids_of(suffix)


def test_a_tokenizer_without_the_tokens() -> None:
    plain = byte_tokenizer(added=())
    assert ReasoningTokens.of(plain) is None
    require_reasoning_tokens(MethodConfig(), plain)
    require_reasoning_tokens(MethodConfig(refiner_reasoning="drop"), TOKENIZER)
    with pytest.raises(ValueError, match=r"--refiner-reasoning drop: the tokenizer has no tokens <think> and </think>"):
        require_reasoning_tokens(MethodConfig(refiner_reasoning="drop"), plain)


def test_both_contexts_end_alike_when_only_the_refiner_thinks() -> None:
    """The student's prompt has the empty block, the teacher's context the sampled one; the response is the same ids."""

    class Thinking(Renderer):
        def solve(self, problem: Problem) -> tuple[int, ...]:
            return ids_of("S>" + EMPTY)

        def refine(self, problem: Problem, y_o_text: str) -> tuple[tuple[int, ...], int]:
            return ids_of("R>"), 0

    y_r = said("<think>\n\nhm\n\n</think>\n\nso\n42")
    engines = Engine(lambda *_: said("raw")), Engine(lambda *_: y_r)
    parts: tuple[Any, ...] = (Thinking(), LastLine(), SamplingParams(max_new_tokens=99), 0)
    runner = RolloutRunner(*engines, *parts)
    (done,) = asyncio.run(asyncio.wait_for(runner.run([Problem(id="p", prompt="x", answer="42")], 0), 30)).trajectories
    block = ids_of("<think>\n\nhm\n\n</think>\n\n")
    assert done.y_r_reasoning == Reasoning(
        num_tokens=len(block), student_suffix_ids=(), teacher_suffix_ids=ids_of(EMPTY)
    )
    sample = to_sample(done, MethodConfig()).sample
    assert sample is not None
    assert sample.student_prompt_ids == ids_of("S>" + EMPTY)
    assert sample.teacher_prompt_ids + sample.response_ids == done.refine_prompt_ids + y_r.token_ids
    assert sample.response_ids == y_r.token_ids[len(block) :]
    dropped = to_sample(done, MethodConfig(refiner_reasoning="drop")).sample
    assert dropped is not None and dropped.teacher_prompt_ids == ids_of("R>" + EMPTY)
    assert dropped.response_ids == sample.response_ids


@pytest.mark.skipif(not QWEN.is_dir(), reason="the Qwen3 tokenizer is not there (shared/data)")
def test_qwen3s_own_template_writes_the_same_empty_block() -> None:
    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    tokens = ReasoningTokens.of(tokenizer)
    assert tokens is not None and (tokens.open_id, tokens.close_id) == (151667, 151668)
    message = [{"role": "user", "content": "x"}]

    def prompt(thinking: bool) -> tuple[int, ...]:
        flags = {"add_generation_prompt": True, "enable_thinking": thinking, "return_dict": False}
        return tuple(tokenizer.apply_chat_template(message, **flags))

    y_r = tokenizer("<think>\nI rewrite.\n</think>\n\nThe answer")["input_ids"]
    found = tokens.find(prompt(False), prompt(True), y_r)
    assert found is not None and tokenizer.decode(y_r[found.num_tokens :]) == "The answer"
    assert found.student_suffix_ids == ()
    assert prompt(True) + found.teacher_suffix_ids == prompt(False)
