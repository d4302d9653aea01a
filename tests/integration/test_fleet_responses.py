"""Responses that broke off go on from their tokens; weights that are wrong are noticed token by token."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from megatron_trd.records import VersionSpan
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.server_client import ServerState
from megatron_trd.rollout.sglang import SGLangFleet
from scripted_server import Reply, aborting, answer, fleet_of, good, scripted

PROMPT = (3, 20, 66, 70)
SAMPLING = SamplingParams(max_new_tokens=8, sampling_seed=1, stop_token_ids=(9,))


def in_turn(*answers: Any) -> Reply:
    left = iter(answers)
    return lambda _: next(left)


def spans(*parts: tuple[str, int, int]) -> tuple[VersionSpan, ...]:
    return tuple(VersionSpan(version=version, start=start, end=end) for version, start, end in parts)


def generate(fleet: SGLangFleet, prompt: tuple[int, ...] = PROMPT) -> Any:
    return fleet.generate(prompt, SAMPLING)


def test_a_response_goes_on_where_it_broke_off_across_servers_and_weights() -> None:
    parts = (
        answer([4, 5], [("v1", 0, 2)], "abort"),
        answer([6], [("v1", 0, 1)], "abort"),
        answer([7, 8, 9], [("v1", 0, 1), ("v2", 1, 3)]),
    )

    async def main() -> None:
        def take(body: dict[str, Any]) -> Any:
            asked.append(body)
            return parts[len(asked) - 1]

        asked: list[dict[str, Any]] = []
        async with scripted(take, take) as servers, fleet_of(*(s.url for s in servers), retries=0) as fleet:
            await fleet.wait_healthy()
            fleet.end_update("v1", {})
            fleet.begin_update("v2")
            done = await generate(fleet)
            assert done.token_ids == (4, 5, 6, 7, 8, 9) and done.logprobs == (-4, -5, -6, -7, -8, -9)
            assert done.text == "4-5-6-7-8"  # of the whole, without the token that ended it
            assert (done.finish_reason, done.error) == ("stop", None)
            assert done.weight_spans == spans(("v1", 0, 4), ("v2", 4, 6)) and done.weight_versions == ("v1", "v2")
            assert [body["input_ids"] for body in asked] == [[*PROMPT], [*PROMPT, 4, 5], [*PROMPT, 4, 5, 6]]
            assert [body["sampling_params"]["max_new_tokens"] for body in asked] == [8, 6, 5]
            assert {body["sampling_params"]["sampling_seed"] for body in asked} == {1}
            assert (fleet.num_continued, fleet.num_retries) == (2, 0)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("ids", "reason", "text"), [((4, 9), "stop", "4"), (tuple(range(10, 18)), "length", "10-11-12-13-14-15-16-17")]
)
def test_a_response_that_broke_off_behind_its_last_token_has_ended(
    ids: tuple[int, ...], reason: str, text: str
) -> None:
    async def main() -> None:
        async with scripted(in_turn(aborting(ids))) as (server,), fleet_of(server.url) as fleet:
            done = await generate(fleet)
            assert (done.token_ids, done.finish_reason, done.text, done.error) == (ids, reason, text, None)

    asyncio.run(main())


def test_ids_without_log_probabilities_are_sampled_again() -> None:
    """A server may report an aborted response's ids a step ahead of their log-probabilities."""
    torn = aborting((4, 5, 6))
    torn["meta_info"]["output_token_logprobs"].pop()

    async def main() -> None:
        async with scripted(in_turn(torn, answer([7, 9], [("v1", 0, 2)]))) as (server,), fleet_of(server.url) as fleet:
            done = await generate(fleet)
            assert done.token_ids == (4, 5, 7, 9) and done.logprobs == (-4, -5, -7, -9)

    asyncio.run(main())


def test_without_a_decoder_a_response_that_broke_off_begins_anew() -> None:
    async def main() -> None:
        replies = in_turn(aborting(), answer([7, 9], [("v1", 0, 2)]))
        async with scripted(replies) as (server,), fleet_of(server.url, decode=None) as fleet:
            done = await generate(fleet)
            assert (done.token_ids, done.text) == ((7, 9), "?")
            assert [body["input_ids"] for body in server.asked] == [[*PROMPT]] * 2

    asyncio.run(main())


def test_a_partial_response_of_wrong_weights_is_not_gone_on_from() -> None:
    async def main() -> None:
        wrong = answer([4, 5], [("old", 0, 2)], "abort")
        right = answer([7], [("v1", 0, 1)])
        async with scripted(in_turn(wrong), in_turn(right)) as (bad, fine), fleet_of(bad.url, fine.url) as fleet:
            await fleet.wait_healthy()
            fleet.end_update("v1", {})
            done = await generate(fleet)
            assert done.token_ids == (7,) and fine.asked[0]["input_ids"] == [*PROMPT]
            assert fleet.servers[0].state is ServerState.STALE and fleet.num_thrown_away == 1

    asyncio.run(main())


