"""The three teachers: a second model, the student's frozen base, the student as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor

from megatron_trd.config.schema import Config
from megatron_trd.data.packing import PackedStream
from megatron_trd.mcore.gpt import GPTChunks, build_gpt
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.hf_config import HFModel
from megatron_trd.mcore.initial_weights import load_initial_weights
from megatron_trd.mcore.lora import adapters_disabled
from megatron_trd.mcore.offload import BoundedRows, OffloadedWeights
from megatron_trd.mcore.schedule import rows_without_gradients


class Teacher:
    """Gives hidden states along the teacher's stream, without gradients."""

    def __init__(
        self,
        model: GPTChunks,
        groups: Groups,
        *,
        max_hidden_bytes: int,
        without_adapters: bool = False,
        offload: bool = False,
    ) -> None:
        """Teach with a model.

        Args:
            max_hidden_bytes: of the hidden states of a whole step, so many stay on the device.
            without_adapters: the model is the student's; teach with its base.
            offload: keep the weights in host memory between forwards, but for the output layer, which the loss needs.
        """
        self._model, self._groups = model, groups
        self._max_hidden_bytes, self._without_adapters = max_hidden_bytes, without_adapters
        self._offloaded: OffloadedWeights | None = None
        if offload:
            head = id(model.output_weight) if groups.is_last_stage else None
            self._offloaded = OffloadedWeights((p for p in model.parameters() if id(p) != head), groups.device)

    @property
    def output_weight(self) -> Tensor:
        """This rank's rows of the teacher's output layer: [padded vocabulary / tp, teacher hidden]. Last stage only."""
        return self._model.output_weight.detach()

    def rows(self, streams: Sequence[PackedStream]) -> Iterator[Tensor]:
        """Yield, for one micro-batch after the other, the teacher's hidden states that predict the response tokens.

        Each is computed when it is asked for. But stages of a pipeline work on many micro-batches at a time, and
        offloaded weights should travel once: then all are computed here, and the last stage keeps them; the other
        stages yield nothing.
        """
        if self._groups.pp_size == 1 and self._offloaded is None:
            return (row for stream in streams for row in self._compute([stream], lambda rows: rows))
        bounded = BoundedRows(self._max_hidden_bytes, self._groups.device)
        return bounded.hand_out(self._compute(streams, bounded.keep))

    def _compute(self, streams: Sequence[PackedStream], keep: Callable[[Tensor], Tensor]) -> list[Tensor]:
        was_training = self._model.training
        self._model.eval()
        with (
            adapters_disabled(self._model) if self._without_adapters else nullcontext(),
            self._offloaded.on_device() if self._offloaded else nullcontext(),
        ):
            rows = rows_without_gradients(self._model, streams, self._groups, keep)
        self._model.train(was_training)
        return rows


def build_teacher(
    config: Config, groups: Groups, student: GPTChunks, teacher_hf: HFModel, *, random_weights: bool = False
) -> Teacher:
    """Choose the teacher of this run; load a second model only where none of the student's can serve.

    `--mode opd`: the teacher's checkpoint. `--mode opsd`: `current` is the student itself; `initial` is its base
    without adapters under LoRA, and a frozen copy of its first weights in full fine-tuning.

    Args:
        random_weights: read no weights for a second model, which then has others than the student; for measurements.
    """
    max_hidden_bytes = config.model.teacher_hidden_mb * 2**20
    if config.method.mode == "opsd":
        if config.method.opsd_teacher == "current":
            return Teacher(student, groups, max_hidden_bytes=max_hidden_bytes)
        if config.lora.lora_rank > 0:
            return Teacher(student, groups, max_hidden_bytes=max_hidden_bytes, without_adapters=True)
    # A target that is not rounded, of a model that is never trained.
    model_config = replace(config.model, fp8_format=None, recompute_granularity="none", cpu_offloading_num_layers=0)
    model = build_gpt(teacher_hf, model_config, groups, sequence_parallel=config.parallel.sequence_parallel)
    if config.method.mode == "opd":
        start, flag = config.model.teacher_megatron_checkpoint, "teacher-megatron-checkpoint"
    else:
        start, flag = config.model.megatron_checkpoint, "megatron-checkpoint"
    if not random_weights:
        load_initial_weights(model, groups, start, flag)
    return Teacher(
        model.requires_grad_(False), groups, max_hidden_bytes=max_hidden_bytes, offload=config.model.offload_teacher
    )
