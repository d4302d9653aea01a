"""Both stages without a server: a tokenizer of bytes, prompts that tell what they are, engines that say what they are
told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_trd.records import Completion, FinishReason, Problem, Trajectory, Verdict
from megatron_trd.rollout.engine import SamplingParams

SWITCH = (
    "{{ messages[0]['content'] }}>{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}"
)
"""A chat template as Qwen3's: it writes an empty block for a model that is not to think."""


def byte_tokenizer(
    chat_template: str = SWITCH, added: Sequence[str] = ("<think>", "</think>", "\n\n")
) -> PreTrainedTokenizerBase:
    """Make a tokenizer with one token for each byte, `<eos>` and `added`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=chat_template)
    fast.add_tokens([AddedToken(token, normalized=False) for token in added])
    return fast


TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text)["input_ids"])


def said(text: str, finish_reason: FinishReason = "stop") -> Completion:
    """A completion with this text; one that stopped ends with `<eos>`, a failed one has no tokens."""
    ids = () if finish_reason == "abort" else ids_of(text) + (EOS,) * (finish_reason == "stop")
    return Completion(token_ids=ids, text=text, finish_reason=finish_reason)


class Renderer:
    """Prompts whose text tells what they are: `S`olve, `V`anilla, `R`efine."""

    tokenizer = TOKENIZER

    def solve(self, problem: Problem) -> tuple[int, ...]:
        return ids_of(f"S{problem.id}:")

    def vanilla(self, problem: Problem) -> tuple[tuple[int, ...], int]:
        return ids_of(f"V{problem.id}:"), 0

    def refine(self, problem: Problem, y_o_text: str) -> tuple[tuple[int, ...], int]:
        return ids_of(f"R{problem.id}:"), 0


class LastLine:
    """The answer is the last line; `?` is none, `!` breaks the verifier, `&` is one that it gives up on."""

    name, template_dir, epistemic_words = "words", Path(), ()

    def grade(self, problem: Problem, response: str, finish_reason: FinishReason) -> Verdict:
        answer = response.rsplit("\n", 1)[-1]
        if answer == "!":
            raise RuntimeError("the verifier met a response it was not made for")
        if answer == "&":
            return Verdict(outcome="grader_error", error="timed out")
        if answer == "?":
            return Verdict(outcome="truncated" if finish_reason == "length" else "no_answer")
        return Verdict(outcome="correct" if answer == problem.answer else "wrong", extracted=answer)


class Engine:
    """Answers with what a function says of the prompt's text and the count of requests with that prompt."""

    def __init__(self, answer: Callable[[str, int], Completion]) -> None:
        self.answer = answer
        self.asked: list[tuple[str, SamplingParams]] = []

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        prompt = TOKENIZER.decode(list(prompt_ids))
        self.asked.append((prompt, params))
        return self.answer(prompt, [other for other, _ in self.asked].count(prompt) - 1)


RIGHT, WRONG = Verdict(outcome="correct"), Verdict(outcome="wrong")


def completion(text: str = "ok", finish_reason: Any = "stop", ids: Sequence[int] | None = None) -> Completion:
    """A completion of three tokens, or of `ids`."""
    return Completion(token_ids=tuple([7, 8, 1] if ids is None else ids), text=text, finish_reason=finish_reason)


def trajectory(**changes: Any) -> Trajectory:
    """A wrong y_o that became a right y_r, with `changes`."""
    base = Trajectory(
        problem=Problem(id="p", prompt="x", answer="1"),
        y_o=completion("raw", ids=[5, 6, 1]),
        y_o_verdict=WRONG,
        solve_prompt_ids=(10,),
        vanilla_prompt_ids=(10, 11),
        y_r=completion("refined"),
        y_r_verdict=RIGHT,
        refine_prompt_ids=(10, 12),
    )
    return replace(base, **changes)
