"""The trainer's own step: `data.packing`, `Student.train_step` and the teacher of the flags."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from megatron_trd.config.schema import Config
from megatron_trd.data.packing import Multiples, PackedStream, pack
from megatron_trd.mcore.groups import initialize_groups
from megatron_trd.mcore.models import read_models
from megatron_trd.mcore.student import Student
from megatron_trd.mcore.teacher import build_teacher
from megatron_trd.metrics import MetricSums
from megatron_trd.objectives.diagnostics import NAMES
from megatron_trd.records import Sample
from megatron_trd.throughput.stopwatch import Stopwatch

NUM_EPISTEMIC_IDS = 20


class Ours:
    """One rank of a job, without servers."""

    def __init__(self, config: Config, local_rank: int, *, num_steps: int, random_weights: bool) -> None:
        """Build student and teacher. Collective over all ranks.

        Raises:
            ValueError: a model or a layout cannot be used.
        """
        student_hf, teacher_hf = read_models(config)
        self._config, self.groups = config, initialize_groups(config.parallel, config.data.seed, local_rank)
        self.device, self.watch = self.groups.device, Stopwatch(self.groups.device)
        self.vocab_size = min(student_hf.geometry.vocab_size, teacher_hf.geometry.vocab_size)
        self.student = Student(
            config,
            self.groups,
            student_hf,
            total_steps=num_steps,
            vocab_size=self.vocab_size,
            epistemic_ids=range(NUM_EPISTEMIC_IDS),
            random_weights=random_weights,
        )
        self._teacher = build_teacher(config, self.groups, self.student.gpt, teacher_hf, random_weights=random_weights)
        self._clock_inside()

    def step(self, samples: Sequence[Sample]) -> tuple[float, int, int]:
        """Train on samples; return the step's loss, micro-batches of a rank, and tokens with their padding, of both
        streams. Collective over all ranks."""
        config = self._config
        with self.watch("pack"):
            (batch,) = pack(
                samples,
                num_steps=1,
                dp_size=self.groups.dp_size,
                max_tokens=config.data.max_tokens_per_micro_batch,
                multiples=Multiples.of(config.parallel, config.model.tokens_multiple),
                normalization=config.objective.loss_normalization,
            )
        result = self.student.train_step(batch[self.groups.dp_rank], self._teacher)
        total = MetricSums(NAMES, device=self.device)
        for sums in result.sums:
            for name, (numerator, denominator) in sums.items():
                total.add(name, numerator, denominator)
        streams = [stream for rank in batch for m in rank for stream in (m.student, m.teacher)]
        return total.reduce()["loss"], len(batch[0]), sum(stream.input_ids.numel() for stream in streams)

    def _clock_inside(self) -> None:
        """Put the watch around the teacher's rows and the optimizer, which `train_step` calls."""
        rows: Callable[[Sequence[PackedStream]], Iterator[Tensor]] = self._teacher.rows
        update: Callable[[], Any] = self.student.optimizer.step

        def timed_rows(streams: Sequence[PackedStream]) -> Iterator[Tensor]:
            with self.watch("teacher forward"):
                waiting = rows(streams)  # which computes now what it does not compute one by one
            return self._one_by_one(waiting)

        def timed_update() -> Any:
            with self.watch("optimizer"):
                return update()

        self._teacher.rows = timed_rows  # type: ignore[method-assign]
        self.student.optimizer.step = timed_update

    def _one_by_one(self, waiting: Iterator[Tensor]) -> Iterator[Tensor]:
        while True:
            with self.watch("teacher forward"):
                row = next(waiting, None)
            if row is None:
                return
            yield row
