"""The method's data: x -> y_o -> y_r, both graded. `to_sample.py` makes training samples of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from transformers import PreTrainedTokenizerBase

from megatron_trd.config.schema import MethodConfig, RolloutConfig
from megatron_trd.records import Candidate, Completion, KeptPrefix, Problem, Reasoning, Trajectory, Verdict
from megatron_trd.rollout.engine import RolloutEngine, SamplingParams
from megatron_trd.rollout.failing_prefix import find_failing_prefix, head, step_ends
from megatron_trd.rollout.generate_wire import NOTHING, joined
from megatron_trd.rollout.grading import Graders, warn_of_grader_errors
from megatron_trd.rollout.reasoning import ReasoningTokens
from megatron_trd.rollout.renderer import Renderer
from megatron_trd.rollout.selection import select
from megatron_trd.rollout.staleness import behind, staleness_metrics
from megatron_trd.rollout.summary import summarize, verdicts_of
from megatron_trd.rollout.vocabulary import stop_token_ids
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
        stop_token_ids=stop_token_ids(tokenizer),
    )


def describe_refinement(method: MethodConfig) -> str:
    """Return what decides how y_r comes about, for people and to compare."""
    start: str = method.refine_from
    if start == "failing-prefix":
        start += f" ({method.prefix_steps}, {method.prefix_min_correct} of {method.prefix_continuations})"
    return f"{method.refine_select} of {method.refine_samples} from {start}"


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
    """Samples y_o, asks for y_r as soon as its own y_o allows it, and grades both meanwhile."""

    def __init__(
        self,
        student: RolloutEngine,
        refiner: RolloutEngine | None,
        renderer: Renderer,
        task: Task,
        sampling: SamplingParams,
        seed: int,
        *,
        method: MethodConfig | None = None,
        max_staleness: int | None = None,
    ) -> None:
        """Assemble the runner.

        Args:
            refiner: writes y_r; None for methods that train on y_o.
            method: how y_r is made; None = the defaults.
            max_staleness: iterations that the oldest token of the student may be behind the iteration it is for; an
                older completion is sampled again. None: as the engine gives it.
        """
        self.student, self.refiner, self.renderer, self.task = student, refiner, renderer, task
        self.sampling, self.seed, self.method = sampling, seed, method or MethodConfig()
        self.max_staleness, self.num_redone = max_staleness, 0
        self._reasoning = ReasoningTokens.of(renderer.tokenizer)
        self._graders = Graders(task)
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
        warn_of_grader_errors(verdicts_of(done.values()))
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
        solve_ids, (vanilla_ids, vanilla_cut) = self.renderer.solve(problem), self.renderer.vanilla(problem)
        y_o = await self._sample(self.student, solve_ids, problem, iteration, "y_o")
        self._last_y_o_at = time.perf_counter()
        draft = Trajectory(
            problem=problem,
            y_o=y_o,
            y_o_verdict=None,
            solve_prompt_ids=solve_ids,
            vanilla_prompt_ids=vanilla_ids,
            vanilla_cut_tokens=vanilla_cut,
        )
        if self.refiner is None or y_o.finish_reason == "abort":
            return replace(draft, y_o_verdict=await self._graders.grade(problem, y_o))
        refine_ids, num_cut = self.renderer.refine(problem, y_o.text)
        draft = replace(draft, refine_prompt_ids=refine_ids, refine_cut_tokens=num_cut)
        if self.method.refine_from == "start":
            verdict, refined = await asyncio.gather(
                self._graders.grade(problem, y_o), self._refine(self.refiner, draft, iteration)
            )
            return replace(refined, y_o_verdict=verdict)
        draft = replace(draft, y_o_verdict=await self._graders.grade(problem, y_o))
        if draft.y_o_correct is False:
            draft = replace(draft, kept=await self._find_kept(draft, iteration))
        return await self._refine(self.refiner, draft, iteration)

    async def _refine(self, refiner: RolloutEngine, draft: Trajectory, iteration: int) -> Trajectory:
        """Let the refiner go on from the refinement prompt and what is kept of y_o; choose y_r among what it writes."""
        start = NOTHING if draft.kept is None else head(draft.y_o, draft.kept.num_tokens)

        async def one(index: int) -> Candidate:
            stage = f"y_r {index}" if index else "y_r"
            y_r = await self._sample(refiner, draft.refine_prompt_ids, draft.problem, iteration, stage, start)
            return Candidate(completion=y_r, verdict=await self._graders.grade(draft.problem, y_r))

        candidates = await asyncio.gather(*(one(index) for index in range(self.method.refine_samples)))
        reasonings = [self._find_reasoning(draft, candidate.completion) for candidate in candidates]
        selection = select(candidates, reasonings, self.method.refine_select)
        chosen = 0 if selection is None else selection.chosen
        return replace(
            draft,
            y_r=candidates[chosen].completion,
            y_r_verdict=candidates[chosen].verdict,
            y_r_reasoning=reasonings[chosen],
            selection=selection,
        )

    def _find_reasoning(self, draft: Trajectory, y_r: Completion) -> Reasoning | None:
        if self._reasoning is None:
            return None
        return self._reasoning.find(draft.solve_prompt_ids, draft.refine_prompt_ids, y_r.token_ids)

    async def _find_kept(self, draft: Trajectory, iteration: int) -> KeptPrefix:
        """Find the last step of y_o from which the student still reaches the answer."""
        y_o, problem = draft.y_o, draft.problem

        async def one(num_tokens: int, index: int) -> Verdict | None:
            stage = f"prefix {num_tokens} {index}"
            start = head(y_o, num_tokens)
            return await self._graders.grade(
                problem, await self._sample(self.student, draft.solve_prompt_ids, problem, iteration, stage, start)
            )

        async def probe(num_tokens: int) -> tuple[Verdict | None, ...]:
            num = self.method.prefix_continuations
            return tuple(await asyncio.gather(*(one(num_tokens, index) for index in range(num))))

        said = y_o.token_ids[:-1] if y_o.finish_reason == "stop" else y_o.token_ids
        ends = step_ends(said, self.renderer.tokenizer, self.method.prefix_steps)
        return await find_failing_prefix(ends, self.method.prefix_min_correct, probe)

    async def _sample(
        self,
        engine: RolloutEngine,
        prompt_ids: Sequence[int],
        problem: Problem,
        iteration: int,
        stage: str,
        start: Completion = NOTHING,
    ) -> Completion:
        """Sample, or go on from `start`; from the student again while a token is older than allowed, until the last
        try fails."""
        params = replace(
            self.sampling,
            max_new_tokens=self.sampling.max_new_tokens - len(start.token_ids),
            sampling_seed=stable_seed(self.seed, iteration, problem.id, stage),
        )
        for _ in range(MAX_REDONE + 1):
            completion = await engine.generate([*prompt_ids, *start.token_ids], params)
            is_fresh = engine is not self.student or self._is_fresh(completion, iteration)
            if start.token_ids:
                completion = joined(start, completion, self.sampling, self._decode)
            if is_fresh:
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

    def _decode(self, ids: Sequence[int]) -> str:
        return self.renderer.tokenizer.decode(list(ids), skip_special_tokens=True)
