"""Servers that die or hang in the middle of a publication, and publications that break off: nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from integration.live_fleet import (
    ENDLESS,
    checksums,
    disturbed,
    expected_logprobs,
    fleet_of,
    kill,
    make_sync,
    processes_of,
    served_logprobs,
    weights_of,
    within_deadline,
)
from megatron_trd.rollout.server_client import ServerState
from megatron_trd.rollout.server_process import ServerProcess, spawn_sglang
from megatron_trd.weight_sync.base import ServerError

TRANSPORTS = ("disk", "tensor", "distributed")


@pytest.fixture
def pair(student_dir: Path) -> Iterator[list[ServerProcess]]:
    servers = [ServerProcess.start(student_dir) for _ in range(2)]
    yield servers
    for server in servers:
        server.stop()


async def _kill_midway(
    servers: list[ServerProcess], victim: int, transport: str, student_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    """Publish to servers of which one dies on the way; the others hold the weights, at the latest after a repair."""
    new = weights_of(other_dir)
    async with fleet_of(servers) as fleet:
        await fleet.wait_healthy()
        sync = make_sync(transport, student_dir, fleet, tmp_path, timeout_s=30.0)
        await sync.publish(weights_of(student_dir).items(), "old")
        lost = servers[victim].url
        version = f"{transport} new"
        failures = {}
        try:
            export = disturbed(new, len(new) // 2, lambda: kill(servers[victim]))
            failures = dict((await sync.publish(export, version)).failures)
        except ServerError:
            assert transport == "distributed"
            failures = {server.url: "all" for server in fleet.servers}
        assert lost in failures and (transport == "distributed" or set(failures) == {lost})
        if len(failures) > 1:
            await sync.close()
            sync = make_sync(transport, student_dir, fleet, tmp_path, timeout_s=120.0)
            report = await sync.publish(new.items(), version, only=failures)
            assert set(report.failures) == {lost}
        for server in fleet.servers:
            if server.url == lost:
                assert server.state is not ServerState.READY
            else:
                assert server.state is ServerState.READY
                np.testing.assert_allclose(await served_logprobs(server), expected_logprobs(other_dir), atol=2e-5)
        completion = await fleet.generate((3, 20), ENDLESS)
        assert completion.error is None and completion.weight_versions == (version,)
        await sync.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_killed_midway(
    transport: str, pair: list[ServerProcess], student_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    within_deadline(_kill_midway(pair, 1, transport, student_dir, other_dir, tmp_path))


def test_real_servers_killed_midway(sglang_python: Path, student_dir: Path, other_dir: Path, tmp_path: Path) -> None:
    servers = [spawn_sglang(student_dir, python=sglang_python) for _ in range(3)]
    try:
        for server in servers:
            server.wait_until_healthy(300)
        within_deadline(_kill_midway(servers, 1, "tensor", student_dir, other_dir, tmp_path))
        servers.pop(1).stop()
        within_deadline(_kill_midway(servers, 1, "distributed", student_dir, other_dir, tmp_path))
    finally:
        for server in servers:
            server.stop()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_that_hangs_midway_holds_nobody_up_beyond_the_deadline(
    transport: str, pair: list[ServerProcess], student_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    new = weights_of(other_dir)
    stuck = pair[1]
    processes = processes_of(stuck)[1:]

    def stop() -> None:
        for process in processes:
            process.suspend()

    async def main() -> None:
        async with fleet_of(pair) as fleet:
            await fleet.wait_healthy()
            sync = make_sync(transport, student_dir, fleet, tmp_path, timeout_s=8.0)
            await sync.publish(weights_of(student_dir).items(), "old")
            before = await checksums(fleet.servers)
            failed = {stuck.url}
            try:
                failed |= set((await sync.publish(disturbed(new, len(new) // 2, stop), "new")).failures)
            except ServerError:
                assert transport == "distributed"
                failed = {server.url for server in fleet.servers}
            if len(failed) > 1:
                assert set((await sync.publish(new.items(), "new", only=failed)).failures) == {stuck.url}
            np.testing.assert_allclose(await served_logprobs(fleet.servers[0]), expected_logprobs(other_dir), atol=2e-5)
            assert [s.state for s in fleet.servers] == [ServerState.READY, ServerState.STALE]
            await sync.close()
            for process in processes:
                process.resume()
            await fleet.servers[1].get("/health", 60.0)
            sync = make_sync(transport, student_dir, fleet, tmp_path, timeout_s=60.0)
            assert (await sync.publish(new.items(), "new", only={stuck.url})).failures == {}
            after = await checksums(fleet.servers)
            assert after[0] == after[1] != before[0]
            assert [s.state for s in fleet.servers] == [ServerState.READY] * 2
            await sync.close()

    try:
        within_deadline(main())
    finally:
        for process in processes:
            if process.is_running():
                process.resume()


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_a_cancelled_publication_leaves_servers_going_and_the_next_one_repairs(
    transport: str, pair: list[ServerProcess], student_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    new = weights_of(other_dir)

    async def main() -> None:
        async with fleet_of(pair) as fleet:
            await fleet.wait_healthy()
            sync = make_sync(transport, student_dir, fleet, tmp_path)
            taken: list[str] = []

            def export() -> Iterator[tuple[str, object]]:
                for i, (name, weight) in enumerate(new.items()):
                    if i == len(new) // 2:
                        publication.cancel()
                    taken.append(name)
                    yield name, weight

            publication = asyncio.create_task(sync.publish(export(), "new"))  # type: ignore[arg-type]
            with pytest.raises(asyncio.CancelledError):
                await publication
            assert taken == list(new)  # making them is collective
            assert [s.state for s in fleet.servers] == [ServerState.STALE] * 2
            for server in fleet.servers:
                assert len(await served_logprobs(server)) == 7
            assert (await sync.publish(new.items(), "new")).failures == {}
            for server in fleet.servers:
                np.testing.assert_allclose(await served_logprobs(server), expected_logprobs(other_dir), atol=2e-5)
            await sync.close()

    within_deadline(main())


def test_a_server_that_was_started_again_joins_the_group_anew(
    pair: list[ServerProcess], student_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    old, new = weights_of(student_dir), weights_of(other_dir)

    async def main() -> None:
        async with fleet_of(pair) as fleet:
            await fleet.wait_healthy()
            sync = make_sync("distributed", student_dir, fleet, tmp_path, timeout_s=20.0)
            await sync.publish(old.items(), "old")
            port = int(pair[1].url.rpartition(":")[2])
            kill(pair[1])
            pair[1] = await asyncio.to_thread(ServerProcess.start, student_dir, port=port)
            failed: set[str] = set()
            try:
                failed |= set((await sync.publish(new.items(), "new")).failures)
            except ServerError:
                failed = {server.url for server in fleet.servers}
            assert (await sync.publish(new.items(), "new", only=failed)).failures == {} or not failed
            for server in fleet.servers:
                assert server.state is ServerState.READY
                np.testing.assert_allclose(await served_logprobs(server), expected_logprobs(other_dir), atol=2e-5)
            await sync.close()

    within_deadline(main())
