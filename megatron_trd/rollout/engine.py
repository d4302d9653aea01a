"""What the method asks of a generation engine; `sglang.py` is the implementation, tests use it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_trd.records import Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one completion. Names and meaning are SGLang's."""

    max_new_tokens: int
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    stop_token_ids: tuple[int, ...] = ()
    """End the response and are part of it. Name all of the model's: a response that broke off behind one has ended."""
    ignore_eos: bool = False
    """Always sample `max_new_tokens`, for benchmarks and tests."""
    sampling_seed: int | None = None
    """Makes a completion reproducible where the server supports it."""


class RolloutEngine(Protocol):
    """A fleet of servers that hold one model."""

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """Sample one completion; never raises for a failed request: `finish_reason` is then `abort`."""
        ...
