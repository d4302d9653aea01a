"""Evaluate the model behind --student-urls: K samples per problem, avg@k and pass@k with intervals.

    python -m megatron_trd.evaluate --hf-checkpoint DIR --student-urls URL [--output FILE]       # held-out problems
    python -m megatron_trd.evaluate --hf-checkpoint DIR --student-urls URL --benchmarks aime24 aime25 \
        --benchmark-dir data --eval-num-samples 16 --output results/student                      # benchmarks
    python -m megatron_trd.evaluate --compare results/student results/trained                    # paired differences
    python -m megatron_trd.evaluate --regrade results/student --benchmark-dir data --output DIR  # another verifier

Benchmarks go on where they were stopped, with the same command.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_trd.benchmarks.benchmark import Benchmark, open_benchmark
from megatron_trd.benchmarks.comparison import compare, comparison_table
from megatron_trd.benchmarks.harness_files import write_harness_files
from megatron_trd.benchmarks.samples_file import SCHEMA, SamplesFile, read_settings
from megatron_trd.benchmarks.sampling import regrade, sample, served_model
from megatron_trd.benchmarks.summary import summarize
from megatron_trd.benchmarks.summary import table as benchmark_table
from megatron_trd.config.cli import exit_on_value_error, parse_config
from megatron_trd.config.schema import Config
from megatron_trd.log import configure
from megatron_trd.rollout.evaluation import evaluate, evaluation_sampling
from megatron_trd.rollout.renderer import Renderer
from megatron_trd.rollout.sglang import SGLangFleet
from megatron_trd.rollout.vocabulary import load_tokenizer
from megatron_trd.tasks import TASKS, TaskMakers, make_task
from megatron_trd.tasks.base import Task
from megatron_trd.weight_sync.base import ServerError

_NO_SERVER = ("--hf-checkpoint", "-", "--student-urls", "http://-")
"""What the configuration demands and nobody asks for where responses are on disk."""
_EXTRA = {
    "benchmarks": (
        tuple[str, ...],
        (),
        "Benchmarks: files NAME.jsonl of `--benchmark-dir`; all their problems are taken.",
    ),
    "benchmark_dir": (str, "data", "Directory of the files that tools/prepare_data.py made."),
    "output": (
        str | None,
        None,
        "With `--benchmarks`: directory to write, or to go on with. Else: JSON file of scores.",
    ),
    "regrade": (str | None, None, "Directory whose responses are graded anew, into `--output`; no server is asked."),
    "compare": (tuple[str, ...], (), "Two such directories, before and after: paired differences. Nothing is sampled."),
}


async def run(config: Config, task: Task) -> dict[str, Any]:
    """Evaluate on held-out problems; return `EvalResult.as_dict` with what was evaluated."""
    tokenizer = load_tokenizer(config.model.hf_checkpoint, "hf-checkpoint")
    async with SGLangFleet.from_config(config, "student", tokenizer) as fleet:
        name = await fleet.model_name()
        result = await evaluate(
            fleet,
            Renderer.from_config(config, task, tokenizer),
            task,
            config.eval.eval_num_problems,
            config.eval.eval_num_samples,
            evaluation_sampling(config, tokenizer),
            config.data.seed,
        )
    return {"task": config.data.task, "model": name, **result.as_dict()}


async def run_benchmarks(config: Config, benchmarks: Sequence[Benchmark], output: str) -> int:
    """Sample and grade what `output` lacks of the benchmarks; return how many requests failed.

    Raises:
        ServerError: a server does not answer, or the weights changed on the way.
        ValueError: `output` was made with another model or otherwise, or a prompt is over budget.
    """
    tokenizer = load_tokenizer(config.model.hf_checkpoint, "hf-checkpoint")
    sampling, num_samples, num_failed = evaluation_sampling(config, tokenizer), config.eval.eval_num_samples, 0
    async with SGLangFleet.from_config(config, "student", tokenizer) as fleet:
        served = await served_model(fleet)
        settings = {
            "schema": SCHEMA,
            **served,
            "sampling": f"T {sampling.temperature}, top-p {sampling.top_p}, top-k {sampling.top_k}",
            "thinking": config.rollout.thinking,
            "seed": config.data.seed,
            "benchmarks": {bench.name: {**bench.describe(), "samples": num_samples} for bench in benchmarks},
        }
        version = served["model"].rpartition("@")[2]
        with SamplesFile(output, settings) as samples:
            for bench in benchmarks:
                renderer = Renderer.from_config(config, bench.task, tokenizer)
                num_failed += await sample(
                    fleet, renderer, bench, samples, sampling, num_samples, config.data.seed, version
                )
        if (now := await served_model(fleet)) != served:
            raise ServerError(f"the servers changed from {served} to {now} on the way; remove {output} and begin anew")
    return num_failed


def regrade_directory(source: str, output: str, config: Config, directory: Path, tasks: TaskMakers) -> None:
    """Grade the responses in `source` with the verifiers of today's flags, into `output`.

    Raises:
        ValueError: a directory or a benchmark's file cannot be used.
    """
    settings = read_settings(source)
    benchmarks = {name: open_benchmark(name, directory, config, tasks) for name in settings["benchmarks"]}
    described = {
        name: {**was, "corpus_sha256": benchmarks[name].corpus_sha256, "verifier": dict(benchmarks[name].verifier)}
        for name, was in settings["benchmarks"].items()
    }
    with SamplesFile(output, {**settings, "benchmarks": described}) as samples:
        asyncio.run(regrade(source, benchmarks, samples))


def table(result: Mapping[str, Any]) -> str:
    """Render a result on held-out problems for people."""
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
    given = [*(sys.argv[1:] if argv is None else argv)]
    # Evaluation samples plain responses: no refiner has to be named. A flag given by the user still wins.
    front = [
        "--trajectory",
        "y_o",
        *(_NO_SERVER if {"--compare", "--regrade"} & {arg.split("=")[0] for arg in given} else ()),
    ]
    with exit_on_value_error():
        config, extras = parse_config(
            [*front, *given], description="Sample problems and score the responses.", extra=_EXTRA
        )
        try:
            if extras.compare:
                _compare(extras)
            elif extras.benchmarks or extras.regrade:
                _evaluate_benchmarks(config, extras, tasks)
            else:
                _evaluate_held_out(config, extras.output, tasks)
        except ServerError as error:
            sys.exit(f"error: {error}")


def _compare(extras: Any) -> None:
    if len(extras.compare) != 2:
        raise ValueError(f"--compare {' '.join(extras.compare)}: give two directories, before and after")
    comparison = compare(*extras.compare)
    if extras.output:
        _write(Path(extras.output), comparison)
    print(comparison_table(comparison), end="")


def _evaluate_benchmarks(config: Config, extras: Any, tasks: TaskMakers) -> None:
    if not extras.output:
        raise ValueError("--output (unset): give the directory for the samples")
    directory, num_failed = Path(extras.benchmark_dir), 0
    if extras.regrade:
        regrade_directory(extras.regrade, extras.output, config, directory, tasks)
    else:
        benchmarks = [open_benchmark(name, directory, config, tasks) for name in dict.fromkeys(extras.benchmarks)]
        num_failed = asyncio.run(run_benchmarks(config, benchmarks, extras.output))
    print(benchmark_table(summarize(extras.output)), end="")
    write_harness_files(extras.output)
    if num_failed:
        sys.exit(f"error: {num_failed} samples failed; run the same command again to retry them")


def _evaluate_held_out(config: Config, output: str | None, tasks: TaskMakers) -> None:
    if config.eval.eval_num_problems == 0:
        raise ValueError("--eval-num-problems 0: give at least 1")
    task = make_task(config, tasks, trains=False, evaluates=True)
    result = asyncio.run(run(config, task))
    if output:
        _write(Path(output), result)
    print(table(result))


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
