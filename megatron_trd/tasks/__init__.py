"""Tasks: problems, verifiers and prompt templates."""

from __future__ import annotations

from collections.abc import Callable

from megatron_trd.tasks.arithmetic import ArithmeticTask
from megatron_trd.tasks.base import Task

TASKS: dict[str, Callable[[], Task]] = {"arithmetic": ArithmeticTask}
"""`--task` -> what makes it. Add your own with `train.main(tasks=TASKS | {"mine": MyTask})`."""
