"""Evaluate the model behind --student-urls: K samples per held-out problem, avg@k and pass@k with intervals.

python -m megatron_trd.evaluate --hf-checkpoint DIR --student-urls URL [--output FILE]
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_trd.config.cli import exit_on_value_error, parse_config
from megatron_trd.config.schema import Config
from megatron_trd.log import configure
from megatron_trd.rollout.evaluation import evaluate
from megatron_trd.rollout.refine import sampling_params
from megatron_trd.rollout.renderer import Renderer
from megatron_trd.rollout.sglang import SGLangFleet
from megatron_trd.rollout.vocabulary import load_tokenizer
from megatron_trd.tasks import TASKS, TaskMakers, make_task
from megatron_trd.tasks.base import Task
from megatron_trd.weight_sync.base import ServerError


async def run(config: Config, task: Task) -> dict[str, Any]:
    """Evaluate; return `EvalResult.as_dict` with what was evaluated."""
    tokenizer = load_tokenizer(config.model.hf_checkpoint, "hf-checkpoint")
    async with SGLangFleet.from_config(config, "student", tokenizer) as fleet:
        name = await fleet.model_name()
        result = await evaluate(
            fleet,
            Renderer.from_config(config, task, tokenizer),
            task,
            config.eval.eval_num_problems,
            config.eval.eval_num_samples,
            sampling_params(config.rollout, tokenizer),
            config.data.seed,
        )
    return {"task": config.data.task, "model": name, **result.as_dict()}


def table(result: Mapping[str, Any]) -> str:
    """Render a result for people."""
    lines = [f"{result['task']}: {result['model']}, {len(result['problem_ids'])} problems"]
    for name, interval in result.items():
        if name.endswith("_interval"):
            score = name.removesuffix("_interval")
            low, high = (100 * bound for bound in interval)
            lines.append(f"{score:>10}  {100 * result[score]:5.1f} %  [{low:.1f}, {high:.1f}]")
    curve = "  ".join(f"{k}: {100 * value:.1f}" for k, value in result["pass_curve"].items())
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(result["finish_reasons"].items()))
    return "\n".join(
        [
            *lines,
            f"    pass@k  {curve}",
            f"    tokens  {result['mean_tokens']:.1f} on average",
            f"     ended  {reasons}",
        ]
    )


def main(argv: Sequence[str] | None = None, tasks: TaskMakers = TASKS) -> None:
    """Evaluate served weights. Other projects pass their own `tasks`."""
    configure(0)
    # Evaluation samples plain responses: no refiner has to be named. A flag given by the user still wins.
    arguments = ["--trajectory", "y_o", *(sys.argv[1:] if argv is None else argv)]
    with exit_on_value_error():
        config, extras = parse_config(
            arguments,
            description="Sample held-out problems and score the responses.",
            extra={"output": (str | None, None, "JSON file for the scores and all verdicts.")},
        )
        task = make_task(config.data, tasks)
        if config.eval.eval_num_problems == 0:
            raise ValueError("--eval-num-problems 0: give at least 1")
        try:
            result = asyncio.run(run(config, task))
        except ServerError as error:
            sys.exit(f"error: {error}")
    if extras.output:
        Path(extras.output).parent.mkdir(parents=True, exist_ok=True)
        Path(extras.output).write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
