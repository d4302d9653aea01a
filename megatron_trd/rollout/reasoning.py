"""The reasoning block at the start of a response (`<think> ... </think>`), found by its token ids.

A refiner that thinks talks about rewriting, which a student that sees no y_o must not learn. The block can move from
the response into the teacher's context, or out of both: `to_sample.py` does it, with what is recorded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_trd.config.schema import MethodConfig
from megatron_trd.records import Reasoning

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningTokens:
    """What reasoning blocks are made of in one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    open_id: int
    close_id: int
    empty_ids: tuple[int, ...]
    """The block that the chat template writes for a model that is not to think; () if it knows none."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ReasoningTokens | None:
        """Find them; None if the tokenizer has no such tokens."""
        ids = [tokenizer.convert_tokens_to_ids(token) for token in (OPEN, CLOSE)]
        if any(found in (None, tokenizer.unk_token_id) for found in ids):
            return None
        return cls(tokenizer=tokenizer, open_id=ids[0], close_id=ids[1], empty_ids=_empty_block(tokenizer))

    def find(
        self, solve_prompt_ids: Sequence[int], refine_prompt_ids: Sequence[int], y_r_ids: Sequence[int]
    ) -> Reasoning | None:
        """Return the block of a y_r; None if it has none. More than one block in a row count as one."""
        if not (num_tokens := self._length(refine_prompt_ids, y_r_ids)):
            return None
        return Reasoning(
            num_tokens=num_tokens,
            student_suffix_ids=self._suffix(solve_prompt_ids),
            teacher_suffix_ids=self._suffix(refine_prompt_ids),
        )

    def _length(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> int:
        opened, closed = _last(ids, self.open_id), _last(ids, self.close_id)
        if opened > closed or (closed < 0 and self._is_open(prompt_ids)):
            return len(ids)
        end = closed + 1
        while 0 < end < len(ids) and self._is_blank(ids[end]):
            end += 1
        return end

    def _suffix(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """Return what puts an answer right behind a prompt: () where the prompt ends with an empty block."""
        if self._is_open(prompt_ids):
            return tuple(self.tokenizer(f"\n{CLOSE}\n\n", add_special_tokens=False)["input_ids"])
        num = len(self.empty_ids)
        return () if num and tuple(prompt_ids[-num:]) == self.empty_ids else self.empty_ids

    def _is_open(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the chat template has opened the block already."""
        return next((id_ == self.open_id for id_ in reversed(prompt_ids) if not self._is_blank(id_)), False)

    def _is_blank(self, token_id: int) -> bool:
        return self.tokenizer.decode([token_id]).isspace()


def require_reasoning_tokens(method: MethodConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if --refiner-reasoning asks for what the tokenizer cannot tell."""
    if method.refiner_reasoning != "auto" and ReasoningTokens.of(tokenizer) is None:
        raise ValueError(
            f"--refiner-reasoning {method.refiner_reasoning}: the tokenizer has no tokens {OPEN} and {CLOSE}, so no "
            "block can be found; leave it out"
        )


def _empty_block(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    if tokenizer.chat_template is None:
        return ()
    thinking, silent = (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], add_generation_prompt=True, enable_thinking=on, return_dict=False
        )
        for on in (True, False)
    )
    return tuple(silent[len(thinking) :]) if silent[: len(thinking)] == thinking else ()


def _last(ids: Sequence[int], wanted: int) -> int:
    return max((i for i, token_id in enumerate(ids) if token_id == wanted), default=-1)
