"""Whom the fleet asks, when it asks twice, how it waits, and what it refuses to send."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from aiohttp import web

from megatron_trd.config.schema import Config, MethodConfig, ModelConfig, RolloutConfig
from megatron_trd.rollout import server_pool, tries
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.server_client import ServerState
from megatron_trd.rollout.sglang import SGLangFleet
from megatron_trd.rollout.tries import GaveUpError, Tries
from megatron_trd.weight_sync.base import ServerError
from scripted_server import GOOD, Scripted, answer, failing, fleet_of, good, hang, scripted

PROMPT = (3, 20, 66, 70)
SAMPLING = SamplingParams(max_new_tokens=8, sampling_seed=1)
FULL = {"error": {"message": "The request queue is full."}}


class Gate:
    """Answers are held back until it opens."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()

    async def __call__(self, _: dict[str, Any]) -> Any:
        await self.opened.wait()
        return GOOD


async def until(condition: Any, deadline_s: float = 30.0) -> None:
    """Let others run until something is true."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.001)


def share(server: Scripted) -> int:
    return len(server.asked)


def test_different_prompts_are_spread_evenly() -> None:
    async def main() -> None:
        gate = Gate()
        async with scripted(gate, gate, gate) as servers, fleet_of(*(s.url for s in servers)) as fleet:
            await fleet.wait_healthy()
            running = [asyncio.create_task(fleet.generate((*PROMPT, i), SAMPLING)) for i in range(60)]
            await until(lambda: sum(map(share, servers)) == 60)
            assert [share(server) for server in servers] == [20, 20, 20]
            gate.opened.set()
            await asyncio.gather(*running)
            assert all(server.num_in_flight == 0 for server in fleet.servers)

    asyncio.run(main())


@pytest.mark.parametrize("num_samples", [8, 24])
def test_the_samples_of_a_prompt_stay_together_until_their_server_is_full(num_samples: int) -> None:
    """24 samples of one prompt exceed the slack of 8: the rest goes where there is room."""

    async def main() -> None:
        gate = Gate()
        async with scripted(gate, gate) as servers, fleet_of(*(s.url for s in servers)) as fleet:
            await fleet.wait_healthy()
            running = [asyncio.create_task(fleet.generate(PROMPT, SAMPLING)) for _ in range(num_samples)]
            await until(lambda: sum(map(share, servers)) == num_samples)
            counts = sorted(share(server) for server in servers)
            slack = server_pool.AFFINITY_SLACK
            assert counts == [0, 8] if num_samples == 8 else counts[1] - counts[0] <= slack + 1
            gate.opened.set()
            await asyncio.gather(*running)
            homes = [share(server) for server in servers]
            for _ in range(5):  # idle again: it goes where its prefix was last
                await fleet.generate(PROMPT, SAMPLING)
            assert sorted(b - a for a, b in zip(homes, map(share, servers), strict=True)) == [0, 5]

    asyncio.run(main())


def test_prompts_are_remembered_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_pool, "MAX_REMEMBERED_PROMPTS", 4)

    async def main() -> None:
        async with scripted(good) as (server,), fleet_of(server.url) as fleet:
            for i in range(20):
                await fleet.generate((*PROMPT, i), SAMPLING)
            assert list(fleet._homes) == [hash((*PROMPT, i)) for i in range(16, 20)]

    asyncio.run(main())


# ------------------------------------------------------------------ hedges


def test_a_slow_request_is_hedged_once_and_the_loser_aborted() -> None:
    async def main() -> None:
        async with scripted(hang, good) as (slow, fast):
            async with fleet_of(slow.url, fast.url, hedge_after_s=0.05) as fleet:
                await fleet.wait_healthy()
                assert (await fleet.generate(PROMPT, SAMPLING)).token_ids == (4, 5)
                assert (fleet.num_hedges, fleet.num_retries, share(slow), share(fast)) == (1, 0, 1, 1)
                assert [s.state for s in fleet.servers] == [ServerState.READY] * 2
                assert all(server.num_in_flight == 0 for server in fleet.servers)
            assert slow.aborted == [slow.asked[0]["rid"]] and not fast.aborted

    asyncio.run(main())


def test_a_hedge_that_fails_does_not_end_the_request() -> None:
    async def main() -> None:
        gate = Gate()

        def fail_and_open(body: dict[str, Any]) -> Any:
            gate.opened.set()
            return failing(500)(body)

        settings = {"hedge_after_s": 0.05}
        async with scripted(gate, fail_and_open) as (slow, bad), fleet_of(slow.url, bad.url, **settings) as fleet:
            await fleet.wait_healthy()
            assert (await fleet.generate(PROMPT, SAMPLING)).token_ids == (4, 5)
            assert (fleet.num_hedges, fleet.num_retries, share(slow), share(bad)) == (1, 0, 1, 1)

    asyncio.run(main())


def test_there_is_no_hedge_without_room_or_without_a_second_server() -> None:
    async def main() -> None:
        gate = Gate()
        settings = {"hedge_after_s": 0.01}
        async with scripted(gate, gate) as (one, two):
            for urls, more in ([one.url, two.url], {"max_concurrent_requests": 1}), ([one.url], {}):
                gate.opened.clear()
                async with fleet_of(*urls, **settings, **more) as fleet:
                    await fleet.wait_healthy()
                    running = asyncio.create_task(fleet.generate(PROMPT, SAMPLING))
                    done, _ = await asyncio.wait([running], timeout=0.1)
                    assert not done and fleet.num_hedges == 0
                    gate.opened.set()
                    assert (await running).error is None and fleet.num_hedges == 0

    asyncio.run(main())


# ------------------------------------------------------------------ waiting


@pytest.mark.parametrize("status", [503, 429])
def test_back_pressure_costs_no_try_and_puts_no_server_out_of_use(status: int) -> None:
    async def main() -> None:
        replies = iter([web.json_response(FULL, status=status) for _ in range(6)])
        async with scripted(lambda _: next(replies, GOOD)) as (server,), fleet_of(server.url, retries=0) as fleet:
            await fleet.wait_healthy()
            done = await fleet.generate(PROMPT, SAMPLING)
            assert done.error is None and share(server) == 7
            assert fleet.servers[0].state is ServerState.READY

    asyncio.run(main())


@pytest.mark.parametrize(("reply", "seen"), [(FULL, "queue is full"), (None, "no answer within")])
def test_the_deadline_holds_over_all_tries(reply: Any, seen: str) -> None:
    """A server that is full for ever, and one that never answers: 2 tries of 0.3 s."""

    async def main() -> None:
        async def respond(body: dict[str, Any]) -> Any:
            return web.json_response(reply, status=503) if reply else await hang(body)

        settings = {"retries": 1, "request_timeout_s": 0.3}
        async with scripted(respond) as (server,), fleet_of(server.url, **settings) as fleet:
            done = await asyncio.wait_for(fleet.generate(PROMPT, SAMPLING), 30)
            assert done.finish_reason == "abort" and seen in (done.error or "")
            assert "--request-retries 1" in (done.error or "")

    asyncio.run(main())


def test_pauses_are_random_grow_and_follow_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def record(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(tries.asyncio, "sleep", record)

    async def fail(seed: int) -> list[float]:
        pauses.clear()
        attempt = Tries(8, 100.0, 0.5, Random(seed))
        for i in range(8):
            await attempt.failed(f"failure {i}")
        with pytest.raises(GaveUpError, match=r"failed 9 times \(--request-retries 8\): failure 0 \| .*failure 7"):
            await attempt.failed("the last")
        return list(pauses)

    runs = [asyncio.run(fail(seed)) for seed in range(200)]
    assert runs[3] == asyncio.run(fail(3)) and len({tuple(run) for run in runs}) == 200
    for i, longest in enumerate([0.5, 1, 2, 4, 8, 10, 10, 10]):
        seen = sorted(run[i] for run in runs)
        assert 0 <= seen[0] < 0.1 * longest and 0.9 * longest < seen[-1] <= longest  # full jitter
        assert 0.4 * longest < sum(seen) / 200 < 0.6 * longest


# ------------------------------------------------------------------ limits and keys


def test_what_would_kill_a_server_never_leaves() -> None:
    async def main() -> None:
        async with scripted(good) as (server,), fleet_of(server.url, vocab_size=92) as fleet:
            for prompt, message in (((3, 92), "vocabulary of 92"), ((-1, 3), "outside the vocabulary"), ((), "empty")):
                done = await fleet.generate(prompt, SAMPLING)
                assert done.finish_reason == "abort" and message in (done.error or "")
            for prompt, response in ((), (4,)), ((3,), (92,)):
                with pytest.raises(ServerError, match="empty|vocabulary of 92"):
                    await fleet.score(prompt, response)
            broken = answer([4, 500], [("v1", 0, 2)], "abort")  # a partial response is a prompt too
            server.reply = lambda _: broken
            done = await fleet.generate(PROMPT, SAMPLING)
            assert "vocabulary of 92" in (done.error or "") and share(server) == 1

    asyncio.run(main())


def test_a_fleet_from_flags_sends_the_key_and_knows_the_vocabulary(
    tmp_path: Path, student_dir: Path, tokenizer: Any
) -> None:
    key = tmp_path / "key"

    def config(*urls: str) -> Config:
        rollout = RolloutConfig(student_urls=urls, server_api_key_file=str(key), hedge_after_s=7.0)
        return Config(
            method=MethodConfig(trajectory="y_o"), model=ModelConfig(hf_checkpoint=str(student_dir)), rollout=rollout
        )

    for content, message in ((None, "No such file"), ("", "holds no single key"), ("a b", "holds no single key")):
        if content is not None:
            key.write_text(content)
        with pytest.raises(ValueError, match=rf"--server-api-key-file {key}: .*{message}"):
            SGLangFleet.from_config(config("http://none"), "student", tokenizer)
    key.write_text("secret\n")

    async def main() -> None:
        async with scripted(good) as (server,):
            async with SGLangFleet.from_config(config(server.url), "student", tokenizer) as fleet:
                assert (fleet.vocab_size, fleet.hedge_after_s) == (92, 7.0)
                assert fleet.decode is not None and fleet.decode((3, 20)) == tokenizer.decode([3, 20])
                assert (await fleet.generate(PROMPT, SAMPLING)).error is None
            assert server.keys == {"Bearer secret"}

    asyncio.run(main())


def test_a_server_that_always_fails_is_no_black_hole() -> None:
    """It is the least loaded one, because it fails at once; every request still ends well."""

    async def main() -> None:
        async with scripted(failing(500), good) as (bad, fine), fleet_of(bad.url, fine.url) as fleet:
            await fleet.wait_healthy()
            done = await asyncio.gather(*(fleet.generate((*PROMPT, i), SAMPLING) for i in range(50)))
            assert Counter(c.error for c in done) == {None: 50} and share(fine) == 50

    asyncio.run(main())
