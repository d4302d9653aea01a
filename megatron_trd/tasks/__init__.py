"""Tasks: problems, verifiers and prompt templates."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_trd.tasks.arithmetic import ArithmeticTask
from megatron_trd.tasks.base import Task

TASKS: dict[str, Callable[[], Task]] = {"arithmetic": ArithmeticTask}
"""`--task` -> what makes it. Add your own with `train.main(tasks=TASKS | {"mine": MyTask})`."""


def make_task(name: str, tasks: Mapping[str, Callable[[], Task]]) -> Task:
    """Make the task that `--task` names. Raises ValueError if there is none of that name."""
    if name not in tasks:
        raise ValueError(f"--task {name}: unknown; use one of {', '.join(sorted(tasks))}")
    return tasks[name]()
