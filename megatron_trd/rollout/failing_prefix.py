"""Where a wrong y_o goes wrong: the last of its steps from which the student still reaches the answer.

A step ends where a line (or a paragraph) does, always at the end of a token. A prefix of y_o still reaches the answer
if enough of the student's own continuations of it are verified as correct. The last such prefix is found by bisection,
which takes for granted that a longer prefix does no better: of n steps, at most ceil(log2 n) prefixes are tried. The
empty prefix counts as one that does, and the whole y_o as one that does not.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from megatron_trd.records import Completion, KeptPrefix, PrefixProbe, Verdict

StepUnit = Literal["lines", "paragraphs", "tokens"]
Probe = Callable[[int], Awaitable[tuple[Verdict | None, ...]]]
"""From a number of y_o's tokens to verdicts on continuations of them; None for a failed request."""


def step_ends(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, unit: StepUnit) -> list[int]:
    """Return after how many tokens a step of a response ends, but for the last one.

    A line ends in front of a token that has more than white space in it, behind white space with a line break; a
    paragraph behind white space with two. A line break inside such a token ends nothing.
    """
    if unit == "tokens":
        return list(range(1, len(ids)))
    texts = {token_id: tokenizer.decode([token_id]) for token_id in set(ids)}
    num_breaks = {"lines": 1, "paragraphs": 2}[unit]
    ends, blank, is_begun = [], "", False
    for i, token_id in enumerate(ids):
        text = texts[token_id]
        words = text.rstrip()
        if words:
            if is_begun and blank.count("\n") >= num_breaks:
                ends.append(i)
            is_begun, blank = True, ""
        blank += text[len(words) :]
    return ends


async def find_failing_prefix(ends: Sequence[int], min_correct: int, probe: Probe) -> KeptPrefix:
    """Bisect for the last step from which at least `min_correct` continuations reach the answer.

    Args:
        ends: `step_ends` of a wrong y_o.
    """
    probes: list[PrefixProbe] = []
    reaches, fails = 0, len(ends) + 1
    while fails - reaches > 1:
        middle = (reaches + fails) // 2
        num_tokens = ends[middle - 1]
        tried = PrefixProbe(num_steps=middle, num_tokens=num_tokens, verdicts=await probe(num_tokens))
        probes.append(tried)
        if tried.num_correct >= min_correct:
            reaches = middle
        else:
            fails = middle
    return KeptPrefix(
        num_tokens=ends[reaches - 1] if reaches else 0,
        num_steps=reaches,
        total_steps=len(ends) + 1,
        probes=tuple(probes),
    )


def head(completion: Completion, num_tokens: int) -> Completion:
    """Return the start of a completion as one that broke off there, without text: `generate_wire.joined` goes on."""
    return Completion(
        token_ids=completion.token_ids[:num_tokens],
        text="",
        finish_reason="abort",
        logprobs=completion.logprobs[:num_tokens],
        weight_spans=tuple(
            replace(span, end=min(span.end, num_tokens)) for span in completion.weight_spans if span.start < num_tokens
        ),
    )
