"""The method's data: x -> y_o -> y_r, and which of them becomes a training sample."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from transformers import PreTrainedTokenizerBase

from megatron_trd.config.schema import MethodConfig, RolloutConfig
from megatron_trd.records import Completion, Problem, Sample, Trajectory
from megatron_trd.rollout.engine import RolloutEngine, SamplingParams
from megatron_trd.rollout.renderer import Renderer
from megatron_trd.rollout.staleness import behind, staleness_metrics
from megatron_trd.tasks.base import Task

MAX_OPEN_PROBLEMS = 2048
"""Problems between their first request and their trajectory."""
MAX_REDONE = 3
"""Times that a completion is sampled again because its weights were too old."""


def sampling_params(rollout: RolloutConfig, tokenizer: PreTrainedTokenizerBase) -> SamplingParams:
    """Return how both stages and evaluation sample."""
    return SamplingParams(
        max_new_tokens=rollout.max_response_tokens,
        temperature=rollout.rollout_temperature,
        top_p=rollout.rollout_top_p,
        top_k=rollout.rollout_top_k,
        stop_token_ids=(tokenizer.eos_token_id,),
    )


def stable_seed(*parts: object) -> int:
    """Hash the parts to 48 bits, the same in every process and on every machine."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=6).digest(), "big")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """What one iteration trains on, and how it came about."""

    trajectories: list[Trajectory]
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall-clock until the last y_o ended (`y_o`), and from there to the end (`y_r`); empty if nothing was sampled."""
    age: Mapping[str, float] = field(default_factory=dict)
    """Metrics of how old the sampling weights were."""

    def metrics(self) -> dict[str, float]:
        """Return everything as metric tags."""
        seconds = {f"rollout/{stage}_s": spent for stage, spent in self.stage_seconds.items()}
        return summarize(self.trajectories) | seconds | dict(self.age)


