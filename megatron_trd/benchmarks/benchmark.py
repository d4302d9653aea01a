"""What belongs to a benchmark: its file of problems, its verifier, its prompt, its budget."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from megatron_trd import __version__
from megatron_trd.benchmarks.harness_tasks import EvalPlusTask, LiveCodeBenchTask
from megatron_trd.config.schema import Config
from megatron_trd.records import Problem
from megatron_trd.tasks import TaskMakers
from megatron_trd.tasks.base import Task
from megatron_trd.tasks.corpus import read_rows

Harness = Literal["evalplus", "livecodebench"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Convention:
    """What sets a benchmark apart from others of its task."""

    harness: Harness | None = None
    """Published harness whose rules and file formats it follows."""
    math_verifier_profile: Literal["amo"] | None = None
    """None = `--math-verifier-profile`."""
    solve_template: str | None = None
    """The prompt; None = the task's solve.txt."""


CONVENTIONS: Mapping[str, Convention] = {
    "amo_bench": Convention(math_verifier_profile="amo", solve_template="{problem}"),
    "humaneval_plus": Convention(harness="evalplus"),
    "mbpp_plus": Convention(harness="evalplus"),
    "livecodebench_release_v6": Convention(harness="livecodebench"),
    "livecodebench_v6": Convention(harness="livecodebench"),
}
"""File name without `.jsonl` -> what is special; AMO-Bench's statements say themselves how to answer."""
MAX_RESPONSE_TOKENS: Mapping[str, int] = {"math": 38_912, "code": 16_384}
"""Task -> the paper's budget (arXiv 2606.08432, table 10)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Problems and all that decides how they are asked and graded."""

    name: str
    task_name: str
    task: Task
    problems: Sequence[Problem]
    convention: Convention
    max_response_tokens: int
    verifier: Mapping[str, str]
    """Its name, version and profile."""
    corpus_sha256: str

    def describe(self) -> dict[str, object]:
        """Return what decides its prompts, responses and verdicts, to compare and to show."""
        return {
            "task": self.task_name,
            "problems": len(self.problems),
            "corpus_sha256": self.corpus_sha256,
            "max_response_tokens": self.max_response_tokens,
            "verifier": dict(self.verifier),
        }


def open_benchmark(name: str, directory: Path, config: Config, tasks: TaskMakers) -> Benchmark:
    """Read `directory/name.jsonl` and make what grades it; its rows say which task they are of.

    Raises:
        ValueError: the file is missing or malformed, or its task is unknown or cannot grade here.
    """
    path = directory / f"{name}.jsonl"
    if not path.is_file():
        found = ", ".join(sorted(file.stem for file in directory.glob("*.jsonl"))) or "none"
        raise ValueError(
            f"--benchmarks {name}: {path} is missing (there: {found}); make it with tools/prepare_data.py {name}"
        )
    task_name = next((row.task for _, row in read_rows(path)), "none: it is empty")
    if task_name not in tasks:
        raise ValueError(f"--benchmarks {name}: {path} is of task {task_name}; known are {', '.join(sorted(tasks))}")
    convention = CONVENTIONS.get(name, Convention())
    data = replace(config.data, task=task_name, train_data=(), eval_data=(str(path),))
    if convention.math_verifier_profile is not None:
        data = replace(data, math_verifier_profile=convention.math_verifier_profile)
    task: Task
    profile: str
    if convention.harness == "evalplus":
        task, profile = EvalPlusTask(data), "evalplus"
    elif convention.harness == "livecodebench":
        profile = config.eval.livecodebench_mode
        task = LiveCodeBenchTask(data, config.eval.livecodebench_mode)
    else:
        task = tasks[task_name](data)
        profile = {"math": str(data.math_verifier_profile), "code": "faithful"}.get(task_name, task_name)
    problems = task.eval_problems(sys.maxsize)
    task.check_grading()
    return Benchmark(
        name=name,
        task_name=task_name,
        task=task,
        problems=problems,
        convention=convention,
        max_response_tokens=config.eval.eval_max_response_tokens
        or MAX_RESPONSE_TOKENS.get(task_name, config.rollout.max_response_tokens),
        verifier={"name": task_name, "version": _verifier_version(task_name), "profile": profile},
        corpus_sha256=sha256(path.read_bytes()).hexdigest(),
    )


def _verifier_version(task_name: str) -> str:
    return f"{__version__}, math-verify {version('math-verify')}" if task_name == "math" else __version__
