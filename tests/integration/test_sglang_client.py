"""The client against real embedded servers, and against scripted ones that fail as real ones do on a bad day."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from integration.live_fleet import kill
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.server_client import ServerState
from megatron_trd.rollout.server_process import ServerProcess
from megatron_trd.weight_sync.base import ServerError
from scripted_server import GOOD, aborting, failing, fleet_of, good, hang, scripted

PROMPT = (3, 20, 66, 70)
SAMPLING = SamplingParams(max_new_tokens=8, sampling_seed=1)


# ------------------------------------------------------------------ scripted servers


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_transient_failure_is_retried_on_the_other_server_under_a_new_rid(status: int) -> None:
    async def main() -> None:
        async with scripted(failing(status), good) as (bad, fine), fleet_of(bad.url, fine.url) as fleet:
            await fleet.wait_healthy()
            done = [await fleet.generate(PROMPT, SAMPLING) for _ in range(3)]
            assert [c.token_ids for c in done] == [(4, 5)] * 3 and [c.error for c in done] == [None] * 3
            assert done[0].logprobs == (-0.5, -0.25) and done[0].weight_versions == ("v1",)
            assert bad.asked and len(fine.asked) == 3 and fleet.num_retries == len(bad.asked)
            rids = [body["rid"] for body in bad.asked + fine.asked]
            assert len(set(rids)) == len(rids)

    asyncio.run(main())


def test_a_refused_request_is_not_sent_again() -> None:
    async def main() -> None:
        async with scripted(failing(400), failing(400)) as servers, fleet_of(*(s.url for s in servers)) as fleet:
            await fleet.wait_healthy()
            completion = await fleet.generate(PROMPT, SAMPLING)
            assert completion.finish_reason == "abort" and "status 400 as told" in (completion.error or "")
            assert sum(len(s.asked) for s in servers) == 1 and fleet.num_retries == 0
            assert all(s.state is ServerState.READY for s in fleet.servers)

    asyncio.run(main())


def test_tries_are_bounded_and_what_there_is_of_a_response_is_kept() -> None:
    async def main() -> None:
        answers = iter([aborting()] + [aborting(())] * 3)
        async with scripted(lambda _: next(answers)) as (server,), fleet_of(server.url) as fleet:
            completion = await fleet.generate(PROMPT, SAMPLING)
            assert completion.finish_reason == "abort" and completion.token_ids == (4, 5)
            assert "failed 3 times" in (completion.error or "") and "--request-retries 2" in (completion.error or "")
            assert len(server.asked) == 4 and fleet.num_retries == 2

    asyncio.run(main())


def test_a_hanging_server_is_left_at_the_deadline_and_told_to_abort() -> None:
    async def main() -> None:
        async with scripted(hang, good) as (stuck, fine):
            async with fleet_of(stuck.url, fine.url, request_timeout_s=0.3) as fleet:
                await fleet.wait_healthy()
                done = await asyncio.gather(*(fleet.generate(PROMPT, SAMPLING) for _ in range(4)))
                assert [c.finish_reason for c in done] == ["stop"] * 4
            assert stuck.asked and sorted(stuck.aborted) == sorted(body["rid"] for body in stuck.asked)

    asyncio.run(main())


def test_cancelling_a_request_aborts_it_on_the_server() -> None:
    async def main() -> None:
        arrived = asyncio.Event()

        async def note_and_hang(body: dict[str, Any]) -> Any:
            arrived.set()
            await hang(body)

        async with scripted(note_and_hang) as (server,):
            async with fleet_of(server.url) as fleet:
                task = asyncio.create_task(fleet.generate(PROMPT, SAMPLING))
                await arrived.wait()
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            assert server.aborted == [server.asked[0]["rid"]]

    asyncio.run(main())


def test_an_answer_of_the_wrong_weights_is_thrown_away_and_its_server_left_until_it_is_right() -> None:
    async def main() -> None:
        async with scripted(good, good) as (old, new), fleet_of(old.url, new.url) as fleet:
            new.version = "v2"
            new.reply = lambda _: {**GOOD, "meta_info": {**GOOD["meta_info"], "weight_version": "v2"}}
            await fleet.wait_healthy()
            fleet.expected_version = "v2"
            done = [await fleet.generate(PROMPT, SAMPLING) for _ in range(6)]
            assert {c.weight_versions for c in done} == {("v2",)}
            assert len(old.asked) <= 1
            assert [s.state for s in fleet.servers] == [ServerState.STALE, ServerState.READY]
            with pytest.raises(ServerError, match="holds weights 'v1', not 'v2'"):
                await fleet.wait_healthy(deadline_s=0.0)
            old.version, old.reply = "v2", new.reply
            await fleet.wait_healthy()
            await asyncio.gather(*(fleet.generate((*PROMPT, i), SAMPLING) for i in range(6)))
            assert len(old.asked) >= 3

    asyncio.run(main())


def test_no_server_at_all_names_url_reason_and_flag() -> None:
    async def main() -> None:
        async with fleet_of("http://127.0.0.1:9") as fleet:
            with pytest.raises(
                ServerError, match=r"127\.0\.0\.1:9 is down.*Start the server or correct --student-urls"
            ):
                await fleet.wait_healthy(deadline_s=0.0)
            completion = await fleet.generate(PROMPT, SAMPLING)
            assert completion.finish_reason == "abort" and "127.0.0.1:9 is down" in (completion.error or "")

    asyncio.run(main())


# ------------------------------------------------------------------ the real thing


def test_limits_are_checked_before_sending(server: str) -> None:
    async def main() -> None:
        async with fleet_of(server) as fleet:
            await fleet.wait_healthy()
            for prompt, params, message in (
                ((3, 92), SAMPLING, "vocabulary of 92"),
                ((), SAMPLING, "empty"),
                (PROMPT, SamplingParams(max_new_tokens=253), "context of 256"),
            ):
                completion = await fleet.generate(prompt, params)
                assert completion.finish_reason == "abort" and message in (completion.error or "")
            assert (await fleet.generate(PROMPT, SamplingParams(max_new_tokens=252))).error is None

    asyncio.run(main())


def test_completions_carry_ids_logprobs_and_version(server: str, tokenizer: Any) -> None:
    async def main() -> None:
        async with fleet_of(server) as fleet:
            greedy = SamplingParams(max_new_tokens=8, temperature=0.0)
            completion = await fleet.generate(PROMPT, greedy)
            assert len(completion.logprobs) == len(completion.token_ids) > 0
            assert completion.weight_versions == ("default",)
            assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            scored = await fleet.score(PROMPT, completion.token_ids)
            np.testing.assert_allclose(scored, completion.logprobs, atol=1e-4)  # both at T = 1

    asyncio.run(main())


def test_a_killed_server_loses_no_request_and_comes_back(student_dir: Path) -> None:
    first, second = ServerProcess.start(student_dir), ServerProcess.start(student_dir)
    restarted: list[ServerProcess] = []

    async def main() -> None:
        async with fleet_of(first.url, second.url) as fleet:
            await fleet.wait_healthy()
            lone = await fleet.generate(PROMPT, SamplingParams(max_new_tokens=200, sampling_seed=7))
            tasks = [
                asyncio.create_task(fleet.generate(PROMPT, SamplingParams(max_new_tokens=200, sampling_seed=7)))
                for _ in range(48)
            ]
            while fleet.servers[0].num_in_flight == 0:
                await asyncio.sleep(0)
            kill(first)
            more = [asyncio.create_task(fleet.generate(PROMPT, SAMPLING)) for _ in range(16)]
            done = await asyncio.gather(*tasks)
            assert {c.token_ids for c in done} == {lone.token_ids} and not any(c.error for c in done)
            assert not any(c.error for c in await asyncio.gather(*more))
            assert [s.state for s in fleet.servers] == [ServerState.DOWN, ServerState.READY]
            port = int(first.url.rpartition(":")[2])
            restarted.append(await asyncio.to_thread(ServerProcess.start, student_dir, port=port))
            await fleet.wait_healthy()
            assert fleet.servers[0].state is ServerState.READY

    try:
        asyncio.run(main())
    finally:
        for process in (first, second, *restarted):
            process.stop()