def test_tokens_older_than_allowed_are_thrown_away_and_sampled_again() -> None:
    mixed = answer([4, 5], [("v1", 0, 1), ("v2", 1, 2)])
    too_old = answer([4, 5], [("v0", 0, 1), ("v2", 1, 2)])
    new = answer([7], [("v2", 0, 1)])

    async def main() -> None:
        async with scripted(good) as (server,), fleet_of(server.url) as fleet:
            server.version = "v1"
            await fleet.wait_healthy()
            fleet.begin_update("v2")
            fleet.end_update("v2", {})
            for accepted, reply, expected in (
                (None, (mixed,), (4, 5)),  # by default: now, and before the last update
                (None, (too_old, new), (7,)),
                (("v2",), (mixed, new), (7,)),
                (("v0", "v1"), (too_old,), (4, 5)),
            ):
                fleet.accept(accepted)
                server.reply, before = in_turn(*reply), fleet.num_thrown_away
                done = await generate(fleet)
                assert (done.token_ids, fleet.num_thrown_away - before) == (expected, len(reply) - 1)
                assert fleet.servers[0].state is ServerState.READY
            fleet.accept(())
            server.reply = lambda _: mixed
            done = await generate(fleet)
            assert done.finish_reason == "abort" and done.token_ids == () and "weights v1, v2" in (done.error or "")

    asyncio.run(main())


def test_what_was_accepted_is_checked_again_when_it_goes_on() -> None:
    async def main() -> None:
        async with scripted(good) as (server,), fleet_of(server.url) as fleet:

            def update_in_between(_: dict[str, Any]) -> Any:
                for version in ("v2", "v3"):
                    fleet.begin_update(version)
                    fleet.end_update(version, {})
                server.reply = in_turn(answer([7], [("v3", 0, 1)]))
                return answer([6], [("v2", 0, 0), ("v3", 0, 1)], "abort")

            server.reply = in_turn(aborting())
            first = await fleet.generate(PROMPT, replace(SAMPLING, max_new_tokens=2))
            assert first.token_ids == (4, 5)
            replies = iter([lambda _: aborting(), update_in_between])
            server.reply = lambda body: next(replies)(body)
            done = await generate(fleet)
            assert done.token_ids == (7,) and done.weight_spans == spans(("v3", 0, 1))
            assert [len(body["input_ids"]) for body in server.asked[1:]] == [4, 6, 4] and fleet.num_thrown_away == 1

    asyncio.run(main())


def test_the_answer_of_a_server_whose_update_failed_meanwhile_is_thrown_away() -> None:
    """It may have sampled from weights that were half loaded."""

    async def main() -> None:
        arrived, release = asyncio.Event(), asyncio.Event()

        async def wait(_: dict[str, Any]) -> Any:
            arrived.set()
            await release.wait()
            return answer([4], [("v2", 0, 1)])

        right = answer([7], [("v2", 0, 1)])
        async with scripted(wait, lambda _: right) as (failed, fine), fleet_of(failed.url, fine.url) as fleet:
            await fleet.wait_healthy()
            running = asyncio.create_task(generate(fleet))
            await arrived.wait()
            for broken in ({failed.url: "broke off"}, {}):  # a second publication repairs it
                fleet.begin_update("v2")
                fleet.end_update("v2", broken)
            assert fleet.servers[0].state is ServerState.READY
            release.set()
            assert (await running).token_ids == (7,) and fleet.num_thrown_away == 1

    asyncio.run(main())


def test_requests_name_the_adapter_and_keep_it_when_another_becomes_current() -> None:
    """A server labels tokens with its newest version, but a request samples from the adapter that it named."""

    async def main() -> None:
        async with scripted(good) as (server,), fleet_of(server.url) as fleet:

            def publish_meanwhile(_: dict[str, Any]) -> Any:
                fleet.begin_update("v2")
                fleet.end_update("v2", {}, adapter="trd-v2")
                server.reply = in_turn(answer([6, 9], [("v2", 0, 2)]))
                return answer([4, 5], [("v1", 0, 1), ("v2", 1, 2)], "abort")

            await fleet.wait_healthy()
            fleet.begin_update("v1")
            fleet.end_update("v1", {}, adapter="trd-v1")
            server.reply = publish_meanwhile
            done = await generate(fleet)
            assert [body["lora_path"] for body in server.asked] == ["trd-v1", "trd-v2"]
            assert done.weight_spans == spans(("v1", 0, 2), ("v2", 2, 4))

    asyncio.run(main())


@pytest.mark.parametrize(
    "bad",
    [
        {},
        [1],
        None,
        {"meta_info": {}},
        {**answer([4], [("v1", 0, 1)]), "output_ids": [4, 5]},
        answer([4, 5], [("v1", 0, 1)]),
        answer([4, 5], [("v1", 1, 2)]),
        answer([4, 5], [("v1", 0, 2)], "tired"),
    ],
)
def test_an_answer_that_makes_no_sense_costs_a_try(bad: Any) -> None:
    async def main() -> None:
        async with scripted(in_turn(bad, answer([7], [("v1", 0, 1)]))) as (server,), fleet_of(server.url) as fleet:
            assert (await generate(fleet)).token_ids == (7,) and fleet.num_retries == 1

    asyncio.run(main())
