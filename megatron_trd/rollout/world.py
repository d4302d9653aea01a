"""Rank 0's view of the world outside the trainer: trajectories come in, weights go out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_trd.config.schema import Config
from megatron_trd.data.source import ProblemSource
from megatron_trd.log import get_logger
from megatron_trd.records import Completion, Sample, Trajectory
from megatron_trd.rollout.evaluation import evaluate
from megatron_trd.rollout.refine import RolloutRunner, sampling_params
from megatron_trd.rollout.renderer import Renderer
from megatron_trd.rollout.sglang import SGLangFleet
from megatron_trd.rollout.trajectory_file import read_fingerprint, read_trajectories
from megatron_trd.tasks.base import Task
from megatron_trd.weight_sync.base import ServerError, WeightSync
from megatron_trd.weight_sync.disk import DiskWeightSync

logger = get_logger(__name__)
PROBE_PROBLEMS, PROBE_TOKENS = 8, 64


class World:
    """Servers and files behind plain calls: owns the event loop that the clients live in.

    Trajectories come from the student's and the teacher's servers, or from a file (the offline recipe). Servers are
    optional then; with them, weights are still published and evaluation still runs.
    """

    def __init__(self, config: Config, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
        """Connect to every server and wait until all answer.

        Raises:
            ValueError: a server does not answer, or the trajectory file cannot be used.
        """
        self._config, self._task = config, task
        self._renderer = Renderer.from_config(config, task, tokenizer)
        self._sampling = sampling_params(config.rollout, tokenizer)
        self._recorded: list[Trajectory] = []
        self._runner: RolloutRunner | None = None
        self._student: SGLangFleet | None = None
        self._sync: WeightSync | None = None
        self._loop = asyncio.new_event_loop()
        self._open = AsyncExitStack()
        try:
            self._loop.run_until_complete(self._connect())
        except ServerError as error:
            self.close()
            raise ValueError(str(error)) from error

    async def _connect(self) -> None:
        config, rollout = self._config, self._config.rollout
        if rollout.student_urls:
            self._student = await self._fleet(rollout.student_urls)
            sync = config.weight_sync
            self._sync = DiskWeightSync(
                sync.weight_sync_dir or Path(config.checkpoint.run_dir) / "weights",
                config.model.hf_checkpoint,
                self._student,
                timeout_s=sync.weight_sync_timeout_s,
            )
        if config.data.trajectories is not None:
            self._recorded = _read_recorded(config.data.trajectories, config.method.mode)
            return
        assert self._student is not None, "the configuration demands --student-urls for online rollouts"
        refiner: SGLangFleet | None = None
        if config.method.trajectory == "y_r":
            refiner = await self._fleet(rollout.teacher_urls) if rollout.teacher_urls else self._student
        self._runner = RolloutRunner(
            self._student, refiner, self._renderer, self._task, self._sampling, config.data.seed
        )

    async def _fleet(self, urls: Sequence[str]) -> SGLangFleet:
        fleet = await self._open.enter_async_context(SGLangFleet.from_config(urls, self._config.rollout))
        await fleet.wait_healthy()
        return fleet

    def trajectories(self, iteration: int, cursor: int) -> list[Trajectory]:
        """Return one rollout batch that starts at problem (or recorded trajectory) `cursor`."""
        batch_size = self._config.data.rollout_batch_size
        if self._runner is None:
            return [self._recorded[i % len(self._recorded)] for i in range(cursor, cursor + batch_size)]
        problems = ProblemSource(self._task, batch_size, cursor).draw()
        return self._loop.run_until_complete(self._runner.run(problems, iteration))

    def stage_seconds(self) -> dict[str, float]:
        """Return the wall-clock until the last y_o of the last batch ended, and from there to its last y_r."""
        return self._runner.stage_seconds if self._runner is not None else {}

    def publish(
        self, weights: Iterable[tuple[str, Tensor]], version: str, only: frozenset[str] | None
    ) -> tuple[dict[str, float], frozenset[str]]:
        """Bring weights to the student's servers, all or those whose URL is in `only`; return metrics and the URLs of
        those that failed."""
        assert self._sync is not None and self._student is not None, "there are no servers to publish to"
        try:
            report = self._loop.run_until_complete(self._sync.publish(weights, version, only))
        except ServerError as error:
            logger.warning("%s", error)
            return {}, only if only is not None else frozenset(server.url for server in self._student.servers)
        return report.metrics(), frozenset(report.failures)

    def require_servers(self) -> None:
        """Raise ServerError if no server holds the published weights."""
        assert self._student is not None, "there are no servers"
        self._student.require_ready()

    def probe(self) -> list[tuple[Sample, tuple[float, ...]]]:
        """Sample a few short responses to held-out problems, with the log-probabilities the server reports for them."""
        fleet = self._student
        assert fleet is not None, "there are no servers to probe"
        params = replace(
            self._sampling, max_new_tokens=min(PROBE_TOKENS, self._sampling.max_new_tokens), sampling_seed=0
        )
        prompts = self._probe_prompts

        async def sample() -> list[Completion]:
            return await asyncio.gather(*(fleet.generate(prompt, params) for prompt in prompts))

        return [
            (
                Sample(
                    problem_id="probe",
                    student_prompt_ids=prompt,
                    teacher_prompt_ids=prompt,
                    response_ids=completion.token_ids,
                ),
                completion.logprobs,
            )
            for prompt, completion in zip(prompts, self._loop.run_until_complete(sample()), strict=True)
            if completion.finish_reason != "abort" and completion.token_ids
        ]

    @cached_property
    def _probe_prompts(self) -> list[tuple[int, ...]]:
        return [self._renderer.solve(problem) for problem in self._task.eval_problems(PROBE_PROBLEMS)]

    def evaluate(self) -> dict[str, Any] | None:
        """Sample held-out problems from the served student; None without servers or problems."""
        settings = self._config.eval
        if self._student is None or settings.eval_num_problems == 0:
            return None
        result = evaluate(
            self._student,
            self._renderer,
            self._task,
            settings.eval_num_problems,
            settings.eval_num_samples,
            self._sampling,
            self._config.data.seed,
        )
        return self._loop.run_until_complete(result).as_dict()

    def close(self) -> None:
        """Close every connection."""
        self._loop.run_until_complete(self._open.aclose())
        self._loop.close()

    def metrics(self) -> dict[str, float]:
        """Return the health of the student's servers."""
        if self._student is None:
            return {}
        ready = sum(server.state.value == "ready" for server in self._student.servers)
        return {"server/ready": float(ready), "server/retries": float(self._student.num_retries)}


def _read_recorded(path: str, mode: str) -> list[Trajectory]:
    if not Path(path).is_file():
        raise ValueError(f"--trajectories {path}: no such file; make it with python -m megatron_trd.generate")
    made_with = read_fingerprint(path)["mode"]
    if made_with != mode:
        raise ValueError(
            f"--mode {mode}: {path} was made with --mode {made_with}, and its teacher contexts belong to that; "
            "use the same mode, or make another file"
        )
    return list(read_trajectories(path))