class RolloutRunner:
    """Samples y_o, asks for y_r the moment its own y_o ends, and grades both off the event loop."""

    def __init__(
        self,
        student: RolloutEngine,
        refiner: RolloutEngine | None,
        renderer: Renderer,
        task: Task,
        sampling: SamplingParams,
        seed: int,
        *,
        executor: Executor | None = None,
        max_staleness: int | None = None,
    ) -> None:
        """Assemble the runner.

        Args:
            refiner: writes y_r; None for methods that train on y_o.
            executor: where verifiers run; None = the event loop's threads.
            max_staleness: iterations that the oldest token of the student may be behind the iteration it is for; an
                older completion is sampled again. None: as the engine gives it.
        """
        self.student, self.refiner, self.renderer, self.task = student, refiner, renderer, task
        self.sampling, self.seed, self.executor = sampling, seed, executor
        self.max_staleness, self.num_redone = max_staleness, 0
        self._last_y_o_at = 0.0

    async def run(self, problems: Sequence[Problem], iteration: int) -> RolloutBatch:
        """Return the trajectories of all problems, in their order. One call at a time."""
        start, redone_before = time.perf_counter(), self.num_redone
        done = {t.problem.id: t async for t in self.stream(problems, iteration)}
        seconds = {"y_o": self._last_y_o_at - start}
        if self.refiner is not None:
            seconds["y_r"] = time.perf_counter() - self._last_y_o_at
        age = staleness_metrics(done.values(), iteration, student_refines=self.refiner is self.student)
        if self.max_staleness is not None:
            age["rollout/redone_stale"] = float(self.num_redone - redone_before)
        return RolloutBatch(trajectories=[done[p.id] for p in problems], stage_seconds=seconds, age=age)

    async def stream(self, problems: Iterable[Problem], iteration: int) -> AsyncIterator[Trajectory]:
        """Yield each trajectory when it is done; problems are drawn as there is room for them."""
        finished: asyncio.Queue[Trajectory | None] = asyncio.Queue()
        remaining = iter(problems)

        async def work() -> None:
            for problem in remaining:
                finished.put_nowait(await self.rollout(problem, iteration))

        async def work_all() -> None:
            workers = [asyncio.create_task(work()) for _ in range(MAX_OPEN_PROBLEMS)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                finished.put_nowait(None)

        working = asyncio.create_task(work_all())
        try:
            while (trajectory := await finished.get()) is not None:
                yield trajectory
            await working
        finally:
            working.cancel()

    async def rollout(self, problem: Problem, iteration: int) -> Trajectory:
        """Take one problem through both stages."""
        solve_ids, vanilla_ids = self.renderer.solve(problem), self.renderer.vanilla(problem)
        y_o = await self._sample(self.student, solve_ids, problem, iteration, "y_o")
        self._last_y_o_at = time.perf_counter()
        if self.refiner is None or y_o.finish_reason == "abort":
            return Trajectory(
                problem=problem,
                y_o=y_o,
                y_o_correct=await self._grade(problem, y_o),
                solve_prompt_ids=solve_ids,
                vanilla_prompt_ids=vanilla_ids,
            )
        refine_ids, num_cut = self.renderer.refine(problem, y_o.text)
        y_o_correct, y_r = await asyncio.gather(
            self._grade(problem, y_o), self._sample(self.refiner, refine_ids, problem, iteration, "y_r")
        )
        return Trajectory(
            problem=problem,
            y_o=y_o,
            y_o_correct=y_o_correct,
            solve_prompt_ids=solve_ids,
            vanilla_prompt_ids=vanilla_ids,
            y_r=y_r,
            y_r_correct=await self._grade(problem, y_r),
            refine_prompt_ids=refine_ids,
            refine_cut_tokens=num_cut,
        )

    async def _sample(
        self, engine: RolloutEngine, prompt_ids: Sequence[int], problem: Problem, iteration: int, stage: str
    ) -> Completion:
        """Sample; from the student again while a token is older than allowed, until the last try fails."""
        params = replace(self.sampling, sampling_seed=stable_seed(self.seed, iteration, problem.id, stage))
        for _ in range(MAX_REDONE + 1):
            completion = await engine.generate(prompt_ids, params)
            if engine is not self.student or self._is_fresh(completion, iteration):
                return completion
            self.num_redone += 1
        return replace(
            completion,
            finish_reason="abort",
            error=f"--rollout-staleness {self.max_staleness}: sampled {MAX_REDONE + 1} times for iteration {iteration}"
            f", at last with weights {', '.join(completion.weight_versions) or 'unknown'}; see that the servers take "
            "the weights they are sent",
        )

    def _is_fresh(self, completion: Completion, iteration: int) -> bool:
        if self.max_staleness is None or completion.finish_reason == "abort":
            return True
        age = behind([completion], iteration)
        return age is not None and age <= self.max_staleness

    async def _grade(self, problem: Problem, completion: Completion) -> bool | None:
        if completion.finish_reason == "abort":
            return None
        loop = asyncio.get_running_loop()
        verdict = await loop.run_in_executor(
            self.executor, self.task.grade, problem, completion.text, completion.finish_reason
        )
        return None if verdict.outcome == "grader_error" else verdict.correct


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What became of a trajectory."""

    sample: Sample | None
    reason: str | None = None
    """Set when something other than the plain good case happened; counted as `rollout/<reason>`."""


def to_sample(trajectory: Trajectory, method: MethodConfig) -> Decision:
    """Choose the response and the teacher's context, or say why there is none.

    Reasons: `filtered` (--trajectory-filter), `bad_y_o` (failed or without tokens), `bad_y_r_kept`,
    `bad_y_r_dropped` and `bad_y_r_replaced` (--on-bad-refinement). A good y_r ended by itself and says something.
    """
    if not _passes(trajectory, method.trajectory_filter):
        return Decision(sample=None, reason="filtered")
    if not _is_usable(trajectory.y_o):
        return Decision(sample=None, reason="bad_y_o")
    if method.trajectory == "y_o":
        return Decision(sample=_along_y_o(trajectory))
    y_r = trajectory.y_r
    if y_r is not None and y_r.finish_reason == "stop" and y_r.text.strip():
        return Decision(sample=_along_y_r(trajectory, y_r))
    if method.on_bad_refinement == "use_y_o":
        return Decision(sample=_along_y_o(trajectory), reason="bad_y_r_replaced")
    if method.on_bad_refinement == "keep" and y_r is not None and y_r.token_ids:
        return Decision(sample=_along_y_r(trajectory, y_r), reason="bad_y_r_kept")
    return Decision(sample=None, reason="bad_y_r_dropped")


def _passes(trajectory: Trajectory, trajectory_filter: str) -> bool:
    match trajectory_filter:
        case "fail":
            return trajectory.y_o_correct is False
        case "succ":
            return trajectory.y_o_correct is True
        case "fail_to_succ":
            return trajectory.y_o_correct is False and trajectory.y_r_correct is True
        case _:
            return True


def _is_usable(completion: Completion) -> bool:
    return completion.finish_reason != "abort" and bool(completion.token_ids)


def _along_y_o(trajectory: Trajectory) -> Sample:
    return Sample(
        problem_id=trajectory.problem.id,
        student_prompt_ids=trajectory.solve_prompt_ids,
        teacher_prompt_ids=trajectory.vanilla_prompt_ids,
        response_ids=trajectory.y_o.token_ids,
        y_o_correct=trajectory.y_o_correct,
    )


def _along_y_r(trajectory: Trajectory, y_r: Completion) -> Sample:
    return Sample(
        problem_id=trajectory.problem.id,
        student_prompt_ids=trajectory.solve_prompt_ids,
        teacher_prompt_ids=trajectory.refine_prompt_ids,
        response_ids=y_r.token_ids,
        y_o_correct=trajectory.y_o_correct,
    )


def summarize(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return rates, lengths and the 2x2 outcomes of an iteration; what has no data has no entry."""
    metrics: dict[str, float] = {"rollout/trajectories": float(len(trajectories))}

    def mean(tag: str, values: Iterable[float]) -> None:
        listed = [float(value) for value in values]
        if listed:
            metrics[f"rollout/{tag}"] = sum(listed) / len(listed)

    for stage in ("y_o", "y_r"):
        graded = [
            (completion, correct)
            for t in trajectories
            for completion, correct in [(t.y_o, t.y_o_correct) if stage == "y_o" else (t.y_r, t.y_r_correct)]
            if completion is not None
        ]
        mean(f"{stage}_pass", (correct for _, correct in graded if correct is not None))
        mean(f"{stage}_truncated", (completion.finish_reason == "length" for completion, _ in graded))
        mean(f"{stage}_failed", (completion.finish_reason == "abort" for completion, _ in graded))
        whole = [(completion, correct) for completion, correct in graded if completion.finish_reason != "abort"]
        mean(f"{stage}_tokens", (len(completion.token_ids) for completion, _ in whole))
        for verdict, name in ((True, "correct"), (False, "incorrect")):
            mean(f"{stage}_tokens_{name}", (len(c.token_ids) for c, correct in whole if correct is verdict))
    names = {True: "pass", False: "fail"}
    both = [(t.y_o_correct, t.y_r_correct) for t in trajectories if None not in (t.y_o_correct, t.y_r_correct)]
    if both:
        for was in names:
            for became in names:
                metrics[f"rollout/{names[was]}_{names[became]}"] = float(both.count((was, became)))
    refined = [t for t in trajectories if t.refine_prompt_ids]
    mean("refine_cut", (t.refine_cut_tokens > 0 for t in refined))
    return metrics
