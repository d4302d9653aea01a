"""Tasks: problems, verifiers and prompt templates."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_trd.config.schema import Config, DataConfig
from megatron_trd.tasks.arithmetic import ArithmeticTask
from megatron_trd.tasks.base import Task
from megatron_trd.tasks.code_problems.task import CodeTask
from megatron_trd.tasks.math_problems.task import MathTask

TaskMakers = Mapping[str, Callable[[DataConfig], Task]]
"""`--task` -> what makes it from the flags about data."""

TASKS: TaskMakers = {"arithmetic": lambda data: ArithmeticTask(), "math": MathTask, "code": CodeTask}
"""Add your own with `train.main(tasks={**TASKS, "mine": make_mine})`."""


def make_task(config: Config, tasks: TaskMakers, *, trains: bool, evaluates: bool, grades: bool = True) -> Task:
    """Make the task that `--task` names, and look at its problems now rather than in the middle of a run.

    Args:
        trains: this process will draw training problems.
        evaluates: this process will ask for held-out problems.
        grades: it will grade responses to them.

    Raises:
        ValueError: there is no task of that name, it lacks problems that are needed, or it cannot grade here.
    """
    name = config.data.task
    if name not in tasks:
        raise ValueError(f"--task {name}: unknown; use one of {', '.join(sorted(tasks))}")
    task = tasks[name](config.data)
    if trains:
        if config.method.mode == "opsd":
            task.require_references()
        task.train_problem(0)
    if evaluates and not task.eval_problems(1):
        raise ValueError(
            f"--eval-data (unset): --task {name} has no held-out problems; give files, or --eval-num-problems 0"
        )
    if grades and (trains or evaluates):
        task.check_grading()
    return task
