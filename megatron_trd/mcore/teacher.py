"""The three teachers: a second model, the student's frozen base, the student as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from megatron_trd.config.schema import Config
from megatron_trd.data.packing import PackedStream
from megatron_trd.mcore import hf_weights
from megatron_trd.mcore.gpt import GPTChunks, build_gpt
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.hf_config import HFModel
from megatron_trd.mcore.lora import adapters_disabled
from megatron_trd.mcore.schedule import rows_without_gradients


class Teacher:
    """Gives hidden states along the teacher's stream, without gradients."""

    def __init__(self, model: GPTChunks, groups: Groups, *, without_adapters: bool = False) -> None:
        self._model = model
        self._groups = groups
        self._without_adapters = without_adapters

    @property
    def output_weight(self) -> Tensor:
        """This rank's rows of the teacher's output layer: [padded vocabulary / tp, teacher hidden]. Last stage only."""
        return self._model.output_weight.detach()

    def rows(self, streams: Sequence[PackedStream]) -> Iterator[Tensor]:
        """Yield, for one micro-batch after the other, the teacher's hidden states that predict the response tokens.

        Without a pipeline each is computed when it is asked for. Stages work on many micro-batches at a time, so
        with a pipeline all are computed here, and the last stage keeps them; the other stages yield nothing.
        """
        if self._groups.pp_size == 1:
            return (row for stream in streams for row in self._compute([stream]))
        return iter(self._compute(streams))

    def _compute(self, streams: Sequence[PackedStream]) -> list[Tensor]:
        was_training = self._model.training
        self._model.eval()
        base: AbstractContextManager = adapters_disabled(self._model) if self._without_adapters else nullcontext()
        with base:
            rows = rows_without_gradients(self._model, streams, self._groups)
        self._model.train(was_training)
        return rows


def build_teacher(config: Config, groups: Groups, student: GPTChunks, teacher_hf: HFModel) -> Teacher:
    """Choose the teacher of this run; load a second model only where none of the student's can serve.

    `--mode opd`: the teacher's checkpoint. `--mode opsd`: `current` is the student itself; `initial` is its base
    without adapters under LoRA, and a frozen copy of its first weights in full fine-tuning.
    """
    if config.method.mode == "opsd":
        if config.method.opsd_teacher == "current":
            return Teacher(student, groups)
        if config.lora.lora_rank > 0:
            return Teacher(student, groups, without_adapters=True)
    model = build_gpt(teacher_hf, config.model, groups, sequence_parallel=config.parallel.sequence_parallel)
    hf_weights.load(model, groups)
    return Teacher(model.requires_grad_(False), groups)
