"""Servers that give their memory back while the trainer trains: in what order, what comes back, and who is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch import ROOT, torchrun
from megatron_trd.rollout.colocation import CACHE, WEIGHTS, Colocation
from megatron_trd.rollout.server_client import ServerState
from megatron_trd.rollout.server_process import ServerProcess, running
from megatron_trd.rollout.sglang import SGLangFleet
from megatron_trd.weight_sync.base import ServerError
from megatron_trd.weight_sync.disk import DiskWeightSync

EXAMPLE = ROOT / "examples/quickstart_cpu"
STUDENT = EXAMPLE / "models/student"
SAVER = ("--enable-memory-saver",)
PROMPT, RESPONSE = (5, 9, 30, 4), (12, 7, 41, 8, 3)


@pytest.fixture(scope="module")
def urls() -> Iterator[tuple[str, str]]:
    """Servers of the student and of the teacher."""
    with running(ServerProcess.start(STUDENT, flags=SAVER), ServerProcess.start(STUDENT, flags=SAVER)) as servers:
        yield servers[0].url, servers[1].url


def with_fleets(
    student: str | list[str], teacher: str, play: Callable[[SGLangFleet, SGLangFleet], Awaitable[None]]
) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            groups = ([student] if isinstance(student, str) else student, [teacher])
            fleets = [await stack.enter_async_context(SGLangFleet(urls, server_timeout_s=60)) for urls in groups]
            for fleet in fleets:
                await fleet.wait_healthy()
            await play(fleets[0], fleets[1])

    asyncio.run(asyncio.wait_for(main(), 120))


async def publish(fleet: SGLangFleet, model: Path, version: str, directory: Path) -> None:
    weights = {name: weight.float() for name, weight in load_file(model / "model.safetensors").items()}
    report = await DiskWeightSync(directory, STUDENT, fleet, timeout_s=60).publish(weights.items(), version)
    assert not report.failures


@torch.no_grad()
def scored_by(model: torch.nn.Module) -> Any:
    logits = model(torch.tensor([[*PROMPT, *RESPONSE]])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    return pytest.approx(logits[range(len(RESPONSE)), list(RESPONSE)].tolist(), abs=1e-4)


def test_memory_is_released_at_rest_and_the_publication_brings_the_weights(
    urls: tuple[str, str], other_dir: Path, hf_student: torch.nn.Module, post: Any, tmp_path: Path
) -> None:
    hf_other = type(hf_student).from_pretrained(other_dir, dtype=torch.float32).eval()
    read = {"name": "model.norm.weight", "truncate_size": 4}

    async def play(student: SGLangFleet, teacher: SGLangFleet) -> None:
        colocation = await Colocation.begin(student, teacher, all_weights_return=True)
        for version, model, hf in (("1", other_dir, hf_other), ("2", STUDENT, hf_student)):
            await colocation.rest()
            assert post(urls[0], "/get_weights_by_name", read)[0] == 400, "the student's weights are gone"
            assert post(urls[1], "/get_weights_by_name", read)[0] == 200, "nobody would bring the teacher's again"
            for url in urls:
                assert post(url, "/release_memory_occupation", {"tags": ["kv_cache"]})[0] == 400, "released already"
            async with colocation.awake():
                assert post(urls[0], "/get_weights_by_name", read)[0] == 200
                await publish(student, model, version, tmp_path)
            assert await student.score(PROMPT, RESPONSE) == scored_by(hf)
            assert await teacher.score(PROMPT, RESPONSE) == scored_by(hf_student)

    with_fleets(*urls, play)


def test_a_student_whose_weights_do_not_come_again_keeps_them(
    urls: tuple[str, str], hf_student: torch.nn.Module, tmp_path: Path
) -> None:
    async def play(student: SGLangFleet, teacher: SGLangFleet) -> None:
        await publish(student, STUDENT, "3", tmp_path)
        colocation = await Colocation.begin(student, None, all_weights_return=False)
        await colocation.rest()
        await colocation.end()
        assert await student.score(PROMPT, RESPONSE) == scored_by(hf_student)

    with_fleets(*urls, play)


def test_a_run_that_breaks_off_leaves_servers_for_the_next_one(
    urls: tuple[str, str], hf_student: torch.nn.Module, tmp_path: Path
) -> None:
    async def play(student: SGLangFleet, teacher: SGLangFleet) -> None:
        colocation = await Colocation.begin(student, teacher, all_weights_return=True)
        await colocation.rest()
        await colocation.end()
        await colocation.end()
        await publish(student, STUDENT, "4", tmp_path)
        assert await student.score(PROMPT, RESPONSE) == scored_by(hf_student)
        assert await teacher.score(PROMPT, RESPONSE) == scored_by(hf_student)

    with_fleets(*urls, play)


def test_a_lost_server_does_not_stop_the_others(urls: tuple[str, str], hf_student: Any, tmp_path: Path) -> None:
    lost = ServerProcess.start(STUDENT, flags=SAVER)

    async def play(student: SGLangFleet, teacher: SGLangFleet) -> None:
        colocation = await Colocation.begin(student, teacher, all_weights_return=True)
        lost.stop()
        await colocation.rest()
        assert student.servers[1].state is ServerState.DOWN
        async with colocation.awake():
            sync = DiskWeightSync(tmp_path, STUDENT, student, timeout_s=60)
            weights = {name: weight.float() for name, weight in load_file(STUDENT / "model.safetensors").items()}
            assert [*(await sync.publish(weights.items(), "5")).failures] == [lost.url]
        assert await student.score(PROMPT, RESPONSE) == scored_by(hf_student)

    with_fleets([urls[0], lost.url], urls[1], play)


def test_real_servers_rest_and_wake(
    sglang_server: str, other_dir: Path, hf_student: torch.nn.Module, tmp_path: Path
) -> None:
    """On a CPU there is no memory saver and nothing is freed; but SGLang dies here too when it is told while busy."""
    hf_other = type(hf_student).from_pretrained(other_dir, dtype=torch.float32).eval()

    async def play(student: SGLangFleet, teacher: SGLangFleet) -> None:
        with pytest.raises(ServerError, match="start it with --enable-memory-saver"):
            await Colocation.begin(student, None, all_weights_return=True)
        colocation = Colocation(dict.fromkeys(student.servers, (CACHE, WEIGHTS)))
        for version, model, hf in (("1", other_dir, hf_other), ("2", STUDENT, hf_student)):
            await colocation.rest()
            async with colocation.awake():
                await publish(student, model, version, tmp_path)
            assert await student.score(PROMPT, RESPONSE) == scored_by(hf)

    with_fleets(sglang_server, sglang_server, play)


def test_a_server_that_cannot_is_refused_at_the_start(server: str) -> None:
    async def play(student: SGLangFleet, teacher: SGLangFleet) -> None:
        remedy = f"--colocate: {server} cannot give memory back; start it with --enable-memory-saver"
        with pytest.raises(ServerError, match=remedy):
            await Colocation.begin(student, teacher, all_weights_return=True)

    with_fleets(server, server, play)


def test_a_colocated_run_learns_the_same(urls: tuple[str, str], tmp_path: Path) -> None:
    arguments = ["--config", EXAMPLE / "config.yaml", "--hf-checkpoint", STUDENT, "--num-iterations", "2"]
    arguments += ["--rollout-batch-size", "16", "--global-batch-size", "8", "--eval-num-problems", "0"]
    arguments += ["--student-urls", urls[0], "--teacher-urls", urls[1], "--no-save-checkpoints"]
    losses = {}
    for name, flags in (("apart", []), ("together", ["--colocate"])):
        result = torchrun(
            2, "-m", "megatron_trd.train", *arguments, "--run-dir", tmp_path / name, *flags, timeout_s=240
        )
        assert result.returncode == 0, result.stderr[-4000:]
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [(line["train/loss"], line["train/grad_norm"], line["rollout/y_o_pass"]) for line in lines]
    assert losses["together"] == losses["apart"] and len(losses["apart"]) == 2


def test_a_run_refuses_servers_that_cannot(server: str, tmp_path: Path) -> None:
    arguments = ["--config", EXAMPLE / "config.yaml", "--hf-checkpoint", STUDENT, "--run-dir", tmp_path, "--colocate"]
    arguments += ["--student-urls", server, "--teacher-urls", server, "--tensor-model-parallel-size", "1"]
    result = torchrun(1, "-m", "megatron_trd.train", *arguments, "--no-sequence-parallel")
    assert result.returncode != 0
    assert f"error: --colocate: {server} cannot give memory back" in result.stderr, result.stderr[-2000:]
