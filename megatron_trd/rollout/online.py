"""Rollouts from live servers, put together from a configuration."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from megatron_trd.config.schema import Config
from megatron_trd.data.source import ProblemSource
from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.refine import RolloutBatch, RolloutRunner, sampling_params
from megatron_trd.rollout.renderer import Renderer
from megatron_trd.rollout.sglang import SGLangFleet
from megatron_trd.tasks.base import Task


async def open_student(config: Config, tokenizer: PreTrainedTokenizerBase, stack: AsyncExitStack) -> SGLangFleet:
    """Connect to the student's servers while `stack` is open. Raises ServerError if one does not answer in time."""
    return await _open(config, "student", tokenizer, stack)


async def _open(
    config: Config, role: Literal["student", "teacher"], tokenizer: PreTrainedTokenizerBase, stack: AsyncExitStack
) -> SGLangFleet:
    fleet = SGLangFleet.from_config(config, role, tokenizer)
    await stack.enter_async_context(fleet)
    await fleet.wait_healthy()
    return fleet


def fleet_counters(fleet: SGLangFleet) -> dict[str, float]:
    """Return what happened to a fleet's requests since it was opened, as metric tags."""
    return {
        "server/retries": float(fleet.num_retries),
        "server/continued": float(fleet.num_continued),
        "server/hedges": float(fleet.num_hedges),
        "server/thrown_away": float(fleet.num_thrown_away),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineRollouts:
    """The servers of both stages, and what a batch needs on its way through them."""

    config: Config
    task: Task
    renderer: Renderer
    sampling: SamplingParams
    student: SGLangFleet
    refiner: SGLangFleet | None
    """Writes y_r: the student's own fleet where no teacher is served; None for methods that train on y_o."""

    @classmethod
    async def open(
        cls, config: Config, task: Task, tokenizer: PreTrainedTokenizerBase, student: SGLangFleet, stack: AsyncExitStack
    ) -> OnlineRollouts:
        """Connect to the teacher's servers, where the method has any. Raises ServerError."""
        refiner: SGLangFleet | None = None
        if config.method.trajectory == "y_r":
            served = bool(config.rollout.teacher_urls)
            refiner = await _open(config, "teacher", tokenizer, stack) if served else student
        return cls(
            config=config,
            task=task,
            renderer=Renderer.from_config(config, task, tokenizer),
            sampling=sampling_params(config.rollout, tokenizer),
            student=student,
            refiner=refiner,
        )

    async def batch(self, iteration: int, cursor: int) -> RolloutBatch:
        """Roll out the batch that iteration `iteration` trains on, from problem `cursor` on."""
        data = self.config.data
        runner = RolloutRunner(
            self.student,
            self.refiner,
            self.renderer,
            self.task,
            self.sampling,
            data.seed,
            method=self.config.method,
            max_staleness=self.config.rollout.rollout_staleness or None,
        )
        return await runner.run(ProblemSource(self.task, data.rollout_batch_size, cursor).draw(), iteration)
