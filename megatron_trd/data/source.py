"""The stream of training problems; where it stands is one integer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from megatron_trd.records import Problem


class TrainProblems(Protocol):
    """The part of a task that the stream needs."""

    def train_problem(self, index: int) -> Problem:
        """Return training problem `index`; the same index always gives the same problem."""
        ...


class ProblemSource:
    """Draws training problems in order, one batch at a time, and can go on where another stopped."""

    def __init__(self, task: TrainProblems, batch_size: int, cursor: int = 0) -> None:
        self.cursor = cursor
        """Index of the next problem."""
        self._task = task
        self._batch_size = batch_size

    def draw(self) -> list[Problem]:
        """Return the next batch and move past it."""
        start, self.cursor = self.cursor, self.cursor + self._batch_size
        return [self._task.train_problem(index) for index in range(start, self.cursor)]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep."""
        return {"cursor": self.cursor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the source that wrote `state` stopped; the batch size may differ."""
        self.cursor = int(state["cursor"])
