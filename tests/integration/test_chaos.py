"""Rollouts and publications while servers and network fail at random: nothing hangs, nothing is lost, and no token
comes from other weights than it says, which is checked by recomputing every log-probability."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from chaos_proxy import OLD_VERSION, ChaosProxy, chaos
from megatron_trd.config.schema import Config, MethodConfig, ModelConfig, RolloutConfig
from megatron_trd.records import Completion, Trajectory
from megatron_trd.rollout import server_client, server_pool, sglang
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.refine import RolloutRunner
from megatron_trd.rollout.renderer import Renderer
from megatron_trd.rollout.server_process import ServerProcess
from megatron_trd.rollout.sglang import SGLangFleet
from megatron_trd.tasks.arithmetic import ArithmeticTask
from megatron_trd.weight_sync import session
from megatron_trd.weight_sync.base import ServerError
from megatron_trd.weight_sync.disk import DiskWeightSync

NUM_FAULTS, DEADLINE_S = 200, 150
PROBLEMS_A_ROUND = 16
SEED = 5


@pytest.fixture(scope="module")
def pair(student_dir: Path) -> Iterator[list[ServerProcess]]:
    with ThreadPoolExecutor() as starts:
        processes = list(starts.map(lambda _: ServerProcess.start(student_dir, weight_version="v0"), range(2)))
    yield processes
    for process in processes:
        process.stop()


def weights_of(student_dir: Path, version: int) -> dict[str, Tensor]:
    """The student's weights, disturbed differently for each version but the first."""
    generator = torch.Generator().manual_seed(version)
    return {
        name: w.float() + (0.03 * torch.randn(w.shape, generator=generator) if version else 0)
        for name, w in load_file(student_dir / "model.safetensors").items()
    }


async def publish_until_all_hold_it(sync: DiskWeightSync, weights: Mapping[str, Tensor], version: str) -> int:
    """Return how often it failed somewhere."""
    missing: frozenset[str] | None = None
    for failures in range(50):
        try:
            report = await sync.publish(weights.items(), version, missing)
        except ServerError:
            continue
        if not report.failures:
            return failures
        missing = frozenset(report.failures)
    raise AssertionError(f"{version} did not arrive in 50 publications")


async def rollouts_under_chaos(
    fleet: SGLangFleet, proxies: Sequence[ChaosProxy], runner: RolloutRunner, sync: DiskWeightSync, student_dir: Path
) -> tuple[list[Trajectory], int, int]:
    """Roll out round by round, with a publication in each; return trajectories, versions, failed publications."""
    trajectories: list[Trajectory] = []
    version = failures = 0
    await fleet.wait_healthy()
    await publish_until_all_hold_it(sync, weights_of(student_dir, 0), "v0")
    for proxy in proxies:
        proxy.calm = False
    while sum(sum(proxy.faults.values()) for proxy in proxies) < NUM_FAULTS:
        version += 1
        problems = [runner.task.train_problem(len(trajectories) + i) for i in range(PROBLEMS_A_ROUND)]  # type: ignore[attr-defined]
        publishing = asyncio.create_task(
            publish_until_all_hold_it(sync, weights_of(student_dir, version), f"v{version}")
        )
        done = [t async for t in runner.stream(problems, version)]
        failures += await publishing
        assert {t.problem.id for t in done} == {p.id for p in problems} and len(done) == len(problems)
        trajectories += done
    for proxy in proxies:
        proxy.calm = True
    return trajectories, version, failures


def largest_gap(model: Any, cases: Sequence[tuple[Sequence[int], Completion, int, int]]) -> float:
    """Compare log-probabilities of tokens [start, end) with those that transformers computes."""
    worst = 0.0
    for prompt, completion, start, end in cases:
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.inference_mode():
            logprobs = model(ids).logits[0].log_softmax(-1)
        rows = torch.arange(start, end) + len(prompt)
        ours = logprobs[rows - 1, ids[0, rows]]
        worst = max(worst, float((ours - torch.tensor(completion.logprobs[start:end])).abs().max()))
    return worst


