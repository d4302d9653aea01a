"""Tasks: problems, verifiers and prompt templates."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_trd.config.schema import DataConfig
from megatron_trd.tasks.arithmetic import ArithmeticTask
from megatron_trd.tasks.base import Task

TaskMakers = Mapping[str, Callable[[DataConfig], Task]]
"""`--task` -> what makes it from the flags about data."""

TASKS: TaskMakers = {"arithmetic": lambda data: ArithmeticTask()}
"""Add your own with `train.main(tasks={**TASKS, "mine": make_mine})`."""


def make_task(data: DataConfig, tasks: TaskMakers) -> Task:
    """Make the task that `--task` names. Raises ValueError if there is none of that name."""
    if data.task not in tasks:
        raise ValueError(f"--task {data.task}: unknown; use one of {', '.join(sorted(tasks))}")
    return tasks[data.task](data)
