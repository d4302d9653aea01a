"""Interrupted responses on real servers, the embedded one and SGLang: they end as if nothing had happened."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_trd.records import Completion
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.server_client import ServerState
from megatron_trd.rollout.server_process import ServerProcess, running, start_sglang
from megatron_trd.rollout.sglang import SGLangFleet
from scripted_server import fleet_of

PROMPTS = [(3, 20 + i, 66, 70) for i in range(16)]
DEADLINE_S = 180


def fleet_over(tokenizer: Any, *urls: str, **changes: Any) -> SGLangFleet:
    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    return fleet_of(*urls, vocab_size=92, decode=decode, **changes)


def greedy(tokenizer: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=200, temperature=0.0, stop_token_ids=(tokenizer.eos_token_id,))


def expected(model: Any, prompt: Sequence[int]) -> tuple[tuple[int, ...], list[float]]:
    """What transformers says: tokens and log-probabilities."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False)
        logprobs = model(whole).logits[0].log_softmax(-1)
    rows = torch.arange(len(prompt), whole.shape[1])
    return tuple(whole[0, len(prompt) :].tolist()), logprobs[rows - 1, whole[0, rows]].tolist()


def require_equal(completions: Sequence[Completion], model: Any, tokenizer: Any) -> None:
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids, logprobs = expected(model, prompt)
        assert completion.error is None and completion.token_ids == ids
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-4)
        (span,) = completion.weight_spans
        assert (span.start, span.end) == (0, len(ids))


@pytest.mark.parametrize("kind", ["server", "sglang_server"])
def test_aborted_responses_go_on_to_the_same_end(
    kind: str, request: pytest.FixtureRequest, hf_student: Any, tokenizer: Any
) -> None:
    async def main() -> None:
        url = request.getfixturevalue(kind)
        # An abort in the server's queue is a failed try, and on a slow machine one request may meet many.
        async with fleet_over(tokenizer, url, retries=1000) as fleet:
            await fleet.wait_healthy()
            tasks = [asyncio.create_task(fleet.generate(prompt, greedy(tokenizer))) for prompt in PROMPTS]
            while fleet.num_continued < 8 and not all(task.done() for task in tasks):
                await fleet.servers[0].post("/abort_request", {"abort_all": True}, 10.0)
                await asyncio.sleep(0.05)
            done = await asyncio.gather(*tasks)
            assert fleet.num_continued >= 1
            require_equal(done, hf_student, tokenizer)
            for completion in done:
                shown = completion.token_ids[:-1] if completion.finish_reason == "stop" else completion.token_ids
                assert completion.text.strip() == tokenizer.decode(shown, skip_special_tokens=True).strip()

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def test_a_sglang_server_that_is_killed_in_the_middle_loses_nothing(
    sglang_python: Path, student_dir: Path, server: str, hf_student: Any, tokenizer: Any
) -> None:
    sglang: ServerProcess = start_sglang(student_dir, python=sglang_python)

    async def main() -> None:
        async with fleet_over(tokenizer, sglang.url, server) as fleet:
            await fleet.wait_healthy()
            doomed = fleet.servers[0]
            fleet.servers[1].num_in_flight += len(PROMPTS)  # so that all go to SGLang first
            tasks = [asyncio.create_task(fleet.generate(prompt, greedy(tokenizer))) for prompt in PROMPTS]
            end = time.monotonic() + DEADLINE_S
            while doomed.num_in_flight < len(PROMPTS) and not any(task.done() for task in tasks):
                assert time.monotonic() < end
                await asyncio.sleep(0)
            sglang.process.kill()
            done = await asyncio.gather(*tasks)
            assert fleet.num_retries > 0 and doomed.state is ServerState.DOWN
            require_equal(done, hf_student, tokenizer)

    with running(sglang):
        asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
