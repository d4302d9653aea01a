"""Rank 0's view of the world outside the trainer: trajectories come in, weights go out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_trd.config.schema import Config, MethodConfig
from megatron_trd.log import get_logger
from megatron_trd.records import Completion, Sample, Trajectory
from megatron_trd.rollout.ahead import ObservedServers, RolloutProcess
from megatron_trd.rollout.colocation import Colocation
from megatron_trd.rollout.evaluation import evaluate, evaluation_sampling
from megatron_trd.rollout.online import OnlineRollouts, fleet_counters, open_student
from megatron_trd.rollout.reasoning import require_reasoning_tokens
from megatron_trd.rollout.refine import RolloutBatch, describe_refinement, sampling_params
from megatron_trd.rollout.renderer import Renderer
from megatron_trd.rollout.sglang import SGLangFleet
from megatron_trd.rollout.trajectory_file import read_fingerprint, read_trajectories
from megatron_trd.tasks.base import Task
from megatron_trd.weight_sync.base import ServerError, SyncReport, WeightServers, WeightSync
from megatron_trd.weight_sync.transports import make_weight_sync

logger = get_logger(__name__)
PROBE_PROBLEMS, PROBE_TOKENS = 8, 64


class World:
    """Servers and files behind plain calls: owns the event loop that the clients live in.

    Trajectories come from the student's and the teacher's servers, or from a file (the offline recipe). Servers are
    optional then; with them, weights are still published and evaluation still runs. With --rollout-staleness another
    process rolls out; weights, probes and evaluation stay here.
    """

    def __init__(self, config: Config, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
        """Connect to every server and wait until all answer.

        Raises:
            ValueError: a server does not answer, or the trajectory file cannot be used.
        """
        self._config, self._task, self._tokenizer = config, task, tokenizer
        require_reasoning_tokens(config.method, tokenizer)
        self._renderer = Renderer.from_config(config, task, tokenizer)
        self._sampling = sampling_params(config.rollout, tokenizer)
        self._recorded: list[Trajectory] = []
        self._rollouts: OnlineRollouts | None = None
        self._ahead: RolloutProcess | None = None
        self._student: SGLangFleet | None = None
        self._sync: WeightSync | None = None
        self._colocation: Colocation | None = None
        self._loop = asyncio.new_event_loop()
        self._open = AsyncExitStack()
        try:
            self._loop.run_until_complete(self._connect())
        except BaseException as error:
            self.close()
            if isinstance(error, ServerError):
                raise ValueError(str(error)) from error
            raise

    async def _connect(self) -> None:
        config, rollout = self._config, self._config.rollout
        online = config.data.trajectories is None
        if online and rollout.rollout_staleness:
            self._ahead = RolloutProcess(config, self._task)  # starts while this process connects
        if rollout.student_urls:
            self._student = await open_student(config, self._tokenizer, self._open)
            servers: WeightServers = self._student
            if self._ahead is not None:
                servers = ObservedServers(self._student, self._ahead)
            self._sync = make_weight_sync(config, servers)
            self._open.push_async_callback(self._sync.close)
        if config.data.trajectories is not None:
            self._recorded = _read_recorded(config.data.trajectories, config.method)
        elif self._ahead is not None:
            self._ahead.wait_ready()
        else:
            assert self._student is not None, "the configuration demands --student-urls for online rollouts"
            self._rollouts = await OnlineRollouts.open(config, self._task, self._tokenizer, self._student, self._open)
        if rollout.colocate and self._student is not None:
            teacher = self._rollouts.refiner if self._rollouts is not None else None
            self._colocation = await Colocation.begin(
                self._student,
                None if teacher is self._student else teacher,
                all_weights_return=config.weight_sync.weight_sync != "adapter",
            )

    def rollout(self, iteration: int, cursor: int) -> RolloutBatch:
        """Return the batch of an iteration, which starts at problem (or recorded trajectory) `cursor`.

        Raises:
            RolloutProcessError: with --rollout-staleness, the process that rolls out died or failed.
        """
        if self._ahead is not None:
            return self._ahead.batch(iteration, cursor)
        if self._rollouts is not None:
            return self._loop.run_until_complete(self._rollouts.batch(iteration, cursor))
        end = cursor + self._config.data.rollout_batch_size
        return RolloutBatch(trajectories=[self._recorded[i % len(self._recorded)] for i in range(cursor, end)])

    def rest(self) -> None:
        """Have servers that share the trainer's GPUs give their memory back, until the next `publish`.

        Raises:
            ServerError: a server did not come to rest.
        """
        if self._colocation is not None:
            self._loop.run_until_complete(self._colocation.rest())

    def publish(
        self, weights: Iterable[tuple[str, Tensor]], version: str, only: frozenset[str] | None
    ) -> tuple[dict[str, float], frozenset[str]]:
        """Bring weights to the student's servers, all or those whose URL is in `only`; return metrics and the URLs of
        those that failed."""
        assert self._sync is not None and self._student is not None, "there are no servers to publish to"
        try:
            report = self._loop.run_until_complete(self._publish(weights, version, only))
        except ServerError as error:
            logger.warning("%s", error)
            return {}, only if only is not None else frozenset(server.url for server in self._student.servers)
        return report.metrics(), frozenset(report.failures)

    async def _publish(
        self, weights: Iterable[tuple[str, Tensor]], version: str, only: frozenset[str] | None
    ) -> SyncReport:
        assert self._sync is not None
        if self._colocation is None:
            return await self._sync.publish(weights, version, only)
        async with self._colocation.awake():
            return await self._sync.publish(weights, version, only)

    def require_servers(self) -> None:
        """Raise ServerError if no server holds the published weights."""
        assert self._student is not None, "there are no servers"
        self._student.require_ready()

    def probe(self) -> list[tuple[Sample, tuple[float, ...]]]:
        """Sample a few short responses, with the log-probabilities the server reports for them; to held-out problems,
        or to training problems where there are none."""
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
        held_out = self._task.eval_problems(PROBE_PROBLEMS)
        if not held_out and self._recorded:
            return [trajectory.solve_prompt_ids for trajectory in self._recorded[:PROBE_PROBLEMS]]
        problems = held_out or [self._task.train_problem(index) for index in range(PROBE_PROBLEMS)]
        return [self._renderer.solve(problem) for problem in problems]

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
            evaluation_sampling(self._config, self._tokenizer),
            self._config.data.seed,
        )
        return self._loop.run_until_complete(result).as_dict()

    def close(self) -> None:
        """Close every connection, and end the process that rolls out."""
        if self._ahead is not None:
            self._ahead.close()
        self._loop.run_until_complete(self._close())
        self._loop.close()

    async def _close(self) -> None:
        if self._colocation is not None:
            await self._colocation.end()
        await self._open.aclose()

    def metrics(self) -> dict[str, float]:
        """Return the health of the student's servers."""
        if self._student is None:
            return {}
        counters = fleet_counters(self._student)
        if self._ahead is not None:
            for tag, number in self._ahead.counters().items():
                counters[tag] += number
        ready = sum(server.state.value == "ready" for server in self._student.servers)
        return {"server/ready": float(ready), **counters}


def _read_recorded(path: str, method: MethodConfig) -> list[Trajectory]:
    if not Path(path).is_file():
        raise ValueError(f"--trajectories {path}: no such file; make it with python -m megatron_trd.generate")
    made_with = read_fingerprint(path)
    if made_with["mode"] != method.mode:
        raise ValueError(
            f"--mode {method.mode}: {path} was made with --mode {made_with['mode']}, and its teacher contexts belong "
            "to that; use the same mode, or make another file"
        )
    if describe_refinement(method) not in (made_with["refinement"], describe_refinement(MethodConfig())):
        raise ValueError(
            f"--refine-samples, --refine-select, --refine-from, --prefix-* {describe_refinement(method)}: the y_r of "
            f"{path} are {made_with['refinement']}; leave the flags out, or make another file"
        )
    return list(read_trajectories(path))
