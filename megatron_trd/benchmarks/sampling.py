"""Ask a served model and grade what it says, or grade anew what it has said."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from megatron_trd.benchmarks.benchmark import Benchmark
from megatron_trd.benchmarks.harness_tasks import PlusVerdict
from megatron_trd.benchmarks.samples_file import Row, SamplesFile, read_samples
from megatron_trd.log import get_logger
from megatron_trd.records import Completion, Problem, Verdict
from megatron_trd.rollout.engine import RolloutEngine, SamplingParams
from megatron_trd.rollout.grading import Graders, warn_of_grader_errors
from megatron_trd.rollout.refine import stable_seed
from megatron_trd.rollout.renderer import Renderer
from megatron_trd.rollout.server_client import RefusedError
from megatron_trd.rollout.sglang import SGLangFleet
from megatron_trd.weight_sync.base import ServerError

logger = get_logger(__name__)
CHECKSUM_TIMEOUT_S = 600.0
MAX_REGRADED_AT_ONCE = 256


async def served_model(fleet: SGLangFleet) -> dict[str, str]:
    """Return which model and weights the servers hold: a name with the version, and a checksum over all parameters.

    Raises:
        ServerError: a server does not answer, or they hold different weights.
    """
    model = await fleet.model_name()
    try:
        sums = await asyncio.gather(*(server.weight_checksums(CHECKSUM_TIMEOUT_S) for server in fleet.servers))
    except RefusedError as error:
        logger.warning("weights are known by name alone, because a server gives no checksum of them: %s", error)
        return {"model": model, "weights": "not told"}
    digests = {sha256(repr(sorted(named.items())).encode()).hexdigest() for named in sums}
    if len(digests) > 1:
        raise ServerError(
            f"the servers of {model} hold different weights, or split them differently; serve the same directory with "
            "the same tensor-parallel size"
        )
    return {"model": model, "weights": digests.pop()}


async def sample(
    engine: RolloutEngine,
    renderer: Renderer,
    benchmark: Benchmark,
    samples: SamplesFile,
    sampling: SamplingParams,
    num_samples: int,
    seed: int,
    weight_version: str,
) -> int:
    """Write the samples of a benchmark that are not there yet; return how many requests failed.

    Args:
        renderer: of this benchmark alone; takes over its template.
        sampling: the budget is replaced by the benchmark's.
        seed: with problem and number of the sample it gives the request's; the same for every model.
        weight_version: what every token must come from.

    Raises:
        ServerError: a response came from other weights, or all requests failed.
        ValueError: a prompt is over budget or was another when the file was begun.
    """
    if benchmark.convention.solve_template is not None:
        renderer.templates = replace(renderer.templates, solve_template=benchmark.convention.solve_template)
    graders, verdicts, failures = Graders(benchmark.task), list[tuple[str, Verdict | None]](), list[str]()

    async def one(request: _Request) -> None:
        params = replace(sampling, max_new_tokens=benchmark.max_response_tokens, sampling_seed=request.seed)
        began = time.monotonic()
        completion = await engine.generate(request.prompt_ids, params)
        seconds = time.monotonic() - began
        if other := set(completion.weight_versions) - {weight_version}:
            raise ServerError(f"the weights changed from {weight_version} to {', '.join(other)} during the evaluation")
        verdict = await graders.grade(request.problem, completion)
        verdicts.append((request.problem.id, verdict))
        if verdict is None:
            failures.append(f"problem {request.problem.id}, sample {request.index}: {completion.error}")
        else:
            samples.append(_row(benchmark, request, completion, verdict, round(seconds, 3), weight_version))

    missing = []
    for problem in benchmark.problems:
        ids = renderer.solve(problem)
        prompt = sha256(repr(ids).encode()).hexdigest()
        for index in range(num_samples):
            if not samples.has((benchmark.name, problem.id, index), prompt):
                number = stable_seed(seed, "eval", problem.id, index)
                missing.append(
                    _Request(problem=problem, index=index, prompt_ids=ids, prompt_sha256=prompt, seed=number)
                )
    logger.info("%s: %d samples to make", benchmark.name, len(missing))
    await asyncio.gather(*map(one, missing))
    warn_of_grader_errors(verdicts)
    if failures:
        told = f"{benchmark.name}: {len(failures)} of {len(missing)} requests failed, the first for {failures[0]}"
        if len(failures) == len(missing):
            raise ServerError(told)
        logger.warning("%s", told)
    return len(failures)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    problem: Problem
    index: int
    prompt_ids: tuple[int, ...]
    prompt_sha256: str
    seed: int


def _row(
    benchmark: Benchmark,
    request: _Request,
    completion: Completion,
    verdict: Verdict,
    seconds: float,
    weight_version: str,
) -> Row:
    return Row(
        bench=benchmark.name,
        problem_id=request.problem.id,
        sample_id=request.index,
        seed=request.seed,
        prompt_sha256=request.prompt_sha256,
        prompt_tokens=len(request.prompt_ids),
        response=completion.text,
        finish_reason=completion.finish_reason,
        response_tokens=len(completion.token_ids),
        seconds=seconds,
        weight_version=weight_version,
        **_graded(benchmark, verdict),
    )


async def regrade(source: str, benchmarks: Mapping[str, Benchmark], samples: SamplesFile) -> None:
    """Grade the responses of another directory into this one; what is here already is left out.

    Raises:
        ValueError: a problem of the source is not in the benchmark's file.
    """
    graders = {name: Graders(benchmark.task) for name, benchmark in benchmarks.items()}
    problems = {name: {problem.id: problem for problem in bench.problems} for name, bench in benchmarks.items()}
    verdicts = list[tuple[str, Verdict | None]]()
    slots = asyncio.Semaphore(MAX_REGRADED_AT_ONCE)

    async def one(row: Row) -> None:
        completion = Completion(token_ids=(), text=row.response, finish_reason=row.finish_reason)
        try:
            verdict = await graders[row.bench].grade(problems[row.bench][row.problem_id], completion)
        finally:
            slots.release()
        verdicts.append((row.problem_id, verdict))
        assert verdict is not None, "failed requests have no row"
        samples.append(replace(row, **_graded(benchmarks[row.bench], verdict)))

    grading = set()
    for row in read_samples(source):
        if row.bench in benchmarks and not samples.has(row.key, row.prompt_sha256):
            if row.problem_id not in problems[row.bench]:
                raise ValueError(
                    f"--regrade {source}: problem {row.problem_id} is not in --benchmark-dir; give its file"
                )
            await slots.acquire()
            grading.add(asyncio.create_task(one(row)))
    await asyncio.gather(*grading)
    warn_of_grader_errors(verdicts)


def _graded(benchmark: Benchmark, verdict: Verdict) -> dict[str, Any]:
    return {
        "extracted": verdict.extracted,
        "verdict": verdict.outcome,
        "error": verdict.error,
        "verifier": benchmark.verifier,
        "evalplus": verdict.evalplus if isinstance(verdict, PlusVerdict) else None,
    }