def test_two_hundred_faults(
    pair: list[ServerProcess],
    student_dir: Path,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for module in (server_client, server_pool, sglang):
        monkeypatch.setattr(module, "PROBE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(session, "CONTINUE_TIMEOUT_S", 1.0)
    caplog.set_level(logging.ERROR)
    task = ArithmeticTask()
    config = Config(
        method=MethodConfig(mode="opsd"),
        model=ModelConfig(hf_checkpoint=str(student_dir)),
        rollout=RolloutConfig(student_urls=tuple(p.url for p in pair), teacher_urls=tuple(p.url for p in pair)),
    )
    renderer = Renderer.from_config(config, task, tokenizer)
    sampling = SamplingParams(
        max_new_tokens=60, temperature=1.0, top_p=1.0, top_k=-1, stop_token_ids=(tokenizer.eos_token_id,)
    )

    async def main() -> tuple[list[Trajectory], int, int, Counter[str], SGLangFleet]:
        async with chaos(*(p.url for p in pair), seed=SEED, generate_rate=0.5) as proxies:
            fleet = SGLangFleet(
                [proxy.url for proxy in proxies],
                request_timeout_s=1.5,
                retries=12,
                first_backoff_s=0.02,
                hedge_after_s=0.5,
                vocab_size=92,
                decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
                random=Random(SEED),
            )
            async with fleet:
                runner = RolloutRunner(fleet, fleet, renderer, task, sampling, SEED)
                sync = DiskWeightSync(tmp_path / "weights", student_dir, fleet, timeout_s=4.0, num_kept=1)
                outcome = await rollouts_under_chaos(fleet, proxies, runner, sync, student_dir)
            return *outcome, sum((proxy.faults for proxy in proxies), Counter()), fleet

    trajectories, version, failures, faults, fleet = asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    completions = [
        (prompt, completion)
        for t in trajectories
        for prompt, completion in ((t.solve_prompt_ids, t.y_o), (t.refine_prompt_ids, t.y_r))
        if completion is not None
    ]
    lost = [completion for _, completion in completions if completion.finish_reason == "abort"]
    print(
        f"{sum(faults.values())} faults {dict(faults)}; {len(completions)} responses, {len(lost)} lost; "
        f"{version} versions, {failures} failed publications; {fleet.num_retries} retries, "
        f"{fleet.num_continued} continued, {fleet.num_hedges} hedges, {fleet.num_thrown_away} thrown away"
    )
    assert sum(faults.values()) >= NUM_FAULTS and len(faults) == 12
    assert all("failed" in (c.error or "") or "not answered within" in (c.error or "") for c in lost)
    assert len(lost) < 0.1 * len(completions)
    assert fleet.num_continued > 0 and fleet.num_thrown_away > 0

    by_version: dict[str, list[tuple[Sequence[int], Completion, int, int]]] = {}
    for prompt, completion in completions:
        if completion.finish_reason == "abort":
            continue
        spans = completion.weight_spans
        assert [s.start for s in spans] == [0, *(s.end for s in spans[:-1])] and spans[-1].end == len(
            completion.logprobs
        )
        ended = completion.finish_reason == "stop"
        assert completion.text == tokenizer.decode(
            completion.token_ids[: -1 if ended else None], skip_special_tokens=True
        )
        for span in spans:
            by_version.setdefault(span.version, []).append((prompt, completion, span.start, span.end))
    assert OLD_VERSION not in by_version and by_version.keys() <= {f"v{i}" for i in range(version + 1)}
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32).eval()
    for name, cases in by_version.items():
        model.load_state_dict(weights_of(student_dir, int(name[1:])), strict=False)
        assert largest_gap(model, cases) < 1e-3, name
        model.load_state_dict(weights_of(student_dir, int(name[1:]) + 1), strict=False)
        assert largest_gap(model, cases) > 0.1, f"{name}: the check cannot tell versions apart"
