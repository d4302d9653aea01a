"""Behind SGLang's router: requests reach only servers that hold the right weights."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.server_client import ServerState
from megatron_trd.rollout.server_process import ServerProcess, free_port, running
from megatron_trd.rollout.sglang import SGLangFleet
from megatron_trd.weight_sync.base import ServerError
from megatron_trd.weight_sync.disk import DiskWeightSync

PROMPT = (3, 20, 66, 70, 81)
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sglang_router") is None,
    reason="sglang-router is not installed: pip install -r requirements/dev.txt",
)


@pytest.fixture
def servers(student_dir: Path) -> Iterator[list[ServerProcess]]:
    processes = [ServerProcess.start(student_dir, weight_version="start") for _ in range(2)]
    yield processes
    for process in processes:
        process.stop()


@pytest.fixture
def router(servers: list[ServerProcess]) -> Iterator[str]:
    port, metrics_port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(metrics_port), "--policy", "round_robin", "--worker-urls"]
    with running(ServerProcess.spawn("router", [*command, *(s.url for s in servers)], url)) as (process,):
        process.wait_until_healthy(60.0)
        yield url


async def workers_of(fleet: SGLangFleet) -> set[str]:
    assert fleet.router is not None
    answer = await fleet.router.server.get("/workers", 10.0)
    return {worker["url"] for worker in answer["workers"]}


def test_a_server_with_wrong_weights_leaves_the_router_until_it_is_right(
    servers: list[ServerProcess], router: str, student_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    weights = {name: weight.float() for name, weight in load_file(other_dir / "model.safetensors").items()}
    urls = {server.url for server in servers}

    async def main() -> None:
        async with SGLangFleet(sorted(urls), router_url=router, first_backoff_s=0.05) as fleet:
            await fleet.wait_healthy()
            before = await fleet.generate(PROMPT, GREEDY)
            assert before.error is None and before.weight_versions == ("start",)
            sync = DiskWeightSync(tmp_path / "weights", student_dir, fleet)
            assert (await sync.publish(weights.items(), "v1")).failures == {}
            after = await asyncio.gather(*(fleet.generate(PROMPT, GREEDY) for _ in range(8)))
            assert {c.weight_versions for c in after} == {("v1",)} and after[0].token_ids != before.token_ids
            assert await workers_of(fleet) == urls

            servers[1].stop()  # and comes back at its port with the weights it was started with
            port = int(servers[1].url.rpartition(":")[2])
            servers[1] = await asyncio.to_thread(ServerProcess.start, student_dir, weight_version="start", port=port)
            done = await asyncio.gather(*(fleet.generate(PROMPT, GREEDY) for _ in range(16)))
            assert {(c.error, c.token_ids) for c in done} == {(None, after[0].token_ids)}
            with pytest.raises(ServerError, match="holds weights 'start', not 'v1'"):
                await fleet.wait_healthy(deadline_s=0.0)
            assert (await fleet.generate(PROMPT, GREEDY)).error is None
            assert await workers_of(fleet) == {servers[0].url}

            assert (await sync.publish(weights.items(), "v2")).failures == {}
            assert [server.state for server in fleet.servers] == [ServerState.READY] * 2
            assert (await fleet.generate(PROMPT, GREEDY)).token_ids == after[0].token_ids
            assert await workers_of(fleet) == urls

    asyncio.run(main())


def test_no_router_is_a_named_error(servers: list[ServerProcess]) -> None:
    async def main() -> None:
        fleet = SGLangFleet([s.url for s in servers], router_url=servers[0].url, retries=0)
        async with fleet:
            await fleet.wait_healthy()
            completion = await fleet.generate(PROMPT, GREEDY)
            assert completion.finish_reason == "abort"
            assert f"{servers[0].url}/workers" in (completion.error or "")

    asyncio.run(main())
