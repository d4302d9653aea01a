"""Our client and our transports on every server: what they make of it, against transformers and the bytes held."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from integration.wire import CONTEXT, ENDLESS, PROMPT, TIMEOUT_S, Engine, Running, greedy, logprobs, read_weights
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.sglang import SGLangFleet
from megatron_trd.weight_sync.base import WeightSync
from megatron_trd.weight_sync.disk import DiskWeightSync
from megatron_trd.weight_sync.distributed import DistributedWeightSync
from megatron_trd.weight_sync.tensors import TensorWeightSync

TOLERANCE = 1e-4
VOCAB = 92
SAMPLING = SamplingParams(max_new_tokens=24, temperature=0.7, top_p=0.9, top_k=5)


def fleet_of(*engines: Engine) -> SGLangFleet:
    return SGLangFleet([e.url for e in engines], request_timeout_s=TIMEOUT_S, first_backoff_s=0.05, vocab_size=VOCAB)


def test_completions_and_scores(engine: Engine, hf_student: Any, tokenizer: Any, served_dir: Path) -> None:
    async def main() -> None:
        async with fleet_of(engine) as fleet:
            await fleet.wait_healthy()
            assert await fleet.model_name() == f"{served_dir}@default"
            best = await fleet.generate(PROMPT, SamplingParams(max_new_tokens=30, temperature=0.0))
            assert list(best.token_ids) == greedy(hf_student, PROMPT, 30) and best.error is None
            assert best.text.lstrip() == tokenizer.decode(best.token_ids, skip_special_tokens=True)
            done = await fleet.generate(PROMPT, SAMPLING)
            assert done.weight_versions == ("default",)
            expected = logprobs(hf_student, [*PROMPT, *done.token_ids], 0.7)[len(PROMPT) - 1 :]
            np.testing.assert_allclose(done.logprobs, expected, atol=TOLERANCE)
            scored = await fleet.score(PROMPT, done.token_ids)
            expected = logprobs(hf_student, [*PROMPT, *done.token_ids])[len(PROMPT) - 1 :]
            np.testing.assert_allclose(scored, expected, atol=TOLERANCE)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("prompt", "num_tokens", "reason"),
    [((), 8, "empty"), ((3, VOCAB), 8, "vocabulary"), ((3, -1), 8, "vocabulary"), ((3,) * 9, CONTEXT, "context")],
    ids=["no id", "beyond the vocabulary", "negative", "beyond the context"],
)
def test_no_request_that_cannot_be_ends_the_server(
    engine: Engine, prompt: tuple[int, ...], num_tokens: int, reason: str
) -> None:
    async def main() -> None:
        async with fleet_of(engine) as fleet:
            refused = await fleet.generate(prompt, SamplingParams(max_new_tokens=num_tokens))
            assert refused.finish_reason == "abort" and reason in (refused.error or "") and fleet.num_retries == 0
            assert (await fleet.generate(PROMPT, SAMPLING)).error is None

    asyncio.run(main())


def transport(kind: str, fleet: SGLangFleet, served_dir: Path, directory: Path) -> WeightSync:
    if kind == "disk":
        return DiskWeightSync(directory, served_dir, fleet, timeout_s=TIMEOUT_S)
    make = TensorWeightSync if kind == "tensor" else DistributedWeightSync
    return make(served_dir, fleet, bucket_bytes=100_000, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("kind", ["disk", "tensor", "distributed"])
def test_a_publication_reaches_two_servers_amid_a_response(
    restored: Engine, partner: Engine, kind: str, served_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    weights = read_weights(other_dir)
    hf_other = AutoModelForCausalLM.from_pretrained(other_dir, dtype=torch.float32).eval()
    both = [restored, partner]

    async def main() -> None:
        async with fleet_of(*both) as fleet:
            await fleet.wait_healthy()
            sync = transport(kind, fleet, served_dir, tmp_path)
            running = await asyncio.to_thread(Running, restored, f"amid-{kind}", ENDLESS)
            report = await sync.publish(weights.items(), "v1")
            assert report.failures == {} and report.num_bytes == sum(w.nbytes for w in weights.values())
            for engine in both:
                assert engine.checksums() == engine.expected_checksums(weights)
                assert engine.get("/model_info")["weight_version"] == "v1"
            done = await asyncio.gather(*(fleet.generate(PROMPT, SAMPLING) for _ in range(4)))
            for completion in done:
                assert completion.weight_versions == ("v1",) and completion.error is None
                expected = logprobs(hf_other, [*PROMPT, *completion.token_ids], 0.7)[len(PROMPT) - 1 :]
                np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE)
            restored.post("/abort_request", rid=f"amid-{kind}")
            meta = (await asyncio.to_thread(running.finish))["meta_info"]
            assert [span["version"] for span in meta["weight_versions"]] == ["default", "v1"]
            assert meta["num_retractions"] == 1
            if kind != "disk":
                await sync.close()

    try:
        asyncio.run(main())
    finally:
        partner.load(served_dir, "default")
