"""Make trajectories offline: stage 1 and refinement to a JSONL file that training can read.

    python -m megatron_trd.generate --hf-checkpoint DIR --student-urls URL --teacher-urls URL --output FILE

Each trajectory is written when it is done. The same command goes on where it was stopped.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from hashlib import blake2b
from pathlib import Path

from megatron_trd.config.cli import exit_on_value_error, parse_config
from megatron_trd.config.schema import Config
from megatron_trd.log import configure, get_logger
from megatron_trd.records import Problem, Trajectory
from megatron_trd.rollout.grading import warn_of_grader_errors
from megatron_trd.rollout.refine import RolloutRunner, describe_refinement, sampling_params
from megatron_trd.rollout.remembered import RememberingEngine
from megatron_trd.rollout.renderer import Renderer
from megatron_trd.rollout.sglang import SGLangFleet
from megatron_trd.rollout.show_prompts import show_prompts
from megatron_trd.rollout.summary import verdicts_of
from megatron_trd.rollout.trajectory_file import TrajectoryWriter
from megatron_trd.rollout.vocabulary import load_tokenizer
from megatron_trd.tasks import TASKS, TaskMakers, make_task
from megatron_trd.tasks.base import Task
from megatron_trd.tasks.corpus import file_sha256
from megatron_trd.train import SHOW_PROMPTS
from megatron_trd.weight_sync.base import ServerError

logger = get_logger(__name__)
PROGRESS_EVERY = 100


async def generate(config: Config, task: Task, output: str | Path, num_problems: int) -> int:
    """Write the trajectories of the first `num_problems` training problems; return how many were missing.

    A trajectory whose y_o failed is not written: the next run tries it again. Until all is done, what the student
    samples is kept in `<output>.y_o.jsonl`: a run that was killed before a y_r ended does not sample its y_o again.
    """
    tokenizer = load_tokenizer(config.model.hf_checkpoint, "hf-checkpoint")
    renderer = Renderer.from_config(config, task, tokenizer)
    sampling = sampling_params(config.rollout, tokenizer)
    num_written = num_failed = 0
    async with AsyncExitStack() as stack:
        student = await stack.enter_async_context(SGLangFleet.from_config(config, "student", tokenizer))
        refiner: SGLangFleet | None = None
        if config.rollout.teacher_urls:
            refiner = await stack.enter_async_context(SGLangFleet.from_config(config, "teacher", tokenizer))
        elif config.method.trajectory == "y_r":
            refiner = student
        fingerprint = await fingerprint_of(config, renderer, student, refiner)
        with (
            TrajectoryWriter(output, fingerprint) as writer,
            RememberingEngine(student, f"{output}.y_o.jsonl", fingerprint) as stage_one,
        ):
            problems = list(missing_problems(task, num_problems, writer.done_ids))
            logger.info("%s: %d trajectories are there, %d to make", output, len(writer.done_ids), len(problems))
            runner = RolloutRunner(stage_one, refiner, renderer, task, sampling, config.data.seed, method=config.method)
            unchecked: list[Trajectory] = []
            async for trajectory in runner.stream(problems, iteration=0):
                if trajectory.y_o.finish_reason == "abort":
                    num_failed += 1
                    logger.warning("problem %s failed: %s", trajectory.problem.id, trajectory.y_o.error)
                    continue
                writer.append(trajectory)
                num_written += 1
                unchecked.append(trajectory)
                if num_written % PROGRESS_EVERY == 0:
                    logger.info("%d of %d", num_written, len(problems))
                    warn_of_grader_errors(verdicts_of(unchecked))
                    unchecked.clear()
            warn_of_grader_errors(verdicts_of(unchecked))
    logger.info("wrote %d trajectories, %d failed", num_written, num_failed)
    return num_failed


def missing_problems(task: Task, num_problems: int, done_ids: Iterable[str]) -> Iterator[Problem]:
    """Yield the training problems that are not done, each once (a finite corpus starts over)."""
    seen = set(done_ids)
    for index in range(num_problems):
        problem = task.train_problem(index)
        if problem.id not in seen:
            seen.add(problem.id)
            yield problem


async def fingerprint_of(
    config: Config, renderer: Renderer, student: SGLangFleet, refiner: SGLangFleet | None
) -> dict[str, str]:
    """Describe what decides the content of a trajectory, readable enough to tell what differs."""
    rollout = config.rollout
    prompts = repr((renderer.templates, renderer.tokenizer.chat_template, renderer.thinking, renderer.refiner_thinking))
    budgets = (rollout.max_prompt_tokens, rollout.max_response_tokens, rollout.max_refine_prompt_tokens)
    return {
        "task": config.data.task,
        "data": " ".join(file_sha256(path)[:16] for path in config.data.train_data) or "none",
        "mode": config.method.mode,
        "student": await student.model_name(),
        "refiner": await refiner.model_name() if refiner else "none",
        "refinement": describe_refinement(config.method),
        "prompts": blake2b(prompts.encode(), digest_size=8).hexdigest(),
        "sampling": f"T {rollout.rollout_temperature}, top-p {rollout.rollout_top_p}, top-k {rollout.rollout_top_k}",
        "budgets": "/".join(map(str, budgets)),
        "seed": str(config.data.seed),
    }


def main(argv: Sequence[str] | None = None, tasks: TaskMakers = TASKS) -> None:
    """Generate trajectories. Other projects pass their own `tasks`."""
    configure(0)
    with exit_on_value_error():
        config, extras = parse_config(
            argv,
            description="Write trajectories to a JSONL file, resumably.",
            extra={
                "output": (str, "", "JSONL file to write, or to go on with."),
                "num_problems": (
                    int | None,
                    None,
                    "Training problems to take; unset = `--num-iterations` times `--rollout-batch-size`.",
                ),
                "show_prompts": (int, 0, SHOW_PROMPTS),
            },
        )
        task = make_task(config, tasks, trains=True, evaluates=False, grades=not extras.show_prompts)
        if extras.show_prompts:
            print(show_prompts(config, task, extras.show_prompts), end="")
            return
        if not extras.output:
            raise ValueError("--output (unset): give the JSONL file to write")
        num_problems = extras.num_problems or config.data.num_iterations * config.data.rollout_batch_size
        try:
            num_failed = asyncio.run(generate(config, task, extras.output, num_problems))
        except ServerError as error:
            sys.exit(f"error: {error}")
    if num_failed:
        sys.exit(f"error: {num_failed} problems failed; run the same command again to retry them")


if __name__ == "__main__":
    main()
