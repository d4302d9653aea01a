"""The model that learns: forward, loss, backward, step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_trd.config.schema import Config
from megatron_trd.data.packing import MicroBatch
from megatron_trd.mcore import hf_weights
from megatron_trd.mcore.gpt import build_gpt, forward_stream
from megatron_trd.mcore.groups import Groups
from megatron_trd.mcore.hf_config import HFModel
from megatron_trd.mcore.optimizer import build_optimizer
from megatron_trd.mcore.response import pad_rows, response_rows
from megatron_trd.mcore.teacher import Teacher
from megatron_trd.objectives.diagnostics import Sums, diagnostic_sums
from megatron_trd.objectives.loss import distillation_loss
from trd_kernels import linear_kl_div


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one optimizer step reports."""

    sums: list[Sums]
    """Diagnostics of this data-parallel rank's micro-batches."""
    grad_norm: float
    """Global gradient norm before clipping; identical on all ranks."""
    lr: float
    """Learning rate this step used."""


class Student:
    """Owns the trained model, its gradient buffers, optimizer and schedule."""

    def __init__(
        self,
        config: Config,
        groups: Groups,
        hf: HFModel,
        *,
        total_steps: int,
        vocab_size: int,
        epistemic_ids: Sequence[int],
    ) -> None:
        """Build the model on its Hugging Face weights. Collective over all ranks.

        Args:
            total_steps: optimizer steps of the whole run, for the schedule.
            vocab_size: tokens that student and teacher both have; columns beyond it are padding.
            epistemic_ids: token ids of the epistemic mass.
        """
        self.config, self.groups = config, groups
        self._vocab_size = vocab_size
        self._sequence_parallel = config.parallel.sequence_parallel
        self._epistemic_ids = torch.tensor(sorted(epistemic_ids), dtype=torch.int64, device=groups.device)
        parallel = config.parallel
        lora = config.lora if config.lora.lora_rank > 0 else None
        self.gpt = build_gpt(hf, config.model, groups, sequence_parallel=parallel.sequence_parallel, lora=lora)
        hf_weights.load(self.gpt, groups)
        self.ddp = DistributedDataParallel(
            config=self.gpt.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                overlap_param_gather=parallel.overlap_param_gather,
                use_distributed_optimizer=parallel.use_distributed_optimizer,
                check_for_nan_in_grad=True,
            ),
            module=self.gpt,
        )
        self.optimizer, self.scheduler = build_optimizer(self.ddp, config.optimizer, parallel, total_steps)
        self.scheduler.step(1)  # step t of 1..total uses the schedule's value at t, so the first one learns too
        self._connect_to_schedule()

    def _connect_to_schedule(self) -> None:
        model_config = self.gpt.config
        model_config.grad_scale_func = self.optimizer.scale_loss
        # The tokens' weights carry the normaliser, so gradients are plain sums: no division by a token count.
        model_config.finalize_model_grads_func = lambda model, num_tokens=None, **kwargs: finalize_model_grads(
            model, None, **kwargs
        )
        if self.config.parallel.overlap_grad_reduce:
            model_config.no_sync_func = self.ddp.no_sync
        if self.config.parallel.overlap_param_gather:
            model_config.param_sync_func = self.ddp.start_param_sync

    def train_step(self, micro_batches: Sequence[MicroBatch], teacher: Teacher) -> StepResult:
        """Accumulate the gradients of one step's micro-batches and update. Collective over all ranks."""
        sums = self.accumulate_gradients(micro_batches, teacher)
        lr = self.optimizer.param_groups[0]["lr"]
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        return StepResult(sums=sums, grad_norm=float(grad_norm), lr=lr)

    def accumulate_gradients(self, micro_batches: Sequence[MicroBatch], teacher: Teacher) -> list[Sums]:
        """Fill every trainable parameter's `main_grad` with the gradient of the step's loss, summed over all ranks."""
        self.ddp.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(micro_batches, teacher, forward_only=False)

    def audit(self, micro_batches: Sequence[MicroBatch], teacher: Teacher) -> list[Sums]:
        """Measure the same sums without training. Collective over all ranks."""
        self.ddp.eval()
        with torch.no_grad():
            return self._run(micro_batches, teacher, forward_only=True)

    @torch.no_grad()
    def response_logprobs(self, batch: MicroBatch, temperature: float) -> Tensor:
        """Return the student's log-probability of every response token: [R] fp32, on every rank."""
        self.ddp.eval()
        batch = batch.to(self.groups.device)
        hidden = forward_stream(self.ddp, batch.student) / temperature  # the head is linear
        rows = self._response_rows(hidden, batch)
        weight = self.gpt.output_weight.detach()
        output = linear_kl_div(
            rows,
            weight,
            rows,
            weight,
            vocab_size=self._vocab_size,
            token_weight=self._padded(batch.token_weight),
            labels=self._padded(batch.response_ids),
            stats=("student_logprob",),
            tp_group=self.groups.tp,
            sequence_parallel=self._sequence_parallel,
        )
        return output.stats["student_logprob"][: batch.response_ids.numel()]

    def _run(self, micro_batches: Sequence[MicroBatch], teacher: Teacher, *, forward_only: bool) -> list[Sums]:
        def forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
            batch = next(batches).to(self.groups.device)
            teacher_rows = teacher.rows(batch.teacher)
            hidden = forward_stream(model, batch.student)
            return hidden, lambda hidden: self._loss(hidden, teacher_rows, teacher.output_weight, batch)

        reports: list[dict[str, Sums]] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=self.ddp,
            num_microbatches=len(micro_batches),
            seq_length=1,  # only pipelines ask for these two
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return [report["sums"] for report in reports]

    def _loss(
        self, hidden: Tensor, teacher_rows: Tensor, teacher_weight: Tensor, batch: MicroBatch
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        weight = self._padded(batch.token_weight)
        output = distillation_loss(
            self.config.objective,
            student_rows=self._response_rows(hidden, batch),
            student_weight=self.gpt.output_weight,
            teacher_rows=teacher_rows,
            teacher_weight=teacher_weight,
            vocab_size=self._vocab_size,
            token_weight_R=weight,
            response_ids_R=self._padded(batch.response_ids),
            epistemic_ids=self._epistemic_ids,
            tp_group=self.groups.tp,
            sequence_parallel=self._sequence_parallel,
        )
        sums = diagnostic_sums(output, weight, self._padded(batch.y_o_correct), self.config.objective.token_clip)
        num_tokens = torch.ones((), dtype=torch.int, device=hidden.device)
        return output.loss, num_tokens, {"sums": sums}

    def _response_rows(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        positions = batch.student.response_positions
        return response_rows(hidden, positions, self.groups, sequence_parallel=self._sequence_parallel)

    def _padded(self, values: Tensor) -> Tensor:
        """Pad [R] to the length that `response_rows` deals out."""
        return pad_rows(values, self.groups.tp_size) if self._sequence_parallel else values

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the student's weights under Hugging Face names, adapters merged. Every rank must exhaust it."""
        self.wait_for_parameters()
        return hf_weights.export(self.gpt, self.groups)

    def export_adapter(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the adapter under PEFT names. Every rank must exhaust it."""
        self.wait_for_parameters()
        return hf_weights.export_adapter(self.gpt, self.groups)

    def wait_for_parameters(self) -> None:
        """Make this rank's parameters those of the last step. Collective over the data-parallel group."""
        if self.config.parallel.overlap_param_gather:  # otherwise the gather would wait for the next forward pass
            self.ddp.disable_forward_pre_hook(param_sync=True)
            self.ddp.enable_forward_pre_hook()
